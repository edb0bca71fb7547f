"""The whole way in a few functions: trace, price, search, plan."""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import nn

from planner.cost.halo import HaloOverlap
from planner.cost.memory import Optimizer
from planner.cost.model import CostModel, Settings
from planner.cost.sharding import ParameterSharding
from planner.cost.shares import Proportions
from planner.cost.table import CostTable, collector_paused, layer_pieces, least_compute_s
from planner.deadline import OutOfTimeError, deadline
from planner.devices.graph import Cluster
from planner.errors import InfeasibleError, LayerwiseError, UnknownNameError, UsageError
from planner.frontend.lower import TracedModel, trace_layers
from planner.frontend.trace import NO_KEYWORDS
from planner.ir.dimension import SPATIAL_DIMENSIONS, Dimension
from planner.ir.graph import LayerGraph
from planner.ir.mesh import Mesh
from planner.ir.ops import BatchNorm
from planner.ir.rules import InputOutput, default_io
from planner.ir.schedule import CYCLIC, ScheduleKind
from planner.ir.tensor import DType
from planner.plan.build import Found, Request, build_pipelined_plan, build_plan
from planner.plan.check import MAX_ELEMENTS
from planner.plan.schema import BranchesPart, InputTensor, Plan
from planner.profile.key import PieceKey
from planner.profile.table import Measurement
from planner.search.auto import SOLVERS, Branches, Planned, Search, Start
from planner.search.fixed import ALIASES, FIXED
from planner.search.problem import Limits, Status
from planner.search.recompute import HaloRecompute
from planner.space.constraints import texts
from planner.space.enumerate import DEFAULT_DIMENSIONS, SearchSpace, enumerate_splits, equal_pieces

if TYPE_CHECKING:
    from runtime.namespaces import Hosts

from planner.api.baselines import Baseline, baselines
from planner.api.branches import best_with_branches, branch_floor
from planner.api.machine import Machine, machine_of, time_layers
from planner.api.meshes import Counts, fewer_meshes, whole_meshes
from planner.api.options import Options, Origin, options_of, refuse_useless
from planner.api.pipelines import Pieces, Pipeline, best_pipeline, pipelined, refuse_uneven
from planner.api.tour import EQUAL, Tour, fastest

_log = logging.getLogger(__name__)

PIPELINED = tuple(kind.value for kind in ScheduleKind if kind is not ScheduleKind.SINGLE)
"""Names of ``--schedule``."""
CYCLIC_NAMES = frozenset(kind.value for kind in CYCLIC)
ONE_STAGE = "one stage"
"""The best plan without a pipeline, among the baselines of one with."""

ALONE = 0.5
"""Of the time limit: what the search for a plan of one stage may take, where pipelines are tried too."""
BESIDE = 0.05
"""Of the time limit: what the fixed strategies beside a plan may take, where the search has not priced them; or"""
LEAST_BESIDE_S = 0.4
MEASURE_TARGET_S = 1.0
"""Of one repeat of a layer in ``measure_layers``; above, fewer samples are timed."""
LAYERS_A_LINE = 10
"""Timed layers for each line of the log."""


def _not_there(batch: int) -> TracedModel:
    raise UsageError(f"this planner has a traced model only, and cannot trace it for a micro-batch of {batch} samples")


