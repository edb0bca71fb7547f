"""Number partitioning: things of given lengths into bins, so that the fullest bin is as empty as can be."""

import heapq
from collections.abc import Sequence
from typing import Final

FEW: Final = 12
"""Things up to which the partition is exact; beyond, longest first, at most 4/3 - 1/(3 bins) of the best [Graham69]."""


def partitioned(lengths: Sequence[float], num_bins: int) -> tuple[int, ...]:
    """Return the bin of each thing; bins are numbered in the order of their first thing."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    found = _longest_first(lengths, order, num_bins)
    if len(lengths) <= FEW:
        found = _exact(lengths, order, num_bins, found)
    numbers: dict[int, int] = {}
    return tuple(numbers.setdefault(own, len(numbers)) for own in found)


def fullest(lengths: Sequence[float], bins: Sequence[int]) -> float:
    """Return what the fullest bin holds."""
    held: dict[int, float] = {}
    for length, own in zip(lengths, bins, strict=True):
        held[own] = held.get(own, 0.0) + length
    return max(held.values(), default=0.0)


def _longest_first(lengths: Sequence[float], order: Sequence[int], num_bins: int) -> list[int]:
    heap = [(0.0, own) for own in range(num_bins)]
    found = [0] * len(lengths)
    for i in order:
        held, own = heapq.heappop(heap)
        found[i] = own
        heapq.heappush(heap, (held + lengths[i], own))
    return found


def _exact(lengths: Sequence[float], order: Sequence[int], num_bins: int, start: list[int]) -> list[int]:
    """Return the best partition by branch and bound; bins that hold equally much are tried once."""
    best, best_held = start, fullest(lengths, start)
    least = max(sum(lengths) / num_bins, max(lengths, default=0.0))
    found = list(start)
    held = [0.0] * num_bins

    def place(depth: int) -> None:
        nonlocal best, best_held
        if best_held <= least:
            return
        if depth == len(order):
            best, best_held = list(found), max(held)
            return
        i = order[depth]
        tried: set[float] = set()
        for own in range(num_bins):
            before = held[own]
            if before in tried or before + lengths[i] >= best_held:
                continue
            tried.add(before)
            held[own], found[i] = before + lengths[i], own
            place(depth + 1)
            held[own] = before

    place(0)
    return best
