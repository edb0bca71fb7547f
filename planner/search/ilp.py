"""`ilp`: the problem as an integer program, for memory limits.

Variables:
    x[i, a] in {0, 1}        variable i takes option a
    y[i, j, a, b] in [0, 1]  edge ij joins a and b; stands for x[i, a] * x[j, b]
    z >= 0                   the largest transient bytes

Minimise sum node_s[i][a] x[i, a] + sum edge_s[i, j][a, b] y[i, j, a, b], in seconds, subject to
    one option           sum_a x[i, a] = 1                for each i        _choice_rows
    edge meets source    sum_b y[i, j, a, b] = x[i, a]    for each ij, a    _edge_rows
    edge meets target    sum_a y[i, j, a, b] = x[j, b]    for each ij, b    _edge_rows
    transient            sum_a transient[i][a] x[i, a] <= z   for each i    _memory_rows
    memory               sum resident[i][a] x[i, a] + z <= limit            _memory_rows
y may stay continuous: for binary x the two edge families force it to the product. An edge without
costs needs no y.
"""

import math
from typing import Any, Final

import pulp

from planner.search.problem import Choice, Costs, Limits, Problem, Solution, Status

_STATUS: Final = {
    "kOptimal": Status.OPTIMAL,
    "kInfeasible": Status.INFEASIBLE,
    "kTimeLimit": Status.FEASIBLE,
    "kInterrupt": Status.FEASIBLE,
    "kSolutionLimit": Status.FEASIBLE,
}
_MEMORY_UNITS: Final = 1e6
"""In which the limit is measured: HiGHS tells 1e-6 apart, so one byte of up to 500 GB (see ``_memory_rows``)."""


def status_of(native: str, *, has_incumbent: bool) -> Status:
    """Translate HiGHS's status; whatever is not listed is a failure, never a success."""
    status = _STATUS.get(native, Status.FAILED)
    if status is Status.FEASIBLE and not has_incumbent:
        return Status.NO_INCUMBENT
    return status


def solve_ilp(problem: Problem, limits: Limits | None = None) -> Solution:
    """Return the optimum under the memory limit, or the best found in time with a proven bound."""
    scale = _scale(problem)
    program = pulp.LpProblem("layerwise", pulp.LpMinimize)
    x = [
        [program.add_variable(f"x_{i}_{a}", cat=pulp.LpBinary) for a in range(len(costs))]
        for i, costs in enumerate(problem.node_s)
    ]
    objective: list[tuple[Any, float]] = []
    for variables, costs in zip(x, problem.node_s, strict=True):
        objective += zip(variables, costs * scale, strict=True)
        program += pulp.lpSum(variables) == 1
    for (i, j), costs in problem.edge_s.items():
        _edge_rows(program, x[i], x[j], costs * scale, (i, j), objective)
    if problem.limit_bytes is not None:
        _memory_rows(program, x, problem)
    program.setObjective(pulp.LpAffineExpression(objective))
    time_limit = None if math.isinf(limits.time_s if limits else math.inf) else limits.time_s  # type: ignore[union-attr]  # not None here
    program.solve(pulp.HiGHS(msg=False, timeLimit=time_limit, gapRel=0.0, gapAbs=0.0))
    native = program.solverModel
    values = [[v.value() for v in variables] for variables in x]
    found = all(v is not None for row in values for v in row) and all(abs(sum(row) - 1) < 1e-4 for row in values)
    status = status_of(native.getModelStatus().name, has_incumbent=found)
    if not status.has_solution:
        bound = math.inf if status is Status.INFEASIBLE else 0.0
        return Solution(status, None, math.inf, bound)
    choice: Choice = tuple(max(range(len(row)), key=row.__getitem__) for row in values)
    cost_s = problem.cost_s(choice)
    bound_s = min(max(float(native.getInfo().mip_dual_bound) / scale, 0.0), cost_s)
    if not problem.fits(choice):
        return Solution(Status.FAILED, None, math.inf, bound_s)
    return Solution(status, choice, cost_s, cost_s if status is Status.OPTIMAL else bound_s)


def _scale(problem: Problem) -> float:
    """Return the factor that brings the costs near 1000, far above HiGHS's absolute tolerances."""
    largest = max((float(c.max()) for c in (*problem.node_s, *problem.edge_s.values())), default=1.0)
    return 1000.0 / largest if largest > 0 else 1.0


def _edge_rows(  # one edge of the program
    program: pulp.LpProblem,
    source: list[Any],
    target: list[Any],
    costs: Costs,
    name: tuple[int, int],
    objective: list[tuple[Any, float]],
) -> None:
    if not costs.any():
        return
    rows = [
        [program.add_variable(f"y_{name[0]}_{name[1]}_{a}_{b}", 0, 1) for b in range(len(target))]
        for a in range(len(source))
    ]
    for a, variables in enumerate(rows):
        objective += zip(variables, costs[a], strict=True)
        program += pulp.lpSum(variables) == source[a]
    for b, variable in enumerate(target):
        program += pulp.lpSum(row[b] for row in rows) == variable


def _memory_rows(program: pulp.LpProblem, x: list[list[Any]], problem: Problem) -> None:
    assert problem.limit_bytes is not None
    unit = max(problem.limit_bytes / _MEMORY_UNITS, 1.0)
    z = program.add_variable("transient", 0)
    resident = []
    for variables, held, needed in zip(x, problem.resident_bytes, problem.transient_bytes, strict=True):
        resident += [variable * (int(b) / unit) for variable, b in zip(variables, held, strict=True)]
        program += pulp.lpSum(v * (int(b) / unit) for v, b in zip(variables, needed, strict=True)) <= z
    program += pulp.lpSum(resident) + z <= (problem.limit_bytes + 0.5) / unit  # bytes are whole
