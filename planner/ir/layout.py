"""Which rank holds which region of a tensor. Only this file knows how dimensions are cut.

Samples and space are cut in balanced pieces. Channels, of parameters and activations, are cut by
``torch.chunk`` applied axis after axis, outermost first, because ``DTensor`` places several
``Shard`` of one dimension so and checkpoints store them so. Where an axis has shares
(``planner.ir.split``), the pieces of either are in proportion to them. All rules nest: the pieces of
the outer axes are unions of the pieces of all axes.

A coordinate whose share is 0 is idle: it holds nothing. An axis that does not cut a tensor, but lets only one
coordinate hold it, cuts dimension 0 with the shares 1 for this coordinate and 0 for all others.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from planner.ir.halo import AnyWindow
from planner.ir.mesh import Mesh
from planner.ir.region import Region
from planner.ir.split import Shares, plain_shares

Interval = tuple[int, int]
Index = NDArray[np.int64]


class Whole(StrEnum):
    """How ranks along a mesh axis hold a tensor that the axis does not cut.

    A value and its gradient come in pairs: the gradient of a SHARED copy is PARTIAL and the other
    way round, an EQUAL copy has an EQUAL gradient.
    """

    EQUAL = "equal"
    """Equal copies, whose gradients are equal copies too."""
    SHARED = "shared"
    """Equal copies, used for different things: their gradients are addends of one sum."""
    PARTIAL = "partial"
    """Addends of one sum."""


Placement = int | Whole
"""Of one mesh axis: the tensor dimension that it cuts, or how it holds the whole."""

_GRADIENT = {Whole.EQUAL: Whole.EQUAL, Whole.SHARED: Whole.PARTIAL, Whole.PARTIAL: Whole.SHARED}


class CutRule(StrEnum):
    """How a dimension is cut in pieces."""

    BALANCED = "balanced"
    CHUNK = "chunk"


@dataclass(frozen=True)
class Cut:
    """How one tensor dimension is cut.

    Attributes:
        rule: balanced pieces, or nested ``torch.chunk``.
        unit: pieces are multiples of this many elements (rows x columns behind a flatten).
        window: the pieces are those of a window operator's output; a rank holds the input it reads.
        sizes: the actual sizes of the pieces, where they follow no rule (a user's own batches).
        tiles: the actual intervals of the pieces, where ranks compute more than a piece (``planner.ir.recompute``);
            with a window, those of its output.
        addends: what several pieces have in common they hold as addends of one sum, as gradients are; else as copies.
    """

    rule: CutRule = CutRule.BALANCED
    unit: int = 1
    window: AnyWindow | None = None
    sizes: tuple[int, ...] | None = None
    tiles: tuple[Interval, ...] | None = None
    addends: bool = False

    @property
    def may_overlap(self) -> bool:
        """Whether pieces may have elements in common."""
        return self.window is not None or self.tiles is not None

    @functools.cached_property
    def gradient(self) -> "Cut":
        """How the gradient is cut: alike, with copies for addends and the other way round."""
        return replace(self, addends=not self.addends) if self.may_overlap else self


BALANCED = Cut(CutRule.BALANCED)
CHUNK = Cut(CutRule.CHUNK)


def balanced_pieces(size: int, parts: int) -> tuple[Interval, ...]:
    """Return ``parts`` intervals whose sizes differ by at most one."""
    return tuple((i * size // parts, (i + 1) * size // parts) for i in range(parts))


def weighted_pieces(size: int, weights: Sequence[int]) -> tuple[Interval, ...]:
    """Return one interval for each weight, with borders at ``size * (sum of weights before) // (sum of all)``."""
    ends = tuple(itertools.accumulate(weights, initial=0))
    return tuple((size * a // ends[-1], size * b // ends[-1]) for a, b in itertools.pairwise(ends))


def chunk_pieces(size: int, parts: tuple[int, ...]) -> tuple[Interval, ...]:
    """Return the intervals of nested ``torch.chunk``; missing trailing chunks are empty."""
    pieces: tuple[Interval, ...] = ((0, size),)
    for count in parts:
        pieces = tuple(
            (min(start + i * step, stop), min(start + (i + 1) * step, stop))
            for start, stop in pieces
            for step in (max(-(-(stop - start) // count), 1),)
            for i in range(count)
        )
    return pieces


@functools.lru_cache(maxsize=1 << 16)
def cut_pieces(size: int, parts: tuple[int, ...], cut: Cut, shares: tuple[Shares, ...] = ()) -> tuple[Interval, ...]:
    """Return the interval of every piece, outermost axis first.

    Args:
        size: of the dimension; of the input where the cut has a window.
        parts: sizes of the mesh axes that cut the dimension, outermost first.
        cut: the rule.
        shares: of these axes; none if left out.
    """
    if any(own is not None and 0 in own for own in shares):
        return _with_idle(size, parts, cut, shares)
    count = math.prod(parts)
    if cut.sizes is not None and len(cut.sizes) == count:
        ends = tuple(itertools.accumulate(cut.sizes))
        return tuple(zip((0, *ends[:-1]), ends, strict=True))
    whole = size if cut.window is None else cut.window.out_size
    is_tiled = cut.tiles is not None and len(cut.tiles) == count
    if cut.tiles is not None and is_tiled:
        pieces = cut.tiles
    elif any(shares):
        pieces = weighted_pieces(whole // cut.unit, piece_weights(parts, shares))
    elif cut.rule is CutRule.BALANCED:
        pieces = balanced_pieces(whole // cut.unit, count)
    else:
        pieces = chunk_pieces(whole // cut.unit, parts)
    if cut.unit != 1 and not is_tiled:
        pieces = tuple((a * cut.unit, b * cut.unit) for a, b in pieces)
    if cut.window is not None:
        pieces = tuple(cut.window.input_interval(a, b, size) for a, b in pieces)
    return pieces


def piece_weights(parts: tuple[int, ...], shares: tuple[Shares, ...]) -> tuple[int, ...]:
    """Return the weight of every piece, outermost axis first; arguments as of ``cut_pieces``."""
    by_axis = [own or (1,) * n for n, own in zip(parts, shares, strict=True)] if shares else [(1,) * n for n in parts]
    return tuple(math.prod(each) for each in itertools.product(*by_axis))


def _with_idle(size: int, parts: tuple[int, ...], cut: Cut, shares: tuple[Shares, ...]) -> tuple[Interval, ...]:
    """Return ``cut_pieces`` where some have weight 0: those are empty, the others are cut as if they were alone."""
    busy = [n if own is None else n - own.count(0) for n, own in zip(parts, shares, strict=True)]
    others = tuple(None if own is None else plain_shares(tuple(w for w in own if w)) for own in shares)
    found = iter(cut_pieces(size, tuple(busy), cut, others))
    pieces: list[Interval] = []
    for weight in piece_weights(parts, shares):
        end = pieces[-1][1] if pieces else 0
        pieces.append(next(found) if weight else (end, end))
    return tuple(pieces)


@dataclass(frozen=True, eq=False)
class Division:
    """How one tensor dimension is divided over the ranks; made once for equal arguments, see ``division``.

    What two divisions are to each other is asked of thousands of pairs of layouts, but of few pairs of divisions:
    answers are kept by identity.

    Attributes:
        size: of the dimension.
        axes: mesh axes that cut it, outermost first.
        parts: their sizes.
        cut: the rule.
        shares: of the axes; empty where none has any.
    """

    size: int
    axes: tuple[int, ...]
    parts: tuple[int, ...]
    cut: Cut
    shares: tuple[Shares, ...] = ()

    @functools.cached_property
    def pieces(self) -> tuple[Interval, ...]:
        """The interval of every piece, outermost axis first."""
        return cut_pieces(self.size, self.parts, self.cut, self.shares) if self.axes else ((0, self.size),)

    @functools.cached_property
    def ends(self) -> tuple[Index, Index]:
        """Start and stop of every piece, int64[pieces] each."""
        found = np.array(self.pieces, dtype=np.int64)
        return found[:, 0], found[:, 1]

    def over(self, rank: int) -> tuple[Index, Index]:
        """Return start and stop of every rank's piece, to be broadcast over a mesh of so many axes."""
        shape = [1] * rank
        for axis, size in zip(self.axes, self.parts, strict=True):
            shape[axis] = size
        return self.ends[0].reshape(shape), self.ends[1].reshape(shape)

    @functools.cached_property
    def overlaps(self) -> bool:
        """Whether neighbouring pieces have elements in common, as windows do."""
        return any(a[1] > b[0] for a, b in itertools.pairwise(p for p in self.pieces if p[0] < p[1]))

    @functools.cached_property
    def has_empty_piece(self) -> bool:
        """Whether some piece holds nothing though it should: it is not idle."""
        weights = piece_weights(self.parts, self.shares) if self.shares else (1,) * len(self.pieces)
        return any(a >= b and weight for (a, b), weight in zip(self.pieces, weights, strict=True))

    @functools.cached_property
    def largest(self) -> int:
        """The size of the largest piece."""
        return max(b - a for a, b in self.pieces)


@functools.lru_cache(maxsize=1 << 16)
def division(
    size: int, axes: tuple[int, ...], parts: tuple[int, ...], cut: Cut, shares: tuple[Shares, ...] = ()
) -> Division:
    """Return how a dimension is divided; arguments as of ``Division``."""
    return Division(size, axes, parts, cut, shares)


@dataclass(frozen=True)
class Layout:
    """A tensor spread over a mesh.

    Attributes:
        shape: of the whole tensor.
        mesh: the ranks.
        placements: of every mesh axis.
        cuts: of every tensor dimension; used where an axis cuts it.
        shares: of every mesh axis; empty where none has any. Axes that do not cut the tensor have shares only where
            one coordinate alone holds it (``kept_shares``).
    """

    shape: tuple[int, ...]
    mesh: Mesh
    placements: tuple[Placement, ...]
    cuts: tuple[Cut, ...]
    shares: tuple[Shares, ...] = ()

    def __post_init__(self) -> None:
        if len(self.placements) != len(self.mesh.axes) or len(self.cuts) != len(self.shape):
            raise ValueError(f"{self.placements} and {self.cuts} do not fit {self.shape} on {self.mesh.axes}")
        if any(isinstance(p, int) and not 0 <= p < len(self.shape) for p in self.placements):
            raise ValueError(f"{self.placements} cut a dimension that {self.shape} has not")

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.shape, self.mesh, self.placements, self.cuts, self.shares))

    def __hash__(self) -> int:  # layouts are keys of large caches
        return self._hash

    @functools.cached_property
    def gradient(self) -> "Layout":
        """The layout of this tensor's gradient: the same regions, addends where copies are shared."""
        placements = tuple(p if isinstance(p, int) else _GRADIENT[p] for p in self.placements)
        if any(cut.may_overlap for cut in self.cuts):
            cuts = tuple(cut.gradient for cut in self.cuts)
            return family(self.shape, self.mesh, cuts, self.shares).at(placements)
        return self.with_placements(placements)

    @functools.cached_property
    def value(self) -> "Layout":
        """The layout without what only matters to gradients: shared copies are equal copies."""
        return self.with_placements(tuple(Whole.EQUAL if p is Whole.SHARED else p for p in self.placements))

    def with_placements(self, placements: tuple[Placement, ...]) -> "Layout":
        """Return this layout with other placements."""
        return self if placements == self.placements else self._family.at(placements)

    @functools.cached_property
    def _family(self) -> "LayoutFamily":
        return family(self.shape, self.mesh, self.cuts, self.shares)

    def with_size(self, dim: int, size: int) -> "Layout":
        """Return this layout for a tensor of another size in one dimension (another batch)."""
        return replace(self, shape=(*self.shape[:dim], size, *self.shape[dim + 1 :]))

    @functools.cached_property
    def divisions(self) -> tuple[Division, ...]:
        """How each tensor dimension is divided."""
        found: list[list[int]] = [[] for _ in self.shape]
        for axis, placement in enumerate(self.placements):
            if isinstance(placement, int):
                found[placement].append(axis)
            elif self.shares and self.shares[axis] and found:
                found[0].append(axis)
        mesh = self.mesh.shape
        return tuple(
            division(size, tuple(axes), tuple(mesh[a] for a in axes), cut, self._shares_of(axes))
            if axes else division(size, (), (), BALANCED)
            for size, axes, cut in zip(self.shape, found, self.cuts, strict=True)
        )  # fmt: skip

    def _shares_of(self, axes: Sequence[int]) -> tuple[Shares, ...]:
        own = tuple(self.shares[a] for a in axes) if self.shares else ()
        return own if any(own) else ()

    @functools.cached_property
    def has_idle(self) -> bool:
        """Whether some ranks are to hold nothing."""
        return any(own is not None and 0 in own for own in self.shares)

    def is_idle(self, position: int) -> bool:
        """Return whether the rank at a mesh position is to hold nothing."""
        if not self.has_idle:
            return False
        pairs = zip(self.shares, self.mesh.coordinates(position), strict=True)
        return any(own is not None and own[coordinate] == 0 for own, coordinate in pairs)

    @functools.cached_property
    def dividing_axes(self) -> tuple[int, ...]:
        """The mesh axes along which ranks hold different regions."""
        return tuple(sorted(axis for each in self.divisions for axis in each.axes))

    @functools.cached_property
    def cutting_axes(self) -> int:
        """The mesh axes that cut a dimension, as bits."""
        return sum(1 << axis for axis, placement in enumerate(self.placements) if isinstance(placement, int))

    def axes_of(self, dim: int) -> tuple[int, ...]:
        """Return the mesh axes that cut a tensor dimension, outermost first."""
        return self.divisions[dim].axes

    def axes_with(self, *kinds: Whole) -> tuple[int, ...]:
        """Return the mesh axes along which ranks hold the whole in one of these ways, all of them."""
        idle = self.shares or (None,) * len(self.placements)
        return tuple(i for i, placement in enumerate(self.placements) if placement in kinds and idle[i] is None)

    def pieces(self, dim: int) -> tuple[Interval, ...]:
        """Return the interval of every piece of a dimension, outermost axis first."""
        return self.divisions[dim].pieces

    def interval(self, dim: int, coordinates: tuple[int, ...]) -> Interval:
        """Return what the rank at these mesh coordinates holds of a dimension."""
        index = 0
        for axis in self.axes_of(dim):
            index = index * self.mesh.shape[axis] + coordinates[axis]
        return self.pieces(dim)[index]

    def region(self, position: int) -> Region:
        """Return what the rank at a mesh position holds."""
        return self.region_at(self.mesh.coordinates(position))

    def region_at(self, coordinates: tuple[int, ...]) -> Region:
        """Return what the rank at these mesh coordinates holds."""
        intervals = [self.interval(dim, coordinates) for dim in range(len(self.shape))]
        return Region(tuple(a for a, _ in intervals), tuple(b for _, b in intervals))

    def largest_shape(self) -> tuple[int, ...]:
        """Return the shape of the largest piece (pieces of each dimension are cut independently)."""
        return self._largest

    @functools.cached_property
    def _largest(self) -> tuple[int, ...]:
        return tuple(d.largest for d in self.divisions)

    def has_empty_piece(self) -> bool:
        """Return whether some rank would hold nothing of a dimension that is cut."""
        return self._has_empty_piece

    @functools.cached_property
    def _has_empty_piece(self) -> bool:
        return any(d.has_empty_piece for d in self.divisions if d.axes)


@dataclass(frozen=True)
class LayoutFamily:
    """The layouts of one tensor that differ in their placements only, each made once.

    A layout keeps what was derived from it, its hash and its pieces among others. Splits by the
    hundred ask for the same few layouts.

    Attributes:
        shape, mesh, cuts: as of ``Layout``.
        shares: of every mesh axis, as far as a layout's placements let it have any; or empty.
    """

    shape: tuple[int, ...]
    mesh: Mesh
    cuts: tuple[Cut, ...]
    shares: tuple[Shares, ...] = ()
    _made: dict[tuple[Placement, ...], Layout] = field(default_factory=dict, compare=False, repr=False)

    def at(self, placements: tuple[Placement, ...]) -> Layout:
        """Return the layout with these placements."""
        found = self._made.get(placements)
        if found is None:
            kept = kept_shares(placements, self.shares)
            if kept == self.shares:
                found = Layout(self.shape, self.mesh, placements, self.cuts, kept)
            else:
                found = family(self.shape, self.mesh, self.cuts, kept).at(placements)
            self._made[placements] = found
        return found


@functools.lru_cache(maxsize=1 << 14)
def family(shape: tuple[int, ...], mesh: Mesh, cuts: tuple[Cut, ...], shares: tuple[Shares, ...] = ()) -> LayoutFamily:
    """Return the layouts of a tensor, for its shape, cuts and shares as of ``Layout``."""
    return LayoutFamily(shape, mesh, cuts, shares if any(shares) else ())


def kept_shares(placements: tuple[Placement, ...], shares: tuple[Shares, ...]) -> tuple[Shares, ...]:
    """Return the shares that mean something: of axes that cut, and of those where one coordinate alone holds all."""
    if not shares:
        return ()
    kept = tuple(
        own if isinstance(placement, int) or (own is not None and 0 in own) else None
        for placement, own in zip(placements, shares, strict=True)
    )
    return kept if any(kept) else ()
