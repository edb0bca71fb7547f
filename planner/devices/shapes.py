"""Which meshes can be laid over levels of devices: how many of each level, cut into which axes.

A shape says for every level, outermost first, into which factors the devices used of it are cut. Fewer than all may be
used, the first ones of every group, so that what is left is a regular machine. ``(1,)`` uses one and has no axis.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Final

MAX_FACTORS: Final = 3  # of one level; a layer splits at most sample, one more and a channel there

Shape = tuple[tuple[int, ...], ...]


def factorings(size: int) -> list[tuple[int, ...]]:
    """Return the ordered factorings of a level, fewest factors first, then ascending."""

    def into(parts: int, rest: int) -> Iterator[tuple[int, ...]]:
        if parts == 1:
            yield (rest,)
            return
        for factor in range(2, rest // 2 + 1):
            if rest % factor == 0:
                yield from ((factor, *others) for others in into(parts - 1, rest // factor))

    return [factors for parts in range(1, MAX_FACTORS + 1) for factors in into(parts, size)]


def factored(sizes: Sequence[int]) -> list[Shape]:
    """Return all shapes that cut levels of these sizes, fewest axes first, then as the factors ascend."""
    shapes = itertools.product(*map(factorings, sizes))
    return sorted(shapes, key=num_axes)


def fewer(sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """Return how many of each level to use where not all are, the most promising first.

    Of a level all are used, or a divisor of their number, or a power of two. First come those that use all or one of
    each level, since it is a slow level that is worth leaving; then those with most devices.
    """
    choices = itertools.product(*map(_counts, sizes))
    found = [counts for counts in choices if counts != tuple(sizes)]

    def order(counts: tuple[int, ...]) -> tuple[int, int, tuple[int, ...]]:
        parts = sum(1 < count < size for count, size in zip(counts, sizes, strict=True))
        return parts, -math.prod(counts), counts

    return sorted(found, key=order)


def _counts(size: int) -> list[int]:
    return [n for n in range(1, size + 1) if size % n == 0 or not n & (n - 1)]


def merges(sizes: Sequence[int], max_axes: int) -> list[tuple[int, ...]]:
    """Return the ways to join neighbouring levels so that at most so many axes are left, as lengths of the runs.

    Levels of one device need no axis. With few enough levels nothing is joined; else as few as possible, first the
    innermost, whose links are the most alike.
    """
    count = len(sizes)
    for joins in range(count):
        found = []
        for cuts in itertools.combinations(range(1, count), count - 1 - joins):
            runs = [b - a for a, b in itertools.pairwise((0, *cuts, count))]
            starts = (0, *itertools.accumulate(runs))
            axes = sum(math.prod(sizes[a:b]) > 1 for a, b in itertools.pairwise(starts))
            if axes <= max_axes:
                found.append(tuple(runs))
        if found:
            return found
    return [(count,)]


def num_axes(shape: Shape) -> int:
    """Return how many axes a shape has."""
    return sum(factor > 1 for factors in shape for factor in factors)
