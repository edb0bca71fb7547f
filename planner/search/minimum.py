"""The least sum of node and edge costs: exact as long as tables fit, with a bound beyond.

Three ways, the first that is short enough:

1. all variables are eliminated (``planner.search.tables``);
2. dominated options are removed (``planner.search.reduction``), then sweeps raise a lower bound, local search lowers
   the best cost, and options whose own bound is above it are removed (``planner.search.relaxation``). Either the two
   meet, or what is left is small enough to be eliminated;
3. a cost between the bound and the best is guessed. Options that no choice of this cost can have are removed; where
   none is left, or the minimum of what is left is larger, the guess is a bound itself.

What is still open then is the gap of a ``feasible`` solution. Counts decide, never the clock.
"""

import math
from typing import Final

import numpy as np

from planner.search.descent import Descent
from planner.search.problem import Choice, Problem, Solution, Status
from planner.search.reduction import folded, undominated, unfolded
from planner.search.relaxation import PATIENCE, PROGRESS, SLACK, Relaxation
from planner.search.tables import eliminate, schedule

SHORT_WORK: Final = 1e8
"""Entries that are minimised over without trying to have less of them first; about 0.1 s."""
MAX_WORK: Final = 3e9
MAX_KEPT: Final = 6e7
"""Entries of all tables together, 480 MB of float64."""
DOMINANCE_WORK: Final = 3e8
"""Entries that are compared to find dominated options before the sweeps."""
MAX_SWEEPS: Final = 100
GUESSES: Final = (1 / 16, 1 / 4, 1.0)
"""Shares of the gap above the bound."""
ROUNDING: Final = 1e-12
"""By which a bound is lowered, relative; it is a sum of rounded numbers."""


def minimise(problem: Problem, start: Choice | None = None, max_dominance: float = DOMINANCE_WORK) -> Solution:
    """Return the least sum of nodes and edges; ``feasible`` where a gap is left.

    Args:
        problem: without limit and chain.
        start: a choice that may be good, where the tables are too large.
        max_dominance: entries that are compared to find dominated options; 0 where there are none.
    """
    found = _eliminated(problem, SHORT_WORK)
    if found is not None:
        cost_s = problem.cost_s(found)
        return Solution(Status.OPTIMAL, found, cost_s, cost_s)
    keep = undominated(problem, max_dominance)
    smaller = problem.restricted(keep)
    first = None
    if start is not None and all(c in kept for kept, c in zip(keep, start, strict=True)):
        first = tuple(int(np.searchsorted(kept, c)) for kept, c in zip(keep, start, strict=True))
    search = _Search(smaller, first)
    search.run()
    choice = tuple(int(kept[c]) for kept, c in zip(keep, search.choice, strict=True))
    cost_s = problem.cost_s(choice)
    bound_s = min(search.bound_s * (1 - ROUNDING), cost_s)
    status = Status.OPTIMAL if search.is_closed else Status.FEASIBLE
    stats = {"sweeps": search.sweeps, "options": float(sum(map(len, search.dual.keep)))}
    return Solution(status, choice, cost_s, cost_s if status is Status.OPTIMAL and search.is_exact else bound_s, stats)


def _eliminated(problem: Problem, max_work: float) -> Choice | None:
    """Return the optimum, if it takes no more than so much work."""
    if 1 not in problem.sizes:
        return _scheduled(problem, max_work)
    smaller, left = folded(problem)  # of a fixed strategy next to nothing is left
    found = _scheduled(smaller, max_work)
    return unfolded(found, left, [np.arange(n) for n in problem.sizes]) if found is not None else None


def _scheduled(problem: Problem, max_work: float) -> Choice | None:
    plan = schedule(problem)
    return eliminate(plan) if plan.work <= max_work and plan.kept <= MAX_KEPT else None


class _Search:
    """Ways 2 and 3: a bound from below and a choice from above."""

    def __init__(self, problem: Problem, start: Choice | None) -> None:
        self._problem, self._descent = problem, Descent(problem)
        self.dual = Relaxation(problem)
        self.choice = self._descent(start or tuple(int(costs.argmin()) for costs in problem.node_s))
        self.cost_s, self.bound_s = problem.cost_s(self.choice), 0.0
        self.is_exact = False
        self.sweeps = 0

    @property
    def is_closed(self) -> bool:
        """Whether the choice is proven to be the best."""
        return self.is_exact or self.cost_s - self.bound_s <= SLACK * self.cost_s

    def run(self) -> None:
        """Sweep as long as it brings the two together; then eliminate what is left, or guess."""
        gaps = [math.inf]
        left = sum(self._problem.sizes)
        while self.sweeps < MAX_SWEEPS:
            self.sweeps += 1
            found = self.dual.sweep(self.cost_s)
            if found is not None:
                self._offer(self._descent(found))
            self.bound_s = max(self.bound_s, self.dual.lower_bound_s)
            if self.is_closed:
                return
            now = sum(map(len, self.dual.keep))
            if now <= 0.8 * left or self.sweeps == PATIENCE:
                left = now
                if self._finish(self.dual, SHORT_WORK, math.inf):
                    return
            gaps.append(self.cost_s - self.bound_s)
            if len(gaps) > PATIENCE and gaps[-1] > gaps[-1 - PATIENCE] * (1 - PROGRESS):
                break
        self._guess()

    def _guess(self) -> None:
        for share in GUESSES:
            upper_s = self.bound_s + share * (self.cost_s - self.bound_s) if share < 1 else self.cost_s
            trial = self.dual.copy()
            if trial.sweep(upper_s) is None or trial.sweep(upper_s) is None:
                self.bound_s = max(self.bound_s, upper_s)  # nothing costs so little
            elif not self._finish(trial, MAX_WORK, upper_s):
                return  # more options for more cost would be longer still
            if self.is_closed:
                return

    def _finish(self, dual: Relaxation, max_work: float, upper_s: float) -> bool:
        """Eliminate what a relaxation left; return whether that was little enough.

        The options that are left are those of all choices that cost at most ``upper_s``.
        """
        smaller, variables = folded(self._problem.restricted(dual.keep))
        found = _eliminated(smaller, max_work)
        if found is None:
            return False
        choice = unfolded(found, variables, dual.keep)
        self._offer(choice)
        self.is_exact = self._problem.cost_s(choice) <= upper_s
        if not self.is_exact:
            self.bound_s = max(self.bound_s, upper_s)  # nothing costs so little
        return True

    def _offer(self, choice: Choice) -> None:
        cost_s = self._problem.cost_s(choice)
        if cost_s < self.cost_s:
            self.choice, self.cost_s = choice, cost_s
