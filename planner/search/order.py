"""In which order variables are eliminated."""

import heapq
import math
from collections.abc import Collection, Sequence
from typing import Final

MAX_COUNTED: Final = 24
"""Neighbours up to which missing edges are counted; above, all of them are taken as missing."""


def elimination_order(sizes: Sequence[int], edges: Collection[tuple[int, int]]) -> tuple[list[int], float]:
    """Return a min-fill order and the entries of the largest table that is minimised over.

    Next is the variable whose neighbours lack the fewest edges among each other, then the one whose
    neighbours make the smallest table, then the one that fewer eliminations one after the other have led to (so
    that the insides of repeated blocks are eliminated alike, before anything from outside reaches them), then the
    first. With few neighbours each it takes near-linear time.
    """
    neighbours = _neighbours(len(sizes), edges)
    generation = [0] * len(sizes)

    def rank(v: int) -> tuple[int, float, int, int]:
        around = neighbours[v]
        links = len(around) * (len(around) - 1) // 2
        if len(around) <= MAX_COUNTED:
            links -= sum(len(neighbours[a] & around) for a in around) // 2
        return links, math.prod(float(sizes[n]) for n in around), generation[v], v

    ranks = [rank(v) for v in range(len(sizes))]
    heap = list(ranks)
    heapq.heapify(heap)
    left = [True] * len(sizes)
    order, largest = [], 0.0
    while heap:
        best = heapq.heappop(heap)
        v = best[-1]
        if not left[v] or best != ranks[v]:
            continue  # out of date
        order.append(v)
        left[v] = False
        largest = max(largest, sizes[v] * best[1])
        around = neighbours[v]
        touched = set(around)
        for a in around:
            neighbours[a].discard(v)
            generation[a] = max(generation[a], generation[v] + 1)
        for a in around:
            if added := around - neighbours[a] - {a}:
                neighbours[a] |= added
                touched |= neighbours[a]
        for u in touched:
            changed = rank(u)
            if changed != ranks[u]:
                ranks[u] = changed
                heapq.heappush(heap, changed)
    return order, largest


def _neighbours(count: int, edges: Collection[tuple[int, int]]) -> list[set[int]]:
    found: list[set[int]] = [set() for _ in range(count)]
    for i, j in edges:
        found[i].add(j)
        found[j].add(i)
    return found
