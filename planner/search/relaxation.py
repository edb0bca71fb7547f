"""Lower bounds of a problem by moving costs between nodes and edges, and choices on the way.

Whatever is added to an edge and taken from its node leaves the cost of every choice as it is. In each such form of
the problem the sum of the least node costs plus the sum of the least edge costs is a lower bound. A sweep goes through
the variables in order: each collects from the edges to its predecessors all they can give, then hands what it has to
the edges to its successors, in equal shares. On a tree one sweep there and back makes the bound exact. This is
sequential tree-reweighted message passing (TRW-S) [Kolmogorov06], the dual ascent for the linear relaxation of the
integer program.

An option whose own bound is above the cost of a known choice cannot be in a better one: it is removed.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from planner.deadline import look
from planner.search.problem import Choice, Costs, Indices, Problem

Improve = Callable[[Choice], Choice]

PATIENCE: Final = 5
"""Sweeps there and back in which the gap has to shrink by ``PROGRESS``."""
PROGRESS: Final = 0.05
SLACK: Final = 1e-9
"""Relative to the cost of a choice: by so much must the bound of an option be above it. Sums are rounded."""


@dataclass(slots=True)
class _Edge:
    """An edge with what its two ends have handed to it: it costs ``costs + source_s[:, None] + target_s``."""

    source: int
    target: int
    costs: Costs
    source_s: Costs
    target_s: Costs

    def give(self, v: int) -> Costs:
        """Return, and lose, what each option of one end is sure to pay here."""
        if v == self.target:
            least: Costs = (self.costs + self.source_s[:, None]).min(axis=0)
            given, self.target_s = least + self.target_s, -least
        else:
            least = (self.costs + self.target_s).min(axis=1)
            given, self.source_s = least + self.source_s, -least
        return given

    def take(self, v: int, handed_s: Costs) -> None:
        """Take costs from one end."""
        if v == self.target:
            self.target_s = self.target_s + handed_s
        else:
            self.source_s = self.source_s + handed_s

    def seen_from(self, v: int, picked: Sequence[int]) -> Costs:
        """Return the edge for every option of one end, the other end's option picked."""
        if v == self.target:
            option = picked[self.source]
            seen: Costs = self.costs[option] + self.source_s[option] + self.target_s
        else:
            option = picked[self.target]
            seen = self.costs[:, option] + self.source_s + self.target_s[option]
        return seen

    def keep(self, rows: NDArray[np.bool_], columns: NDArray[np.bool_]) -> None:
        """Take options out."""
        self.costs = self.costs[np.ix_(rows, columns)]
        self.source_s, self.target_s = self.source_s[rows], self.target_s[columns]


class Relaxation:
    """A form of the problem's nodes and edges, and the options that can still be in a best choice.

    Args:
        problem: its limit and chain are not read.

    Attributes:
        keep: for every variable the options that are left, positions among those of the problem, ascending.
        lower_bound_s: of all choices that cost no more than the ``upper_s`` with which options were removed.
    """

    def __init__(self, problem: Problem) -> None:
        sizes = problem.sizes
        self.keep: list[Indices] = [np.arange(n) for n in sizes]
        self._left: list[Costs] = list(problem.node_s)
        self._before: list[list[_Edge]] = [[] for _ in sizes]
        self._after: list[list[_Edge]] = [[] for _ in sizes]
        for (i, j), costs in problem.edge_s.items():
            edge = _Edge(i, j, costs, np.zeros(sizes[i]), np.zeros(sizes[j]))
            self._after[i].append(edge)
            self._before[j].append(edge)
        self._alive: list[NDArray[np.bool_]] = [np.ones(n, dtype=np.bool_) for n in sizes]
        self.lower_bound_s = 0.0

    def copy(self) -> "Relaxation":
        """Return one that can be swept on its own."""
        other = object.__new__(Relaxation)
        other.keep, other._left, other._alive = list(self.keep), list(self._left), [a.copy() for a in self._alive]
        other._before, other._after = [[] for _ in self.keep], [[] for _ in self.keep]
        other.lower_bound_s = self.lower_bound_s
        for edges in self._after:
            for edge in edges:
                same = _Edge(edge.source, edge.target, edge.costs, edge.source_s, edge.target_s)
                other._after[edge.source].append(same)
                other._before[edge.target].append(same)
        return other

    def sweep(self, upper_s: float) -> Choice | None:
        """Go through the variables there and back; return the choice met on the way back.

        Args:
            upper_s: options that cannot be in a choice of this cost, or less, are removed.

        Returns:
            None where no such choice is left.
        """
        count = len(self._left)
        if self._pass(range(count), self._before, self._after, upper_s) is None:
            return None
        found = self._pass(range(count - 1, -1, -1), self._after, self._before, upper_s)
        if found is not None:
            self._shrink()
            self.lower_bound_s = max(self.lower_bound_s, math.fsum(float(left.min()) for left in self._left))
        return found

    def _pass(
        self, order: range, behind: Sequence[Sequence[_Edge]], ahead: Sequence[Sequence[_Edge]], upper_s: float
    ) -> Choice | None:
        """Collect from the edges behind, hand to the edges ahead. Nodes and edges stay non-negative throughout."""
        look()
        bound_s = math.fsum(float(left.min()) for left in self._left)
        picked = [0] * len(self._left)
        for v in order:
            bound_s -= float(self._left[v].min())
            left = self._left[v]
            for edge in behind[v]:
                left = left + edge.give(v)
            alive = self._alive[v]
            alive &= left <= upper_s - bound_s + SLACK * upper_s
            if not alive.any():
                return None
            asked = left
            for edge in behind[v]:
                asked = asked + edge.seen_from(v, picked)
            picked[v] = int(np.where(alive, asked, np.inf).argmin())
            if ahead[v]:
                share = left / max(len(behind[v]), len(ahead[v]))
                for edge in ahead[v]:
                    edge.take(v, share)
                left = left - share * len(ahead[v]) if len(behind[v]) > len(ahead[v]) else np.zeros_like(left)
            self._left[v] = left
            bound_s += float(left.min())
        return tuple(int(kept[p]) for kept, p in zip(self.keep, picked, strict=True))

    def _shrink(self) -> None:
        """Take the options that are not alive out of all arrays."""
        changed = [not alive.all() for alive in self._alive]
        for v, edges in enumerate(self._after):
            for edge in edges:
                if changed[v] or changed[edge.target]:
                    edge.keep(self._alive[v], self._alive[edge.target])
        for v, alive in enumerate(self._alive):
            if changed[v]:
                self.keep[v], self._left[v] = self.keep[v][alive], self._left[v][alive]
                self._alive[v] = np.ones(len(self.keep[v]), dtype=np.bool_)
