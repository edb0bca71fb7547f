"""The whole way in a few functions: trace, price, search, plan."""

import logging
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from planner.cost.memory import Optimizer
from planner.cost.model import CostModel, Settings
from planner.cost.table import CostTable
from planner.devices.graph import DeviceGraph
from planner.errors import InfeasibleError, LayerwiseError, NoPlanError, UnknownNameError, UsageError
from planner.frontend.lower import TracedModel, trace_layers
from planner.frontend.trace import NO_KEYWORDS
from planner.ir.dimension import Dimension
from planner.ir.mesh import Mesh
from planner.ir.rules import InputOutput
from planner.ir.tensor import DType
from planner.plan.build import Found, Request, build_plan
from planner.plan.schema import InputTensor, Plan
from planner.profile.key import PieceKey
from planner.profile.table import Measurement
from planner.search.auto import SOLVERS, Planned, Search
from planner.search.fixed import ALIASES, FIXED
from planner.search.problem import Limits
from planner.space.enumerate import DEFAULT_DIMENSIONS, SearchSpace, default_io, enumerate_splits

if TYPE_CHECKING:
    from runtime.namespaces import Hosts

from planner.api.machine import Machine, machine_of, time_layers

_log = logging.getLogger(__name__)

MEASURE_TARGET_S = 1.0
"""Of one repeat of a layer in ``measure_layers``; above, fewer samples are timed."""


MAX_MESHES = 6
"""Candidate meshes that are searched: whole levels first, then their factorings."""


MAX_AXES = 3
"""Of a candidate mesh; the splits of a layer are up to 5 to the power of its axes."""


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
        few = [mesh for mesh in graph.meshes() if len(mesh.axes) <= MAX_AXES][:MAX_MESHES]
        return few or [graph.mesh()]  # a machine of more levels

    def table(self, mesh: Mesh) -> CostTable:
        """Return the priced search space on a mesh."""
        return CostTable.of(self.space(mesh), self.cost_model(mesh))

    def space(self, mesh: Mesh) -> SearchSpace:
        """Return the legal splits on a mesh."""
        options, layers = self.options, self.traced.layers
        io = InputOutput(options.io) if options.io else default_io(layers.batch, mesh.size)
        return enumerate_splits(layers, mesh, io, options.dimensions)

    def cost_model(self, mesh: Mesh) -> CostModel:
        """Return what prices layers and transfers on a mesh."""
        options, machine = self.options, self.machine
        settings = Settings(options.precision, Optimizer(options.optimizer), options.sync_batch_norm)
        return CostModel.of(self.traced.layers, machine.graph, mesh, machine.profile, settings)

    def layer_pieces(
        self,
        meshes: Sequence[Mesh] | None = None,
        memory_format: Literal["contiguous", "channels_last"] = "contiguous",
    ) -> list[PieceKey]:
        """Return every piece of a layer that a search can ask for and that computes anything, each once.

        Args:
            meshes: that are searched; all candidates if left out.
            memory_format: of the pieces; the runtime computes contiguously, and plans are priced so.
        """
        found: dict[PieceKey, None] = {}
        for mesh in self.meshes() if meshes is None else meshes:
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
