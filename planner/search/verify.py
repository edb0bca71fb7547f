"""Recheck any solution from the problem alone."""

import math

from planner.search.problem import Problem, Solution


def problems_of(problem: Problem, solution: Solution) -> list[str]:
    """Return what is wrong with a solution; empty where range, cost, memory and bound all hold."""
    if solution.choice is None:
        return []
    sizes = [len(costs) for costs in problem.node_s]
    if len(solution.choice) != len(sizes) or any(not 0 <= c < n for c, n in zip(solution.choice, sizes, strict=True)):
        return [f"choice {solution.choice} is out of range {sizes}"]
    found = []
    cost_s = problem.cost_s(solution.choice)
    if not math.isclose(cost_s, solution.cost_s, rel_tol=1e-9):
        found.append(f"the choice costs {cost_s} s, not {solution.cost_s} s")
    if not problem.fits(solution.choice):
        found.append(f"it needs {problem.memory_bytes(solution.choice)} bytes of {problem.limit_bytes}")
    if solution.lower_bound_s > cost_s * (1 + 1e-9):
        found.append(f"the bound {solution.lower_bound_s} s is above the cost {cost_s} s")
    return found
