"""Brute force: the oracle for small problems."""

import itertools
import math
from typing import Final

from planner.errors import UsageError
from planner.search.problem import Choice, Limits, Problem, Solution, Status

MAX_CHOICES: Final = 2_000_000
"""Beyond this, brute force takes minutes; it is for tests and toy networks."""


def solve_exhaustively(problem: Problem, limits: Limits | None = None) -> Solution:
    """Try every choice; ties go to the lexicographically first.

    Raises:
        UsageError: there are too many choices.
    """
    del limits  # the size limit below keeps it short
    count = math.prod(len(costs) for costs in problem.node_s)
    if count > MAX_CHOICES:
        raise UsageError(f"exhaustive search over {count:.3g} strategies is hopeless; use --solver dp")
    best: Choice | None = None
    best_s = math.inf
    for choice in itertools.product(*(range(len(costs)) for costs in problem.node_s)):
        if problem.fits(choice) and (cost_s := problem.cost_s(choice)) < best_s:
            best, best_s = choice, cost_s
    if best is None:
        return Solution(Status.INFEASIBLE, None, math.inf, math.inf)
    return Solution(Status.OPTIMAL, best, best_s, best_s, {"choices": count})
