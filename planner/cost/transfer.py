"""Seconds and bytes of the steps that ``planner.ir.transfer`` lists."""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from planner.cost.collectives import (
    all_gather_s,
    all_reduce_s,
    exchange_s,
    least_all_reduce_rate,
    reduce_scatter_s,
)
from planner.cost.moves import frame, moves, used_rank
from planner.devices.measured import CollectiveKind, MeasuredCollective
from planner.devices.route import Router
from planner.ir.layout import Layout
from planner.ir.transfer import StepKind


@dataclass(frozen=True, slots=True)
class Price:
    """What a transfer costs.

    Attributes:
        seconds: while nothing else is sent.
        num_bytes: sent by the busiest rank.
        levels: bit set of the machine's levels whose links it uses, see ``StepPricer.levels``.
    """

    seconds: float
    num_bytes: float
    levels: int = 0

    def __add__(self, other: "Price") -> "Price":
        return Price(self.seconds + other.seconds, self.num_bytes + other.num_bytes, self.levels | other.levels)


FREE = Price(0.0, 0.0)
_FORMULAS: Final = {
    CollectiveKind.ALL_REDUCE: all_reduce_s,
    CollectiveKind.ALL_GATHER: all_gather_s,
    CollectiveKind.REDUCE_SCATTER: reduce_scatter_s,
    CollectiveKind.ALL_TO_ALL: exchange_s,
}


@dataclass(frozen=True, slots=True)
class Reduction:
    """A gradient reduction behind backward.

    Attributes:
        seconds: while nothing else runs.
        loaded_s: while the device computes.
        lost_s: by how much that computation takes longer for it.
        levels: as in ``Price``.
    """

    seconds: float
    loaded_s: float
    lost_s: float
    levels: int


