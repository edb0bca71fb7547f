"""Sub-domains against their definition: which pixels a part holds, and how often each pixel is held."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.errors import UsageError
from planner.ir.subdomains import parse_grid, subdomains


@st.composite
def cases(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    grid = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple))
    space = tuple(draw(st.integers(parts, 3 * parts + 2)) for parts in grid)
    inner = [size // parts for size, parts in zip(space, grid, strict=True) if parts > 1]
    return space, grid, draw(st.integers(0, min(inner, default=0)))


@given(cases())
def test_a_part_holds_the_pixels_of_its_cell_and_those_within_the_overlap_of_it(
    case: tuple[tuple[int, ...], tuple[int, ...], int],
) -> None:
    space, grid, overlap = case
    parts = subdomains(space, grid, overlap)
    cells = list(itertools.product(*(range(count) for count in grid)))
    assert len(parts) == len(cells)
    for part, cell in zip(parts, cells, strict=True):
        for size, count, index, start, stop in zip(space, grid, cell, part.start, part.stop, strict=True):
            own = _cell(size, count, index)
            near = [row for row in range(size) if min(abs(row - each) for each in own) <= overlap]
            assert near == list(range(start, stop))


def _cell(size: int, count: int, index: int) -> set[int]:
    """Return the rows of one cell: those whose place among all cells, by floors of equal shares, is this one."""
    return {row for row in range(size) if index * size // count <= row < (index + 1) * size // count}


@given(cases())
def test_disjoint_parts_hold_every_pixel_once_and_are_nearly_equal(
    case: tuple[tuple[int, ...], tuple[int, ...], int],
) -> None:
    space, grid, _ = case
    parts = subdomains(space, grid)
    held = [p for part in parts for p in itertools.product(*map(range, part.start, part.stop))]
    assert sorted(held) == list(itertools.product(*(range(size) for size in space)))
    for sizes in zip(*(part.shape for part in parts), strict=True):
        assert max(sizes) - min(sizes) <= 1


def test_neighbours_share_twice_the_overlap() -> None:
    left, right = subdomains((32, 32), (1, 2), 3)
    assert (left.start, left.stop) == ((0, 0), (32, 19))
    assert (right.start, right.stop) == ((0, 13), (32, 32))
    common = left.intersect(right)
    assert common is not None
    assert common.shape == (32, 6)


@pytest.mark.parametrize(
    ("space", "grid", "overlap", "said"),
    [
        ((8, 8), (2,), 0, "each of the 2 dimensions"),
        ((8, 8), (9, 1), 0, "at least one pixel"),
        ((8, 8), (2, 2), 5, "0 to 4 pixels, and is 5"),
        ((8, 8), (2, 2), -1, "0 to 4"),
        ((8, 8), (1, 1), 1, None),
    ],
)
def test_what_does_not_fit_is_refused(
    space: tuple[int, ...], grid: tuple[int, ...], overlap: int, said: str | None
) -> None:
    if said is None:
        assert [part.shape for part in subdomains(space, grid, overlap)] == [space]
    else:
        with pytest.raises(UsageError, match=said):
            subdomains(space, grid, overlap)


def test_grids_are_read_from_texts() -> None:
    assert parse_grid("2x2") == (2, 2)
    assert parse_grid("1X2x3") == (1, 2, 3)
    for text in ("", "2x", "0x2", "2,2", "ax2"):
        with pytest.raises(UsageError, match="2x2 or 1x2x2"):
            parse_grid(text)
