"""The whole way in a few functions: trace, price, search, plan; and the comparison of strategies."""

import logging
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import nn

from planner.cost.memory import Optimizer
from planner.cost.model import CostModel, Settings
from planner.cost.simulate import Timeline, simulate
from planner.cost.table import CostTable
from planner.devices.graph import DeviceGraph
from planner.devices.library import cluster as find_cluster
from planner.devices.library import equal_devices
from planner.errors import InfeasibleError, LayerwiseError, NoPlanError, UnknownNameError, UsageError
from planner.frontend.lower import TracedModel, trace_layers
from planner.frontend.source import load_model
from planner.frontend.trace import NO_KEYWORDS, empty_inputs
from planner.ir.dimension import Dimension
from planner.ir.mesh import Mesh
from planner.ir.rules import InputOutput
from planner.ir.tensor import DType
from planner.plan.build import Found, Request, build_plan
from planner.plan.check import refuse_other_model
from planner.plan.schema import InputTensor, Plan
from planner.profile.roofline import Roofline
from planner.profile.table import ProfileTable
from planner.search.auto import SOLVERS, Planned, Search
from planner.search.fixed import ALIASES, FIXED
from planner.search.problem import Limits
from planner.space.enumerate import DEFAULT_DIMENSIONS, SearchSpace, default_io, enumerate_splits

if TYPE_CHECKING:
    from planner.measure.host import HostRates
    from runtime.namespaces import Hosts

_log = logging.getLogger(__name__)

MEASURE_TIMEOUT_S = 600.0
"""For the processes that time layers and links."""

MAX_MESHES = 6
"""Candidate meshes that are searched: whole levels first, then their factorings."""
MAX_AXES = 3
"""Of a candidate mesh; the splits of a layer are up to 5 to the power of its axes."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What a plan is made for: a device graph and what is known of the speed of its devices."""

    graph: DeviceGraph
    profile: ProfileTable


@dataclass(frozen=True, slots=True)
class Options:
    """What a user may ask of a plan beside model and machine.

    Attributes:
        solver: a name of ``planner.search.auto.SOLVERS``.
        memory_limit_bytes: per device; the smallest device's memory where None.
        precision: ``fp32``, ``tf32`` or ``bf16`` (autocast).
        optimizer: ``sgd``, ``momentum`` or ``adam``.
        sync_batch_norm: statistics over the global batch (as one device) or each rank's own.
        io: ``per-rank`` or ``global``; per-rank where every rank gets a sample, if None.
        dimensions: that may be split.
        mesh: such as ``node=2,gpu=4``; candidates are searched where None.
        time_limit_s: for the integer program and for further candidate meshes.
    """

    solver: str = "auto"
    memory_limit_bytes: int | None = None
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    optimizer: Literal["sgd", "momentum", "adam"] = "momentum"
    sync_batch_norm: bool = True
    io: Literal["per-rank", "global"] | None = None
    dimensions: Collection[Dimension] = DEFAULT_DIMENSIONS
    mesh: str | None = None
    time_limit_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a model comes from, for the plan's provenance."""

    name: str = ""
    source: str = ""
    arguments: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    command: str = ""


def machine_of(
    cluster: str | Path | DeviceGraph | None = None,
    devices: int | None = None,
    precision: str = "fp32",
) -> Machine:
    """Return a machine: exactly one of a cluster (name, path or graph; ``local-N`` is this host) and a number.

    Raises:
        UsageError: both or none is given, or the cluster is unknown.
    """
    if (cluster is None) == (devices is None):
        raise UsageError("give exactly one of --devices N and --cluster NAME (cluster= and devices= from Python)")
    if devices is not None:
        graph = equal_devices(devices)
    elif isinstance(cluster, DeviceGraph):
        graph = cluster
    elif str(cluster).startswith("local-"):
        from planner.measure.host import local_machine, parse_local

        return Machine(*local_machine(parse_local(str(cluster)), measure_host))
    else:
        graph = find_cluster(str(cluster))
    return Machine(graph, data_sheet_profile(graph, precision))


