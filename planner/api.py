"""The whole way in a few functions: trace, price, search, plan; and the comparison of strategies."""

import json
import logging
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from planner.cost.memory import Optimizer
from planner.cost.model import CostModel, LayerCost, Settings
from planner.cost.simulate import Timeline, simulate
from planner.cost.table import CostTable
from planner.devices.files import profiles_path
from planner.devices.graph import DeviceGraph
from planner.devices.library import cluster as find_cluster
from planner.devices.library import device_kinds, equal_devices
from planner.devices.schema import DeviceKind
from planner.errors import InfeasibleError, LayerwiseError, NoPlanError, UnknownNameError, UsageError
from planner.frontend.lower import TracedModel, trace_layers
from planner.frontend.source import load_model
from planner.frontend.trace import NO_KEYWORDS, empty_inputs
from planner.ir.dimension import Dimension
from planner.ir.mesh import Mesh
from planner.ir.rules import InputOutput
from planner.ir.split import Split
from planner.ir.tensor import DType
from planner.plan.build import Found, Request, build_plan
from planner.plan.check import refuse_other_model
from planner.plan.schema import InputTensor, Plan
from planner.profile.file import read_profile
from planner.profile.key import LocalLayer, PieceKey
from planner.profile.roofline import Roofline
from planner.profile.shipped import profiles_for, with_profiles
from planner.profile.table import Measurement, ProfileTable
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

PROFILE_TIMEOUT_S = 86_400.0
"""For timing all layers of a model."""
MEASURE_TARGET_S = 1.0
"""Of one repeat of a layer in ``measure_layers``; above, fewer samples are timed."""

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
        memory_format: ``contiguous`` or ``channels_last``: which measured layers are looked up.
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
    memory_format: Literal["contiguous", "channels_last"] = "contiguous"


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
    profile: str | Path | None = None,
) -> Machine:
    """Return a machine: exactly one of a cluster (name, path or graph; ``local-N`` is this host) and a number.

    Layers are priced by the device profile given, else by the shipped ones of the (slowest) device's kind, else by its
    data sheet; ``local-N`` by the profile given, else by the rates measured on this host.

    Args:
        cluster: name, path or graph.
        devices: number of equal accelerators.
        precision: that its data sheet is read for.
        profile: path of a file of ``layerwise profile``.

    Raises:
        UsageError: both or none is given, the cluster is unknown, or the profile cannot be read.
    """
    machine = _plain_machine(cluster, devices, precision)
    if profile is not None:
        asked = read_profile(Path(profile))
        kinds = sorted({device.kind for device in machine.graph.devices})
        if asked.device not in kinds and not machine.profile.roofline.measured:
            _log.warning("%s was measured on %s, this machine has %s", profile, asked.device, ", ".join(kinds))
        return replace(machine, profile=with_profiles(machine.profile, [asked]))
    if machine.profile.roofline.measured:
        return machine
    shipped = profiles_for(profiles_path() / "devices", machine.profile.device)
    return replace(machine, profile=with_profiles(machine.profile, shipped))


def _plain_machine(cluster: str | Path | DeviceGraph | None, devices: int | None, precision: str) -> Machine:
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

    argument = {"level": device_kinds()["cpu"].level}
    found = run_local(
        "runtime.measuring:host_rates", argument, num_ranks=num_ranks, timeout_s=MEASURE_TIMEOUT_S,
        threads_per_rank=threads_per_rank(num_ranks), hosts=hosts,
    )  # fmt: skip
    return median_rates([HostRates.model_validate_json(json.dumps(rates)) for rates in found])


def machine_of_links(
    name: str, nodes: int, ranks_per_node: int, found: Mapping[str, Any], device: str | None = None
) -> DeviceGraph:
    """Return the machine whose links ``runtime.measuring.link_times`` timed.

    Args:
        name: of the machine.
        nodes: hosts.
        ranks_per_node: on each.
        found: what a rank returned.
        device: kind of its accelerators; found by their name where None.

    Raises:
        UnknownNameError: no such kind, or none fits the name of the accelerator.
    """
    from planner.devices.schema import CollectiveEntry
    from planner.measure.host import HostRates, device_of
    from planner.measure.links import measured_graph

    collectives = [
        CollectiveEntry.model_validate_json(json.dumps(entry)).collective() for entry in found["collectives"]
    ]
    if device is None and "rates" in found:
        kind = device_of(HostRates.model_validate_json(json.dumps(found["rates"])))
    else:
        kind = _device_kind(device or found.get("accelerator", "cpu"), named=device is not None)
    return measured_graph(name, nodes, ranks_per_node, kind, collectives)


def _device_kind(name: str, *, named: bool) -> DeviceKind:
    """Return a kind by its name, or by that of an accelerator such as ``NVIDIA H200``."""
    kinds = device_kinds()
    if name in kinds:
        return kinds[name]
    words = name.lower().replace("-", " ").split()
    fitting = [kind for kind in kinds if kind in words]
    if named or len(fitting) != 1:
        raise UnknownNameError("device", name, kinds, "Give its kind with --device, or write a cluster file.")
    return kinds[fitting[0]]


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


