"""The devices of a stage as a grid with named axes, outermost (slowest link) first.

A mesh maps one to one to ``torch.distributed.device_mesh.DeviceMesh``.
"""

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MeshAxis:
    """One axis of a mesh; axes of size 1 do not exist."""

    name: str
    size: int

    def __post_init__(self) -> None:
        if self.size < 2:
            raise ValueError(f"mesh axis {self.name!r} has size {self.size}; levels of size 1 have no axis")


@dataclass(frozen=True)
class Mesh:
    """A grid of ranks, row-major: the last axis runs fastest.

    Attributes:
        axes: outermost first; empty for a single device.
        ranks: the rank at each grid position, row-major.
    """

    axes: tuple[MeshAxis, ...]
    ranks: tuple[int, ...]

    def __post_init__(self) -> None:
        names = [axis.name for axis in self.axes]
        if len(set(names)) != len(names):
            raise ValueError(f"a mesh axis appears twice in {names}")
        if self.size != math.prod(axis.size for axis in self.axes):
            raise ValueError(f"axes {self.axes} do not multiply to {len(self.ranks)} ranks")
        if len(set(self.ranks)) != len(self.ranks):
            raise ValueError(f"a rank appears twice in {self.ranks}")

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.axes, self.ranks))

    def __hash__(self) -> int:  # layouts are keys of large caches, and ranks can be thousands
        return self._hash

    @staticmethod
    def of(**sizes: int) -> "Mesh":
        """Return the mesh with these axes over ranks 0, 1, …; sizes of 1 are dropped."""
        axes = tuple(MeshAxis(name, size) for name, size in sizes.items() if size > 1)
        return Mesh(axes, tuple(range(math.prod(axis.size for axis in axes))))

    @property
    def size(self) -> int:
        """The number of ranks."""
        return len(self.ranks)

    @functools.cached_property
    def shape(self) -> tuple[int, ...]:
        """The sizes of the axes."""
        return tuple(axis.size for axis in self.axes)

    def index(self, axis_name: str) -> int:
        """Return the position of an axis."""
        return [axis.name for axis in self.axes].index(axis_name)

    def coordinates(self, position: int) -> tuple[int, ...]:
        """Return the grid coordinates of a position (not a rank)."""
        coordinates = []
        for axis in reversed(self.axes):
            position, coordinate = divmod(position, axis.size)
            coordinates.append(coordinate)
        return tuple(reversed(coordinates))

    def position(self, coordinates: Iterable[int]) -> int:
        """Return the position (not the rank) of grid coordinates."""
        position = 0
        for axis, coordinate in zip(self.axes, coordinates, strict=True):
            position = position * axis.size + coordinate
        return position

    def groups(self, axis_indices: Iterable[int]) -> tuple[tuple[int, ...], ...]:
        """Return the groups of positions that differ only along the given axes, each in row-major order."""
        varying = set(axis_indices)
        groups: dict[tuple[int, ...], list[int]] = {}
        for position in range(self.size):
            coordinates = self.coordinates(position)
            key = tuple(c for i, c in enumerate(coordinates) if i not in varying)
            groups.setdefault(key, []).append(position)
        return tuple(tuple(group) for group in groups.values())
