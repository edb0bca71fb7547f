"""Strategies beside each other, and plans priced again."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from planner import html
from planner.api.machine import Machine, machine_of
from planner.api.options import Options, Origin, options_of
from planner.api.pipelines import price_pipeline, stage_costs
from planner.api.planning import Planner, prepare
from planner.cost.model import LayerCost
from planner.cost.pipeline import PipelineTimeline
from planner.cost.simulate import Timeline, simulate
from planner.cost.table import CostTable
from planner.devices.graph import Cluster
from planner.errors import InfeasibleError, NoPlanError, UnknownNameError, UsageError
from planner.frontend.source import load_model
from planner.frontend.trace import NO_KEYWORDS, empty_inputs
from planner.ir.dimension import Dimension
from planner.ir.mesh import Mesh
from planner.ir.split import LayerId, Split
from planner.plan.check import refuse_other_model
from planner.plan.schema import Plan, StageCostPart
from planner.profile.key import LocalLayer
from planner.report import tables
from planner.search.auto import SEARCHING, Planned, Search
from planner.search.recompute import with_tiles


@dataclass(frozen=True, slots=True)
class Comparison:
    """Strategies on one problem: the fixed ones, those of other solvers, then the planned one.

    Attributes:
        rows: fixed strategies, other solvers' that were asked for, then the planned one (solver ``auto`` or the one
            asked for).
        fits: for each row whether it obeys the memory limit.
        searches: that each comes from.
        notes: for each row why it could not have been planned; empty where it could.
        missing: other solvers that found nothing, and why.
    """

    planner: Planner
    rows: tuple[Planned, ...]
    fits: tuple[bool, ...]
    searches: tuple[Search, ...]
    notes: tuple[str, ...]
    missing: tuple[tuple[str, str], ...] = ()

    @property
    def planned(self) -> Planned:
        """The planned strategy."""
        return self.rows[-1]

    def _repr_html_(self) -> str:
        """Return what a notebook shows: the strategies beside each other, and the bound."""
        graph, planned = self.planner.traced.layers, self.planned
        rows = tables.rows_of_search(self.rows, self.fits, graph.batch, self.notes)
        shown = tables.strategies(rows)
        said = (
            tables.bound_sentence(planned.timeline.step_s, planned.lower_bound_s),
            *tables.standing_sentences(rows, planned.lower_bound_s),
            *tables.change_sentences(self.planner.traced.changes),
        )
        return html.titled(
            f"{graph.name}, batch {graph.batch}, on {self.planner.machine.graph.name}: {shown.title.lower()}",
            html.table(shown.columns, shown.rows, num_text=shown.num_text, emphasis=shown.emphasis),
            *map(html.sentence, said),
        )

    def plans(self) -> tuple[Plan, ...]:
        """Return every row as a plan."""
        pairs = zip(self.searches, self.rows, strict=True)
        return tuple(self.planner.plan_of(search, row) for search, row in pairs)

    @property
    def planned_lost(self) -> bool:
        """Whether a strategy that fits, and that could have been planned, has a shorter predicted step."""
        return any(
            ok and not note and row.timeline.step_s < self.planned.timeline.step_s * (1 - 1e-9)
            for row, ok, note in zip(self.rows[:-1], self.fits[:-1], self.notes[:-1], strict=True)
        )


def compare(
    model: nn.Module,
    example_inputs: Sequence[torch.Tensor],
    *,
    cluster: str | Path | Cluster | None = None,
    devices: int | None = None,
    machine: Machine | None = None,
    origin: Origin | None = None,
    example_keywords: Mapping[str, torch.Tensor] = NO_KEYWORDS,
    profile: str | Path | None = None,
    solvers: Sequence[str] = (),
    **options: Any,
) -> Comparison:
    """Compare the fixed strategies with the planned one, by prediction.

    Args:
        model: and all others: as of ``plan_model``.
        example_inputs: tensors with the global batch as their first size.
        cluster: a name, a path, or a graph.
        devices: that many equal accelerators; exactly one of cluster, devices and machine.
        machine: a graph with a profile of its devices.
        origin: for the plans' provenance.
        example_keywords: inputs that ``forward`` takes by keyword, by name.
        profile: path of a device profile.
        solvers: names of other solvers whose strategies are shown too, such as ``dp`` and ``hypar``.
        options: the fields of ``Options``.

    Returns:
        A row for each fixed strategy that the machine allows, for each other solver, then the planned one, with seconds
        and bytes of each.

    Raises:
        LayerwiseError: see ``planner.errors`` for the cases.
    """
    asked = options_of(**options)
    found = machine or machine_of(cluster, devices, asked.precision, profile)
    name = origin or Origin(type(model).__name__)
    if isinstance(solvers, str):
        raise UsageError(f"solvers is {solvers!r}, which is one text: give a list of names")
    planner = prepare(model, example_inputs, found, asked, name, example_keywords)
    return compare_with(planner, solvers)


def compare_with(planner: Planner, solvers: Sequence[str] = ()) -> Comparison:
    """Compare the strategies of a prepared planner.

    Args:
        planner: of the model on its machine.
        solvers: names of ``planner.search.auto.SEARCHING`` whose strategies are shown too, but for the one that plans.

    Raises:
        UnknownNameError: no such solver.
        LayerwiseError: there is no plan.
    """
    refuse_unknown_solvers(solvers)
    beside = planner.baselines()
    search, planned = planner.best()
    wanted = [name for name in dict.fromkeys(solvers) if name != planner.options.solver]
    others, missing = _others(planner, wanted)
    return Comparison(
        planner,
        (*(baseline.planned for baseline in beside), *(found for _, found in others), planned),
        (*(baseline.search.fits(baseline.planned) for baseline in beside), *(True for _ in others), True),
        (*(baseline.search for baseline in beside), *(own for own, _ in others), search),
        (*(baseline.note for baseline in beside), *("" for _ in others), ""),
        missing,
    )


def refuse_unknown_solvers(names: Sequence[str]) -> None:
    """Check that these are solvers that search.

    Raises:
        UnknownNameError: one is not.
    """
    for name in names:
        if name not in SEARCHING:
            raise UnknownNameError("solver", name, SEARCHING)


def _others(
    planner: Planner, solvers: Sequence[str]
) -> tuple[list[tuple[Search, Planned]], tuple[tuple[str, str], ...]]:
    """Return what other solvers find, and which find nothing, with the reason."""
    found, missing = [], []
    for name in solvers:
        try:
            found.append(planner.with_solver(name).best())
        except (InfeasibleError, NoPlanError, UsageError) as error:  # such as an exhaustive search that is hopeless
            missing.append((name, str(error)))
    return found, tuple(missing)


@dataclass(frozen=True, slots=True)
class Priced:
    """A plan on a machine.

    Attributes:
        table: all costs of its model on its mesh.
        choice: position of every layer's split in the table's space.
        timeline: the predicted step.
    """

    table: CostTable
    choice: tuple[int, ...]
    timeline: Timeline

    @property
    def costs(self) -> tuple[LayerCost, ...]:
        """What every layer costs."""
        return tuple(costs[c] for costs, c in zip(self.table.layers, self.choice, strict=True))


@dataclass(frozen=True, slots=True)
class PricedStages:
    """A pipelined plan on a machine.

    Attributes:
        timeline: the predicted step; of schedules in cycles, a cycle.
        stages: what every stage costs.
    """

    timeline: PipelineTimeline
    stages: tuple[StageCostPart, ...]


def reprice(plan: Plan, machine: Machine) -> Timeline | PipelineTimeline:
    """Return the predicted step of a plan on another machine with as many devices; see ``price_plan``."""
    return (price_stages if plan.is_pipelined else price_plan)(plan, machine).timeline


def price_stages(plan: Plan, machine: Machine) -> PricedStages:
    """Return what the stages of a pipelined plan cost on a machine; raises as ``price_plan``."""
    found = price_pipeline(plan, planner_of(plan, machine))
    return PricedStages(found.timeline, stage_costs(found))


def price_plan(plan: Plan, machine: Machine) -> Priced:
    """Return what a plan costs on a machine, layer by layer.

    The model is built from the source that the plan names (code of the user's, if it is no shipped one).

    Raises:
        UsageError: the machine has another number of devices, or the source cannot be loaded.
        MismatchError: the source gives another model than the plan's.
    """
    if len(machine.graph.devices) < plan.mesh.size:
        raise UsageError(
            f"the plan needs {plan.mesh.size} devices, {machine.graph.name} has {len(machine.graph.devices)}"
        )
    return price_with(planner_of(plan, machine), plan)


def price_with(planner: Planner, plan: Plan) -> Priced:
    """Return what a plan costs in the space of a planner of the same model; raises as ``price_plan``.

    Shares of the plan that are not among the few that a search tries, such as those of branches, join that space.
    """
    mesh = _mesh_on(plan, planner.machine.graph)
    strategy = {layer: _on_axes(mesh, split) for layer, split in plan.strategy.items()}
    table = table_with(planner, mesh, strategy)
    try:
        choice = table.choice(strategy)
    except ValueError as error:
        raise UsageError(f"the plan cannot be priced here: {error}") from error
    if recomputing := plan.only_stage.recomputing():
        table, choice = with_tiles(table, choice, recomputing)
    return Priced(table, choice, simulate(table, choice, plan.bucket_bytes))


def table_with(planner: Planner, mesh: Mesh, strategy: Mapping[LayerId, Split]) -> CostTable:
    """Return the costs on a mesh, of the shares in a strategy too that a search does not try by itself."""
    space = planner.space(mesh)
    more = {layer: split for layer, split in strategy.items() if split.shares and split not in space.splits[layer]}
    splits = {layer: (*known, more[layer]) if layer in more else known for layer, known in space.splits.items()}
    return CostTable.of(replace(space, splits=splits), planner.cost_model(mesh))


def _on_axes(mesh: Mesh, split: Split) -> Split:
    """Return a split with the names of a mesh's axes."""
    names = [axis.name for axis in mesh.axes]
    shares = ((name, own) for name, own in zip(names, split.weights, strict=False) if own is not None)
    return Split.of(mesh, split.dimensions).with_shares(dict(shares))


def _mesh_on(plan: Plan, graph: Cluster) -> Mesh:
    """Return a plan's mesh on a machine, with the names that the machine gives to axes of these sizes.

    Its ranks are the devices that the plan names, where the machine has them; else the first ones.

    Raises:
        UsageError: the machine has no such axes.
    """
    mesh = plan.mesh
    positions = {device.id: rank for rank, device in enumerate(graph.devices)}
    if plan.stages[0].devices and plan.cluster.sha256 == graph.digest:
        return Mesh(mesh.axes, tuple(positions[device] for device in plan.stages[0].devices))
    if (shape := graph.shape_of(mesh.axes)) is not None:
        return graph.mesh_of(*shape)
    for found in graph.meshes():
        if found.shape == mesh.shape:
            return found
    raise UsageError(
        f"the plan's mesh of {' x '.join(map(str, mesh.shape))} ranks cannot be laid over {graph.name}, whose levels "
        "are " + " x ".join(f"{level.name}={level.size}" for level in graph.levels)
    )


def local_layers(plan: Plan) -> tuple[LocalLayer, ...]:
    """Return what one device computes of every layer of a plan, in the plan's order.

    Raises:
        UsageError: the source that the plan names cannot be loaded.
        MismatchError: the source gives another model than the plan's.
    """
    planner = planner_of(plan, machine_of(devices=plan.mesh.size, precision=plan.precision))
    model, graph = planner.cost_model(plan.mesh), planner.traced.layers
    return tuple(model.local(graph[layer], split) for layer, split in plan.enlarged(graph).items())


def planner_of(plan: Plan, machine: Machine, dimensions: Collection[Dimension] = frozenset(Dimension)) -> Planner:
    """Return a planner of the model that a plan names, for what the plan was made for; raises as ``price_plan``."""
    loaded = load_model(plan.model.source, dict(plan.model.arguments))
    inputs, keywords = empty_inputs(plan.model.inputs)
    options = Options(
        precision=plan.precision, optimizer=plan.optimizer, sync_batch_norm=plan.sync_batch_norm,
        io=None if plan.is_pipelined else plan.io,
        dimensions=frozenset(dimensions), parameter_sharding=plan.stages[0].parameter_sharding,
        halo_overlap="auto" if any(layer.overlap for stage in plan.stages for layer in stage.layers) else "never",
    )  # fmt: skip
    planner = prepare(loaded.module, inputs, machine, options, Origin(loaded.name), keywords)
    if not plan.is_pipelined:  # of several stages, the graph at micro-batch size is compared
        refuse_other_model(plan, planner.traced.layers)
    return planner
