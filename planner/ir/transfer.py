"""What moves between two layouts of one tensor. Decided here, once.

``steps`` turns a pair of layouts into a few steps. The cost model prices exactly these steps, the
runtime posts exactly these steps. ``transfers`` lists the single copies behind a pair of layouts;
the steps that are native collectives move the same bytes (tests/properties/test_transfers.py).
"""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

from planner.ir.layout import Division, Index, Layout, Placement, Whole, family
from planner.ir.region import Region


class StepKind(StrEnum):
    """What one step does. The first three move nothing between ranks."""

    SLICE = "slice"
    """Keep a part of the own region."""
    PAD = "pad"
    """Put the own region into zeros: pieces become addends, or addends of more."""
    MASK = "mask"
    """Keep the first of equal copies, zero the others: copies become addends."""
    ALL_REDUCE = "all_reduce"
    REDUCE_SCATTER = "reduce_scatter"
    ALL_GATHER = "all_gather"
    EXCHANGE = "exchange"
    """Any copies between regions, in one all-to-all."""

    @property
    def communicates(self) -> bool:
        """Whether ranks talk."""
        return self not in {StepKind.SLICE, StepKind.PAD, StepKind.MASK}


@dataclass(frozen=True, slots=True)
class Step:
    """One step from a layout to another.

    Attributes:
        kind: what is done.
        axes: mesh axes along which ranks talk; groups are the ranks that differ only there.
        source, target: layouts before and after.
        dim: the tensor dimension that is gathered or scattered; -1 for the other kinds.
    """

    kind: StepKind
    axes: tuple[int, ...]
    source: Layout
    target: Layout
    dim: int = -1


@dataclass(frozen=True, slots=True)
class Transfer:
    """One copy: a region that goes from one mesh position to another (or stays, where both are one)."""

    source: int
    target: int
    region: Region


class Relation(StrEnum):
    """What the pieces of a dimension before are to those after."""

    OVERLAPPING = "overlapping"
    """Those before have elements in common, which are addends to be summed."""
    SAME = "same"
    WIDENED = "widened"
    """Those after contain those before, and are addends too: a rank adds zeros around its own."""
    COVERING = "covering"
    """Every rank has what it needs."""
    NESTED = "nested"
    """Those of the innermost axes before, joined, are those after."""
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class Change:
    """What happens to one dimension between two layouts; sets of mesh axes are bits.

    Attributes:
        relation: of its pieces.
        cut_before: axes that cut it before, if anything changes.
        freed: axes that no longer cut it once it is gathered.
        is_apart: 1 if it takes an exchange, else 0.
    """

    relation: Relation
    cut_before: int
    freed: int
    is_apart: int


@functools.lru_cache(maxsize=1 << 16)
def change(before: Division, after: Division) -> Change:
    """Return what happens to a dimension that is divided in one way before and in another after."""
    relation = _relation(before, after)
    cut_before = 0 if relation is Relation.SAME else sum(1 << axis for axis in before.axes)
    is_gathered = relation is Relation.NESTED
    freed = sum(1 << axis for axis in before.axes if is_gathered and axis not in after.axes)
    return Change(relation, cut_before, freed, int(relation in {Relation.OVERLAPPING, Relation.OTHER}))


def _relation(a: Division, b: Division) -> Relation:
    is_same = a is b or (a.axes == b.axes and a.pieces == b.pieces)
    are_addends = a.overlaps and a.cut.addends
    if is_same and (b.cut.addends or not are_addends):
        return Relation.SAME
    if b.cut.addends and a.axes == b.axes and _covers(b, a):
        return Relation.WIDENED
    if are_addends:
        return Relation.OVERLAPPING
    if _covers(a, b):
        return Relation.COVERING
    return Relation.NESTED if _nests(a, b) else Relation.OTHER


Bits = TypeVar("Bits", int, Index)
"""Sets of mesh axes: of one pair of layouts or of many."""


def takes_exchange(is_apart: Bits, freed: Bits, cut_after: Bits) -> Bits:
    """Return what keeps a tensor from being sliced and gathered dimension by dimension; 0 if nothing does.

    Args:
        is_apart: not 0 if some dimension takes an exchange.
        freed: axes that gathers would free.
        cut_after: axes that cut the target; what is freed in one dimension cannot cut another.
    """
    return is_apart | (freed & cut_after)


