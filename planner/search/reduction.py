"""Smaller problems with the same optimum: options that another one dominates, variables with nothing to choose.

Option b of a variable dominates option a if a choice never costs more with b than with a: for nodes and edges

    node[b] - node[a] + sum over edges of max over the neighbour's options x of (edge[b, x] - edge[a, x])  <=  0

([Goldstein94], dead-end elimination). Under a memory limit b must not need more bytes either. With a chain, whatever
the length of the step is made of must not grow: the forward part with the worse of (edge, edge without its transfer
backward), plus the variable's own backward or not, plus its reductions on a level or not; see ``Chain``.

Nothing else is removed. In particular identical layers behind one another keep options of their own: a best choice
may alternate between two splits, which columns that two layers share could not say.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from planner.deadline import look
from planner.search.problem import Chain, Choice, Costs, Indices, Problem


def undominated(problem: Problem, max_work: float) -> list[Indices]:
    """Return for every variable the options that none dominates; of equal ones the first.

    Args:
        problem: with or without limit and chain.
        max_work: entries that may be compared, about 1e9 a second; what would take more keeps all its options.
    """
    keep = [np.arange(n) for n in problem.sizes]
    left = problem
    while True:
        rounds = _Round(left, max_work)
        found = [rounds.kept(v) for v in range(len(keep))]
        max_work -= rounds.work
        if all(len(f) == n for f, n in zip(found, left.sizes, strict=True)):
            return keep
        keep = [k[f] for k, f in zip(keep, found, strict=True)]
        left = left.restricted(found)


class _Round:
    """One look at every variable, with the options that its neighbours had at the start."""

    def __init__(self, problem: Problem, max_work: float) -> None:
        self._problem, self._max_work, self.work = problem, max_work, 0.0
        chain = problem.chain
        self._around: list[list[tuple[Costs, Costs | None]]] = [[] for _ in problem.node_s]
        backward = _undirected(chain) if chain is not None else {}
        for (i, j), costs in problem.edge_s.items():
            back = backward.get((i, j))
            self._around[i].append((costs, back))
            self._around[j].append((costs.T, None if back is None else back.T))
        self._made: dict[object, Costs] = {}
        self._read: list[Costs] = []

    def kept(self, v: int) -> Indices:
        """Return the options of a variable that none dominates."""
        problem = self._problem
        count = len(problem.node_s[v])
        entries = sum(float(count) * costs.size for costs, _ in self._around[v])
        if count == 1 or self.work + entries > self._max_work:
            return np.arange(count)
        look()
        dominates = self._dominates(v)
        np.fill_diagonal(dominates, val=False)
        for held in (problem.resident_bytes, problem.transient_bytes):
            if problem.limit_bytes is not None:
                dominates &= held[v][:, None] <= held[v]
        alive = np.ones(count, dtype=np.bool_)
        for a in np.flatnonzero(dominates.any(axis=0))[::-1]:  # the last first: of equal ones the first is left
            alive[a] = not (dominates[:, a] & alive).any()
        return np.flatnonzero(alive)

    def _dominates(self, v: int) -> NDArray[np.bool_]:
        """Return whether the option of a row costs no more than that of a column, whatever the others choose."""
        problem, chain = self._problem, self._problem.chain
        own = problem.node_s[v]
        if chain is None:
            more = own[:, None] - own
            for costs, _ in self._around[v]:
                more += self._most(costs)
            return np.asarray(more <= 0)
        backward = _differences(chain.backward_s[v])
        more = _differences(own) - backward
        for costs, back in self._around[v]:
            worst = self._most(costs)
            more += worst if back is None else np.maximum(worst, self._most(costs - back))
        longest = np.maximum(backward, 0.0)
        sync = np.zeros_like(backward)
        for level in chain.sync_s[v]:
            sync = np.maximum(sync, _differences(level))
        return np.asarray(more + longest + sync <= 0)

    def _most(self, costs: Costs) -> Costs:
        """Return by how much a row can cost more than another, over all columns: float64[rows, rows]."""
        where = costs.__array_interface__["data"][0], costs.shape, costs.strides
        if where not in self._made:
            plain = np.ascontiguousarray(costs)
            self.work += float(len(plain)) * plain.size
            self._made[where] = np.stack([(row - plain).max(axis=1) for row in plain])
            self._read.append(costs)  # its memory must not become another array's
        return self._made[where]


def _differences(vector: Costs) -> Costs:
    return vector[:, None] - vector


def _undirected(chain: Chain) -> dict[tuple[int, int], Costs]:
    found: dict[tuple[int, int], Costs] = {}
    for (i, j), costs in chain.transfer_s.items():
        key, matrix = ((i, j), costs) if i < j else ((j, i), costs.T)
        found[key] = found[key] + matrix if key in found else matrix
    return found


def folded(problem: Problem) -> tuple[Problem, tuple[int, ...]]:
    """Return nodes and edges without variables of one option, and the variables that are left.

    What such a variable costs beside a neighbour is added to the neighbour; what it costs alone is left out.
    """
    left = tuple(v for v, n in enumerate(problem.sizes) if n > 1)
    number = {v: k for k, v in enumerate(left)}
    node_s = [problem.node_s[v] for v in left]
    edge_s = {}
    for (i, j), costs in problem.edge_s.items():
        if i in number and j in number:
            edge_s[number[i], number[j]] = costs
        elif i in number:
            node_s[number[i]] = node_s[number[i]] + costs[:, 0]
        elif j in number:
            node_s[number[j]] = node_s[number[j]] + costs[0]
    return Problem(tuple(node_s), edge_s), left


def unfolded(choice: Choice, left: Sequence[int], keep: Sequence[Indices]) -> Choice:
    """Return the choice of the whole problem: of the variables that were left, and the only option of the others."""
    picked = [0] * len(keep)
    for v, option in zip(left, choice, strict=True):
        picked[v] = option
    return tuple(int(kept[p]) for kept, p in zip(keep, picked, strict=True))
