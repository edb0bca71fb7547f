"""Which dimension of a layer each mesh axis splits."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NewType

from planner.ir.dimension import Dimension
from planner.ir.mesh import Mesh

LayerId = NewType("LayerId", str)


@dataclass(frozen=True)
class Split:
    """What each mesh axis splits of one layer; axes in mesh order, each exactly once."""

    axes: tuple[tuple[str, Dimension], ...]

    def __post_init__(self) -> None:
        names = [name for name, _ in self.axes]
        if len(set(names)) != len(names):
            raise ValueError(f"a mesh axis appears twice in {names}")

    @functools.cached_property
    def _hash(self) -> int:
        return hash(self.axes)

    def __hash__(self) -> int:  # a key of caches
        return self._hash

    @staticmethod
    def of(mesh: Mesh, dimensions: tuple[Dimension, ...]) -> "Split":
        """Return the split that gives the axes of a mesh these dimensions, in order."""
        return _split(tuple(axis.name for axis in mesh.axes), dimensions)

    @functools.cached_property
    def dimensions(self) -> tuple[Dimension, ...]:
        """The dimension of each axis, in mesh order."""
        return tuple(dimension for _, dimension in self.axes)

    def __str__(self) -> str:
        return " ".join(f"{axis}={dimension}" for axis, dimension in self.axes) or "one device"


@functools.lru_cache(maxsize=1 << 12)
def _split(names: tuple[str, ...], dimensions: tuple[Dimension, ...]) -> Split:
    """Return the split with these axes; one object for each, so that comparing them is cheap."""
    return Split(tuple(zip(names, dimensions, strict=True)))


Strategy = Mapping[LayerId, Split]
"""A split for every layer."""