def measure_host(num_ranks: int, hosts: "Hosts | None" = None) -> "HostRates":
    """Measure this host with so many processes at once, a few seconds.

    Args:
        num_ranks: processes.
        hosts: network namespaces to spread them over; links are then those between the namespaces.
    """
    from planner.measure.host import HostRates, median_rates, threads_per_rank
    from runtime.launch import run_local

    found = run_local(
        "runtime.measuring:host_rates", None, num_ranks=num_ranks, timeout_s=MEASURE_TIMEOUT_S,
        threads_per_rank=threads_per_rank(num_ranks), hosts=hosts,
    )  # fmt: skip
    return median_rates([HostRates.model_validate(rates) for rates in found])


def measure_layers(planner: "Planner", hosts: "Hosts | None" = None) -> "Planner":
    """Return the planner with measured times of every piece of a layer that its search can ask for.

    As many processes as the machine has devices time the same layers at once on this host.
    """
    from planner.measure.host import threads_per_rank
    from planner.measure.layers import median_over_ranks
    from runtime.launch import run_local

    machine, count = planner.machine, len(planner.machine.graph.devices)
    keys = planner.layer_keys()
    start = time.perf_counter()
    found = run_local(
        "runtime.measuring:layer_times", {"keys": keys}, num_ranks=count, timeout_s=MEASURE_TIMEOUT_S,
        threads_per_rank=threads_per_rank(count), hosts=hosts,
    )  # fmt: skip
    layers = median_over_ranks(cast("list[dict[str, list[float]]]", found))
    _log.info("profile: %d layers timed in %.1f s", len(layers), time.perf_counter() - start)
    profile = replace(machine.profile, layers=layers)
    return replace(planner, machine=Machine(machine.graph, profile))


def data_sheet_profile(graph: DeviceGraph, precision: str) -> ProfileTable:
    """Return the roofline of the slowest device's data sheet.

    Raises:
        UsageError: a device has no figure for the precision.
    """
    for device in graph.devices:
        if precision not in device.peak_flop_per_s:
            known = ", ".join(device.peak_flop_per_s)
            raise UsageError(f"device {device.id!r} ({device.kind}) has no {precision} rate, only {known}")
    slowest = min(graph.devices, key=lambda d: (d.peak_flop_per_s[precision], d.memory_bandwidth_bytes_per_s))
    roofline = Roofline.of_data_sheet(slowest.peak_flop_per_s[precision], slowest.memory_bandwidth_bytes_per_s)
    return ProfileTable(slowest.kind, roofline)


