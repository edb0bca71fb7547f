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
from planner.cost.table import CostTable, collector_paused, least_compute_s
from planner.devices.graph import DeviceGraph
from planner.errors import InfeasibleError, UnknownNameError, UsageError
from planner.frontend.lower import TracedModel, trace_layers
from planner.frontend.trace import NO_KEYWORDS
from planner.ir.dimension import SPATIAL_DIMENSIONS, Dimension
from planner.ir.mesh import Mesh
from planner.ir.rules import InputOutput, default_io
from planner.ir.schedule import CYCLIC, ScheduleKind
from planner.ir.tensor import DType
from planner.plan.build import Found, Request, build_pipelined_plan, build_plan
from planner.plan.schema import InputTensor, Plan
from planner.profile.key import PieceKey
from planner.profile.table import Measurement
from planner.search.auto import SOLVERS, Planned, Search, Start
from planner.search.fixed import ALIASES, FIXED
from planner.search.problem import Limits, Status
from planner.space.constraints import texts
from planner.space.enumerate import DEFAULT_DIMENSIONS, SearchSpace, enumerate_splits

if TYPE_CHECKING:
    from runtime.namespaces import Hosts

from planner.api.baselines import Baseline, baselines
from planner.api.machine import Machine, machine_of, time_layers
from planner.api.meshes import Counts, fewer_meshes, whole_meshes
from planner.api.options import Options, Origin, options_of
from planner.api.pipelines import Pipeline, best_pipeline, pipelined
from planner.api.tour import EQUAL, Tour, fastest

_log = logging.getLogger(__name__)

PIPELINED = tuple(kind.value for kind in ScheduleKind if kind is not ScheduleKind.SINGLE)
"""Names of ``--schedule``."""
CYCLIC_NAMES = frozenset(kind.value for kind in CYCLIC)
ONE_STAGE = "one stage"
"""The best plan without a pipeline, among the baselines of one with."""