@dataclass(frozen=True)
class StepPricer:
    """Prices steps on the machine of a router; keeps what it priced for its lifetime.

    Attributes:
        router: of the machine.
        packing_bytes_per_s: memory bandwidth with which a device copies pieces, into and out of messages and elsewhere.
    """

    router: Router
    packing_bytes_per_s: float = math.inf
    _prices: dict[tuple[Layout, Layout, int], Price] = field(default_factory=dict)
    _times: dict[tuple[CollectiveKind, tuple[int, ...], int], float] = field(default_factory=dict)
    _measured: dict[tuple[CollectiveKind, tuple[int, ...]], MeasuredCollective | None] = field(default_factory=dict)
    _least_rates: dict[tuple[tuple[int, ...], float], float] = field(default_factory=dict)

    @functools.cached_property
    def _level_bits(self) -> tuple[int, ...]:
        """For every mesh axis the bits of its levels: ``gpu1`` is a factor of level ``gpu``, ``leaf+node`` are two."""
        names = [level.name for level in self.router.graph.levels]
        parts = (axis.name.rstrip("0123456789").split("+") for axis in self.router.mesh.axes)
        return tuple(sum(1 << names.index(name) for name in own) for own in parts)

    def price(self, source: Layout, target: Layout, item_bytes: int) -> Price:
        """Return the price of turning one layout into another, for elements of so many bytes."""
        key = (source.value, target.value, item_bytes)
        if key not in self._prices:
            self._prices[key] = self._price(*key)
        return self._prices[key]

    def _price(self, source: Layout, target: Layout, item_bytes: int) -> Price:
        if source.shares or target.shares:  # pieces are not alike, so no small tensor stands for this one
            listed = moves(source, target)
            return sum(
                (self.move(m.kind, m.axes, m.elements * item_bytes, m.copied * item_bytes) for m in listed), FREE
            )
        found = frame(source.shape, source.mesh, source.cuts, target.cuts)
        share = found.share(found.code(source, target), used_rank([source, target]))
        listed = moves(share.source.at(source.placements), share.target.at(target.placements))
        priced = (
            self.move(m.kind, m.axes, share.elements(m) * item_bytes, share.copied(m) * item_bytes) for m in listed
        )
        return sum(priced, FREE)

    def all_reduce(self, axes: tuple[int, ...], num_bytes: int) -> Price:
        """Return the price of an all-reduce of a buffer of so many bytes on each rank."""
        return self._collective(CollectiveKind.ALL_REDUCE, axes, num_bytes, 2 * self._others(axes) * num_bytes)

    def reduction(
        self, axes: tuple[int, ...], num_bytes: int, kind: CollectiveKind = CollectiveKind.ALL_REDUCE
    ) -> Reduction:
        """Return what a collective behind computation takes; not slower, and at no cost to it, where unmeasured."""
        seconds, levels = self._seconds(kind, axes, num_bytes), self.levels(axes)
        measured = self._of_levels(kind, levels)
        if measured is None:
            return Reduction(seconds, seconds, 0.0, levels)
        scale = seconds / measured.seconds(num_bytes)  # 1 for whole levels; their factors suffer in proportion
        return Reduction(seconds, scale * measured.loaded_s(num_bytes), scale * measured.lost_s(num_bytes), levels)

    def least_reduction_s(self, axes: tuple[int, ...], num_bytes: float, most_bytes: float) -> float:
        """Return what reducing so many bytes takes at least, in messages of up to ``most_bytes`` together with others.

        A message's seconds per byte are least where it is longest or, measured, at a measured size: between two of
        those its time is a line.
        """
        key = axes, most_bytes
        if key not in self._least_rates:
            measured = self.measured(CollectiveKind.ALL_REDUCE, axes)
            if measured is None:
                self._least_rates[key] = least_all_reduce_rate(self.router, axes, most_bytes)
            else:
                sizes = [most_bytes, *(p.num_bytes for p in measured.points if 0 < p.num_bytes < most_bytes)]
                self._least_rates[key] = min(measured.seconds(size) / size for size in sizes)
        return num_bytes * self._least_rates[key]

    def all_gather(self, axes: tuple[int, ...], num_bytes: int) -> Price:
        """Return the price of an all-gather whose result has so many bytes on each rank."""
        return self._collective(CollectiveKind.ALL_GATHER, axes, num_bytes, self._others(axes) * num_bytes)

    def reduce_scatter(self, axes: tuple[int, ...], num_bytes: int) -> Price:
        """Return the price of a reduce-scatter of a buffer of so many bytes on each rank."""
        return self._collective(CollectiveKind.REDUCE_SCATTER, axes, num_bytes, self._others(axes) * num_bytes)

    def exchange(self, axes: tuple[int, ...], num_bytes: int) -> Price:
        """Return the price of an exchange in which the busiest rank moves so many bytes."""
        return self._collective(CollectiveKind.ALL_TO_ALL, axes, num_bytes, float(num_bytes))

    def messages_s(self, sizes: Mapping[tuple[int, int], int]) -> float:
        """Return the time of messages between ranks that are all sent at once.

        A machine whose collectives are measured over the levels that the messages cross takes what an exchange of the
        busiest rank's bytes takes there; else the links decide, every message as long as the largest.

        Args:
            sizes: bytes by sender and receiver, positions of the mesh.
        """
        if not sizes:
            return 0.0
        mesh, bits = self.router.mesh, self._level_bits
        crossed, sent = 0, dict.fromkeys((source for source, _ in sizes), 0)
        for (source, target), num_bytes in sizes.items():
            both = zip(bits, mesh.coordinates(source), mesh.coordinates(target), strict=True)
            crossed |= sum(bit for bit, a, b in both if a != b)
            sent[source] += num_bytes
        measured = self._of_levels(CollectiveKind.ALL_TO_ALL, crossed)
        if measured is not None:
            return measured.seconds(max(sent.values()))
        path = self.router.between(sizes)
        return path.latency_s + max(sizes.values()) / path.bandwidth_bytes_per_s

    def lost_s_per_byte(self, num_bytes: float) -> float:
        """Return what a message of so many bytes takes of the processors for each byte; 0 where it is not measured."""
        found = [c for c in self.router.graph.collectives if c.kind is CollectiveKind.ALL_TO_ALL]
        return max((c.lost_s(num_bytes) for c in found), default=0.0) / num_bytes if num_bytes else 0.0

    def _collective(self, kind: CollectiveKind, axes: tuple[int, ...], num_bytes: int, sent_bytes: float) -> Price:
        return Price(self._seconds(kind, axes, num_bytes), sent_bytes, self.levels(axes))

    def _others(self, axes: tuple[int, ...]) -> float:
        """Return the share of the other ranks of a group along these axes."""
        size = math.prod(self.router.mesh.shape[a] for a in axes)
        return (size - 1) / size

    def _seconds(self, kind: CollectiveKind, axes: tuple[int, ...], num_bytes: int) -> float:
        """Return the time of a collective: measured, or by formula from the links."""
        key = kind, axes, num_bytes
        if key not in self._times:
            measured = self.measured(kind, axes)
            self._times[key] = (
                measured.seconds(num_bytes) if measured else _FORMULAS[kind](self.router, axes, num_bytes)
            )
        return self._times[key]

    def levels(self, axes: tuple[int, ...]) -> int:
        """Return the levels of the machine that groups along these axes span, as a set of bits."""
        found = 0
        for axis in axes:
            found |= self._level_bits[axis]
        return found

    def measured(self, kind: CollectiveKind, axes: tuple[int, ...]) -> MeasuredCollective | None:
        """Return the measurements of a collective along these axes: they must be whole levels of the machine."""
        if not self.router.graph.collectives:
            return None
        key = (kind, axes)
        if key not in self._measured:
            self._measured[key] = self._find_measured(kind, axes)
        return self._measured[key]

    def _find_measured(self, kind: CollectiveKind, axes: tuple[int, ...]) -> MeasuredCollective | None:
        graph, shape, levels = self.router.graph, self.router.mesh.shape, self.levels(axes)
        spanned = [level.size for i, level in enumerate(graph.levels) if levels >> i & 1]
        is_whole = math.prod(shape[a] for a in axes) == math.prod(spanned)
        return self._of_levels(kind, levels) if is_whole else None

    def _of_levels(self, kind: CollectiveKind, levels: int) -> MeasuredCollective | None:
        """Return the measurements of a collective over these levels, whole."""
        graph = self.router.graph
        names = tuple(level.name for i, level in enumerate(graph.levels) if levels >> i & 1)
        return next((c for c in graph.collectives if (c.kind, c.levels) == (kind, names)), None)

    def move(self, kind: StepKind, axes: tuple[int, ...], num_bytes: int, copied_bytes: int) -> Price:
        """Return the price of a step: what ranks send, and what each copies for it before and after.

        Args:
            kind: of the step.
            axes: along which ranks talk.
            num_bytes: of what says ``planner.cost.moves.Move``; of no account where no ranks talk.
            copied_bytes: read or written on the busiest rank, see ``planner.cost.moves.copied_elements``.
        """
        copying = Price(copied_bytes / self.packing_bytes_per_s, 0.0)
        return copying + self._collective_of(kind)(axes, num_bytes) if kind.communicates else copying

    def _collective_of(self, kind: StepKind) -> Callable[[tuple[int, ...], int], Price]:
        match kind:
            case StepKind.ALL_REDUCE:
                return self.all_reduce
            case StepKind.REDUCE_SCATTER:
                return self.reduce_scatter
            case StepKind.ALL_GATHER:
                return self.all_gather
            case _:
                return self.exchange
