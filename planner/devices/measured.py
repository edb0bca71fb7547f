"""Collectives as they were measured on a machine, by size: what network, library and cores give together."""

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property


class CollectiveKind(StrEnum):
    """What is measured; ``num_bytes`` of its points means the size in brackets, in bytes on one rank."""

    ALL_REDUCE = "all_reduce"
    """[the buffer]"""
    ALL_GATHER = "all_gather"
    """[the result]"""
    REDUCE_SCATTER = "reduce_scatter"
    """[the buffer before it]"""
    ALL_TO_ALL = "all_to_all"
    """[what the rank sends to others]"""


@dataclass(frozen=True, slots=True)
class CollectivePoint:
    """One size of a collective, median over repeats on the slowest rank.

    Attributes:
        num_bytes: see ``CollectiveKind``.
        seconds: while nothing else runs.
        loaded_s: while the rank computes as well.
        lost_s: by how much that computation takes longer for it.
    """

    num_bytes: int
    seconds: float
    loaded_s: float
    lost_s: float


@dataclass(frozen=True)
class MeasuredCollective:
    """Times of one collective over whole levels of a machine, piecewise linear in its size.

    Below the smallest size the time is that of the smallest; above the largest it goes on with the
    slope of the last piece, but at least half of the largest's time per byte. Times never fall with the size.

    Attributes:
        kind: which collective.
        levels: names of the levels that each group spans, outermost first.
        points: in ascending order of size, at least two.
    """

    kind: CollectiveKind
    levels: tuple[str, ...]
    points: tuple[CollectivePoint, ...]

    def seconds(self, num_bytes: float) -> float:
        """Return its time while nothing else runs."""
        return _interpolated(self._sizes, self._seconds, num_bytes)

    def loaded_s(self, num_bytes: float) -> float:
        """Return its time behind computation; never less than alone."""
        return max(_interpolated(self._sizes, self._loaded_s, num_bytes), self.seconds(num_bytes))

    def lost_s(self, num_bytes: float) -> float:
        """Return by how much it delays that computation."""
        return _interpolated(self._sizes, self._lost_s, num_bytes)

    @cached_property
    def _sizes(self) -> list[float]:
        return [float(point.num_bytes) for point in self.points]

    @cached_property
    def _seconds(self) -> list[float]:
        return _rising([point.seconds for point in self.points])

    @cached_property
    def _loaded_s(self) -> list[float]:
        return _rising([point.loaded_s for point in self.points])

    @cached_property
    def _lost_s(self) -> list[float]:
        return _rising([point.lost_s for point in self.points])


def _rising(values: Sequence[float]) -> list[float]:
    return list(itertools.accumulate(values, max))


def _interpolated(sizes: Sequence[float], values: Sequence[float], at: float) -> float:
    if at <= sizes[0]:
        return values[0]
    right = min(bisect.bisect_left(sizes, at), len(sizes) - 1)
    left = right - 1
    slope = (values[right] - values[left]) / (sizes[right] - sizes[left])
    if at > sizes[-1]:  # a noisy last point must not promise that more bytes take no time
        return values[-1] + max(slope, 0.5 * values[-1] / sizes[-1]) * (at - sizes[-1])
    return values[left] + slope * (at - sizes[left])
