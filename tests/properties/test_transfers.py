"""Steps between layouts, executed for all ranks, against the tensor that they move."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from planner.ir.halo import Window
from planner.ir.layout import BALANCED, CHUNK, Cut, CutRule, Layout, Placement, Whole
from planner.ir.mesh import Mesh
from planner.ir.recompute import follows
from planner.ir.transfer import StepKind, steps, transfers
from support import interpreter
from support import layouts as some

EQUAL, SHARED, PARTIAL = Whole.EQUAL, Whole.SHARED, Whole.PARTIAL


@st.composite
def pairs(draw: st.DrawFn, *, wholes: tuple[Whole, ...] = tuple(Whole)) -> tuple[Layout, Layout]:
    mesh, shape = draw(some.meshes()), draw(some.shapes())
    source = draw(some.layouts(shape, mesh, wholes=wholes))
    return source, draw(some.layouts(shape, mesh, wholes=wholes))


@st.composite
def window_pairs(draw: st.DrawFn) -> tuple[Layout, Layout]:
    """Rows in pieces, and the rows that a window operator needs for pieces of its output."""
    mesh, rows = draw(some.meshes()), draw(st.integers(2, 16))
    window = draw(some.windows(rows))
    shape = (3, rows)
    held: list[Placement] = [0, 1, EQUAL]
    have = tuple(draw(st.sampled_from(held)) for _ in mesh.axes)
    need = tuple(draw(st.sampled_from([*held, SHARED])) for _ in mesh.axes)
    source = Layout(shape, mesh, have, (BALANCED, BALANCED))
    target = Layout(shape, mesh, need, (BALANCED, Cut(CutRule.BALANCED, window=window)))
    outputs = Layout((3, window.out_size), mesh, need, (BALANCED, BALANCED))
    assume(not any(layout.has_empty_piece() for layout in (source, target, outputs)))
    return source, target


@st.composite
def tile_pairs(draw: st.DrawFn) -> tuple[Layout, Layout]:
    """Tiles that hold what two windows need, and what one of them, or a reader of the pieces themselves, needs."""
    mesh, rows = draw(some.meshes()), draw(st.integers(2, 16))
    needed: list[Placement] = [0, 1, EQUAL, SHARED]
    held: list[Placement] = [0, EQUAL, PARTIAL]
    need = tuple(draw(st.sampled_from(needed)) for _ in mesh.axes)
    have = tuple(1 if p == 1 else draw(st.sampled_from(held)) for p in need)
    cuts = [BALANCED, *(Cut(window=draw(some.windows(rows))) for _ in range(2))]
    divided = [Layout((3, rows), mesh, need, (BALANCED, cut)) for cut in cuts]
    assume(not any(layout.has_empty_piece() for layout in divided))
    tiles = tuple((min(a for a, _ in each), max(b for _, b in each)) for each in
                  zip(*(layout.pieces(1) for layout in divided[draw(st.integers(0, 1)):]), strict=True))  # fmt: skip
    source = Layout((3, rows), mesh, have, (BALANCED, Cut(tiles=tiles)))
    target = draw(st.sampled_from(divided))
    assume(not source.has_empty_piece() and follows(source, target))
    return source, target


def tensor_of(layout: Layout) -> interpreter.Array:
    return np.random.default_rng(1).integers(-99, 100, layout.shape).astype(np.float64)


def assert_moves(source: Layout, target: Layout) -> None:
    """Assert that behind the steps every rank holds its region, or an addend of it."""
    tensor = tensor_of(source)
    found = interpreter.run(steps(source, target), interpreter.spread(tensor, source, np.random.default_rng(2)))
    for group in target.mesh.groups(target.axes_with(PARTIAL)):
        whole = np.sum([found[p] for p in group], axis=0)
        np.testing.assert_array_equal(whole, interpreter.cut(tensor, target, group[0]))


def assert_adjoint(source: Layout, target: Layout) -> None:
    """Assert <A x, y> = <x, A^T y> where A^T are the steps between the gradients."""
    rng = np.random.default_rng(3)
    x, y = interpreter.anything(source, rng), interpreter.anything(target.gradient, rng)
    forward = interpreter.run(steps(source, target), x)
    backward = interpreter.run(steps(target.gradient, source.gradient), y)
    assert interpreter.inner_product(forward, y, target) == interpreter.inner_product(x, backward, source)


@given(pairs())
def test_every_rank_ends_with_its_region_of_the_tensor(pair: tuple[Layout, Layout]) -> None:
    assert_moves(*pair)


@given(pairs())
def test_the_steps_between_the_gradients_are_the_adjoint(pair: tuple[Layout, Layout]) -> None:
    assert_adjoint(*pair)


@given(window_pairs())
def test_windows_get_their_halos(pair: tuple[Layout, Layout]) -> None:
    assert_moves(*pair)


@given(window_pairs())
def test_gradients_of_halos_are_added_and_rows_that_nobody_read_get_none(
    pair: tuple[Layout, Layout],
) -> None:
    assert_adjoint(*pair)


@given(tile_pairs())
def test_tiles_that_overlap_give_their_readers_all_without_an_exchange(pair: tuple[Layout, Layout]) -> None:
    assert_moves(*pair)


@given(tile_pairs())
def test_gradients_of_tiles_stay_the_addends_of_their_ranks(pair: tuple[Layout, Layout]) -> None:
    assert_adjoint(*pair)


@given(window_pairs())
def test_a_gradient_of_a_gradient_is_cut_as_the_tensor(pair: tuple[Layout, Layout]) -> None:
    assert all(layout.gradient.gradient == layout for layout in pair)


def test_rows_that_a_window_skips_come_back_as_zeros() -> None:
    skips = Cut(CutRule.BALANCED, window=Window(out_size=2, kernel=1, stride=2))
    target = Layout((3, 3), Mesh.of(gpu=2), (1,), (BALANCED, skips))
    for whole in (EQUAL, SHARED):
        assert_adjoint(Layout((3, 3), Mesh.of(gpu=2), (whole,), (BALANCED, BALANCED)), target)


@given(some.meshes(), st.data())
def test_batches_of_any_sizes_come_from_and_go_to_their_ranks(mesh: Mesh, data: st.DataObject) -> None:
    sizes = tuple(data.draw(st.integers(1, 5)) for _ in range(mesh.size))
    shape = (sum(sizes), 12)
    own = Layout(shape, mesh, (0,) * len(mesh.axes), (Cut(sizes=sizes), CHUNK))
    inside = data.draw(some.layouts(shape, mesh))
    assert_moves(own, inside)
    assert_moves(inside, own)
    assert_adjoint(own, inside)
    assert_adjoint(inside, own)


@given(pairs())
def test_steps_are_chained_and_end_in_the_regions_of_the_target(
    pair: tuple[Layout, Layout],
) -> None:
    source, target = pair
    found = steps(source, target)
    assert all(a.target == b.source for a, b in itertools.pairwise(found))
    last = found[-1].target if found else source
    assert last.axes_with(PARTIAL) == target.axes_with(PARTIAL)
    assert all(last.region(p) == target.region(p) for p in range(target.mesh.size))


@given(pairs())
def test_nothing_moves_between_equal_layouts(pair: tuple[Layout, Layout]) -> None:
    assert steps(pair[0], pair[0]) == ()


@given(pairs(wholes=(EQUAL, SHARED)))
def test_transfers_give_each_receiver_exactly_what_it_needs(pair: tuple[Layout, Layout]) -> None:
    source, target = pair
    received = [np.zeros(target.region(p).shape, dtype=int) for p in range(target.mesh.size)]
    listed = transfers(source, target)
    assert list(listed) == sorted(listed, key=lambda t: (t.target, t.source))
    for copy in listed:
        assert source.region(copy.source).contains(copy.region)
        received[copy.target][copy.region.slices_in(target.region(copy.target))] += 1
    assert all((count == 1).all() for count in received)


@given(pairs(wholes=(EQUAL, SHARED)))
def test_what_a_rank_has_already_is_not_sent_to_it(pair: tuple[Layout, Layout]) -> None:
    source, target = pair
    for copy in transfers(source, target):
        own = source.region(copy.target)
        assert copy.source == copy.target or own.intersect(copy.region) is None


@given(pairs(wholes=(EQUAL, SHARED)))
def test_all_gathers_receive_what_the_list_says(pair: tuple[Layout, Layout]) -> None:
    for step in steps(*pair):
        if step.kind is StepKind.ALL_GATHER:
            listed: Counter[int] = Counter()
            for copy in transfers(step.source, step.target):
                if copy.source != copy.target:
                    listed[copy.target] += copy.region.volume
            for group in step.source.mesh.groups(step.axes):
                sizes = {p: step.source.region(p).volume for p in group}
                for p in group:
                    assert sum(sizes.values()) - sizes[p] == listed[p]


@given(pairs(wholes=(EQUAL, SHARED)))
def test_an_exchange_is_there_only_where_some_rank_misses_something(
    pair: tuple[Layout, Layout],
) -> None:
    communicates = any(s.kind.communicates for s in steps(*pair))
    misses = any(t.source != t.target for t in transfers(*pair))
    assert communicates == misses or (communicates and any(layout.has_idle for layout in pair))


AXIS = Mesh.of(gpu=4)
GATHER, REDUCE, SCATTER = StepKind.ALL_GATHER, StepKind.ALL_REDUCE, StepKind.REDUCE_SCATTER
SLICE, EXCHANGE, PAD, MASK = StepKind.SLICE, StepKind.EXCHANGE, StepKind.PAD, StepKind.MASK


@pytest.mark.parametrize(
    ("have", "need", "forward", "backward"),
    [
        (0, EQUAL, [GATHER], [SLICE]),
        (0, SHARED, [GATHER], [SCATTER]),
        (1, SHARED, [GATHER], [SCATTER]),
        (EQUAL, 0, [SLICE], [GATHER]),
        (EQUAL, SHARED, [], [REDUCE]),
        (PARTIAL, EQUAL, [REDUCE], []),
        (PARTIAL, 1, [SCATTER], [GATHER]),
        (0, 1, [EXCHANGE], [EXCHANGE]),
        (SHARED, 0, [SLICE], [PAD]),
        (SHARED, EQUAL, [], [MASK]),
        (SHARED, SHARED, [], []),
    ],
)
def test_the_pairs_of_the_design(
    have: int | Whole, need: int | Whole, forward: list[StepKind], backward: list[StepKind]
) -> None:
    source, target = (Layout((8, 8), AXIS, (p,), (BALANCED, CHUNK)) for p in (have, need))
    assert [s.kind for s in steps(source, target)] == forward
    assert [s.kind for s in steps(target.gradient, source.gradient)] == backward


TWO = Mesh.of(node=2, gpu=2)


@pytest.mark.parametrize(
    ("have", "need", "found"),
    [
        ((0, 0), (0, EQUAL), [(GATHER, (1,))]),
        ((0, 0), (EQUAL, EQUAL), [(GATHER, (0, 1))]),
        ((0, 0), (EQUAL, 0), [(EXCHANGE, (0, 1))]),
        ((0, 1), (0, EQUAL), [(GATHER, (1,))]),
        ((0, PARTIAL), (0, 0), [(SCATTER, (1,))]),
        ((PARTIAL, PARTIAL), (0, 0), [(SCATTER, (0, 1))]),
        ((PARTIAL, 0), (0, 0), [(REDUCE, (0,)), (EXCHANGE, (1,))]),
        ((0, 0), (PARTIAL, PARTIAL), [(PAD, ())]),
        ((0, 1), (PARTIAL, PARTIAL), [(PAD, ())]),
    ],
)
def test_steps_on_two_axes(
    have: tuple[int | Whole, ...],
    need: tuple[int | Whole, ...],
    found: list[tuple[StepKind, tuple[int, ...]]],
) -> None:
    source, target = (Layout((8, 8), TWO, p, (BALANCED, CHUNK)) for p in (have, need))
    assert [(s.kind, s.axes) for s in steps(source, target)] == found