MEASURE_TARGET_S = 1.0
"""Of one repeat of a layer in ``measure_layers``; above, fewer samples are timed."""


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
    _models: dict[Mesh, CostModel] = field(init=False, default_factory=dict, compare=False)
    _baselines: list[tuple[Baseline, ...]] = field(init=False, default_factory=list, compare=False)

    def meshes(self) -> list[Mesh]:
        """Return the candidate meshes over all devices: the one asked for, or whole levels and their factorings."""
        if self.options.mesh is not None:
            return [self.machine.graph.parse_mesh(self.options.mesh)]
        return whole_meshes(self.machine.graph)

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
        asked = ParameterSharding(self.options.parameter_sharding)
        return rule.sharding or asked if rule is not None else asked

    def table(self, mesh: Mesh) -> CostTable:
        """Return the priced search space on a mesh."""
        return CostTable.of(self.space(mesh), self.cost_model(mesh))

    def space(self, mesh: Mesh) -> SearchSpace:
        """Return the legal splits on a mesh.

        Raises:
            InfeasibleError: the constraints leave a layer none.
        """
        constraints = self.options.constraints
        return enumerate_splits(self.traced.layers, mesh, self.io(mesh), self.dimensions, constraints)

    def io(self, mesh: Mesh) -> InputOutput:
        """Return how ranks of a mesh pass the batch."""
        asked = self.options.io
        return InputOutput(asked) if asked else default_io(self.traced.layers.batch, mesh.size)

    def cost_model(self, mesh: Mesh) -> CostModel:
        """Return what prices layers and transfers on a mesh; made once."""
        if mesh not in self._models:
            machine = self.machine
            self._models[mesh] = CostModel.of(self.traced.layers, machine.graph, mesh, machine.profile, self.settings)
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
    ) -> list[PieceKey]:
        """Return every piece of a layer that a search can ask for and that computes anything, each once.

        Args:
            meshes: that are searched; all candidates if left out, over all devices and over fewer.
            memory_format: of the pieces; the runtime computes contiguously, and plans are priced so.
        """
        found: dict[PieceKey, None] = {}
        every = [*self.meshes(), *(mesh for _, mesh in self.fewer_meshes())]
        for mesh in every if meshes is None else meshes:
            model, space = self.cost_model(mesh), self.space(mesh)
            for layer in self.traced.layers.layers:
                locals_of = (
                    replace(model.local(layer, split), memory_format=memory_format) for split in space.splits[layer.id]
                )
                found.update(dict.fromkeys(local.piece for local in locals_of if local.has_kernel))
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

    def best(self) -> tuple[Search, Planned]:
        """Return the best plan over the candidate meshes, with the search it comes from.

        Its lower bound is that of all meshes that were searched. ``auto`` is no slower than any fixed strategy that the
        user allows: where one is faster, it goes on from there.

        Raises:
            LayerwiseError: there is no plan on any mesh.
        """
        with collector_paused():
            return self._best()

    def _best(self) -> tuple[Search, Planned]:
        found = Tour(self).go()
        search, planned = fastest(found)
        if self.options.solver == "auto" and (faster := self._fastest_fixed(planned.timeline.step_s)) is not None:
            search = self.search(faster.search.table.space.mesh)
            choice = search.table.choice(faster.strategy)
            planned = search.refine([Start(choice, faster.planned.timeline.step_s, faster.planned.bucket_bytes)])
            found.append((search, planned))
        planned = replace(planned, lower_bound_s=min(each.lower_bound_s for _, each in found))
        is_proven = self.options.solver == "auto" and planned.gap <= EQUAL
        return search, replace(planned, status=Status.OPTIMAL) if is_proven else planned

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
        """Return the best plan with the fixed strategies beside it; a pipeline where that is asked for, or faster."""
        if self.options.stages == 1:
            return self.plan_of(*self.best())
        alone, _ = _tried(self.best)
        pipeline, why_not = _tried(lambda: best_pipeline(self))
        if pipeline is None and (alone is None or self.options.stages != "auto"):
            assert why_not is not None
            raise why_not
        if alone is not None and self.options.stages == "auto":
            alone_s = alone[1].timeline.step_s
            if pipeline is None or alone_s <= pipeline.timeline.step_s:
                return self.plan_of(*alone)
        assert pipeline is not None
        return self.plan_of_pipeline(pipeline, alone)

    def plan_of_pipeline(self, pipeline: Pipeline, alone: tuple[Search, Planned] | None = None) -> Plan:
        """Return a pipeline as a plan, with the best plan of one stage and the fixed strategies beside it."""
        beside = [_found(baseline.planned, baseline.note) for baseline in self.baselines()]
        if alone is not None:
            beside.append(replace(_found(alone[1]), solver=ONE_STAGE))
        return build_pipelined_plan(pipelined(pipeline), beside, self._request())

    def plan_of(self, search: Search, planned: Planned) -> Plan:
        """Return a strategy as a plan, with the fixed strategies beside it."""
        beside = [_found(baseline.planned, baseline.note) for baseline in self.baselines()]
        return build_plan(search.table, _found(planned), beside, self._request())

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
        )


T = TypeVar("T")


def _tried(call: Callable[[], T]) -> tuple[T | None, InfeasibleError | None]:
    """Return what a call returns, or why nothing fits."""
    try:
        return call(), None
    except InfeasibleError as error:
        return None, error


