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

from planner.ir.layout import Layout, Placement, Whole, family
from planner.ir.region import Region


class StepKind(StrEnum):
    """What one step does. The first three move nothing between ranks."""

    SLICE = "slice"
    """Keep a part of the own region."""
    PAD = "pad"
    """Put the own region into zeros: disjoint pieces become addends."""
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


def _same_pieces(a: Layout, b: Layout, dim: int) -> bool:
    return a.axes_of(dim) == b.axes_of(dim) and a.pieces(dim) == b.pieces(dim)


def _overlaps(layout: Layout, dim: int) -> bool:
    pieces = layout.pieces(dim)
    return any(a[1] > b[0] for a, b in itertools.pairwise(pieces))


def _every_interval(a: Layout, b: Layout, dim: int, holds: Callable[[tuple[int, int], tuple[int, int]], bool]) -> bool:
    """Return whether a relation holds between the intervals of both layouts on every rank."""
    axes = sorted({*a.axes_of(dim), *b.axes_of(dim)})
    coordinates = [0] * len(a.mesh.axes)
    for values in itertools.product(*(range(a.mesh.shape[axis]) for axis in axes)):
        for axis, value in zip(axes, values, strict=True):
            coordinates[axis] = value
        if not holds(a.interval(dim, tuple(coordinates)), b.interval(dim, tuple(coordinates))):
            return False
    return True


def _covers(a: Layout, b: Layout, dim: int) -> bool:
    return _every_interval(a, b, dim, lambda x, y: x[0] <= y[0] and y[1] <= x[1])


def _nests(fine: Layout, coarse: Layout, dim: int) -> bool:
    """Return whether joining the pieces of the innermost axes of ``fine`` gives those of ``coarse``."""
    fine_axes, coarse_axes = fine.axes_of(dim), coarse.axes_of(dim)
    fine_pieces, coarse_pieces = fine.pieces(dim), coarse.pieces(dim)
    if fine_axes[: len(coarse_axes)] != coarse_axes or any(
        a[1] != b[0]
        for a, b in itertools.pairwise(fine_pieces)  # windows overlap or leave gaps
    ):
        return False
    joined = len(fine_pieces) // len(coarse_pieces)
    return all(
        (fine_pieces[i * joined][0], fine_pieces[(i + 1) * joined - 1][1]) == piece
        for i, piece in enumerate(coarse_pieces)
    )


def _replace_axes(layout: Layout, axes: tuple[int, ...], placement: Placement) -> Layout:
    return layout.with_placements(tuple(placement if i in axes else p for i, p in enumerate(layout.placements)))


def _with_dim_of(layout: Layout, other: Layout, dims: set[int]) -> Layout:
    """Return ``layout`` with the given tensor dimensions placed and cut as in ``other``."""
    placements = list(layout.placements)
    for i, placement in enumerate(layout.placements):
        if placement in dims:
            placements[i] = Whole.EQUAL
    for i, placement in enumerate(other.placements):
        if placement in dims:
            placements[i] = placement
    cuts = tuple(other.cuts[d] if d in dims else cut for d, cut in enumerate(layout.cuts))
    return family(layout.shape, layout.mesh, cuts).at(tuple(placements))


@functools.lru_cache(maxsize=1 << 16)
def steps(source: Layout, target: Layout) -> tuple[Step, ...]:
    """Return the steps that turn a tensor in one layout into another; empty where nothing is to do.

    Partial sums are resolved first, by a reduce-scatter where the target cuts that axis innermost,
    else by an all-reduce. The rest is a local slice, all-gathers along innermost axes, or one
    exchange. SHARED and EQUAL copies hold the same values; they differ in their gradients only.
    """
    found: list[Step] = []
    current = source

    def add(kind: StepKind, axes: tuple[int, ...], after: Layout, dim: int = -1) -> None:
        nonlocal current
        found.append(Step(kind, axes, current, after, dim))
        current = after

    partial = tuple(a for a in source.axes_with(Whole.PARTIAL) if target.placements[a] is not Whole.PARTIAL)
    for dim in range(len(source.shape)):
        axes = tuple(a for a in partial if target.placements[a] == dim)
        if axes and current.axes_of(dim) + axes == target.axes_of(dim):
            scattered = _with_dim_of(current, target, {dim})
            if _nests(scattered, current, dim):
                add(StepKind.REDUCE_SCATTER, axes, scattered, dim)
    rest = tuple(a for a in partial if current.placements[a] is Whole.PARTIAL)
    if rest:
        add(StepKind.ALL_REDUCE, rest, _replace_axes(current, rest, Whole.EQUAL))

    made_partial = tuple(a for a in target.axes_with(Whole.PARTIAL) if current.placements[a] is not Whole.PARTIAL)
    _move(current, _before_partial(current, target, made_partial), add)
    padded = tuple(a for a in made_partial if isinstance(current.placements[a], int))
    if padded:
        add(StepKind.PAD, (), _replace_axes(current, padded, Whole.PARTIAL))
    masked = tuple(a for a in made_partial if current.placements[a] is not Whole.PARTIAL)
    if masked:
        add(StepKind.MASK, masked, _replace_axes(current, masked, Whole.PARTIAL))
    return tuple(found)


def _before_partial(current: Layout, target: Layout, axes: tuple[int, ...]) -> Layout:
    """Return the target with the axes that will become addends still as pieces, or else as copies."""
    goal = _replace_axes(target, axes, Whole.EQUAL)
    for dim in range(len(target.shape)):
        padded = tuple(a for a in axes if current.placements[a] == dim)
        if padded and goal.axes_of(dim) + padded == current.axes_of(dim):
            kept = _with_dim_of(goal, current, {dim})
            if _nests(kept, goal, dim):
                goal = kept
    return goal


def _move(current: Layout, target: Layout, add: Callable[..., None]) -> None:
    """Append the steps between layouts without partial sums to resolve."""
    dims = [d for d in range(len(current.shape)) if not _same_pieces(current, target, d)]
    overlapping = {d for d in range(len(current.shape)) if _overlaps(current, d)}
    covered = {d for d in dims if d not in overlapping and _covers(current, target, d)}
    gathered = {d for d in dims if d not in covered | overlapping and _nests(current, target, d)}
    freed = {a for d in gathered for a in current.axes_of(d) if a not in target.axes_of(d)}
    moved = any(isinstance(target.placements[a], int) for a in freed)
    if not overlapping and not moved and covered | gathered == set(dims):
        if covered:
            sliced = _with_dim_of(current, target, covered)
            add(StepKind.SLICE, (), sliced)
            current = sliced
        for dim in sorted(gathered):
            whole = _with_dim_of(current, target, {dim})
            axes = tuple(a for a in current.axes_of(dim) if a not in target.axes_of(dim))
            add(StepKind.ALL_GATHER, axes, whole, dim)
            current = whole
    elif dims or overlapping:
        axes = tuple(a for a, p in enumerate(current.placements) if p in {*dims, *overlapping})
        add(StepKind.EXCHANGE, axes, target)


def transfers(source: Layout, target: Layout) -> tuple[Transfer, ...]:
    """List the copies that give every mesh position its region, in (target, source) order.

    Neither layout may have partial sums over axes that the other has not. Of equal copies the one
    is taken whose coordinates agree with the receiver's. Copies that overlap at the receiver (the
    halos of a gradient) are to be added. A copy whose source is its target stays in place.
    """
    mesh = source.mesh
    cut_axes = [a for a, p in enumerate(source.placements) if isinstance(p, int)]
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