@dataclass(frozen=True)
class Planner:
    """A traced model on a machine, ready to be searched and compared.

    Attributes:
        traced: the model.
        machine: the machine.
        options: what was asked.
        origin: for the plan's provenance.
    """

    traced: TracedModel
    machine: Machine
    options: Options
    origin: Origin
    _searches: dict[Mesh, Search] = field(init=False, default_factory=dict, compare=False)

    def meshes(self) -> list[Mesh]:
        """Return the candidate meshes: the one asked for, or whole levels and their factorings."""
        graph = self.machine.graph
        if self.options.mesh is not None:
            return [graph.parse_mesh(self.options.mesh)]
        return [mesh for mesh in graph.meshes() if len(mesh.axes) <= MAX_AXES][:MAX_MESHES]

    def table(self, mesh: Mesh) -> CostTable:
        """Return the priced search space on a mesh."""
        return CostTable.of(self._space(mesh), self._model(mesh))

    def _space(self, mesh: Mesh) -> SearchSpace:
        options, layers = self.options, self.traced.layers
        io = InputOutput(options.io) if options.io else default_io(layers.batch, mesh.size)
        return enumerate_splits(layers, mesh, io, options.dimensions)

    def _model(self, mesh: Mesh) -> CostModel:
        options, machine = self.options, self.machine
        settings = Settings(options.precision, Optimizer(options.optimizer), options.sync_batch_norm)
        return CostModel.of(self.traced.layers, machine.graph, mesh, machine.profile, settings)

    def layer_keys(self) -> list[str]:
        """Return the profile keys of every piece of a layer that a search can ask for."""
        found: dict[str, None] = {}
        for mesh in self.meshes():
            model, space = self._model(mesh), self._space(mesh)
            for layer in self.traced.layers.layers:
                for split in space.splits[layer.id]:
                    found[model.local(layer, split).key] = None
        return list(found)

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

        Its lower bound is that of all meshes that were searched.
        Fixed strategies use the mesh of whole levels only: on it they are what their users run.
        """
        meshes = self.meshes()
        if self.options.solver in FIXED:
            meshes = meshes[:1]
        start = time.perf_counter()
        found: list[tuple[Search, Planned]] = []
        failure: LayerwiseError | None = None
        for mesh in meshes:
            if found and time.perf_counter() - start > self.options.time_limit_s:
                _log.warning("time limit: %d of %d candidate meshes searched", len(found), len(meshes))
                break
            search = self.search(mesh)
            try:
                planned = search.solve(self.options.solver)
            except (InfeasibleError, NoPlanError, UsageError) as error:  # another mesh may do
                _log.info("mesh %s: %s", "x".join(map(str, mesh.shape)) or "1", error)
                failure = failure or error
                continue
            found.append((search, planned))
            _log.info("mesh %s: %.6g s", "x".join(map(str, mesh.shape)) or "1", planned.timeline.step_s)
        if not found:
            assert failure is not None
            raise failure
        search, planned = min(found, key=lambda pair: pair[1].timeline.step_s)
        if self.options.solver == "auto":
            planned = search.refine(planned)
        bound_s = min(each.lower_bound_s for _, each in found)
        return search, replace(planned, lower_bound_s=bound_s)

    def baselines(self) -> list[Planned]:
        """Return every fixed strategy on the mesh of whole levels, whether or not it fits."""
        search = self.search(self.meshes()[0])
        return [p for name in FIXED for p in _possible(search, name)]

    def plan(self) -> Plan:
        """Return the best plan with the fixed strategies beside it."""
        return self.plan_of(*self.best())

    def plan_of(self, search: Search, planned: Planned) -> Plan:
        """Return a strategy as a plan, with the fixed strategies beside it."""
        inputs = [
            InputTensor(
                name=layer.id, shape=list(layer.output.shape), dtype=layer.output.dtype,
                keyword=layer.id in self.traced.keywords,
            )
            for layer in self.traced.layers.layers if layer.op.kind == "input"
        ]  # fmt: skip
        request = Request(
            self.origin.source,
            self.origin.arguments,
            inputs,
            self.limit_bytes,
            self.origin.command,
        )
        return build_plan(search.table, _found(planned), [_found(b) for b in self.baselines()], request)


def _possible(search: Search, name: str) -> Iterator[Planned]:
    try:
        yield search.fixed(name)
    except LayerwiseError as error:  # the user forbade a dimension that the rule asks for
        _log.info("no baseline %s: %s", name, error)


def _found(planned: Planned) -> Found:
    return Found(
        planned.solver, planned.status.value, planned.lower_bound_s, planned.gap, planned.choice,
        planned.bucket_bytes, planned.timeline, planned.num_replaced,
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
    options = replace(options, solver=ALIASES.get(options.solver, options.solver))
    start = time.perf_counter()
    traced = trace_layers(model, tuple(example_inputs), origin.name, keywords=example_keywords)
    _log.info("trace: %d layers, %.2f s", len(traced.layers.layers), time.perf_counter() - start)
    return Planner(traced, machine, options, origin)


def plan_model(
    model: nn.Module,
    example_inputs: Sequence[torch.Tensor],
    *,
    cluster: str | Path | DeviceGraph | None = None,
    devices: int | None = None,
    machine: Machine | None = None,
    origin: Origin | None = None,
    example_keywords: Mapping[str, torch.Tensor] = NO_KEYWORDS,
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
        options: the fields of ``Options``.

    Raises:
        LayerwiseError: see ``planner.errors`` for the cases.
    """
    asked = Options(**options)
    found = machine or machine_of(cluster, devices, asked.precision)
    name = origin or Origin(type(model).__name__, f"{type(model).__module__}:{type(model).__qualname__}")
    return prepare(model, example_inputs, found, asked, name, example_keywords).plan()


