"""Overlapping or disjoint parts of an image or a volume, as in domain decomposition methods.

The space is cut into a grid of disjoint parts whose sizes differ by at most one. With an overlap, every part reaches so
many pixels further over each inner boundary (the minimal overlap of Schwarz methods), so two neighbours share
``2 * overlap`` rows; at the image's own border nothing is added.
"""

import itertools
from collections.abc import Sequence

from planner.errors import UsageError
from planner.ir.layout import Interval, balanced_pieces
from planner.ir.region import Region


def subdomains(space: Sequence[int], grid: Sequence[int], overlap: int = 0) -> tuple[Region, ...]:
    """Return the parts of a space, row-major in the grid.

    Args:
        space: pixels in every dimension of space, such as (height, width) or (depth, height, width).
        grid: number of parts in each of them.
        overlap: pixels by which a part reaches over each inner boundary; 0 for disjoint parts.

    Raises:
        UsageError: the grid does not fit the space, or a part would reach further than its neighbour.
    """
    if not space:
        raise UsageError("a sample has channels and at least one dimension of space, such as 1x32x32")
    what = f"a decomposition of {_times(space)} pixels into {_times(grid)} parts"
    if len(space) != len(grid):
        raise UsageError(f"{what}: the grid needs a number of parts for each of the {len(space)} dimensions of space")
    if any(not 1 <= parts <= size for size, parts in zip(space, grid, strict=True)):
        raise UsageError(f"{what}: every part needs at least one pixel, and every dimension at least one part")
    cut = [size // parts for size, parts in zip(space, grid, strict=True) if parts > 1]
    if overlap < 0 or (overlap and cut and overlap > min(cut)):
        raise UsageError(f"{what}: the overlap must be 0 to {min(cut, default=0)} pixels, and is {overlap}")
    rows = [_parts(size, parts, overlap) for size, parts in zip(space, grid, strict=True)]
    return tuple(
        Region(tuple(start for start, _ in part), tuple(stop for _, stop in part)) for part in itertools.product(*rows)
    )


def parse_grid(text: str, what: str = "grid", such_as: str = "2x2 or 1x2x2") -> tuple[int, ...]:
    """Return the numbers of a grid such as ``2x2`` or ``1x2x2``, or of what else is written so.

    Raises:
        UsageError: the text is no such grid.
    """
    parts = text.lower().split("x")
    if not all(part.strip().isdecimal() and int(part) for part in parts):
        raise UsageError(f"{what} {text!r} is not a whole number for each dimension, such as {such_as}")
    return tuple(int(part) for part in parts)


def _parts(size: int, parts: int, overlap: int) -> list[Interval]:
    return [(max(start - overlap, 0), min(stop + overlap, size)) for start, stop in balanced_pieces(size, parts)]


def _times(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))
