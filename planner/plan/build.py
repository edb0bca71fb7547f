"""From a strategy with its costs to a plan."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata

from planner.cost.simulate import Timeline
from planner.cost.table import CostTable
from planner.ir.ops import describe
from planner.plan.schema import (
    AxisPart,
    BaselinePart,
    ClusterPart,
    ConstraintPart,
    CostPart,
    InputTensor,
    LayerPart,
    MeshPart,
    ModelPart,
    Plan,
    ProvenancePart,
    SchedulePart,
    SearchPart,
    StagePart,
    TotalsPart,
)
from planner.profile.table import Source


@dataclass(frozen=True, slots=True)
class Found:
    """What a search found, as plain numbers.

    Attributes:
        solver, status, lower_bound_s, gap: of the search.
        choice: position of every layer's split in the table's space.
        bucket_bytes: of the gradient reductions.
        timeline: the simulated step.
        num_replaced: layers where a fixed strategy's dimension is illegal.
        note: why a fixed strategy could not have been planned.
    """

    solver: str
    status: str
    lower_bound_s: float
    gap: float
    choice: tuple[int, ...]
    bucket_bytes: int
    timeline: Timeline
    num_replaced: int
    note: str = ""


@dataclass(frozen=True, slots=True)
class Request:
    """What the plan was asked for, as far as the table does not know it; constraints as pairs of kind and text."""

    source: str
    arguments: Mapping[str, str | int | float | bool]
    inputs: Sequence[InputTensor]
    memory_limit_bytes: int
    command: str
    constraints: Sequence[tuple[str, str]] = ()


def build_plan(table: CostTable, found: Found, baselines: Sequence[Found], request: Request) -> Plan:
    """Return the plan of a strategy."""
    space, model = table.space, table.model
    graph, mesh, timeline = space.graph, space.mesh, found.timeline
    is_part = mesh.size < len(model.machine.devices)
    strategy = table.strategy(found.choice)
    costs = [layer[c] for layer, c in zip(table.layers, found.choice, strict=True)]
    layers = [
        LayerPart(
            id=layer.id, op=describe(layer.op), split=dict(strategy[layer.id].axes),
            overlap=t.overlaps_halo,
            cost=CostPart(
                compute_s=t.compute_s, transfer_s=t.transfer_s, halo_s=t.halo_s, sync_s=t.sync_s, exposed_s=t.exposed_s
            ),
            memory_bytes=cost.memory.resident,
        )
        for layer, t, cost in zip(graph.layers, timeline.layers, costs, strict=True)
    ]  # fmt: skip
    return Plan(
        model=ModelPart(
            name=graph.name, source=request.source, arguments=dict(request.arguments),
            graph_sha256=graph.digest, num_params=graph.num_params,
            inputs=list(request.inputs),
        ),
        batch=graph.batch,
        precision=model.settings.precision,  # type: ignore[arg-type]  # checked by pydantic
        optimizer=model.settings.optimizer.value,
        io=space.io.value,
        sync_batch_norm=model.settings.sync_batch_norm,
        bucket_bytes=found.bucket_bytes,
        cluster=ClusterPart(
            name=model.machine.name, sha256=model.machine.digest, num_devices=len(model.machine.devices)
        ),
        schedule=SchedulePart(),
        stages=[StagePart(
            mesh=MeshPart(
                axes=[AxisPart(name=a.name, size=a.size) for a in mesh.axes], ranks=list(range(mesh.size)),
            ),
            devices=[model.machine.devices[rank].id for rank in mesh.ranks] if is_part else [],
            parameter_sharding=model.settings.parameter_sharding.value,
            layers=layers,
        )],
        totals=TotalsPart(
            step_s=timeline.step_s, samples_per_s=graph.batch / timeline.step_s, compute_s=timeline.compute_s,
            exposed_s=timeline.exposed_s,
            measured_s=timeline.source_s[Source.MEASURED], fitted_s=timeline.source_s[Source.FITTED],
            data_sheet_s=timeline.source_s[Source.DATA_SHEET],
            communication_bytes=timeline.communication_bytes, memory_bytes=timeline.memory_bytes,
        ),
        baselines=[
            BaselinePart(
                name=b.solver, step_s=b.timeline.step_s, exposed_s=b.timeline.exposed_s,
                communication_bytes=b.timeline.communication_bytes,
                memory_bytes=b.timeline.memory_bytes, num_replaced=b.num_replaced, note=b.note,
            )
            for b in baselines
        ],
        search=SearchPart(
            solver=found.solver, status=found.status,  # type: ignore[arg-type]  # checked by pydantic
            lower_bound_s=found.lower_bound_s, gap=found.gap,
            num_strategies=f"{space.num_strategies:.3g}", memory_limit_bytes=request.memory_limit_bytes,
            constraints=[ConstraintPart.model_validate({"kind": k, "text": t}) for k, t in request.constraints],
        ),
        provenance=ProvenancePart(
            profile_sha256=model.profile.digest, versions=versions(), command=request.command,
            utc=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        ),
    )  # fmt: skip


def versions() -> dict[str, str]:
    """Return the versions that a prediction depends on."""
    found = {"python": platform.python_version()}
    for name in ("layerwise", "torch", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found
