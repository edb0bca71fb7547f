"""One training step in time: a compute stream, and gradient reductions behind it on the machine's levels.

What the runtime blocks on, blocks here: transfers between layers, partial sums, batch norm
statistics. Halo exchanges run beside computation where that is faster (``planner.cost.halo``).
Gradient reductions are collected in the runtime's buckets and run behind the rest of backward
(``planner.cost.overlap``). The optimizer starts when backward and all reductions have ended. What
sharded parameters add says ``planner.cost.sharding``. Where some ranks are idle in some layers, ranks that compute the
same layers have streams of their own (``planner.cost.parts``), and the step is that of the last of them.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from planner.cost.halo import HaloPair
from planner.cost.memory import LayerBytes, with_halo
from planner.cost.model import Axes, LayerCost
from planner.cost.overlap import Event, Running, Streams
from planner.cost.parts import Crossing, Parts, PartStreams, Together
from planner.cost.peak import StepMemory, step_memory
from planner.cost.sharding import ParameterSharding
from planner.cost.table import CostTable, Edge, EdgeCost
from planner.cost.transfer import Reduction
from planner.deadline import look
from planner.ir.branches import moves_at_reader
from planner.ir.bucket import fill_buckets
from planner.ir.dimension import SPATIAL_DIMENSIONS
from planner.ir.layout import Layout
from planner.ir.transfer import steps
from planner.profile.table import Source


@dataclass(frozen=True, slots=True)
class LayerTimes:
    """What a layer adds to a step, in seconds; transfers are those of its inputs.

    Attributes:
        compute_s: forward, backward and optimizer.
        waited_s: transfers that compute waits for, halos included.
        halo_s: halo exchanges, whole.
        halo_waited_s: what compute waits for of them, with what overlapping them costs.
        overlaps_halo: they run beside computation.
        sync_s: gradient reductions, hidden or not.
        exposed_s: communication that is not hidden.
    """

    compute_s: float
    waited_s: float
    halo_s: float
    halo_waited_s: float
    overlaps_halo: bool
    sync_s: float
    exposed_s: float

    @property
    def transfer_s(self) -> float:
        """Blocking transfers but for halos."""
        return max(self.waited_s - self.halo_waited_s, 0.0)


@dataclass(frozen=True, slots=True)
class Timeline:
    """A simulated step.

    Attributes:
        step_s: its length.
        compute_s: forward, backward and optimizer compute.
        blocking_s: communication that compute waits for, as if nothing else were sent.
        sync_s: gradient reductions, hidden or not, as if nothing else ran.
        exposed_s: communication that is not hidden, and what hidden communication takes from compute.
        source_s: forward and backward compute by where the seconds are from.
        communication_bytes: sent by the busiest rank.
        memory_bytes: safe bound of the peak on the busiest device; what a memory limit is held against.
        memory: what the busiest device holds over the step, with the simulated peak.
        layers: of every layer, in graph order.
        events: in order of their start.
    """

    step_s: float
    compute_s: float
    blocking_s: float
    sync_s: float
    exposed_s: float
    source_s: Mapping[Source, float]
    communication_bytes: float
    memory_bytes: int
    memory: StepMemory
    layers: tuple[LayerTimes, ...]
    events: tuple[Event, ...]


def simulate(table: CostTable, choice: Sequence[int], bucket_bytes: int) -> Timeline:
    """Return the timeline of one step of the strategy at these positions of the space."""
    simulation = _Simulation(table, choice, keeps_events=True)
    simulation.run(bucket_bytes)
    return simulation.timeline()


def simulated_step_s(table: CostTable, choice: Sequence[int], bucket_bytes: int) -> float:
    """Return only the length of the step."""
    look()
    return _Simulation(table, choice, keeps_events=False).run(bucket_bytes)


def simulated_forward_s(table: CostTable, choice: Sequence[int]) -> float:
    """Return the length of forward alone."""
    return _Simulation(table, choice, keeps_events=False).forward()


def held_bytes(table: CostTable, choice: Sequence[int]) -> int:
    """Return the safe bound of the peak of memory, ``Timeline.memory_bytes``, without a simulation."""
    costs = [layer[c].memory for layer, c in zip(table.layers, choice, strict=True)]
    return _parts_of(table, choice).fullest(costs)[1]


def _parts_of(table: CostTable, choice: Sequence[int]) -> Parts:
    """Return which ranks compute what; all ranks are one part where none is ever idle."""
    space = table.space
    if not table.has_idle:
        return Parts.everyone(space.mesh, len(choice))
    splits = (space.splits[layer.id][c] for layer, c in zip(space.graph.layers, choice, strict=True))
    return Parts.of(space.mesh, splits)


class InputGradients(NamedTuple):
    """Gradients of a layer's inputs on their way to the layers that made them.

    Attributes:
        waited_s: what backward waits for, but for halos.
        halo_s: what it waits for of halos, with what overlapping them costs.
        hidden_s: of halos, what runs beside computation.
        levels: of the machine that are used (``planner.cost.transfer.Price``).
    """

    waited_s: float
    halo_s: float
    hidden_s: float
    levels: int

    def with_edge(self, edge: EdgeCost, pair: tuple[int, int]) -> "InputGradients":
        """Return them with those of one more input."""
        seconds, levels = float(edge.backward_s[pair]), self.levels | int(edge.backward_levels[pair])
        halo = edge.halos.get(pair)
        if halo is None:
            return InputGradients(self.waited_s + seconds, self.halo_s, self.hidden_s, levels)
        return InputGradients(self.waited_s, self.halo_s + seconds, self.hidden_s + halo.hidden_s, levels)


NO_GRADIENTS = InputGradients(0.0, 0.0, 0.0, 0)


class LayerBackward(NamedTuple):
    """Backward of one layer, in seconds, with the levels of what is sent (``planner.cost.transfer.Price``).

    Attributes:
        sums_s, sums_levels: partial sums and batch norm statistics.
        compute_s: gradients, and copying them into buckets.
        inputs: gradients of the inputs.
    """

    sums_s: float
    sums_levels: int
    compute_s: float
    inputs: InputGradients

    @staticmethod
    def of(cost: LayerCost, inputs: InputGradients) -> "LayerBackward":
        """Return backward of a layer of this cost, with these transfers of its inputs' gradients."""
        sums = cost.blocking_backward
        return LayerBackward(sums.seconds, sums.levels, cost.backward_s + cost.collect_s, inputs)

    def run(self, streams: Streams | Together, launches: Iterable[Reduction], name: str = "") -> None:
        """Go through it.

        The layer's gradients are ready when its halos have arrived, which the last of the computation may hide. Then
        reductions of the buckets that they complete start, and other gradients of inputs are sent.
        """
        waited_s, halo_s, hidden_s, levels = self.inputs
        if self.sums_s:
            streams.transfer(f"{name} sums backward", self.sums_s, self.sums_levels)
        if hidden_s:
            hidden_s = min(hidden_s, self.compute_s)
            streams.compute(f"{name} backward", self.compute_s - hidden_s)
            streams.beside(f"{name} backward", hidden_s, levels)
        else:
            streams.compute(f"{name} backward", self.compute_s)
        if halo_s:
            streams.transfer(f"{name} halo backward", halo_s, levels)
        for reduction in launches:
            streams.start(f"sync {name}", reduction)
        if waited_s:
            streams.transfer(f"{name} input backward", waited_s, levels)


