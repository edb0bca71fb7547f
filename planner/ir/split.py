"""Which dimension of a layer each mesh axis splits."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NewType

from planner.ir.dimension import Dimension
from planner.ir.mesh import Mesh

LayerId = NewType("LayerId", str)


@dataclass(frozen=True, slots=True)
class Split:
    """What each mesh axis splits of one layer; axes in mesh order, each exactly once."""

    axes: tuple[tuple[str, Dimension], ...]

    def __post_init__(self) -> None:
        names = [name for name, _ in self.axes]
        if len(set(names)) != len(names):
            raise ValueError(f"a mesh axis appears twice in {names}")

    @staticmethod
    def of(mesh: Mesh, dimensions: tuple[Dimension, ...]) -> "Split":
        """Return the split that gives the axes of a mesh these dimensions, in order."""
        return Split(tuple((a.name, d) for a, d in zip(mesh.axes, dimensions, strict=True)))

    @property
    def dimensions(self) -> tuple[Dimension, ...]:
        """The dimension of each axis, in mesh order."""
        return tuple(dimension for _, dimension in self.axes)

    def __str__(self) -> str:
        return " ".join(f"{axis}={dimension}" for axis, dimension in self.axes) or "one device"


Strategy = Mapping[LayerId, Split]
"""A split for every layer."""