def _found(planned: Planned, note: str = "") -> Found:
    return Found(
        planned.solver, planned.status.value, planned.lower_bound_s, planned.gap, planned.choice,
        planned.bucket_bytes, planned.timeline, planned.num_replaced, note,
    )  # fmt: skip


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
    if options.solver not in SOLVERS:
        raise UnknownNameError("solver", options.solver, SOLVERS)
    inputs = [*example_inputs, *example_keywords.values()]
    if not inputs or not inputs[0].dim() or inputs[0].shape[0] < 1:
        raise UsageError("the batch must be at least 1 (the first size of every example input)")
    if any(x.shape[:1] != inputs[0].shape[:1] for x in inputs):
        shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
        raise UsageError(f"every input needs the batch as its first size, but the inputs have shapes {shapes}")
    if options.parameter_sharding not in set(ParameterSharding):
        raise UnknownNameError("parameter sharding", options.parameter_sharding, [s.value for s in ParameterSharding])
    _refuse_pipeline(options)
    if options.halo_overlap not in set(HaloOverlap):
        raise UnknownNameError("halo overlap", options.halo_overlap, [wish.value for wish in HaloOverlap])
    options = replace(options, solver=ALIASES.get(options.solver, options.solver))
    start = time.perf_counter()
    traced = trace_layers(model, tuple(example_inputs), origin.name, keywords=example_keywords)
    _log.info("trace: %d layers, %.2f s", len(traced.layers.layers), time.perf_counter() - start)

    def retraced(batch: int) -> TracedModel:
        smaller = [x.new_empty((batch, *x.shape[1:]), device="meta") for x in example_inputs]
        named = {n: x.new_empty((batch, *x.shape[1:]), device="meta") for n, x in example_keywords.items()}
        return trace_layers(model, tuple(smaller), origin.name, keywords=named)

    planner = Planner(traced, machine, options, origin, retraced)
    if options.constraints:
        levels = [level.name for level in machine.graph.levels]
        options.constraints.refuse_unknown(traced.layers, planner.meshes(), levels)
    return planner


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
    if options.microbatches is not None and options.microbatches < 1:
        raise UsageError(f"--microbatches {options.microbatches}: give at least 1")
    if options.schedule in CYCLIC_NAMES and options.microbatches not in {None, 1}:
        raise UsageError(f"--schedule {options.schedule} works on whole batches: leave --microbatches out")
    if options.stages != 1 and options.mesh is not None:
        raise UsageError("--mesh is the mesh of a plan of one stage; --stages chooses the meshes of its stages")
    if options.stages != 1 and options.solver != "auto":
        raise UsageError(f"--solver {options.solver} is for plans of one stage; --stages has a search of its own")
    if options.stages != 1 and options.io not in {None, "global"}:
        raise UsageError("pipelined plans take the whole batch (--io global)")


def plan_model(
    model: nn.Module,
    example_inputs: Sequence[torch.Tensor],
    *,
    cluster: str | Path | DeviceGraph | None = None,
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
        example_inputs: tensors with the global batch as their first size, on any device.
        cluster: a name such as ``4xa100-nvlink``, a path, or a graph; ``local-N`` is this host.
        devices: that many equal accelerators; exactly one of cluster, devices and machine.
        machine: a graph with a profile of its devices.
        origin: for the plan's provenance.
        example_keywords: inputs that ``forward`` takes by keyword, by name.
        profile: path of a device profile, see ``machine_of``.
        options: as of ``options_of``.

    Raises:
        LayerwiseError: see ``planner.errors`` for the cases.
    """
    asked = options_of(**options)
    found = machine or machine_of(cluster, devices, asked.precision, profile)
    name = origin or Origin(type(model).__name__, f"{type(model).__module__}:{type(model).__qualname__}")
    return prepare(model, example_inputs, found, asked, name, example_keywords).plan()


def measure_layers(planner: "Planner", hosts: "Hosts | None" = None) -> "Planner":
    """Return the planner with measured times of every piece of a layer that its search can ask for.

    As many processes as the machine has devices time the same layers at once on this host; pieces of many samples with
    fewer of them, see ``planner.measure.sizing``.
    """
    from planner.measure.sizing import Rates, sized

    machine, count = planner.machine, len(planner.machine.graph.devices)
    start = time.perf_counter()
    rates = Rates.of(torch.device("cpu"))
    keys = dict.fromkeys(sized(piece, rates, MEASURE_TARGET_S).text for piece in planner.layer_pieces())
    layers: dict[str, Measurement] = {}

    def keep(key: str, found: Measurement | None) -> None:
        if found is not None:
            layers[key] = found

    time_layers(list(keys), keep, ranks_at_once=count, hosts=hosts)
    _log.info("profile: %d layers timed in %.1f s", len(layers), time.perf_counter() - start)
    profile = replace(machine.profile, layers=layers)
    return replace(planner, machine=Machine(machine.graph, profile))


def example_inputs(
    shapes: Sequence[Sequence[int]], batch: int, dtype: DType = DType.FLOAT32
) -> tuple[torch.Tensor, ...]:
    """Return meta tensors of these shapes (without batch) for a global batch.

    Raises:
        UsageError: the batch is below 1.
    """
    if batch < 1:
        raise UsageError(f"batch {batch} is not possible: it must be at least 1")
    return tuple(torch.empty((batch, *shape), dtype=getattr(torch, dtype.value), device="meta") for shape in shapes)