@dataclass(frozen=True, slots=True)
class Comparison:
    """Strategies on one problem: the fixed ones, then the planned one.

    Attributes:
        rows: fixed strategies, then the planned one (solver ``auto`` or the one asked for).
        fits: for each row whether it obeys the memory limit.
    """

    planner: Planner
    rows: tuple[Planned, ...]
    fits: tuple[bool, ...]

    @property
    def planned(self) -> Planned:
        """The planned strategy."""
        return self.rows[-1]

    @property
    def planned_lost(self) -> bool:
        """Whether a fixed strategy that fits has a shorter predicted step."""
        return any(
            ok and row.timeline.step_s < self.planned.timeline.step_s * (1 - 1e-9)
            for row, ok in zip(self.rows[:-1], self.fits[:-1], strict=True)
        )


def compare(
    model: nn.Module,
    example_inputs: Sequence[torch.Tensor],
    *,
    cluster: str | Path | DeviceGraph | None = None,
    devices: int | None = None,
    machine: Machine | None = None,
    origin: Origin | None = None,
    example_keywords: Mapping[str, torch.Tensor] = NO_KEYWORDS,
    **options: Any,
) -> Comparison:
    """Compare the fixed strategies with the planned one; arguments as ``plan_model``."""
    asked = Options(**options)
    found = machine or machine_of(cluster, devices, asked.precision)
    name = origin or Origin(type(model).__name__)
    planner = prepare(model, example_inputs, found, asked, name, example_keywords)
    return compare_with(planner)


def compare_with(planner: Planner) -> Comparison:
    """Compare the strategies of a prepared planner."""
    rows = planner.baselines()
    _, planned = planner.best()
    fits = [row.timeline.memory_bytes <= planner.limit_bytes for row in rows]
    return Comparison(planner, (*rows, planned), (*fits, True))


def reprice(plan: Plan, machine: Machine) -> Timeline:
    """Return the predicted step of a plan on another machine with as many devices.

    The model is built from the source that the plan names (code of the user's, if it is no shipped one).

    Raises:
        UsageError: the machine has another number of devices, or the source cannot be loaded.
        MismatchError: the source gives another model than the plan's.
    """
    if len(machine.graph.devices) < plan.mesh.size:
        raise UsageError(
            f"the plan needs {plan.mesh.size} devices, {machine.graph.name} has {len(machine.graph.devices)}"
        )
    loaded = load_model(plan.model.source, dict(plan.model.arguments))
    inputs, keywords = empty_inputs(plan.model.inputs)
    options = Options(
        precision=plan.precision, optimizer=plan.optimizer, sync_batch_norm=plan.sync_batch_norm, io=plan.io,
        dimensions=frozenset(Dimension),
    )  # fmt: skip
    planner = prepare(loaded.module, inputs, machine, options, Origin(plan.model.name), keywords)
    refuse_other_model(plan, planner.traced.layers)
    table = planner.table(plan.mesh)
    try:
        choice = table.choice(plan.strategy)
    except ValueError as error:
        raise UsageError(f"the plan cannot be priced here: {error}") from error
    return simulate(table, choice, plan.bucket_bytes)


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


__all__ = [
    "Comparison", "Machine", "NoPlanError", "Options", "Origin", "Plan", "Planner", "compare", "compare_with",
    "data_sheet_profile", "example_inputs", "machine_of", "plan_model", "prepare", "reprice",
]  # fmt: skip
