"""The operators of PaSE's graphs [PaSE21], as numbers.

Every operator is written over the seven dimensions of ``DIMENSIONS``, those that it lacks of size 1: a linear layer is
a convolution of one pixel.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

Shape = tuple[int, int, int, int]
"""Of a tensor: samples, channels, height, width."""

DIMENSIONS: Final = ("b", "c", "h", "w", "r", "s", "n")
"""Samples, (input) channels, output height and width, kernel height and width, output channels."""
B, C, H, W, R, S, N = range(7)
TENSOR: Final = (B, C, H, W)


class Kind(StrEnum):
    """What an operator costs."""

    PRODUCT = "product"
    """Convolution, linear layer."""
    POOL = "pool"
    NORM = "norm"
    ELEMENTWISE = "elementwise"
    CONCAT = "concat"
    MEAN = "mean"
    """Over height and width."""
    FLATTEN = "flatten"
    """To one dimension: ``(b, c, h, w)`` to ``(bchw, 1, 1, 1)``."""
    UNFLATTEN = "unflatten"
    """Back to samples and channels."""
    LOSS = "loss"
    """Softmax with cross entropy over the channels."""


@dataclass(frozen=True, slots=True)
class Operator:
    """A node of a graph in PaSE's granularity; the same operator at two places is equal.

    Attributes:
        kind: decides the formula.
        sizes: of the iteration space, by ``DIMENSIONS``.
        output: the tensor it makes.
        reads: the tensor it reads (of several, the first); None for the network's input.
        pointwise: element-wise operators behind it that count with it.
        window: of a pool, height and width.
        groups: of a convolution; between them nothing is reduced.
    """

    kind: Kind
    sizes: tuple[int, ...]
    output: Shape
    reads: Shape
    pointwise: int = 0
    window: tuple[int, int] = (1, 1)
    groups: int = 1


@dataclass(frozen=True, slots=True)
class Node:
    """An operator of a graph.

    Attributes:
        name: for plans and messages.
        operator: what it computes.
        inputs: positions of the earlier nodes that it reads; none for what reads the network's input alone.
    """

    name: str
    operator: Operator
    inputs: tuple[int, ...]


Graph = tuple[Node, ...]
"""Operators, each behind those that it reads."""
