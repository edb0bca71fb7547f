"""The picture of a network: edges point onwards, nothing lies on anything else."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from planner.report.drawing import Drawing, draw


@st.composite
def graphs(draw_: st.DrawFn) -> tuple[int, list[tuple[int, int]]]:
    size = draw_(st.integers(1, 25))
    pairs = list(itertools.combinations(range(size), 2))
    return size, draw_(st.lists(st.sampled_from(pairs), max_size=40)) if pairs else []


def cells(found: Drawing, edges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return every column and lane that a node, or an edge on its way, takes."""
    nodes = list(zip(found.columns, found.lanes, strict=True))
    passing = [
        (column, found.passing[a, b]) for a, b in set(edges) for column in range(found.columns[a] + 1, found.columns[b])
    ]
    return nodes + passing


@given(graphs())
def test_edges_point_onwards_and_nothing_lies_on_anything_else(graph: tuple[int, list[tuple[int, int]]]) -> None:
    found = draw(*graph)
    assert all(found.columns[a] < found.columns[b] for a, b in graph[1])
    taken = cells(found, graph[1])
    assert len(set(taken)) == len(taken)
    assert all(column >= 0 and lane >= 0 for column, lane in taken)


def test_a_chain_is_straight_and_what_skips_lies_beside_it() -> None:
    found = draw(6, [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (1, 4)])
    assert found.columns == (0, 1, 2, 3, 4, 5)
    assert len(set(found.lanes)) == 1
    assert found.passing.keys() == {(1, 4)}
    assert abs(found.passing[1, 4] - found.lanes[0]) == 1


def test_what_reads_nothing_stands_in_front_of_its_first_reader() -> None:
    assert draw(4, [(0, 1), (1, 3), (2, 3)]).columns == (0, 1, 1, 2)