class _Simulation:
    def __init__(self, table: CostTable, choice: Sequence[int], *, keeps_events: bool) -> None:
        self._table, self._choice, self._keeps_events = table, choice, keeps_events
        self._names = [layer.id for layer in table.space.graph.layers]
        self._costs = [costs[c] for costs, c in zip(table.layers, choice, strict=True)]
        count = len(self._costs)
        self._splits = [
            table.space.splits[layer.id][c] for layer, c in zip(table.space.graph.layers, choice, strict=True)
        ]
        self._parts = _parts_of(table, choice)
        self._streams = PartStreams(self._parts, self._new_streams)
        self._on = [self._streams.on(members) for members in self._parts.members]
        self._in_forward, self._in_bytes, self._crossed_s = [0.0] * count, [0.0] * count, [0.0] * count
        self._in_backward = [NO_GRADIENTS] * count
        self._halos: list[HaloPair | None] = [None] * count
        self._behind: list[list[Crossing]] = [[] for _ in range(count)]
        self._before: list[list[Crossing]] = [[] for _ in range(count)]
        for (i, j, position), edge in table.edges.items():
            pair = choice[i], choice[j]
            self._in_bytes[j] += float(edge.num_bytes[pair])
            if self._parts.members[i] != self._parts.members[j]:
                self._cross((i, j, position), edge)
                continue
            self._in_forward[j] += float(edge.forward_s[pair])
            self._in_backward[j] = self._in_backward[j].with_edge(edge, pair)
            self._halos[j] = edge.halos.get(pair) or self._halos[j]
        self._sync_s = [0.0] * count
        self._sharding = table.model.settings.parameter_sharding
        self._gathered: list[Running] = []

    def _new_streams(self) -> Streams:
        levels = self._table.model.machine.levels
        return Streams(tuple(level.name for level in levels), self._keeps_events)

    def _cross(self, edge: Edge, cost: EdgeCost) -> None:
        """Note a transfer between parts, before the layer that reads or behind the one that makes."""
        i, j, position = edge
        model, layers = self._table.model, self._table.space.graph.layers
        have = model.layouts(layers[i], self._splits[i]).output
        need = model.layouts(layers[j], self._splits[j]).inputs[position]
        makes, reads = self._parts.members[i], self._parts.members[j]
        both = tuple(sorted({*makes, *reads}))
        on, pair = self._streams.on, (self._choice[i], self._choice[j])
        crossing = Crossing(
            self._names[j], float(cost.forward_s[pair]), float(cost.backward_s[pair]), int(cost.backward_levels[pair]),
            on(both if _communicates(have, need) else reads),
            on(both if _communicates(need.gradient, have.gradient) else makes),
        )  # fmt: skip
        self._crossed_s[j] += crossing.forward_s + crossing.backward_s
        (self._before[j] if moves_at_reader(makes, reads) else self._behind[i]).append(crossing)

    def run(self, bucket_bytes: int) -> float:
        """Go through the step; return its length."""
        self.forward()
        self._backward(bucket_bytes)
        self._streams.finish([cost.update_s for cost in self._costs])
        if self._sharding is ParameterSharding.OPTIMIZER:
            self._gather_updated(bucket_bytes)
        return self._streams.now_s

    def forward(self) -> float:
        """Go through forward; return its length."""
        forward = self._gathering(range(len(self._costs)))
        for j, (name, cost, transfer_s) in enumerate(zip(self._names, self._costs, self._in_forward, strict=True)):
            streams = self._on[j]
            next(forward, None)
            for crossing in self._before[j]:
                crossing.forward()
            if transfer_s:  # most transfers are none, and a step is simulated hundreds of times
                streams.transfer(f"{name} input", transfer_s, 0)
            streams.compute(f"{name} forward", cost.forward_s)
            if cost.blocking_forward.seconds:
                streams.transfer(f"{name} sums", cost.blocking_forward.seconds, 0)
            for crossing in self._behind[j]:
                crossing.forward()
        return self._streams.now_s

    def _gathering(self, order: range) -> Iterator[None]:
        """Go through layers; at each sharded one wait for its parameters and start to gather those of the next.

        Yields at every layer, with its parameters there; at none where nothing is sharded.
        """
        if self._sharding is not ParameterSharding.FULL:
            return
        sharded = [j for j in order if self._costs[j].gathered]
        after = dict(itertools.pairwise(sharded))
        if sharded:
            self._gather(sharded[0])
        for j in order:
            if self._costs[j].gathered:
                for gathered in self._gathered:
                    self._streams.first.wait(gathered)
                if j in after:
                    self._gather(after[j])
            yield

    def _gather(self, j: int) -> None:
        """Start to gather the parameters of a layer."""
        found = [(axes, self._table.model.gathering(axes, b)) for axes, b in sorted(self._costs[j].gathered.items())]
        self._gathered = [self._streams.first.start(f"gather {self._names[j]}", gather) for _, gather in found]
        self._sync_s[j] += sum(gather.seconds for _, gather in found)

    def _gather_updated(self, bucket_bytes: int) -> None:
        """Wait for the parameters that other ranks updated, one message for each bucket."""
        ready = self._ready(lambda cost: cost.sync)
        for bucket in fill_buckets([(axes, num_bytes) for _, axes, num_bytes in ready], bucket_bytes):
            members = [ready[i] for i in bucket.items]
            total = sum(member[2] for member in members)
            gather = self._table.model.pricer.all_gather(bucket.key, total)
            self._streams.first.transfer("gather parameters", gather.seconds, gather.levels)
            for j, _, num_bytes in members:
                self._sync_s[j] += gather.seconds * num_bytes / total

    def _backward(self, bucket_bytes: int) -> None:
        """Run backward; start each bucket's reduction when its last gradient is there."""
        layer_by_layer = self._sharding is ParameterSharding.FULL
        buckets = self._buckets(self._ready(lambda cost: cost.sync), 1 if layer_by_layer else bucket_bytes)
        whole = self._buckets(self._ready(lambda cost: cost.whole), bucket_bytes, is_whole=True)
        order = range(len(self._costs) - 1, -1, -1)
        backward = self._gathering(order)
        for j in order:
            next(backward, None)
            for crossing in reversed(self._behind[j]):
                crossing.backward()
            own = LayerBackward.of(self._costs[j], self._in_backward[j])
            own.run(self._on[j], (*buckets.get(j, ()), *whole.get(j, ())), self._names[j])
            for crossing in self._before[j]:
                crossing.backward()

    def _ready(self, bytes_of: Callable[[LayerCost], Mapping[Axes, int]]) -> list[tuple[int, Axes, int]]:
        """Return layer, axes and bytes of gradients in the order in which backward makes them ready."""
        order = range(len(self._costs) - 1, -1, -1)
        return [(j, axes, b) for j in order for axes, b in sorted(bytes_of(self._costs[j]).items())]

    def _buckets(
        self, ready: Sequence[tuple[int, Axes, int]], bucket_bytes: int, *, is_whole: bool = False
    ) -> dict[int, list[Reduction]]:
        """Return the reductions of buckets by the layer that completes them; note each layer's share."""
        found: dict[int, list[Reduction]] = {}
        groups = [(self._parts.members[j], axes) for j, axes, _ in ready]
        sizes = (num_bytes for _, _, num_bytes in ready)
        for bucket in fill_buckets(list(zip(groups, sizes, strict=True)), bucket_bytes):
            members = [ready[i] for i in bucket.items]
            num_bytes = sum(member[2] for member in members)
            reduction = self._table.model.reduction(bucket.key[1], num_bytes, is_whole=is_whole)
            found.setdefault(members[-1][0], []).append(reduction)
            if self._keeps_events:
                for j, _, part in members:
                    self._sync_s[j] += reduction.seconds * part / num_bytes
        return found

    def _memories(self) -> list[LayerBytes]:
        """Return the bytes of every layer; what a producer keeps is not counted again with its reader."""
        model, layers = self._table.model, self._table.space.graph.layers
        found = [cost.memory for cost in self._costs]
        for (i, j, position), edge in self._table.edges.items():
            if not SPATIAL_DIMENSIONS.isdisjoint(self._splits[j].dimensions):
                have, need = model.layouts(layers[i], self._splits[i]).output, model.layouts(layers[j], self._splits[j])
                dtype = model.settings.activation_dtype(layers[i].output.dtype)
                halo = edge.halos.get((self._choice[i], self._choice[j]))
                has_frame = halo is None or halo.has_frame
                found[j] = with_halo(found[j], layers[j], have, need.inputs[position], dtype, has_frame=has_frame)
        return found

    def timeline(self) -> Timeline:
        """Return what happened; where parts differ, numbers of the step are those of the part with most of them."""
        costs, sync_s, step_s = self._costs, self._sync_s, self._streams.now_s
        total_sync_s = sum(sync_s)
        compute = [cost.forward_s + cost.backward_s + cost.collect_s + cost.update_s for cost in costs]
        blocking = [
            cost.blocking_forward.seconds + cost.blocking_backward.seconds + forward + sum(backward[:2]) + crossed
            for cost, forward, backward, crossed in zip(
                costs, self._in_forward, self._in_backward, self._crossed_s, strict=True
            )
        ]
        sent = [
            in_bytes + c.blocking_forward.num_bytes + c.blocking_backward.num_bytes
            + sum(self._table.model.sync(axes, b).num_bytes for axes, b in c.sync.items())
            + sum(self._table.model.pricer.all_reduce(axes, b).num_bytes for axes, b in c.whole.items())
            + self._table.model.gathers(c).num_bytes
            for in_bytes, c in zip(self._in_bytes, costs, strict=True)
        ]  # fmt: skip
        parts = self._parts
        busiest, compute_s = parts.largest(compute)
        own = [busiest in members for members in parts.members]
        exposed_s = max(step_s - compute_s, 0.0)
        exposed_sync_s = max(exposed_s - sum(itertools.compress(blocking, own)), 0.0)
        layers = tuple(
            LayerTimes(
                compute_s, waited_s, 0.0 if halo is None else halo.whole_s,
                0.0 if halo is None else halo.forward_s + halo.backward_s, halo is not None and halo.is_overlapped,
                sync,
                waited_s + (exposed_sync_s * sync / total_sync_s if total_sync_s else 0.0),
            )
            for compute_s, waited_s, halo, sync in zip(compute, blocking, self._halos, sync_s, strict=True)
        )  # fmt: skip
        memories = self._memories()
        fullest, memory_bytes = parts.fullest([cost.memory for cost in costs])
        held = [fullest in members for members in parts.members]
        return Timeline(
            step_s=step_s,
            compute_s=compute_s,
            blocking_s=sum(itertools.compress(blocking, own)),
            sync_s=sum(itertools.compress(sync_s, own)),
            exposed_s=exposed_s,
            source_s={
                s: sum(c.forward_s + c.backward_s for c in itertools.compress(costs, own) if c.source is s)
                for s in Source
            },
            communication_bytes=parts.largest(sent)[1],
            memory_bytes=memory_bytes,
            memory=step_memory(list(itertools.compress(self._names, held)), list(itertools.compress(memories, held))),
            layers=layers,
            events=self._streams.events(self._table.space.mesh.ranks),
        )


def _communicates(before: Layout, after: Layout) -> bool:
    return any(step.kind.communicates for step in steps(before, after))
