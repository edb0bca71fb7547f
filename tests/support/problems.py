"""Random problems for solvers."""

import itertools

import numpy as np
from hypothesis import strategies as st

from planner.search.problem import Problem
from planner.units import MIB


@st.composite
def problems(draw: st.DrawFn, *, memory: bool = False) -> Problem:
    """A chain, tree, diamond or any sparse graph; few distinct costs, so that ties are common."""
    count = draw(st.integers(1, 6))
    sizes = [draw(st.integers(1, 3)) for _ in range(count)]
    pairs = draw(st.sampled_from([_chain, _tree, _diamonds, _any]))(draw, count)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scale = draw(st.sampled_from([1.0, 1e-6]))
    top = draw(st.sampled_from([1, 3, 1000]))

    def seconds(*shape: int) -> np.ndarray:
        return rng.integers(0, top + 1, shape) / 8 * scale

    node_s = tuple(seconds(n) for n in sizes)
    edge_s = {(i, j): seconds(sizes[i], sizes[j]) for i, j in pairs}
    if not memory:
        return Problem(node_s, edge_s)
    unit = draw(st.sampled_from([1, MIB + 1, 3 * 2**30 + 7]))
    resident, transient = (tuple(rng.integers(0, 10, n).astype(np.int64) * unit for n in sizes) for _ in range(2))
    limit = draw(st.integers(0, 9 * count)) * unit
    return Problem(node_s, edge_s, resident, transient, limit)


Pairs = list[tuple[int, int]]


def _chain(draw: st.DrawFn, count: int) -> Pairs:  # noqa: ARG001  # all shapes take both
    return list(itertools.pairwise(range(count)))


def _tree(draw: st.DrawFn, count: int) -> Pairs:
    return [(draw(st.integers(0, j - 1)), j) for j in range(1, count)]


def _diamonds(draw: st.DrawFn, count: int) -> Pairs:
    return [*_chain(draw, count), *((i, i + 2) for i in range(0, count - 2, 2))]


def _any(draw: st.DrawFn, count: int) -> Pairs:
    every = list(itertools.combinations(range(count), 2))
    return draw(st.lists(st.sampled_from(every), unique=True)) if every else []
