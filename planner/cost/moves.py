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

from planner.ir.layout import BALANCED, Cut, Layout, LayoutFamily, Placement, family
from planner.ir.mesh import Mesh
from planner.ir.transfer import Step, StepKind, steps

Index = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Move:
    """A step between ranks, as far as its price depends on it.

    Attributes:
        kind: of the step.
        axes: of the mesh along which ranks talk.
        elements: of the buffer that is reduced or scattered on each rank, of the result of a gather on each
            rank, or what the busiest rank sends or receives in an exchange, whichever is more.
    """

    kind: StepKind
    axes: tuple[int, ...]
    elements: int


@functools.lru_cache(maxsize=1 << 18)
def moves(source: Layout, target: Layout) -> tuple[Move, ...]:
    """Return what moves between ranks on the way from one layout to another, in order."""
    return tuple(Move(s.kind, s.axes, _elements(s)) for s in steps(source, target) if s.kind.communicates)


def _elements(step: Step) -> int:
    match step.kind:
        case StepKind.ALL_REDUCE | StepKind.REDUCE_SCATTER:
            return math.prod(step.source.largest_shape())
        case StepKind.ALL_GATHER:
            return math.prod(step.target.largest_shape())
        case _:
            return exchanged(step.source, step.target, step.axes)


@functools.lru_cache(maxsize=1 << 14)
def _intervals(layout: Layout) -> tuple[Index, Index]:
    """Return start and stop of every rank's region, int64[ranks, dims] each."""
    mesh = layout.mesh
    coordinates = np.indices(mesh.shape).reshape(len(mesh.axes), -1) if mesh.axes else np.zeros((0, 1), int)
    starts, stops = [], []
    for dim in range(len(layout.shape)):
        index = np.zeros(mesh.size, int)
        for axis in layout.axes_of(dim):
            index = index * mesh.shape[axis] + coordinates[axis]
        pieces = np.array(layout.pieces(dim))
        starts.append(pieces[index, 0])
        stops.append(pieces[index, 1])
    ends = [np.array(x, dtype=np.int64).reshape(len(layout.shape), mesh.size).T for x in (starts, stops)]
    return ends[0], ends[1]


@functools.lru_cache(maxsize=1 << 10)
def _senders(mesh: Mesh, axes: tuple[int, ...]) -> Index:
    """Return the positions that differ from each one along these axes only, itself included: int64[ranks, group]."""
    positions = np.arange(mesh.size).reshape(mesh.shape)
    moved = np.moveaxis(positions, axes, range(len(mesh.shape) - len(axes), len(mesh.shape)))
    size = math.prod(mesh.shape[a] for a in axes)
    groups = moved.reshape(-1, size)
    found = np.empty((mesh.size, size), dtype=np.int64)
    found[groups.reshape(-1)] = np.repeat(groups, size, axis=0)
    return found


def exchanged(source: Layout, target: Layout, axes: tuple[int, ...] | None = None) -> int:
    """Return the most elements that a rank sends or that a rank receives in an exchange, whichever is more.

    The copies are those that ``planner.ir.transfer.transfers`` lists: a rank gets what it needs from the ranks
    that agree with it along the axes that do not cut the source.

    Args:
        source: layout before.
        target: layout after; neither has partial sums that the other has not.
        axes: along which ranks talk, as of ``Step``; all that cut the source if left out.
    """
    mesh = source.mesh
    if axes is None:
        axes = tuple(a for a, p in enumerate(source.placements) if isinstance(p, int))
    senders = _senders(mesh, axes)
    have_start, have_stop = _intervals(source)
    need_start, need_stop = _intervals(target)
    stop = np.minimum(have_stop[senders], need_stop[:, None])
    common = np.maximum(stop - np.maximum(have_start[senders], need_start[:, None]), 0)
    volume = common.prod(axis=2)
    volume[senders == np.arange(mesh.size)[:, None]] = 0  # what a rank has stays in place
    sent = np.bincount(senders.ravel(), volume.ravel(), mesh.size)  # floats, exact up to 2**53 elements
    return int(max(volume.sum(axis=1).max(), sent.max()))


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
        parts = [math.prod(n for axis, n in enumerate(self.mesh.shape) if s >> axis & 1) for s in sets]
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


def _is_even(size: int, cut: Cut, parts: int) -> bool:
    return cut.window is None and cut.sizes is None and size > 0 and size % (cut.unit * parts) == 0


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
