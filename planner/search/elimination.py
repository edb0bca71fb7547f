"""`dp`: the least cost by variable elimination, memory limits by a multiplier.

``planner.search.minimum`` finds the least sum of nodes and edges with a bound. Where its choice breaks the memory
limit, ``planner.search.lagrange`` goes on.
"""

from planner.search.lagrange import solve_limited
from planner.search.minimum import minimise
from planner.search.problem import Limits, Problem, Solution, Status
from planner.search.relaxation import SLACK


def solve_dp(problem: Problem, limits: Limits | None = None) -> Solution:
    """Return the choice of least cost that obeys the memory limit, with its proven bound.

    ``optimal`` is within 1e-9 of the bound. Without a memory limit the result does not depend on the time; a gap
    that is left there is that of graphs whose tables are too large. Under a limit a gap is closed by the integer
    program as far as the time goes. A chain's exposed reductions count in the cost of the choice, but only ``ilp``
    minimises them: here the bound leaves them out.
    """
    plain = problem.additive()
    found = minimise(plain)
    if found.choice is not None and not problem.fits(found.choice):
        found = solve_limited(problem, found, limits or Limits())
    if problem.chain is None or found.choice is None:
        return found
    cost_s = problem.cost_s(found.choice)
    status = Status.OPTIMAL if cost_s <= found.lower_bound_s * (1 + SLACK) else Status.FEASIBLE
    return Solution(status, found.choice, cost_s, found.lower_bound_s, found.stats)