@dataclass(frozen=True)
class Planner:
    """A traced model on a machine, ready to be searched and compared.

    Attributes:
        traced: the model.
        machine: the machine.
        options: what was asked.
        origin: for the plan's provenance.
        retraced: returns the model for another batch.
    """

    traced: TracedModel
    machine: Machine
    options: Options
    origin: Origin
    retraced: Callable[[int], TracedModel] = field(default=_not_there, compare=False)
    _searches: dict[Mesh, Search] = field(init=False, default_factory=dict, compare=False)
    _found: list[tuple[Search, Planned]] = field(init=False, default_factory=list, compare=False)
    _models: dict[Mesh, CostModel] = field(init=False, default_factory=dict, compare=False)
    _baselines: list[tuple[Baseline, ...]] = field(init=False, default_factory=list, compare=False)

    def on(self, machine: Machine, batch: int) -> "Planner":
        """Return the planner of the same request for another machine, and for so many samples a step.

        Raises:
            UsageError: a constraint or the mesh names what the machine has not.
        """
        traced = self.traced if batch == self.traced.layers.batch else self.retraced(batch)
        found = replace(self, traced=traced, machine=machine)
        found.refuse_unknown_names()
        return found

    def with_solver(self, name: str) -> "Planner":
        """Return the planner with another solver, none of the fixed ones; what was priced is not priced again."""
        found = replace(self, options=replace(self.options, solver=name))
        found._searches.update(self._searches)
        found._models.update(self._models)
        return found

    def refuse_unknown_names(self) -> None:
        """Check that constraints name layers and axes that there are.

        Raises:
            UsageError: one does not.
        """
        if self.options.constraints:
            levels = [level.name for level in self.machine.graph.levels]
            self.options.constraints.refuse_unknown(self.traced.layers, self.meshes(), levels)

    def meshes(self) -> list[Mesh]:
        """Return the candidate meshes over all devices: whole levels and their factorings; or the one asked for.

        Raises:
            UsageError: the one asked for is none of this machine, or not of all devices.
        """
        if self.options.mesh is not None:
            return [self._given_mesh(self.options.mesh)]
        return whole_meshes(self.machine.graph)

    def _given_mesh(self, text: str) -> Mesh:
        """Return ``--mesh``.

        Raises:
            UsageError: the machine has none such, or it leaves devices out where all are asked for.
        """
        mesh, count = self.machine.graph.parse_mesh(text), len(self.machine.graph.devices)
        if self.options.all_devices and mesh.size < count:
            raise UsageError(
                f"--mesh {text} uses {mesh.size} of {count} devices, but --all-devices asks for all: leave one of them "
                "out"
            )
        return mesh

    def fewer_meshes(self) -> list[tuple[Counts, Mesh]]:
        """Return the candidate meshes over fewer devices, and how many devices of each level they use."""
        if self.options.mesh is not None or self.options.all_devices:
            return []
        return list(fewer_meshes(self.machine.graph))

    def fixed_mesh(self, name: str) -> Mesh:
        """Return the mesh of a fixed strategy: whole levels, because on it they are what their users run.

        One that needs two axes cuts the only one of a machine by the smallest prime factor, if it can.
        """
        mesh = self.meshes()[0]
        if not FIXED[name].needs_two_axes or len(mesh.axes) != 1 or self.options.mesh is not None:
            return mesh
        size = mesh.size
        inner = next(n for n in range(2, size + 1) if size % n == 0)
        if inner == size:
            return mesh
        counts = [level.size for level in self.machine.graph.levels]
        return self.machine.graph.mesh_of([(count // inner, inner) if count == size else (1,) for count in counts])

    @property
    def dimensions(self) -> frozenset[Dimension]:
        """The dimensions that may be split: those asked for.

        By default all but space, which is added where there are fewer samples than devices: only there it is needed
        to use them all. A fixed strategy as the solver adds its own.
        """
        asked = frozenset(self.options.dimensions)
        if asked != DEFAULT_DIMENSIONS:
            return asked
        rule = FIXED.get(self.options.solver)
        if rule is not None:
            return asked | rule.dimensions
        scarce = self.traced.layers.batch < math.prod(level.size for level in self.machine.graph.levels)
        return asked | SPATIAL_DIMENSIONS if scarce else asked

    @property
    def sharding(self) -> ParameterSharding:
        """How parameters are held: as asked for, or as the fixed strategy that is the solver holds them."""
        rule = FIXED.get(self.options.solver)
        if rule is not None and rule.sharding is not None:
            return rule.sharding
        return ParameterSharding(self.options.parameter_sharding or ParameterSharding.NONE)

    def table(self, mesh: Mesh) -> CostTable:
        """Return the priced search space on a mesh."""
        return CostTable.of(self.space(mesh), self.cost_model(mesh))

    def space(self, mesh: Mesh) -> SearchSpace:
        """Return the legal splits on a mesh.

        Raises:
            InfeasibleError: the constraints leave a layer none.
        """
        constraints = self.options.constraints
        model = self.cost_model(mesh)
        shares = equal_pieces if self.options.shares == "equal" else Proportions(model).of_layer
        return enumerate_splits(
            self.traced.layers, mesh, self.io(mesh), self.dimensions, constraints, shares,
            own_statistics=not self.options.sync_batch_norm,
        )  # fmt: skip

    @property
    def share_factor(self) -> int:
        """By how much shares multiply the pairs of splits: nearly every split is tried with equal pieces and others."""
        different = {(device.kind, device.speed) for device in self.machine.graph.devices}
        return 4 if len(different) > 1 and self.options.shares == "auto" else 1

    def io(self, mesh: Mesh) -> InputOutput:
        """Return how ranks of a mesh pass the batch."""
        asked = self.options.io
        return InputOutput(asked) if asked else default_io(self.traced.layers.batch, mesh.size)

    def cost_model(self, mesh: Mesh) -> CostModel:
        """Return what prices layers and transfers on a mesh; made once."""
        if mesh not in self._models:
            machine = self.machine
            self._models[mesh] = CostModel.of(
                self.traced.layers, machine.graph, mesh, machine.profile, self.settings, machine.others
            )
        return self._models[mesh]

    @property
    def settings(self) -> Settings:
        """What a step's cost depends on beside network, split and machine."""
        options = self.options
        return Settings(
            options.precision, Optimizer(options.optimizer), options.sync_batch_norm, self.sharding,
            HaloOverlap(options.halo_overlap),
        )  # fmt: skip

    def layer_pieces(
        self,
        meshes: Sequence[Mesh] | None = None,
        memory_format: Literal["contiguous", "channels_last"] = "contiguous",
        microbatches: Sequence[int] = (),
    ) -> list[PieceKey]:
        """Return every piece of a layer that a search can ask for and that computes anything, each once.

        Args:
            meshes: that are searched; all candidates if left out, over all devices and over fewer.
            memory_format: of the pieces; the runtime computes contiguously, and plans are priced so.
            microbatches: numbers of them with which pipelines are searched too, on all numbers of devices of a stage.

        Raises:
            UsageError: a number of micro-batches does not divide the batch.
        """
        found: dict[PieceKey, None] = {}
        every = [*self.meshes(), *(mesh for _, mesh in self.fewer_meshes())]
        for mesh in every if meshes is None else meshes:
            found.update(dict.fromkeys(layer_pieces(self.space(mesh), self.cost_model(mesh), memory_format)))
        pieces = Pieces(self)
        for count in microbatches:
            refuse_uneven(count, self.traced.layers.batch)
            found.update(dict.fromkeys(replace(p, memory_format=memory_format) for p in pieces.kernels(count)))
        return list(found)

    def layer_keys(self) -> list[str]:
        """Return the profile keys of ``layer_pieces``."""
        return [piece.text for piece in self.layer_pieces()]

    def search(self, mesh: Mesh) -> Search:
        """Return the solvers on a mesh; made once."""
        if mesh not in self._searches:
            self._searches[mesh] = Search(self.table(mesh), self.limit_bytes, Limits(self.options.time_limit_s))
        return self._searches[mesh]

    @property
    def limit_bytes(self) -> int:
        """The memory limit per device: the one asked for, or the smallest device's."""
        if self.options.memory_limit_bytes is not None:
            return self.options.memory_limit_bytes
        return min(device.memory_bytes for device in self.machine.graph.devices)

    def best(self, time_limit_s: float | None = None) -> tuple[Search, Planned]:
        """Return the best plan over the candidate meshes, with the search it comes from.

        Its lower bound is that of all meshes that were searched. ``auto`` is no slower than any fixed strategy that the
        user allows: where one is faster, it goes on from there. Where the time limit ends the search, the best plan
        until then is returned.

        Args:
            time_limit_s: that of the options if left out.

        Raises:
            LayerwiseError: there is no plan on any mesh, or none yet when time was over.
        """
        with collector_paused():
            try:
                with deadline(self.options.time_limit_s if time_limit_s is None else time_limit_s):
                    return self._best()
            except OutOfTimeError:
                found = self.so_far()
                if found is None:
                    raise
                _log.warning("time limit: this is the best plan until then; a longer one may find better plans")
                return found

    def so_far(self) -> tuple[Search, Planned] | None:
        """Return the best plan that a search came by until it was ended, where there is one (`auto` only).

        Raises:
            InfeasibleError: all halos are to be recomputed, and that does not fit in memory.
        """
        found = list(self._found)
        if self.options.solver == "auto":
            finished = {id(search) for search, _ in found}
            for mesh, search in self._searches.items():
                planned = None if id(search) in finished else search.so_far()
                if planned is not None:
                    bound_s = max(planned.lower_bound_s, self.floor_s(mesh))
                    found.append((search, replace(planned, lower_bound_s=bound_s)))
        if not found:
            return None
        search, planned = fastest(found)
        planned = replace(planned, lower_bound_s=min(each.lower_bound_s for _, each in found))
        if HaloRecompute(self.options.halo_recompute) is HaloRecompute.ALWAYS:
            return self._recomputed(search, planned, [each for each, _ in found])
        return search, planned

    def _best(self) -> tuple[Search, Planned]:
        self._found.clear()
        found = list(Tour(self, self._found).go())
        search, planned = fastest(found)
        if self.options.solver == "auto" and (faster := self._fastest_fixed(planned.timeline.step_s)) is not None:
            search = self.search(faster.search.table.space.mesh)
            choice = search.table.choice(faster.strategy)
            planned = search.refine([Start(choice, faster.planned.timeline.step_s, faster.planned.bucket_bytes)])
            found.append((search, planned))
        if self.options.solver == "auto" and self.options.branches == "auto":
            (search, planned), found = best_with_branches((search, planned), found, self.limit_bytes)
        planned = replace(planned, lower_bound_s=min(each.lower_bound_s for _, each in found))
        is_proven = self.options.solver == "auto" and planned.gap <= EQUAL
        planned = replace(planned, status=Status.OPTIMAL) if is_proven else planned
        return self._recomputed(search, planned, [each for each, _ in found])

    def _recomputed(self, search: Search, planned: Planned, searched: Sequence[Search]) -> tuple[Search, Planned]:
        """Return a plan with halos recomputed where that is faster, or told: this one, or one that is cut in space.

        The bound of the search is that of plans that exchange; one that recomputes has that of computing alone.
        Where messages are slow the search leaves space alone, which recomputing could have made the fastest. So `auto`
        looks at the fixed strategies that cut space as well.
        """
        wish = HaloRecompute(self.options.halo_recompute)
        if wish is HaloRecompute.AUTO and self.options.solver in FIXED:
            return search, planned  # what it is, not what is fastest
        best = search.with_recomputing(planned, wish)
        own = best[1]
        if wish is HaloRecompute.AUTO and self.options.solver == "auto" and self.dimensions & SPATIAL_DIMENSIONS:
            for baseline in self.baselines():
                if not baseline.note and baseline.search.fits(baseline.planned):
                    other = baseline.search.with_recomputing(baseline.planned, wish)
                    if other[1].timeline.step_s < best[1].timeline.step_s * (1 - EQUAL):
                        best = other
        if best[1] is planned:
            return search, planned
        branches = planned.branches
        floors = (self.floor_s(x.table.space.mesh) if branches is None else branch_floor(x) for x in searched)
        floor_s = min(planned.lower_bound_s, *floors)
        if branches is not None and best[1] is not own:
            branches = replace(branches, taken=())  # a fixed strategy computes none at the same time
        return best[0], replace(
            best[1], solver=planned.solver, status=Status.FEASIBLE, lower_bound_s=floor_s, branches=branches
        )

    def _fastest_fixed(self, step_s: float) -> Baseline | None:
        """Return the fastest fixed strategy that could have been planned, if it is faster than this step."""
        allowed = [b for b in self.baselines() if not b.note and b.search.fits(b.planned)]
        best = min(allowed, key=lambda b: b.planned.timeline.step_s, default=None)
        return best if best is not None and best.planned.timeline.step_s < step_s * (1 - 1e-9) else None

    def floor_s(self, mesh: Mesh) -> float:
        """Return what no plan on a mesh can be faster than, in seconds."""
        return least_compute_s(self.space(mesh), self.cost_model(mesh))

    def baselines(self) -> tuple[Baseline, ...]:
        """Return every fixed strategy that the machine allows, whether or not it fits; made once."""
        if not self._baselines:
            self._baselines.append(baselines(self))
        return self._baselines[0]

    def plan(self) -> Plan:
        """Return the best plan with the fixed strategies beside it; a pipeline where that is asked for, or faster.

        Raises:
            LayerwiseError: there is no plan.
            InterruptedSearchError: Ctrl-C came first; has the best plan until then, if there is one.
        """
        try:
            return self._plan()
        except KeyboardInterrupt:
            found = self.so_far()
            if found is None:
                raise
            beside = self._baselines[0] if self._baselines else ()
            raise InterruptedSearchError(self._plan_beside(beside, *found)) from None

    def _plan(self) -> Plan:
        end_s = time.perf_counter() + self.options.time_limit_s
        if self.options.stages == 1:
            return self.plan_of(*self.best(), end_s=end_s)
        alone, _ = _tried(lambda: self.best(ALONE * self.options.time_limit_s))
        # the first pipeline is searched for beyond the limit only where there would be no plan without it
        is_extra = alone is not None and self.options.stages == "auto"
        with deadline(end_s - time.perf_counter() if is_extra else math.inf):
            pipeline, why_not = _tried(lambda: best_pipeline(self, end_s - time.perf_counter()))
        if pipeline is None and (alone is None or self.options.stages != "auto"):
            assert why_not is not None
            raise why_not
        if alone is not None and self.options.stages == "auto":
            alone_s = alone[1].timeline.step_s
            if pipeline is None or alone_s <= pipeline.timeline.step_s:
                return self.plan_of(*alone, end_s=end_s)
        assert pipeline is not None
        return self.plan_of_pipeline(pipeline, alone, end_s=end_s)

    def plan_of_pipeline(
        self, pipeline: Pipeline, alone: tuple[Search, Planned] | None = None, *, end_s: float = math.inf
    ) -> Plan:
        """Return a pipeline as a plan, with the best plan of one stage and the fixed strategies beside it.

        ``end_s`` as of ``plan_of``.
        """
        beside = [_found(baseline.planned, baseline.note) for baseline in self._beside(end_s)]
        if alone is not None:
            beside.append(replace(_found(alone[1]), solver=ONE_STAGE))
        return build_pipelined_plan(pipelined(pipeline), beside, self._request())

    def plan_of(self, search: Search, planned: Planned, *, end_s: float = math.inf) -> Plan:
        """Return a strategy as a plan, with the fixed strategies beside it.

        ``end_s``: where the time limit ends, by ``time.perf_counter``. The plan is without fixed strategies where they
        would take much longer.
        """
        return self._plan_beside(self._beside(end_s), search, planned)

    def _beside(self, end_s: float) -> Sequence[Baseline]:
        left_s = end_s + BESIDE * self.options.time_limit_s - time.perf_counter()
        try:
            with deadline(max(left_s, LEAST_BESIDE_S)):
                return self.baselines()
        except OutOfTimeError:
            _log.warning("time limit: the plan is held against no fixed strategy")
            return ()

    def _plan_beside(self, beside: Sequence[Baseline], search: Search, planned: Planned) -> Plan:
        others = [_found(baseline.planned, baseline.note) for baseline in beside]
        return build_plan(search.table, _found(planned), others, self._request())

    def _request(self) -> Request:
        """Return what the plan was asked for; its inputs are those of the whole batch."""
        inputs = [
            InputTensor(
                name=layer.id, shape=list(layer.output.shape), dtype=layer.output.dtype,
                keyword=layer.id in self.traced.keywords,
            )
            for layer in self.traced.layers.layers if layer.op.kind == "input"
        ]  # fmt: skip
        return Request(
            self.origin.source,
            self.origin.arguments,
            inputs,
            self.limit_bytes,
            self.origin.command,
            tuple(texts(self.options.constraints)),
            self.traced.changes,
        )


class InterruptedSearchError(KeyboardInterrupt):
    """Ctrl-C ended a search that had a plan.

    Attributes:
        plan: the best until then; it is held against those fixed strategies that were priced.
    """

    def __init__(self, plan: Plan) -> None:
        super().__init__("the search was interrupted")
        self.plan = plan


T = TypeVar("T")


def _tried(call: Callable[[], T]) -> tuple[T | None, LayerwiseError | None]:
    """Return what a call returns, or why there is no plan."""
    try:
        return call(), None
    except (InfeasibleError, OutOfTimeError) as error:
        return None, error


def _found(planned: Planned, note: str = "") -> Found:
    return Found(
        planned.solver, planned.status.value, planned.lower_bound_s, planned.gap, planned.choice,
        planned.bucket_bytes, planned.timeline, planned.num_replaced, note, _branches_part(planned.branches),
    )  # fmt: skip


def _branches_part(found: Branches | None) -> BranchesPart | None:
    if found is None:
        return None
    return BranchesPart(regions=found.num_regions, bound=found.bound, step_s=found.step_s, taken=list(found.taken))


def prepare(
    model: nn.Module,
    example_inputs: Sequence[torch.Tensor],
    machine: Machine,
    options: Options,
    origin: Origin,
    example_keywords: Mapping[str, torch.Tensor] = NO_KEYWORDS,
) -> Planner:
    """Trace a model for a machine; arguments as ``plan_model``.

    Raises:
        UsageError: an option is unknown.
        TraceError: the model cannot be traced.
    """
    refuse_useless(options)
    if options.solver not in SOLVERS:
        raise UnknownNameError("solver", options.solver, SOLVERS)
    _refuse_other_sharding(options)
    _refuse_no_model(model, example_inputs)
    inputs = [*example_inputs, *example_keywords.values()]
    if not inputs or not inputs[0].dim() or inputs[0].shape[0] < 1:
        raise UsageError("the batch must be at least 1 (the first size of every example input)")
    if any(x.shape[:1] != inputs[0].shape[:1] for x in inputs):
        shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
        raise UsageError(f"every input needs the batch as its first size, but the inputs have shapes {shapes}")
    _refuse_pipeline(options)
    options = replace(options, solver=ALIASES.get(options.solver, options.solver))
    start = time.perf_counter()
    _log.info("tracing %s", origin.name)
    traced = trace_layers(model, tuple(example_inputs), origin.name, keywords=example_keywords)
    _log.info("trace: %d layers, %.2f s", len(traced.layers.layers), time.perf_counter() - start)

    def retraced(batch: int) -> TracedModel:
        smaller = [x.new_empty((batch, *x.shape[1:]), device="meta") for x in example_inputs]
        named = {n: x.new_empty((batch, *x.shape[1:]), device="meta") for n, x in example_keywords.items()}
        return trace_layers(model, tuple(smaller), origin.name, keywords=named)

    _refuse_single_values(model, traced.layers)
    planner = Planner(traced, machine, options, origin, retraced)
    planner.refuse_unknown_names()
    return planner


def _refuse_single_values(model: nn.Module, graph: LayerGraph) -> None:
    """Check that every batch norm that is trained sees more than one value of each channel.

    Raises:
        UsageError: one does not; torch refuses to train it.
    """
    modules = dict(model.named_modules())
    for layer in graph.layers:
        for name, op in ((layer.id, layer.op), *((each.id, each.op) for each in layer.absorbed)):
            module = modules.get(name.partition("@")[0])
            trains = module is None or module.training
            if isinstance(op, BatchNorm) and trains and layer.output.numel <= op.channels:
                raise UsageError(
                    f"batch norm {name} gets one value of each channel from a batch of {graph.batch}, of which there "
                    "are no statistics: use a larger batch or larger inputs, or put that layer into eval mode"
                )


def _refuse_no_model(model: object, example_inputs: object) -> None:
    """Check that there is a model to trace, and what it is traced with.

    Raises:
        UsageError: there is not, but maybe its name, one tensor, or sizes.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"the model is {model!r}, which is no torch.nn.Module; planner.frontend.source.load_model makes one"
        )
    if not isinstance(example_inputs, Sequence) or not all(isinstance(x, torch.Tensor) for x in example_inputs):
        raise UsageError("example_inputs is a tuple of tensors, such as (torch.empty(256, 3, 224, 224),)")


def _refuse_other_sharding(options: Options) -> None:
    """Check that parameters may be held as the fixed strategy that is the solver holds them.

    Raises:
        UsageError: it is asked for another way.
    """
    rule, asked = FIXED.get(options.solver), options.parameter_sharding
    if rule is not None and rule.sharding is not None and asked not in {None, rule.sharding.value}:
        raise UsageError(
            f"--solver {options.solver} stands for --parameter-sharding {rule.sharding}, so that it cannot be {asked}: "
            "leave one of them out"
        )


def _refuse_pipeline(options: Options) -> None:
    """Check what is asked of a pipeline.

    Raises:
        UsageError: it is not possible, or of no meaning.
    """
    if options.schedule is not None and options.schedule not in PIPELINED:
        raise UnknownNameError("schedule", options.schedule, PIPELINED)
    if options.stages != "auto" and options.stages < 1:
        raise UsageError(f"--stages {options.stages}: give auto, or a number of at least 1")
    if options.stages == 1 and (options.schedule is not None or options.microbatches is not None):
        raise UsageError("--schedule and --microbatches are of a pipeline: add --stages auto, or a number")
    if options.parameter_sharding not in {None, ParameterSharding.NONE.value} and options.schedule in {
        *CYCLIC_NAMES, ScheduleKind.ZERO_BUBBLE.value,
    }:  # fmt: skip
        raise UsageError(
            f"--schedule {options.schedule} needs whole parameters on every rank: use gpipe, 1f1b or interleaved, or "
            "leave --parameter-sharding out"
        )
    if options.microbatches is not None and options.microbatches < 1:
        raise UsageError(f"--microbatches {options.microbatches}: give at least 1")
    if options.schedule in CYCLIC_NAMES and options.microbatches not in {None, 1}:
        raise UsageError(f"--schedule {options.schedule} works on whole batches: leave --microbatches out")
    if options.stages != 1:
        _refuse_of_one_stage(options)


def _refuse_of_one_stage(options: Options) -> None:
    """Check that nothing is asked of a pipeline that only plans of one stage have.

    Raises:
        UsageError: something is.
    """
    if options.mesh is not None:
        raise UsageError("--mesh is the mesh of a plan of one stage; --stages chooses the meshes of its stages")
    if options.solver != "auto":
        raise UsageError(f"--solver {options.solver} is for plans of one stage; --stages has a search of its own")
    if options.halo_recompute == "always":
        raise UsageError("--halo-recompute always is for plans of one stage; the stages of a pipeline exchange halos")
    if options.io not in {None, "global"}:
        raise UsageError("pipelined plans take the whole batch (--io global)")


def plan_model(
    model: nn.Module,
    example_inputs: Sequence[torch.Tensor],
    *,
    cluster: str | Path | Cluster | None = None,
    devices: int | None = None,
    machine: Machine | None = None,
    origin: Origin | None = None,
    example_keywords: Mapping[str, torch.Tensor] = NO_KEYWORDS,
    profile: str | Path | None = None,
    **options: Any,
) -> Plan:
    """Plan the fastest training step of a CNN on a machine.

    Args:
        model: any CNN; weights may be on the meta device.
        example_inputs: tensors with the global batch as their first size, such as (256, 3, 224, 224), on any device
            (meta is enough); their values do not matter.
        cluster: a name such as ``4xa100-nvlink``, a path, or a graph; ``local-N`` is this host.
        devices: that many equal accelerators; exactly one of cluster, devices and machine.
        machine: a graph with a profile of its devices.
        origin: for the plan's provenance.
        example_keywords: inputs that ``forward`` takes by keyword, by name.
        profile: path of a device profile, see ``machine_of``.
        options: the fields of ``Options``, such as ``memory_limit_bytes=16 * 2**30``; and ``pin``, ``forbid`` and
            ``tie``, texts or lists of them as on the command line.

    Returns:
        The plan with the shortest predicted step: all times in it are seconds, all sizes bytes.

    Raises:
        LayerwiseError: see ``planner.errors`` for the cases.
    """
    asked = options_of(**options)
    found = machine or machine_of(cluster, devices, asked.precision, profile)
    name = origin or Origin(type(model).__name__, f"{type(model).__module__}:{type(model).__qualname__}")
    return prepare(model, example_inputs, found, asked, name, example_keywords).plan()


def measure_layers(planner: "Planner", hosts: "Hosts | None" = None) -> "Planner":
    """Return the planner with measured times of every piece of a layer that its search can ask for.

    What its profile has is not measured again.
    As many processes as the machine has devices time the same layers at once on this host; pieces of many samples with
    fewer of them, see ``planner.measure.sizing``.
    """
    from planner.measure.sizing import Rates, sized

    machine, count = planner.machine, len(planner.machine.graph.devices)
    start = time.perf_counter()
    rates = Rates.of(torch.device("cpu"))
    keys = dict.fromkeys(sized(piece, rates, MEASURE_TARGET_S).text for piece in planner.layer_pieces())
    layers = dict(machine.profile.layers)
    keys = {key: None for key in keys if key not in layers}
    if not keys:
        return planner
    known, done = len(layers), 0

    def keep(key: str, found: Measurement | None) -> None:
        nonlocal done
        done += 1
        if found is not None:
            layers[key] = found
        if done % LAYERS_A_LINE == 0:
            _log.info("timed %d of %d layers", done, len(keys))

    time_layers(list(keys), keep, ranks_at_once=count, hosts=hosts)
    _log.info("profile: %d layers timed in %.1f s", len(layers) - known, time.perf_counter() - start)
    return replace(planner, machine=replace(machine, profile=replace(machine.profile, layers=layers)))


def example_inputs(
    shapes: Sequence[Sequence[int]], batch: int, dtype: DType = DType.FLOAT32
) -> tuple[torch.Tensor, ...]:
    """Return meta tensors of these shapes (without batch) for a global batch.

    Raises:
        UsageError: the batch is below 1, or an input would be larger than a plan may have it.
    """
    if batch < 1:
        raise UsageError(f"batch {batch} is not possible: it must be at least 1")
    if any(batch * math.prod(shape) > MAX_ELEMENTS for shape in shapes):
        raise UsageError(f"batch {batch} is not possible: an input would have more than {MAX_ELEMENTS} elements")
    return tuple(torch.empty((batch, *shape), dtype=getattr(torch, dtype.value), device="meta") for shape in shapes)