def _covers(a: Division, b: Division) -> bool:
    """Return whether every rank's piece in ``a`` contains the one in ``b``."""
    rank = 1 + max((*a.axes, *b.axes), default=-1)
    (a_start, a_stop), (b_start, b_stop) = a.over(rank), b.over(rank)
    return bool(((a_start <= b_start) & (b_stop <= a_stop) | (b_start >= b_stop)).all())


@functools.lru_cache(maxsize=1 << 16)
def _nests(fine: Division, coarse: Division) -> bool:
    """Return whether joining the pieces of the innermost axes of ``fine`` gives those of ``coarse``."""
    if fine.axes[: len(coarse.axes)] != coarse.axes or any(
        a[1] != b[0]
        for a, b in itertools.pairwise(fine.pieces)  # windows overlap or leave gaps
    ):
        return False
    joined = len(fine.pieces) // len(coarse.pieces)
    return all(
        (fine.pieces[i * joined][0], fine.pieces[(i + 1) * joined - 1][1]) == piece
        for i, piece in enumerate(coarse.pieces)
    )


def _replace_axes(layout: Layout, axes: tuple[int, ...], placement: Placement) -> Layout:
    return layout.with_placements(tuple(placement if i in axes else p for i, p in enumerate(layout.placements)))


def _with_dim_of(layout: Layout, other: Layout, dims: set[int]) -> Layout:
    """Return ``layout`` with the given tensor dimensions placed and cut as in ``other``."""
    placements, shares = list(layout.placements), list(layout.shares or (None,) * len(layout.placements))
    for i, placement in enumerate(layout.placements):
        if placement in dims:
            placements[i], shares[i] = Whole.EQUAL, None
    for i, placement in enumerate(other.placements):
        if placement in dims:
            placements[i], shares[i] = placement, other.shares[i] if other.shares else None
    cuts = tuple(other.cuts[d] if d in dims else cut for d, cut in enumerate(layout.cuts))
    return family(layout.shape, layout.mesh, cuts, tuple(shares)).at(tuple(placements))


@functools.lru_cache(maxsize=1 << 16)
def steps(source: Layout, target: Layout) -> tuple[Step, ...]:
    """Return the steps that turn a tensor in one layout into another; empty where nothing is to do.

    Partial sums are resolved first, by a reduce-scatter where the target cuts that axis innermost,
    else by an all-reduce. The rest is a local slice, all-gathers along innermost axes, or one
    exchange. SHARED and EQUAL copies hold the same values; they differ in their gradients only.
    Where ranks are idle before or after, what is left behind partial sums is one slice or one exchange.
    """
    found: list[Step] = []
    current = source

    def add(kind: StepKind, axes: tuple[int, ...], after: Layout, dim: int = -1) -> None:
        nonlocal current
        found.append(Step(kind, axes, current, after, dim))
        current = after

    partial = tuple(a for a in source.axes_with(Whole.PARTIAL) if target.placements[a] is not Whole.PARTIAL)
    is_idle = source.has_idle or target.has_idle
    for dim in range(len(source.shape)) if partial and not is_idle else ():
        axes = tuple(a for a in partial if target.placements[a] == dim)
        if axes and current.axes_of(dim) + axes == target.axes_of(dim):
            scattered = _with_dim_of(current, target, {dim})
            if _nests(scattered.divisions[dim], current.divisions[dim]):
                add(StepKind.REDUCE_SCATTER, axes, scattered, dim)
    rest = tuple(a for a in partial if current.placements[a] is Whole.PARTIAL)
    if rest:
        add(StepKind.ALL_REDUCE, rest, _replace_axes(current, rest, Whole.EQUAL))

    made_partial = tuple(a for a in target.axes_with(Whole.PARTIAL) if current.placements[a] is not Whole.PARTIAL)
    _move(current, _before_partial(current, target, made_partial) if made_partial else target, add)
    if not made_partial:
        return tuple(found)
    padded = tuple(a for a in made_partial if isinstance(current.placements[a], int))
    if padded:
        add(StepKind.PAD, (), _replace_axes(current, padded, Whole.PARTIAL))
    masked = tuple(a for a in made_partial if current.placements[a] is not Whole.PARTIAL)
    if masked:
        add(StepKind.MASK, masked, _replace_axes(current, masked, Whole.PARTIAL))
    return tuple(found)


