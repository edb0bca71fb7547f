"""Local search on a problem: one variable at a time takes the option that costs least beside its neighbours."""

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from planner.search.problem import Choice, Costs, Problem

MAX_CHANGES: Final = 100_000
"""After which it ends; each lowers the cost, so that none is made twice."""


class Descent:
    """Coordinate descent on nodes and edges; under the memory limit where the problem has one."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._around: list[list[tuple[int, Costs]]] = [[] for _ in problem.node_s]
        for (i, j), costs in problem.edge_s.items():
            self._around[i].append((j, costs))
            self._around[j].append((i, costs.T))

    def __call__(self, choice: Choice) -> Choice:
        """Return a choice of no higher cost from which no single change leads further down.

        A choice that breaks the memory limit is returned as it is.
        """
        problem = self._problem
        if not problem.fits(choice):
            return choice
        picked, held = list(choice), _Held(problem, choice)
        waiting, is_waiting = list(range(len(picked) - 1, -1, -1)), [True] * len(picked)
        changes = 0
        while waiting and changes < MAX_CHANGES:
            v = waiting.pop()
            is_waiting[v] = False
            own = problem.node_s[v]
            for other, costs in self._around[v]:
                own = own + costs[:, picked[other]]
            if not held.unlimited:
                own = np.where(held.possible(v), own, np.inf)
            best = int(own.argmin())
            if not own[best] < own[picked[v]] * (1 - 1e-12):  # not for the rounding of sums
                continue
            picked[v] = best
            held.take(v, best)
            changes += 1
            for other, _ in self._around[v]:
                if not is_waiting[other]:
                    is_waiting[other] = True
                    waiting.append(other)
        return tuple(picked)


class _Held:
    """The bytes of a choice that changes."""

    def __init__(self, problem: Problem, choice: Sequence[int]) -> None:
        self._problem, self.unlimited = problem, problem.limit_bytes is None
        if not self.unlimited:
            self._resident = np.array([b[c] for b, c in zip(problem.resident_bytes, choice, strict=True)])
            self._transient = np.array([b[c] for b, c in zip(problem.transient_bytes, choice, strict=True)])

    def possible(self, v: int) -> NDArray[np.bool_]:
        """Return which options of one variable obey the limit."""
        assert self._problem.limit_bytes is not None
        others = int(self._resident.sum() - self._resident[v])
        own, self._transient[v] = self._transient[v], 0
        largest = self._transient.max()
        self._transient[v] = own
        needed = np.maximum(self._problem.transient_bytes[v], largest)
        return np.asarray(self._problem.resident_bytes[v] + needed + others <= self._problem.limit_bytes)

    def take(self, v: int, option: int) -> None:
        """Change one variable's option."""
        if not self.unlimited:
            self._resident[v] = self._problem.resident_bytes[v][option]
            self._transient[v] = self._problem.transient_bytes[v][option]
