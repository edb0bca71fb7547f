"""From a strategy with its costs to a plan."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from typing import Any, Final

from planner.cost.simulate import Timeline
from planner.cost.table import CostTable
from planner.ir.canonical import bounded
from planner.ir.ops import describe
from planner.plan.schema import (
    AxisPart,
    BaselinePart,
    BranchesPart,
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
    StageCostPart,
    StagePart,
    TotalsPart,
)
from planner.profile.table import Source

_PLAN: Final = "the plan of this model on this machine"


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
        branches: what was looked at of branches that run at the same time.
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
    branches: BranchesPart | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """What the plan was asked for, as far as the table does not know it; constraints as pairs of kind and text.

    ``changes`` says how a transform changed the model.
    """

    source: str
    arguments: Mapping[str, str | int | float | bool]
    inputs: Sequence[InputTensor]
    memory_limit_bytes: int
    command: str
    constraints: Sequence[tuple[str, str]] = ()
    changes: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class FoundStage:
    """A stage that was found.

    Attributes:
        table: of its layers.
        choice: position of every layer's split in the table's space.
        timeline: of a micro-batch, with the tail of the step.
        cost: of the stage.
        recompute: activations are computed again.
    """

    table: CostTable
    choice: tuple[int, ...]
    timeline: Timeline
    cost: StageCostPart
    recompute: bool


@dataclass(frozen=True, slots=True)
class PipelinedPlan:
    """A pipeline that was found, as plain numbers.

    Attributes:
        stages: first to last.
        kind, num_microbatches: of the schedule.
        bucket_bytes: of the gradient reductions.
        step_s: simulated.
        compute_s, source_s: of the busiest stage in a step, and where the seconds are from.
        sent_bytes: by the busiest rank.
        memory_bytes: of the fullest device.
        lower_bound_s: no pipeline of the searched ones is faster.
        num_strategies: ways to cut that there are.
        batch: of all micro-batches together.
        graph_sha256: digest of the layer graph at micro-batch size.
    """

    stages: Sequence[FoundStage]
    kind: str
    num_microbatches: int
    bucket_bytes: int
    step_s: float
    compute_s: float
    source_s: Mapping[Source, float]
    sent_bytes: float
    memory_bytes: int
    lower_bound_s: float
    num_strategies: str
    batch: int
    graph_sha256: str


@bounded(_PLAN)
def build_plan(table: CostTable, found: Found, baselines: Sequence[Found], request: Request) -> Plan:
    """Return the plan of a strategy.

    Raises:
        FormatError: a figure is beyond what plans hold: the machine is of a file, and slow or fast beyond all measure.
    """
    space, timeline = table.space, found.timeline
    return Plan(
        model=_model_part(table, request, space.graph.digest),
        batch=space.graph.batch,
        io=space.io.value,
        bucket_bytes=found.bucket_bytes,
        schedule=SchedulePart(),
        stages=[_stage_part(table, found.choice, timeline)],
        totals=TotalsPart(
            step_s=timeline.step_s, samples_per_s=space.graph.batch / timeline.step_s, compute_s=timeline.compute_s,
            exposed_s=timeline.exposed_s,
            measured_s=timeline.source_s[Source.MEASURED], fitted_s=timeline.source_s[Source.FITTED],
            data_sheet_s=timeline.source_s[Source.DATA_SHEET],
            communication_bytes=timeline.communication_bytes, memory_bytes=timeline.memory_bytes,
        ),
        search=SearchPart(
            solver=found.solver, status=found.status,  # type: ignore[arg-type]  # checked by pydantic
            lower_bound_s=found.lower_bound_s, gap=found.gap,
            num_strategies=f"{space.num_strategies:.3g}", memory_limit_bytes=request.memory_limit_bytes,
            constraints=_constraint_parts(request), branches=found.branches,
        ),
        **_common(table, baselines, request),
    )  # fmt: skip


@bounded(_PLAN)
def build_pipelined_plan(found: PipelinedPlan, baselines: Sequence[Found], request: Request) -> Plan:
    """Return the plan of a pipeline; raises as ``build_plan``."""
    table = found.stages[0].table
    stages = []
    for stage in found.stages:
        part = _stage_part(stage.table, stage.choice, stage.timeline, stage.table.space.mesh.ranks)
        stages.append(part.model_copy(update={"recompute": stage.recompute, "cost": stage.cost, "devices": []}))
    model = _model_part(table, request, found.graph_sha256)
    params = {p.name: p.spec.numel for s in found.stages for x in s.table.space.graph.layers for p in x.params
              if p.trainable}  # fmt: skip
    return Plan(
        model=model.model_copy(update={"num_params": sum(params.values())}),
        batch=found.batch,
        io="global",
        bucket_bytes=found.bucket_bytes,
        schedule=SchedulePart.model_validate({"kind": found.kind, "num_microbatches": found.num_microbatches}),
        stages=stages,
        totals=TotalsPart(
            step_s=found.step_s, samples_per_s=found.batch / found.step_s, compute_s=found.compute_s,
            exposed_s=max(found.step_s - found.compute_s, 0.0),
            measured_s=found.source_s[Source.MEASURED], fitted_s=found.source_s[Source.FITTED],
            data_sheet_s=found.source_s[Source.DATA_SHEET],
            communication_bytes=found.sent_bytes, memory_bytes=found.memory_bytes,
        ),
        search=SearchPart(
            solver="stages", status="feasible", lower_bound_s=found.lower_bound_s,
            gap=max(1 - found.lower_bound_s / found.step_s, 0.0), num_strategies=found.num_strategies,
            memory_limit_bytes=request.memory_limit_bytes, constraints=_constraint_parts(request),
        ),
        **_common(table, baselines, request),
    )  # fmt: skip


def _model_part(table: CostTable, request: Request, digest: str) -> ModelPart:
    graph = table.space.graph
    return ModelPart(
        name=graph.name, source=request.source, arguments=dict(request.arguments),
        graph_sha256=digest, num_params=graph.num_params, inputs=list(request.inputs),
        changes=list(request.changes),
    )  # fmt: skip


def _stage_part(
    table: CostTable, choice: tuple[int, ...], timeline: Timeline, ranks: Sequence[int] | None = None
) -> StagePart:
    """Return one stage; its ranks are 0, 1, … unless they are given."""
    space, model = table.space, table.model
    graph, mesh = space.graph, space.mesh
    is_part = mesh.size < len(model.machine.devices)
    strategy = table.strategy(choice)
    costs = [layer[c] for layer, c in zip(table.layers, choice, strict=True)]
    layers = [
        LayerPart(
            id=layer.id, op=describe(layer.op), split=dict(strategy[layer.id].axes),
            shares={axis: list(own) for axis, own in strategy[layer.id].shares},
            overlap=t.overlaps_halo, halo="recompute" if strategy[layer.id].tiles else "exchange",
            cost=CostPart(
                compute_s=t.compute_s, transfer_s=t.transfer_s, halo_s=t.halo_s, sync_s=t.sync_s, exposed_s=t.exposed_s
            ),
            memory_bytes=cost.memory.resident,
        )
        for layer, t, cost in zip(graph.layers, timeline.layers, costs, strict=True)
    ]  # fmt: skip
    return StagePart(
        mesh=MeshPart(
            axes=[AxisPart(name=a.name, size=a.size) for a in mesh.axes],
            ranks=list(ranks if ranks is not None else range(mesh.size)),
        ),
        devices=[model.machine.devices[rank].id for rank in mesh.ranks] if is_part else [],
        parameter_sharding=model.settings.parameter_sharding.value,
        layers=layers,
    )  # fmt: skip


def _constraint_parts(request: Request) -> list[ConstraintPart]:
    return [ConstraintPart.model_validate({"kind": k, "text": t}) for k, t in request.constraints]


def _common(table: CostTable, baselines: Sequence[Found], request: Request) -> dict[str, Any]:
    """Return what plans of one stage and of several have in common."""
    model = table.model
    return {
        "precision": model.settings.precision,
        "optimizer": model.settings.optimizer.value,
        "sync_batch_norm": model.settings.sync_batch_norm,
        "cluster": ClusterPart(
            name=model.machine.name, sha256=model.machine.digest, num_devices=len(model.machine.devices)
        ),
        "baselines": [
            BaselinePart(
                name=b.solver, step_s=b.timeline.step_s, exposed_s=b.timeline.exposed_s,
                communication_bytes=b.timeline.communication_bytes,
                memory_bytes=b.timeline.memory_bytes, num_replaced=b.num_replaced, note=b.note,
            )
            for b in baselines
        ],
        "provenance": ProvenancePart(
            profile_sha256=model.profile.digest, versions=versions(), command=request.command,
            utc=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        ),
    }  # fmt: skip


def versions() -> dict[str, str]:
    """Return the versions that a prediction depends on."""
    found = {"python": platform.python_version()}
    for name in ("layerwise", "torch", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found