@functools.lru_cache(maxsize=1 << 14)
def is_halo(source: Layout, target: Layout) -> bool:
    """Return whether a conversion only widens pieces: axes cut the same dimensions, and windows need neighbours' rows.

    Both directions are then one exchange each, which the runtime can run beside computing (``runtime.lowering.halo``).
    """
    if source.placements != target.placements or source.shares != target.shares or source.has_idle:
        return False
    both = steps(source, target), steps(target.gradient, source.gradient)
    return all(len(found) == 1 and found[0].kind is StepKind.EXCHANGE for found in both)


def _before_partial(current: Layout, target: Layout, axes: tuple[int, ...]) -> Layout:
    """Return the target with the axes that will become addends still as pieces, or else as copies."""
    goal = _replace_axes(target, axes, Whole.EQUAL)
    for dim in range(len(target.shape)) if not (current.has_idle or target.has_idle) else ():
        padded = tuple(a for a in axes if current.placements[a] == dim)
        if padded and goal.axes_of(dim) + padded == current.axes_of(dim):
            kept = _with_dim_of(goal, current, {dim})
            if _nests(kept.divisions[dim], goal.divisions[dim]):
                goal = kept
    return goal


def _move(current: Layout, target: Layout, add: Callable[..., None]) -> None:
    """Append the steps between layouts without partial sums to resolve."""
    changes = [change(a, b) for a, b in zip(current.divisions, target.divisions, strict=True)]
    freed = cut_before = is_apart = 0
    for each in changes:
        freed, cut_before, is_apart = freed | each.freed, cut_before | each.cut_before, is_apart | each.is_apart
    if current.has_idle or target.has_idle:
        is_apart |= int(any(each.relation is Relation.NESTED for each in changes))
    if takes_exchange(is_apart, freed, target.cutting_axes):
        kept = _idle_alike(current, target)
        talking = (a for a in range(len(current.placements)) if cut_before >> a & 1 and a not in kept)
        add(StepKind.EXCHANGE, tuple(talking), target)
        return
    covered = {d for d, each in enumerate(changes) if each.relation is Relation.COVERING}
    if covered:
        is_whole = current.has_idle or target.has_idle  # then nothing is left to gather
        sliced = target if is_whole else _with_dim_of(current, target, covered)
        add(StepKind.SLICE, (), sliced)
        current = sliced
    for dim, each in enumerate(changes):
        if each.relation is Relation.NESTED:
            whole = _with_dim_of(current, target, {dim})
            axes = tuple(a for a in current.axes_of(dim) if a not in target.axes_of(dim))
            add(StepKind.ALL_GATHER, axes, whole, dim)
            current = whole
    widened = {d for d, each in enumerate(changes) if each.relation is Relation.WIDENED}
    if widened:
        add(StepKind.PAD, (), _with_dim_of(current, target, widened))


def _idle_alike(before: Layout, after: Layout) -> set[int]:
    """Return the axes on which the same one coordinate holds all in both layouts: nothing moves along these."""
    both = zip(before.placements, after.placements, before.shares, after.shares, strict=False)
    return {
        axis
        for axis, (first, second, own, other) in enumerate(both)
        if own == other and 0 in (own or ()) and not isinstance(first, int) and not isinstance(second, int)
    }


def without_idle_alike(before: Layout, after: Layout) -> tuple[Layout, Layout]:
    """Return two layouts in which ranks that are idle in both do what the others do: these move the same."""
    alike = _idle_alike(before, after)
    if not alike:
        return before, after
    first, second = (
        family(x.shape, x.mesh, x.cuts, tuple(None if a in alike else own for a, own in enumerate(x.shares))).at(
            x.placements
        )
        for x in (before, after)
    )
    return first, second


def transfers(source: Layout, target: Layout) -> tuple[Transfer, ...]:
    """List the copies that give every mesh position its region, in (target, source) order.

    Neither layout may have partial sums over axes that the other has not. Of equal copies the one
    is taken whose coordinates agree with the receiver's. Copies that overlap at the receiver (the
    halos of a gradient) are to be added. A copy whose source is its target stays in place.
    """
    mesh = source.mesh
    cut_axes = source.dividing_axes
    found = []
    for position in range(mesh.size):
        own = mesh.coordinates(position)
        need = target.region_at(own)
        for values in itertools.product(*(range(mesh.shape[a]) for a in cut_axes)):
            coordinates = list(own)
            for axis, value in zip(cut_axes, values, strict=True):
                coordinates[axis] = value
            common = source.region_at(tuple(coordinates)).intersect(need)
            if common is not None:
                found.append(Transfer(mesh.position(coordinates), position, common))
    return tuple(found)
