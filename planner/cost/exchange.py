"""How much ranks hand to each other in an exchange, and copy for it: of one pair of layouts, or of thousands at once.

A region is a product of intervals, and each mesh axis cuts at most one dimension before and one after. So the
elements that a rank gets from its whole group are a product, dimension by dimension, of what the pieces along the
axes of that dimension have in common with its own, and likewise what it sends. No pair of ranks is looked at, which
makes it fast on thousands of ranks.

What a rank copies (``runtime.comm.packing.Exchange``), in elements read or written: what it sends into the message and
what comes out of it, each read and written; what it keeps from the old piece to the new one, likewise. Where what comes
is to be added up (gradients of halos), the new piece is read once more with each addition, and set to zero before
unless what is kept fills it. **Deviation**: the runtime sends a single part that lies together (rows of the first
dimension, to one other rank) from where it is; here it is packed all the same.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np

from planner.ir.layout import Division, Index, Layout, Whole
from planner.ir.transfer import change, takes_exchange

_CHUNK: Final = 1 << 21
"""Pairs of layouts times ranks that are worked on at a time: 16 MiB of int64."""


class Exchanged(NamedTuple):
    """An exchange on its busiest rank, in elements.

    Attributes:
        moved: the most that a rank sends or that a rank receives, whichever is more.
        copied: the most that a rank reads or writes to pack, unpack and keep.
    """

    moved: int
    copied: int


@functools.lru_cache(maxsize=1 << 16)
def _common(have: Division, need: Division, group: tuple[int, ...], rank: int) -> tuple[Index, Index, Index, Index]:
    """Return elements of one dimension that ranks have in common, arrays to be broadcast over a mesh of ``rank`` axes.

    Args:
        have: how the dimension is divided before.
        need: how it is divided after.
        group: axes along which ranks talk; the axes of ``have`` are all of them or none.
        rank: axes of the mesh.

    Returns:
        What each rank needs and has itself; what it needs and all pieces of its group have; what it has and its
        group needs, added up over the pieces that differ along these axes; what it needs.
    """
    (have_start, have_stop), (need_start, need_stop) = have.over(rank), need.over(rank)
    own = np.maximum(np.minimum(have_stop, need_stop) - np.maximum(have_start, need_start), 0)
    needed = need_stop - need_start
    if not set(group) & {*have.axes, *need.axes}:
        return own, own, own, needed
    (have_start, have_stop), (need_start, need_stop) = have.ends, need.ends
    each = np.minimum(have_stop[:, None], need_stop) - np.maximum(have_start[:, None], need_start)
    each = np.maximum(each, 0).reshape(*have.parts, *need.parts)
    apart = len(have.axes)
    received = each.sum(axis=tuple(range(apart)))  # over the pieces that others have
    talking = [i for i, axis in enumerate(need.axes) if axis in group]
    sent = each.sum(axis=tuple(apart + i for i in talking))  # over the pieces that others need
    return (
        own,
        _over(received, need.axes, rank),
        _over(sent, (*have.axes, *(a for a in need.axes if a not in group)), rank),
        needed,
    )


def _over(values: Index, axes: tuple[int, ...], rank: int) -> Index:
    """Return values of some mesh axes, in this order, as an array to be broadcast over all of them."""
    order = sorted(range(len(axes)), key=axes.__getitem__)
    shape = [1] * rank
    for axis, size in zip(axes, values.shape, strict=True):
        shape[axis] = size
    return values.transpose(order).reshape(shape)


def exchanged(source: Layout, target: Layout, axes: tuple[int, ...] | None = None) -> Exchanged:
    """Return what an exchange is on its busiest rank.

    The copies between ranks are those that ``planner.ir.transfer.transfers`` lists: a rank gets what it needs from the
    ranks that agree with it along the axes that do not cut the source.

    Args:
        source: layout before.
        target: layout after; neither has partial sums that the other has not.
        axes: along which ranks talk, as of ``Step``; all that cut the source if left out.
    """
    mesh = source.mesh
    if axes is None:
        axes = source.dividing_axes
    rank = len(mesh.axes)
    kept: Index = np.ones((1,) * rank, dtype=np.int64)
    received, sent, needed, whole = kept, kept, kept, 1
    for have, need in zip(source.divisions, target.divisions, strict=True):
        if have.axes or need.axes:
            own, got, given, all_ = _common(have, need, axes, rank)
            kept, received, sent, needed = kept * own, received * got, sent * given, needed * all_
        else:
            whole *= have.size
    copies = math.prod(mesh.shape[a] for a in axes if a not in target.dividing_axes)
    is_sum = int(any(have.overlaps for have in source.divisions))
    moved, copied = _busiest(kept, received, copies * sent, needed, is_sum)
    return Exchanged(whole * int(moved.max()), whole * int(copied.max()))


def _busiest(kept: Index, received: Index, sent: Index, needed: Index, is_sum: Index | int) -> tuple[Index, Index]:
    """Return what each rank moves and copies; ``received`` and ``sent`` with what it keeps.

    ``is_sum`` is 1 where what comes is added up, else 0.
    """
    moved = np.maximum(received - kept, sent - kept)
    added = received - kept + needed * (kept != needed)
    return moved, 2 * (received + sent - kept) + is_sum * added


def exchanges(
    before: Sequence[Layout], after: Sequence[Layout], pairs: tuple[Index, Index]
) -> tuple[Index, Index, Index]:
    """Return what is exchanged by each of many pairs of layouts.

    Args:
        before: layouts that differ in their placements only.
        after: likewise.
        pairs: positions in ``before`` and ``after`` of each pair, int64[pairs] each.

    Returns:
        The mesh axes along which ranks talk, as bits, and ``moved`` and ``copied`` of the pair (``Exchanged``),
        int64[pairs] each. The bits are 0 where the pair is not a single exchange, or has partial sums.
    """
    rows, columns = pairs
    dims = [
        _Dimension.of([x.divisions[d] for x in before], [x.divisions[d] for x in after], pairs)
        for d in range(len(before[0].shape))
    ]
    is_plain = np.array([not x.axes_with(Whole.PARTIAL) for x in before])[rows]
    is_plain &= np.array([not x.axes_with(Whole.PARTIAL) for x in after])[columns]
    cut_after = np.array([x.cutting_axes for x in after])[columns]
    groups, freed, is_apart = np.zeros((3, len(rows)), dtype=np.int64)
    for dim in dims:
        groups, freed, is_apart = groups | dim.cut_before, freed | dim.freed, is_apart | dim.is_apart
    groups[~is_plain | (takes_exchange(is_apart, freed, cut_after) == 0)] = 0
    overlaps = np.array([any(d.overlaps for d in x.divisions) for x in before])[rows].astype(np.int64)
    moved, copied = np.zeros((2, len(rows)), dtype=np.int64)
    shape = before[0].mesh.shape
    step = max(_CHUNK // max(math.prod(shape), 1), 1)
    members = np.flatnonzero(groups)
    for start in range(0, len(members), step):
        chosen = members[start : start + step]
        moved[chosen], copied[chosen] = _exchanged(
            dims, chosen, groups[chosen], cut_after[chosen], overlaps[chosen], shape
        )
    return groups, moved, copied


@dataclass(frozen=True, slots=True)
class _Dimension:
    """One dimension in many pairs of layouts.

    Attributes:
        kinds: pairs of divisions that occur, before and after.
        kind_of: of every pair of layouts the pair of divisions, int64[pairs].
        cut_before, freed, is_apart: of every pair of layouts, as of ``planner.ir.transfer.Change``.
    """

    kinds: list[tuple[Division, Division]]
    kind_of: Index
    cut_before: Index
    freed: Index
    is_apart: Index

    @staticmethod
    def of(before: Sequence[Division], after: Sequence[Division], pairs: tuple[Index, Index]) -> "_Dimension":
        """Return a dimension that the layouts divide so."""
        have, need = list(dict.fromkeys(before)), list(dict.fromkeys(after))
        have_of = np.array([have.index(x) for x in before])[pairs[0]]
        need_of = np.array([need.index(x) for x in after])[pairs[1]]
        kinds = [(a, b) for a in have for b in need]
        kind_of = have_of * len(need) + need_of
        changes = [change(a, b) for a, b in kinds]
        return _Dimension(
            kinds, kind_of,
            np.array([c.cut_before for c in changes])[kind_of],
            np.array([c.freed for c in changes])[kind_of],
            np.array([c.is_apart for c in changes])[kind_of],
        )  # fmt: skip


def _exchanged(
    dims: Sequence[_Dimension], chosen: Index, groups: Index, cut_after: Index, overlaps: Index, shape: tuple[int, ...]
) -> tuple[Index, Index]:
    """Return ``Exchanged`` of the chosen pairs, which talk along these axes (bits), int64[chosen] each.

    ``overlaps`` is 1 where pieces before overlap, else 0.
    """
    rank = len(shape)
    subsets = 1 << rank
    axes = [tuple(a for a in range(rank) if bits >> a & 1) for bits in range(subsets)]
    kept: Index = np.ones((len(chosen), *(1,) * rank), dtype=np.int64)
    received, sent, needed, whole = kept, kept, kept, 1
    for dim in dims:
        if not any(have.axes or need.axes for have, need in dim.kinds):
            whole *= dim.kinds[0][0].size
            continue
        codes = dim.kind_of[chosen] * subsets + groups
        used = np.flatnonzero(np.bincount(codes))
        position = np.zeros(used[-1] + 1, dtype=np.int64)
        position[used] = np.arange(len(used))
        tables = [_common(*dim.kinds[code // subsets], axes[code % subsets], rank) for code in used.tolist()]
        own, got, given, all_ = (_stack(arrays)[position[codes]] for arrays in zip(*tables, strict=True))
        kept, received, sent, needed = kept * own, received * got, sent * given, needed * all_
    parts = np.array([math.prod(shape[a] for a in each) for each in axes])
    each = (-1, *(1,) * rank)
    copies = parts[groups & ~cut_after].reshape(each)  # who agrees along these axes needs the same
    is_sum = overlaps.reshape(each)
    moved, copied = _busiest(kept, received, copies * sent, needed, is_sum)
    over = tuple(range(1, rank + 1))
    return whole * moved.max(axis=over), whole * copied.max(axis=over)


def _stack(arrays: Sequence[Index]) -> Index:
    """Return arrays that are broadcast over a mesh as one, int64[arrays, ...]."""
    shape = np.broadcast_shapes(*(x.shape for x in arrays))
    found = np.empty((len(arrays), *shape), dtype=np.int64)
    for i, values in enumerate(arrays):
        found[i] = values
    return found
