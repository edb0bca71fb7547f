"""`dp`: the exact minimum of node and edge costs by eliminating variable after variable.

Eliminating variable v replaces it by the table over its neighbours N

    t[N] = min_v ( node_s[v] + sum over tables that contain v ),

which is exact (min-sum bucket elimination [Dechter99]). Node elimination of [OptCNN18, Sec. 5] is
the case of two neighbours, its edge elimination the sum of two tables over the same pair; the
dependent sets of [PaSE21] are the neighbours N. The order is min-fill: the variable whose
neighbours lack the fewest edges among each other, then the smallest table.
"""

import itertools
import math
from typing import Final

import numpy as np
import numpy.typing as npt

from planner.errors import UsageError
from planner.search.problem import Choice, Costs, Limits, Problem, Solution, Status

MAX_TABLE_ENTRIES: Final = 50_000_000
"""Of one table, 400 MB of float64."""


def elimination_order(sizes: list[int], edges: set[tuple[int, int]]) -> tuple[list[int], float]:
    """Return a min-fill order and the entries of the largest table it builds."""
    neighbours: list[set[int]] = [set() for _ in sizes]
    for i, j in edges:
        neighbours[i].add(j)
        neighbours[j].add(i)
    left = set(range(len(sizes)))

    def rank(v: int) -> tuple[int, float, int]:
        missing = sum(b not in neighbours[a] for a, b in itertools.combinations(neighbours[v], 2))
        return missing, math.prod(sizes[n] for n in neighbours[v]), v

    ranks = {v: rank(v) for v in left}
    order, largest = [], 0.0
    while left:
        v = min(left, key=ranks.__getitem__)
        around = neighbours[v]
        largest = max(largest, float(sizes[v]) * math.prod(float(sizes[n]) for n in around))
        order.append(v)
        left.remove(v)
        touched = set(around)
        for a in around:
            neighbours[a] |= around - {a}
            neighbours[a].discard(v)
            touched |= neighbours[a]
        for u in touched & left:
            ranks[u] = rank(u)
    return order, largest


def solve_dp(problem: Problem, limits: Limits | None = None) -> Solution:
    """Return the optimum without regard to the memory limit.

    With a limit, the result is optimal where it happens to obey it; otherwise only its cost is of
    use, as a lower bound, and the status is ``no incumbent``. Ties go to the lowest option.

    Raises:
        UsageError: the tables would not fit in memory.
    """
    del limits  # the size of the tables bounds the time
    sizes = [len(costs) for costs in problem.node_s]
    order, largest = elimination_order(sizes, set(problem.edge_s))
    if largest > MAX_TABLE_ENTRIES:
        raise UsageError(
            f"dp would need a table of {largest:.3g} entries; use --solver ilp, or fewer mesh axes (--mesh)"
        )
    choice = _eliminate(problem, order)
    cost_s = problem.cost_s(choice)
    stats = {"largest_table": largest}
    if not problem.fits(choice):
        return Solution(Status.NO_INCUMBENT, None, math.inf, cost_s, stats)
    return Solution(Status.OPTIMAL, choice, cost_s, cost_s, stats)


def _eliminate(problem: Problem, order: list[int]) -> Choice:
    tables: list[tuple[tuple[int, ...], Costs]] = [((i,), costs) for i, costs in enumerate(problem.node_s)]
    tables += list(problem.edge_s.items())
    of_variable: dict[int, dict[int, tuple[tuple[int, ...], Costs]]] = {v: {} for v in order}
    serial = itertools.count()
    for scope, costs in tables:
        number = next(serial)
        for v in scope:
            of_variable[v][number] = (scope, costs)
    decisions: list[tuple[int, tuple[int, ...], npt.NDArray[np.int64]]] = []
    for v in order:
        mine = of_variable.pop(v)
        others = tuple(sorted({u for scope, _ in mine.values() for u in scope if u != v}))
        total = _sum_tables((v, *others), [mine[number] for number in sorted(mine)])
        decisions.append((v, others, total.argmin(axis=0)))
        for number, (scope, _) in mine.items():
            for u in scope:
                if u != v:
                    del of_variable[u][number]
        number = next(serial)
        for u in others:
            of_variable[u][number] = (others, total.min(axis=0))
    chosen: dict[int, int] = {}
    for v, others, best in reversed(decisions):
        chosen[v] = int(best[tuple(chosen[u] for u in others)])
    return tuple(chosen[v] for v in range(len(problem.node_s)))


def _sum_tables(scope: tuple[int, ...], tables: list[tuple[tuple[int, ...], Costs]]) -> Costs:
    """Return the sum of tables over a scope that contains theirs, as one array in scope order."""
    axis_of = {v: i for i, v in enumerate(scope)}
    total: Costs = np.zeros((1,) * len(scope))
    for names, costs in tables:
        order = sorted(range(len(names)), key=lambda k: axis_of[names[k]])
        shape = [1] * len(scope)
        for k in order:
            shape[axis_of[names[k]]] = costs.shape[k]
        total = total + costs.transpose(order).reshape(shape)
    return total
