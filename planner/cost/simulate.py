"""One training step in time: a compute stream and one stream per group of gradient reductions.

What the runtime blocks on, blocks here: transfers between layers, partial sums, batch norm
statistics. Gradient reductions are collected in the runtime's buckets and run behind the rest of
backward; those that share links (any two groups, here) run one after the other. The optimizer
starts when backward and all reductions have ended.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from planner.cost.model import Axes
from planner.cost.table import CostTable
from planner.ir.bucket import fill_buckets
from planner.profile.table import Source


@dataclass(frozen=True, slots=True)
class Event:
    """Something that took time on a stream."""

    name: str
    stream: str
    start_s: float
    stop_s: float


@dataclass(frozen=True, slots=True)
class LayerTimes:
    """What a layer adds to a step, in seconds; transfers are those of its inputs."""

    compute_s: float
    transfer_s: float
    sync_s: float
    exposed_s: float


@dataclass(frozen=True, slots=True)
class Timeline:
    """A simulated step.

    Attributes:
        step_s: its length.
        compute_s: forward, backward and optimizer compute.
        blocking_s: communication that compute waits for.
        sync_s: gradient reductions, hidden or not.
        exposed_s: communication that is not hidden behind compute.
        source_s: forward and backward compute by where the seconds are from.
        communication_bytes: sent by the busiest rank.
        memory_bytes: safe bound of the peak on the busiest device.
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
    layers: tuple[LayerTimes, ...]
    events: tuple[Event, ...]


def simulate(table: CostTable, choice: Sequence[int], bucket_bytes: int) -> Timeline:
    """Return the timeline of one step of the strategy at these positions of the space."""
    simulation = _Simulation(table, choice, keeps_events=True)
    simulation.run(bucket_bytes)
    return simulation.timeline()


def simulated_step_s(table: CostTable, choice: Sequence[int], bucket_bytes: int) -> float:
    """Return only the length of the step."""
    return _Simulation(table, choice, keeps_events=False).run(bucket_bytes)


class _Simulation:
    def __init__(self, table: CostTable, choice: Sequence[int], *, keeps_events: bool) -> None:
        self._table, self._keeps_events = table, keeps_events
        self._names = [layer.id for layer in table.space.graph.layers]
        self._costs = [costs[c] for costs, c in zip(table.layers, choice, strict=True)]
        count = len(self._costs)
        self._in_forward, self._in_backward, self._in_bytes = (
            [0.0] * count,
            [0.0] * count,
            [0.0] * count,
        )
        for (i, j, _), edge in table.edges.items():
            pair = choice[i], choice[j]
            self._in_forward[j] += float(edge.forward_s[pair])
            self._in_backward[j] += float(edge.backward_s[pair])
            self._in_bytes[j] += float(edge.num_bytes[pair])
        self._events: list[Event] = []
        self._now = 0.0

    def _advance(self, name: str, stream: str, seconds: float) -> None:
        if seconds > 0 and self._keeps_events:
            self._events.append(Event(name, stream, self._now, self._now + seconds))
        self._now += seconds

    def run(self, bucket_bytes: int) -> float:
        """Go through the step; return its length."""
        for name, cost, transfer_s in zip(self._names, self._costs, self._in_forward, strict=True):
            self._advance(f"{name} input", "transfer", transfer_s)
            self._advance(f"{name} forward", "compute", cost.forward_s)
            self._advance(f"{name} sums", "transfer", cost.blocking_forward.seconds)
        ready = self._backward()
        self._sync_s, last_sync_s = self._reduce(ready, bucket_bytes)
        self._exposed_sync_s = max(last_sync_s - self._now, 0.0)
        self._now = max(self._now, last_sync_s)
        self._advance("optimizer", "compute", sum(cost.update_s for cost in self._costs))
        return self._now

    def _backward(self) -> list[tuple[int, Axes, int, float]]:
        """Run backward; return layer, axes, bytes and time of every gradient, in order."""
        ready = []
        for j in range(len(self._costs) - 1, -1, -1):
            name, cost = self._names[j], self._costs[j]
            self._advance(f"{name} sums backward", "transfer", cost.blocking_backward.seconds)
            self._advance(f"{name} backward", "compute", cost.backward_s)
            ready += [(j, axes, num_bytes, self._now) for axes, num_bytes in sorted(cost.sync.items())]
            self._advance(f"{name} input backward", "transfer", self._in_backward[j])
        return ready

    def _reduce(self, ready: list[tuple[int, Axes, int, float]], bucket_bytes: int) -> tuple[list[float], float]:
        """Run the gradient reductions; return the seconds each layer's take and when the last ends."""
        sync_s = [0.0] * len(self._costs)
        end = 0.0
        for bucket in fill_buckets([(axes, num_bytes) for _, axes, num_bytes, _ in ready], bucket_bytes):
            members = [ready[i] for i in bucket.items]
            num_bytes = sum(member[2] for member in members)
            seconds = self._table.model.pricer.all_reduce(bucket.key, num_bytes).seconds
            start = max(end, members[-1][3])
            end = start + seconds
            if self._keeps_events:
                self._events.append(Event(f"sync {self._names[members[-1][0]]}", "sync", start, end))
            for j, _, part, _ in members:
                sync_s[j] += seconds * part / num_bytes
        return sync_s, end

    def timeline(self) -> Timeline:
        """Return what happened."""
        costs, sync_s, exposed_sync_s = self._costs, self._sync_s, self._exposed_sync_s
        total_sync_s, update_s = sum(sync_s), sum(cost.update_s for cost in costs)
        blocking = [
            cost.blocking_forward.seconds + cost.blocking_backward.seconds + forward + backward
            for cost, forward, backward in zip(costs, self._in_forward, self._in_backward, strict=True)
        ]
        layers = tuple(
            LayerTimes(
                cost.forward_s + cost.backward_s + cost.update_s, transfer_s, sync,
                transfer_s + (exposed_sync_s * sync / total_sync_s if total_sync_s else 0.0),
            )
            for cost, transfer_s, sync in zip(costs, blocking, sync_s, strict=True)
        )  # fmt: skip
        sent = sum(self._in_bytes) + sum(
            c.blocking_forward.num_bytes + c.blocking_backward.num_bytes
            + sum(self._table.model.pricer.all_reduce(axes, b).num_bytes for axes, b in c.sync.items())
            for c in costs
        )  # fmt: skip
        return Timeline(
            step_s=self._now,
            compute_s=sum(c.forward_s + c.backward_s for c in costs) + update_s,
            blocking_s=sum(blocking),
            sync_s=total_sync_s,
            exposed_s=sum(blocking) + exposed_sync_s,
            source_s={s: sum(c.forward_s + c.backward_s for c in costs if c.source is s) for s in Source},
            communication_bytes=sent,
            memory_bytes=sum(c.memory.resident for c in costs) + max(c.memory.transient for c in costs),
            layers=layers,
            events=tuple(sorted(self._events, key=lambda e: (e.start_s, e.stop_s, e.name))),
        )
