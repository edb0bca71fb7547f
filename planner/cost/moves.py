"""How much moves between two layouts, worked out once for all tensors that are cut alike.

``planner.ir.transfer.steps`` asks how the pieces of one layout lie to those of another, dimension by
dimension, never how large they are. Where every piece of a dimension is as large as the others, that
does not depend on the size of the dimension, and the number of elements that move grows with it. So
one small tensor stands for all whose dimensions are cut evenly by the same axes: a network with tens of
shapes has one set of steps, of which only the bytes differ.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from planner.cost.exchange import exchanged, exchanges
from planner.ir.layout import (
    BALANCED,
    Cut,
    Index,
    Layout,
    LayoutFamily,
    Placement,
    balanced_pieces,
    cut_pieces,
    family,
)
from planner.ir.mesh import Mesh
from planner.ir.transfer import Step, StepKind, steps, without_idle_alike


@dataclass(frozen=True, slots=True)
class Move:
    """A step, as far as its price depends on it.

    Attributes:
        kind: of the step.
        axes: of the mesh along which ranks talk.
        elements: of the buffer that is reduced or scattered on each rank, of the result of a gather on each
            rank, or what the busiest rank sends or receives in an exchange, whichever is more; 0 where none talk.
        copied: read or written by the busiest rank beside that, see ``copied_elements``.
    """

    kind: StepKind
    axes: tuple[int, ...]
    elements: int
    copied: int


@functools.lru_cache(maxsize=1 << 18)
def moves(source: Layout, target: Layout) -> tuple[Move, ...]:
    """Return what moves, or is copied, on the way from one layout to another, in order."""
    return tuple(_move(step) for step in steps(source, target))


def moves_of_pairs(
    before: Sequence[Layout], after: Sequence[Layout], pairs: tuple[Index, Index]
) -> list[tuple[Move, ...]]:
    """Return ``moves`` of many pairs; those that are one exchange, which are most, are worked out together.

    Args:
        before: layouts that differ in their placements only.
        after: likewise.
        pairs: positions in ``before`` and ``after`` of each pair.
    """
    mesh = before[0].mesh
    axes_of = [tuple(a for a in range(len(mesh.axes)) if group >> a & 1) for group in range(1 << len(mesh.axes))]
    found = zip(*(each.tolist() for each in (*pairs, *exchanges(before, after, pairs))), strict=True)
    return [
        (Move(StepKind.EXCHANGE, axes_of[group], moved, copied),) if group else moves(before[i], after[j])
        for i, j, group, moved, copied in found
    ]


def _move(step: Step) -> Move:
    if step.kind is StepKind.EXCHANGE:
        return Move(step.kind, step.axes, *exchanged(*without_idle_alike(step.source, step.target), step.axes))
    elements = 0
    if step.kind in {StepKind.ALL_REDUCE, StepKind.REDUCE_SCATTER}:
        elements = math.prod(step.source.largest_shape())
    elif step.kind is StepKind.ALL_GATHER:
        elements = math.prod(step.target.largest_shape())
    return Move(step.kind, step.axes, elements, copied_elements(step))


def copied_elements(step: Step) -> int:
    """Return the elements that the busiest rank reads or writes in a step beside what the collective itself does.

    What the runtime copies (``runtime.comm.exchange``), a copy being a read and a write:

    - a slice is copied out of the piece, so that the piece can be freed;
    - a piece that becomes an addend is copied into zeros, which are written before;
    - of equal copies that become addends, all but one are replaced by zeros;
    - an all-reduce works in a copy, because its input may be needed by others (a product's partial sums are not, where
      they become a sum and nothing else: there the runtime has a copy less than this);
    - for a reduce-scatter, the parts are put one after the other; those that do not lie so, which is in any dimension
      but the first, are copied one by one before;
    - what a gather along the first dimension brings is the result, along any other one it is joined.

    Of an exchange see ``planner.cost.exchange``.
    """
    if step.kind is StepKind.EXCHANGE:
        return exchanged(*without_idle_alike(step.source, step.target), step.axes).copied
    before, after = (math.prod(layout.largest_shape()) for layout in (step.source, step.target))
    return {
        StepKind.SLICE: 2 * after,
        StepKind.PAD: after + 2 * before,
        StepKind.MASK: after,
        StepKind.ALL_REDUCE: 2 * before,
        StepKind.REDUCE_SCATTER: (4 if step.dim else 2) * before,
        StepKind.ALL_GATHER: 2 * after if step.dim else 0,
    }[step.kind]


@dataclass(frozen=True, slots=True)
class Share:
    """A pair of small tensors that stands for one of a given size.

    Attributes:
        source, target: layouts of the small tensor.
        numerator, denominator: elements of the tensor for so many elements of the small one.
    """

    source: LayoutFamily
    target: LayoutFamily
    numerator: int
    denominator: int

    def elements(self, move: Move) -> int:
        """Return the elements of a move of the small tensor, in the tensor that it stands for."""
        return move.elements * self.numerator // self.denominator

    def copied(self, move: Move) -> int:
        """Return the elements that are copied for a move of the small tensor, in the tensor that it stands for."""
        return move.copied * self.numerator // self.denominator


@dataclass(frozen=True)
class Frame:
    """The ways in which the pieces of two families of layouts of one tensor lie to each other.

    Attributes:
        shape: of the tensor.
        mesh: the ranks.
        source, target: how the dimensions are cut before and after.
    """

    shape: tuple[int, ...]
    mesh: Mesh
    source: tuple[Cut, ...]
    target: tuple[Cut, ...]
    _shares: dict[tuple[int, int], Share] = field(default_factory=dict, compare=False, repr=False)

    @functools.cached_property
    def _evenness(self) -> NDArray[np.bool_]:
        """Whether the pieces are equally large, bool[dims, sets of mesh axes that cut the dimension]."""
        sets = range(1 << len(self.mesh.axes))
        parts = [tuple(n for axis, n in enumerate(self.mesh.shape) if s >> axis & 1) for s in sets]
        return np.array([
            [not s or (_is_even(n, a, parts[s]) and _is_even(n, b, parts[s])) for s in sets]
            for n, a, b in zip(self.shape, self.source, self.target, strict=True)
        ])  # fmt: skip

    def codes(self, sources: Sequence[Layout], targets: Sequence[Layout]) -> Index:
        """Return for every pair the set of dimensions that are cut evenly, as bits, int64[sources, targets]."""
        rank = len(self.shape)
        before = np.array([cutting_axes(layout.placements, rank) for layout in sources]).reshape(len(sources), rank)
        after = np.array([cutting_axes(layout.placements, rank) for layout in targets]).reshape(len(targets), rank)
        found = np.zeros((len(sources), len(targets)), dtype=np.int64)
        for dim, even in enumerate(self._evenness):
            found |= even[before[:, None, dim] | after[None, :, dim]].astype(np.int64) << dim
        return found

    def code(self, source: Layout, target: Layout) -> int:
        """Return the set of dimensions that are cut evenly, as bits."""
        rank = len(self.shape)
        pairs = zip(cutting_axes(source.placements, rank), cutting_axes(target.placements, rank), strict=True)
        return sum(int(self._evenness[dim, a | b]) << dim for dim, (a, b) in enumerate(pairs))

    def share(self, code: int, rank: int) -> Share:
        """Return the small tensor that stands for this one.

        Args:
            code: the dimensions that are cut evenly.
            rank: dimensions that are cut at all come before this one; the others are left out.
        """
        if (code, rank) not in self._shares:
            self._shares[code, rank] = self._share(code, rank)
        return self._shares[code, rank]

    def _share(self, code: int, rank: int) -> Share:
        small = self.mesh.size
        even = [bool(code >> dim & 1) for dim in range(rank)]
        shape = tuple(small if e else n for n, e in zip(self.shape, even, strict=False))
        source, target = (
            family(shape, self.mesh, tuple(BALANCED if e else cut for cut, e in zip(cuts, even, strict=False)))
            for cuts in (self.source, self.target)
        )
        scaled = [n for n, e in zip(self.shape, even, strict=False) if e] + list(self.shape[rank:])
        return Share(source, target, math.prod(scaled), small ** sum(even))


def _is_even(size: int, cut: Cut, parts: tuple[int, ...]) -> bool:
    """Return whether the pieces are equally large and lie side by side; those of a pool without overlap do."""
    count = math.prod(parts)
    if size == 0 or size % (cut.unit * count) != 0:
        return False
    return cut_pieces(size, parts, cut) == balanced_pieces(size, count)


@functools.lru_cache(maxsize=1 << 12)
def frame(shape: tuple[int, ...], mesh: Mesh, source: tuple[Cut, ...], target: tuple[Cut, ...]) -> Frame:
    """Return the frame of two families of layouts; arguments as of ``Frame``."""
    return Frame(shape, mesh, source, target)


@functools.lru_cache(maxsize=1 << 14)
def cutting_axes(placements: tuple[Placement, ...], rank: int) -> tuple[int, ...]:
    """Return for each of so many dimensions the mesh axes that cut it, as bits."""
    return tuple(sum(1 << axis for axis, p in enumerate(placements) if p == dim) for dim in range(rank))


def used_rank(layouts: Sequence[Layout]) -> int:
    """Return how many dimensions there are up to the last one that some axis cuts."""
    return 1 + max((p for layout in layouts for p in layout.placements if isinstance(p, int)), default=-1)
