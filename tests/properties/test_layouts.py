"""Layouts against torch.chunk, DTensor and brute force."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.distributed.tensor import Shard
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset

from planner.ir.halo import Window
from planner.ir.layout import (
    CHUNK,
    Cut,
    CutRule,
    Layout,
    Whole,
    chunk_pieces,
    cut_pieces,
)
from planner.ir.mesh import Mesh
from support import layouts as some

PARTS = st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple)


@given(st.integers(1, 50), PARTS, st.sampled_from(CutRule), st.integers(1, 3))
def test_pieces_partition_the_dimension(size: int, parts: tuple[int, ...], rule: CutRule, unit: int) -> None:
    pieces = cut_pieces(size * unit, parts, Cut(rule, unit))
    assert len(pieces) == math.prod(parts)
    assert [i for a, b in pieces for i in range(a, b)] == list(range(size * unit))
    assert all(a % unit == b % unit == 0 for a, b in pieces)


@given(st.integers(1, 50), PARTS, st.sampled_from(CutRule))
def test_pieces_of_the_outer_axes_are_unions_of_the_pieces_of_all_axes(
    size: int, parts: tuple[int, ...], rule: CutRule
) -> None:
    fine = cut_pieces(size, parts, Cut(rule))
    inner = parts[-1]
    joined = tuple((group[0][0], group[-1][1]) for group in zip(*[fine[i::inner] for i in range(inner)], strict=True))
    assert joined == cut_pieces(size, parts[:-1], Cut(rule))


@given(st.integers(1, 50), PARTS)
def test_balanced_pieces_differ_by_at_most_one(size: int, parts: tuple[int, ...]) -> None:
    sizes = [b - a for a, b in cut_pieces(size, parts, Cut(CutRule.BALANCED))]
    assert max(sizes) - min(sizes) <= 1


@given(st.integers(1, 50), PARTS)
def test_nested_chunks_are_torch_chunk_axis_after_axis(size: int, parts: tuple[int, ...]) -> None:
    tensors = [torch.arange(size)]
    for count in parts:
        tensors = [
            chunk
            for t in tensors
            for chunk in itertools.islice(itertools.chain(t.chunk(count), itertools.repeat(t[:0])), count)
        ]
    assert [list(range(a, b)) for a, b in chunk_pieces(size, parts)] == [t.tolist() for t in tensors]


@given(some.meshes(), st.lists(st.integers(1, 30), min_size=1, max_size=3), st.data())
def test_chunk_layouts_are_those_of_dtensor(mesh: Mesh, shape: list[int], data: st.DataObject) -> None:
    dims = [data.draw(st.integers(0, len(shape) - 1)) for _ in mesh.axes]
    layout = Layout(tuple(shape), mesh, tuple(dims), (CHUNK,) * len(shape))
    for position in range(mesh.size):
        size, offset = _compute_local_shape_and_global_offset(
            shape, mesh.shape, list(mesh.coordinates(position)), [Shard(d) for d in dims]
        )
        region = layout.region(position)
        assert region.shape == size
        assert region.volume == 0 or region.start == offset


def test_ten_channels_on_two_by_two_ranks_are_three_two_three_two() -> None:
    assert [b - a for a, b in chunk_pieces(10, (2, 2))] == [3, 2, 3, 2]


def test_five_channels_leave_the_fourth_of_four_ranks_empty() -> None:
    mesh = Mesh.of(gpu=4)
    assert Layout((8, 5), mesh, (1,), (Cut(), CHUNK)).has_empty_piece()
    assert not Layout((8, 6), Mesh.of(gpu=3), (1,), (Cut(), CHUNK)).has_empty_piece()


@given(some.meshes(), some.shapes(), st.data())
def test_regions_tile_the_tensor_once_per_copy(mesh: Mesh, shape: tuple[int, ...], data: st.DataObject) -> None:
    layout = data.draw(some.layouts(shape, mesh))
    held = np.zeros(shape, dtype=int)
    for position in range(mesh.size):
        region = layout.region(position)
        held[tuple(slice(a, b) for a, b in zip(region.start, region.stop, strict=True))] += 1
    copies = math.prod(mesh.shape[a] for a in layout.axes_with(*Whole))
    assert (held == copies).all()
    assert layout.largest_shape() == tuple(
        max(layout.region(p).shape[d] for p in range(mesh.size)) for d in range(len(shape))
    )


@given(st.data(), st.integers(1, 20))
def test_the_input_of_a_piece_is_what_brute_force_finds_it_to_read(data: st.DataObject, in_size: int) -> None:
    window = data.draw(some.windows(in_size))
    start = data.draw(st.integers(0, window.out_size - 1))
    stop = data.draw(st.integers(start + 1, window.out_size))
    read = {
        o * window.stride - window.padding + window.dilation * k
        for o in range(start, stop)
        for k in range(window.kernel)
    }
    inside = {p for p in read if 0 <= p < in_size}
    assume(inside)  # an output that sees nothing but padding reads nothing
    first, last = window.input_interval(start, stop, in_size)
    assert (first, last) == (max(min(read), 0), min(max(read) + 1, in_size))
    if window.dilation == 1:  # else a border row may lie between two that are read
        assert (first, last) == (min(inside), max(inside) + 1)


@given(st.integers(1, 5), st.integers(0, 4), st.integers(1, 3), st.data())
def test_what_reaches_a_part_is_what_brute_force_finds(
    kernel: int, padding: int, step: int, data: st.DataObject
) -> None:
    window = Window(20, kernel, 1, padding, step)
    a, start = data.draw(st.integers(0, 19)), data.draw(st.integers(0, 19))
    b, stop = data.draw(st.integers(a + 1, 20)), data.draw(st.integers(start + 1, 20))
    reads = [
        (o, j) for o in range(a, b) for j in range(kernel) if start <= o + j * step - padding < stop
    ]  # fmt: skip
    found = window.reached((a, b), (start, stop))
    taps, outputs = {j for _, j in reads}, {o for o, _ in reads}
    if found is None:
        assert not reads
        return
    assert taps <= set(range(found.first_tap, found.first_tap + found.num_taps)) <= set(range(kernel))
    assert outputs <= set(range(found.start, found.stop)) <= set(range(a, b))
    if step == 1 and reads:  # with gaps between taps, the hull may have some that reach nothing
        assert len(taps) == found.num_taps
        assert len(outputs) == found.stop - found.start


def test_a_window_that_sees_padding_alone_reads_nothing() -> None:
    start, stop = Window(out_size=9, kernel=1, padding=3).input_interval(7, 9, 3)
    assert start >= stop


@pytest.mark.parametrize("placements", [(0,), (0, 1, 1)])
def test_placements_must_fit_the_mesh(placements: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        Layout((4, 4), Mesh.of(a=2, b=2), placements, (CHUNK, CHUNK))
