"""Random problems for solvers."""

import itertools
from dataclasses import replace

import numpy as np
from hypothesis import strategies as st

from planner.search.problem import Chain, Problem
from planner.units import MIB


@st.composite
def problems(draw: st.DrawFn, *, memory: bool = False, chain: bool = False, max_count: int = 6) -> Problem:
    """A chain, tree, diamond, graph of treewidth up to 4 or any; few distinct costs, so that ties are common."""
    count = draw(st.integers(1, max_count))
    shared = draw(st.booleans())  # equal layers share their arrays
    sizes = [draw(st.integers(1, 3))] * count if shared else [draw(st.integers(1, 3)) for _ in range(count)]
    pairs = draw(st.sampled_from([_chain, _tree, _diamonds, _thick, _any]))(draw, count)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scale = draw(st.sampled_from([1.0, 1e-6]))
    top = draw(st.sampled_from([1, 3, 1000]))

    def seconds(*shape: int) -> np.ndarray:
        return rng.integers(0, top + 1, shape) / 8 * scale

    if shared:
        vectors, matrices = [seconds(sizes[0]) for _ in range(2)], [seconds(sizes[0], sizes[0]) for _ in range(2)]
        node_s = tuple(vectors[rng.integers(2)] for _ in sizes)
        edge_s = {pair: matrices[rng.integers(2)] for pair in pairs}
    else:
        node_s = tuple(seconds(n) for n in sizes)
        edge_s = {(i, j): seconds(sizes[i], sizes[j]) for i, j in pairs}
    problem = Problem(node_s, edge_s)
    if chain:
        problem = replace(problem, chain=_reductions(draw, rng, problem, seconds))
    if not memory:
        return problem
    unit = draw(st.sampled_from([1, MIB + 1, 3 * 2**30 + 7]))
    resident, transient = (tuple(rng.integers(0, 10, n).astype(np.int64) * unit for n in sizes) for _ in range(2))
    limit = draw(st.integers(0, 9 * count)) * unit
    return replace(problem, resident_bytes=resident, transient_bytes=transient, limit_bytes=limit)


def _reductions(draw: st.DrawFn, rng: np.random.Generator, problem: Problem, seconds: object) -> Chain:
    """Reductions on up to three levels; every part of a cost is a number of quarters of it."""
    assert callable(seconds)
    count, levels = len(problem.node_s), draw(st.integers(0, 3))
    order = draw(st.permutations(range(count)))
    backward = [rng.integers(0, 4, len(own)) / 4 for own in problem.node_s]
    transfers = {}
    for (i, j), costs in problem.edge_s.items():
        part = costs * (rng.integers(0, 5, costs.shape) / 4)
        transfers.update({(i, j): part} if rng.integers(2) else {(j, i): part.T})
    return Chain(
        tuple(order),
        tuple(own * part for own, part in zip(problem.node_s, backward, strict=True)),
        tuple(own * (1 - part) / 2 for own, part in zip(problem.node_s, backward, strict=True)),
        transfers,
        tuple(seconds(levels, n) for n in problem.sizes),
    )


Pairs = list[tuple[int, int]]


def _chain(draw: st.DrawFn, count: int) -> Pairs:  # noqa: ARG001  # all shapes take both
    return list(itertools.pairwise(range(count)))


def _tree(draw: st.DrawFn, count: int) -> Pairs:
    return [(draw(st.integers(0, j - 1)), j) for j in range(1, count)]


def _diamonds(draw: st.DrawFn, count: int) -> Pairs:
    return [*_chain(draw, count), *((i, i + 2) for i in range(0, count - 2, 2))]


def _thick(draw: st.DrawFn, count: int) -> Pairs:
    """Each variable joins some of a clique of at most four earlier ones: treewidth up to 4."""
    width = draw(st.integers(1, 4))
    clique: list[int] = []
    pairs = []
    for j in range(count):
        pairs += [(i, j) for i in clique if draw(st.booleans())]
        if len(clique) == width:
            clique.remove(draw(st.sampled_from(clique)))
        clique.append(j)
    return pairs


def _any(draw: st.DrawFn, count: int) -> Pairs:
    every = list(itertools.combinations(range(count), 2))
    return draw(st.lists(st.sampled_from(every), unique=True)) if every else []
