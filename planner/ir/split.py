"""Which dimension of a layer each mesh axis splits, and in which shares."""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NewType

from planner.ir.dimension import Dimension
from planner.ir.mesh import Mesh

LayerId = NewType("LayerId", str)


Tiles = tuple[tuple[int, tuple[tuple[int, int], ...]], ...]
"""Dimensions of an output, each with the interval that every piece of it is enlarged to."""
Shares = tuple[int, ...] | None
"""Of a mesh axis: the weight of each coordinate, in lowest terms; None where all are equal."""


def plain_shares(weights: tuple[int, ...]) -> Shares:
    """Return weights in lowest terms, None where they are equal.

    Raises:
        ValueError: one is negative, or none is positive.
    """
    if min(weights, default=0) < 0 or not any(weights):
        raise ValueError(f"shares {list(weights)} must be whole numbers from 0 on, not all 0")
    divisor = math.gcd(*weights)
    return None if min(weights) == max(weights) else tuple(weight // divisor for weight in weights)


@dataclass(frozen=True)
class Split:
    """What each mesh axis splits of one layer; axes in mesh order, each exactly once.

    Attributes:
        axes: what each axis splits.
        shares: weights of the coordinates of an axis, where they are not equal: pieces are as large as their weights
            say. With weight 0 a coordinate is idle: it holds nothing of the layer and computes nothing of it. That is
            said of whole layers, ``replicate`` with one weight that is not 0: one coordinate runs the layer alone.
        tiles: what ranks compute instead of their pieces where they compute what neighbours compute too, so that no
            rows need to come from them. Derived from the layers behind (``planner.ir.recompute``), never in a file.
    """

    axes: tuple[tuple[str, Dimension], ...]
    shares: tuple[tuple[str, tuple[int, ...]], ...] = ()
    tiles: Tiles = ()

    def __post_init__(self) -> None:
        names = [name for name, _ in self.axes]
        if len(set(names)) != len(names):
            raise ValueError(f"a mesh axis appears twice in {names}")
        if self.shares:
            given = dict(self.shares)
            if len(given) != len(self.shares) or not set(given) <= set(names):
                raise ValueError(f"shares of {[name for name, _ in self.shares]} on the mesh axes {names}")
            plain = ((name, plain_shares(given[name])) for name in names if name in given)
            object.__setattr__(self, "shares", tuple((name, own) for name, own in plain if own is not None))

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.axes, self.shares, self.tiles))

    def __hash__(self) -> int:  # a key of caches
        return self._hash

    @staticmethod
    def of(mesh: Mesh, dimensions: tuple[Dimension, ...]) -> "Split":
        """Return the split that gives the axes of a mesh these dimensions, in order."""
        return _split(tuple(axis.name for axis in mesh.axes), dimensions)

    def with_shares(self, shares: Mapping[str, tuple[int, ...]]) -> "Split":
        """Return this split with shares by axis, and no others."""
        return Split(self.axes, tuple(shares.items()))

    @functools.cached_property
    def dimensions(self) -> tuple[Dimension, ...]:
        """The dimension of each axis, in mesh order."""
        return tuple(dimension for _, dimension in self.axes)

    @functools.cached_property
    def weights(self) -> tuple[Shares, ...]:
        """The shares of each axis, in mesh order; empty where all are equal."""
        given = dict(self.shares)
        return tuple(given.get(axis) for axis, _ in self.axes) if given else ()

    @functools.cached_property
    def texts(self) -> tuple[str, ...]:
        """What each axis does, in mesh order, such as ``sample 2:1``."""
        shares = (
            "" if own is None else f" {':'.join(map(str, own))}" for own in self.weights or (None,) * len(self.axes)
        )
        return tuple(f"{dimension}{own}" for dimension, own in zip(self.dimensions, shares, strict=True))

    def __str__(self) -> str:
        return " ".join(f"{axis}={text}" for (axis, _), text in zip(self.axes, self.texts, strict=True)) or "one device"


@functools.lru_cache(maxsize=1 << 12)
def _split(names: tuple[str, ...], dimensions: tuple[Dimension, ...]) -> Split:
    """Return the split with these axes; one object for each, so that comparing them is cheap."""
    return Split(tuple(zip(names, dimensions, strict=True)))


Strategy = Mapping[LayerId, Split]
"""A split for every layer."""