def time_layers(
    keys: Sequence[str],
    found: Callable[[str, Measurement | None], None],
    *,
    ranks_at_once: int = 1,
    threads: int | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
    hosts: "Hosts | None" = None,
) -> None:
    """Time the layers behind ``LocalLayer.key`` in processes of their own.

    Args:
        keys: of the layers.
        found: is handed each layer as soon as it is timed, with the medians over the processes; None: no kernel.
        ranks_at_once: processes that time the same layer at the same time, as ranks of one host would.
        threads: of each; an equal part of the processors if left out.
        device: that they compute on.
        hosts: network namespaces to spread them over.

    Raises:
        UsageError: the device is missing, or cannot compute what a key asks for.
        RunError: a process died.
    """
    from planner.measure.host import threads_per_rank
    from planner.measure.journal import JournalReader
    from runtime.launch import run_local

    with tempfile.TemporaryDirectory(prefix="layerwise-") as folder:
        reader = JournalReader(Path(folder), ranks_at_once)

        def look() -> None:
            for key, measurement in reader.new():
                found(key, measurement)

        try:
            run_local(
                "runtime.measuring:layer_times", {"keys": list(keys), "folder": folder, "device": device},
                num_ranks=ranks_at_once, timeout_s=PROFILE_TIMEOUT_S,
                threads_per_rank=threads or threads_per_rank(ranks_at_once), hosts=hosts, while_waiting=look,
            )  # fmt: skip
        finally:
            look()


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
        settings = Settings(
            options.precision, Optimizer(options.optimizer), options.sync_batch_norm, options.memory_format
        )
        return CostModel.of(self.traced.layers, machine.graph, mesh, machine.profile, settings)

    def layer_pieces(self, meshes: Sequence[Mesh] | None = None) -> list[PieceKey]:
        """Return every piece of a layer that a search can ask for and that computes anything, each once.

        Args:
            meshes: that are searched; all candidates if left out.
        """
        found: dict[PieceKey, None] = {}
        for mesh in self.meshes() if meshes is None else meshes:
            model, space = self._model(mesh), self._space(mesh)
            for layer in self.traced.layers.layers:
                locals_of = (model.local(layer, split) for split in space.splits[layer.id])
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
        options: the fields of ``Options``.

    Raises:
        LayerwiseError: see ``planner.errors`` for the cases.
    """
    asked = Options(**options)
    found = machine or machine_of(cluster, devices, asked.precision, profile)
    name = origin or Origin(type(model).__name__, f"{type(model).__module__}:{type(model).__qualname__}")
    return prepare(model, example_inputs, found, asked, name, example_keywords).plan()


@dataclass(frozen=True, slots=True)
class Comparison:
    """Strategies on one problem: the fixed ones, then the planned one.

    Attributes:
        rows: fixed strategies, then the planned one (solver ``auto`` or the one asked for).
        fits: for each row whether it obeys the memory limit.
        search: that the planned one comes from.
    """

    planner: Planner
    rows: tuple[Planned, ...]
    fits: tuple[bool, ...]
    search: Search

    @property
    def planned(self) -> Planned:
        """The planned strategy."""
        return self.rows[-1]

    def plans(self) -> tuple[Plan, ...]:
        """Return every row as a plan."""
        fixed = self.planner.search(self.planner.meshes()[0])
        of = [*(fixed for _ in self.rows[:-1]), self.search]
        return tuple(self.planner.plan_of(search, row) for search, row in zip(of, self.rows, strict=True))

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
    profile: str | Path | None = None,
    **options: Any,
) -> Comparison:
    """Compare the fixed strategies with the planned one; arguments as ``plan_model``."""
    asked = Options(**options)
    found = machine or machine_of(cluster, devices, asked.precision, profile)
    name = origin or Origin(type(model).__name__)
    planner = prepare(model, example_inputs, found, asked, name, example_keywords)
    return compare_with(planner)


def compare_with(planner: Planner) -> Comparison:
    """Compare the strategies of a prepared planner."""
    rows = planner.baselines()
    search, planned = planner.best()
    fits = [row.timeline.memory_bytes <= planner.limit_bytes for row in rows]
    return Comparison(planner, (*rows, planned), (*fits, True), search)


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


def reprice(plan: Plan, machine: Machine) -> Timeline:
    """Return the predicted step of a plan on another machine with as many devices; see ``price_plan``."""
    return price_plan(plan, machine).timeline


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
    planner = _planner_of(plan, machine)
    mesh = _mesh_on(plan.mesh, machine.graph)
    table = planner.table(mesh)
    try:
        choice = table.choice({layer: Split.of(mesh, split.dimensions) for layer, split in plan.strategy.items()})
    except ValueError as error:
        raise UsageError(f"the plan cannot be priced here: {error}") from error
    return Priced(table, choice, simulate(table, choice, plan.bucket_bytes))


def _mesh_on(mesh: Mesh, graph: DeviceGraph) -> Mesh:
    """Return a mesh with the names that a machine gives to axes of these sizes.

    Raises:
        UsageError: the machine has no such axes.
    """
    names = {level.name for level in graph.levels}
    if all(axis.name.rstrip("0123456789") in names for axis in mesh.axes):
        return mesh
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
    planner = _planner_of(plan, machine_of(devices=plan.mesh.size, precision=plan.precision))
    model, graph = planner._model(plan.mesh), planner.traced.layers
    return tuple(model.local(graph[layer], split) for layer, split in plan.strategy.items())


def _planner_of(plan: Plan, machine: Machine) -> Planner:
    loaded = load_model(plan.model.source, dict(plan.model.arguments))
    inputs, keywords = empty_inputs(plan.model.inputs)
    options = Options(
        precision=plan.precision, optimizer=plan.optimizer, sync_batch_norm=plan.sync_batch_norm, io=plan.io,
        dimensions=frozenset(Dimension),
    )  # fmt: skip
    planner = prepare(loaded.module, inputs, machine, options, Origin(plan.model.name), keywords)
    refuse_other_model(plan, planner.traced.layers)
    return planner


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
    "Comparison", "Machine", "NoPlanError", "Options", "Origin", "Plan", "Planner", "Priced", "compare",
    "compare_with", "data_sheet_profile", "example_inputs", "local_layers", "machine_of", "plan_model", "prepare",
    "price_plan", "reprice",
]  # fmt: skip
