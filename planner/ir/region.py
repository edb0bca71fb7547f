"""Hyper-rectangles of a tensor, in global coordinates."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Region:
    """The elements ``start <= index < stop`` in every dimension."""

    start: tuple[int, ...]
    stop: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.start) != len(self.stop) or any(a > b for a, b in zip(self.start, self.stop, strict=True)):
            raise ValueError(f"no region from {self.start} to {self.stop}")

    @property
    def shape(self) -> tuple[int, ...]:
        """The size in every dimension."""
        return tuple(b - a for a, b in zip(self.start, self.stop, strict=True))

    @property
    def volume(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    def intersect(self, other: "Region") -> "Region | None":
        """Return the common elements, or None where there are none."""
        start = tuple(map(max, self.start, other.start))
        stop = tuple(map(min, self.stop, other.stop))
        return Region(start, stop) if all(a < b for a, b in zip(start, stop, strict=True)) else None

    def contains(self, other: "Region") -> bool:
        """Return whether every element of the other region is in this one."""
        return all(a <= c and d <= b for a, b, c, d in zip(self.start, self.stop, other.start, other.stop, strict=True))

    def slices_in(self, frame: "Region") -> tuple[slice, ...]:
        """Return the slices that select this region from a tensor that holds ``frame``."""
        return tuple(slice(a - f, b - f) for a, b, f in zip(self.start, self.stop, frame.start, strict=True))
