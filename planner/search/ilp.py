"""`ilp`: the problem as an integer program, for memory limits and for reductions behind backward.

Variables:
    x[i, a] in {0, 1}        variable i takes option a
    y[i, j, a, b] in [0, 1]  edge ij joins a and b; stands for x[i, a] * x[j, b]
    z >= 0                   the largest transient bytes
    u[l, i] >= 0             with a chain: reductions of level l still to do when i's own are posted, in seconds
    w >= 0                   with a chain: reductions still to do when backward has ended, in seconds

Minimise sum node_s[i][a] x[i, a] + sum edge_s[i, j][a, b] y[i, j, a, b] + w, in seconds, subject to
    one option           sum_a x[i, a] = 1                for each i        _choice_rows
    edge meets source    sum_b y[i, j, a, b] = x[i, a]    for each ij, a    _edge_rows
    edge meets target    sum_a y[i, j, a, b] = x[j, b]    for each ij, b    _edge_rows
    transient            sum_a transient[i][a] x[i, a] <= z   for each i    _memory_rows
    memory               sum resident[i][a] x[i, a] + z <= limit            _memory_rows,
                         where all bytes are those above what every choice needs
    own reductions       u[l, i] >= sync of i                               _chain_rows
    those before         u[l, i] >= u[l, h] - backward from h to i + sync of i, h the one before i on l
    what is exposed      w >= u[l, k] - backward behind k, k the last on l
where sync and backward are sums over x and y. y may stay continuous: for binary x the two edge families force it to
the product. An edge without costs needs no y. Options that another one dominates have no column
(``planner.search.reduction``); identical layers share arrays, not columns, since a best choice may tell them apart.

HiGHS solves it; where PuLP finds no HiGHS, CBC. Either starts from a choice that is given.
"""

import math
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pulp

from planner.deadline import left_s
from planner.search.problem import Choice, Costs, Limits, Pair, Problem, Solution, Status
from planner.search.reduction import undominated

_STATUS: Final = {
    "kOptimal": Status.OPTIMAL,
    "kInfeasible": Status.INFEASIBLE,
    "kTimeLimit": Status.FEASIBLE,
    "kInterrupt": Status.FEASIBLE,
    "kSolutionLimit": Status.FEASIBLE,
}
_CBC_STATUS: Final = {
    pulp.LpSolutionOptimal: Status.OPTIMAL,
    pulp.LpSolutionInfeasible: Status.INFEASIBLE,
    pulp.LpSolutionIntegerFeasible: Status.FEASIBLE,
    pulp.LpSolutionNoSolutionFound: Status.NO_INCUMBENT,
}
"""Of ``sol_status``: the ``status`` of a CBC that was stopped says *Optimal*."""
_MEMORY_UNITS: Final = 1e6
"""In which the bytes that may be chosen are measured: HiGHS tells 1e-6 apart, so one byte of up to 500 GB."""
DOMINANCE_WORK: Final = 1e9
"""Entries that are compared to find dominated options."""
_LEAST_CBC_S: Final = 1e-3
"""CBC takes a time limit of 0 for none."""

Terms = list[tuple[Any, float]]
"""A sum: variables with their factors."""


def status_of(native: str, *, has_incumbent: bool) -> Status:
    """Translate HiGHS's status; whatever is not listed is a failure, never a success."""
    status = _STATUS.get(native, Status.FAILED)
    if status is Status.FEASIBLE and not has_incumbent:
        return Status.NO_INCUMBENT
    return status


def solve_ilp(
    problem: Problem, limits: Limits | None = None, start: Choice | None = None, program: str | None = None
) -> Solution:
    """Return the optimum under the memory limit, or the best found in time with a proven bound.

    Args:
        problem: additive, or with a chain.
        limits: of the solver's time and nodes.
        start: a choice to start from; one that breaks the memory limit is left out. Without a chain, costs above twice
            its own count as so much: no better choice has them, and programs do not see a cost beside one that is 1e8
            times as large.
        program: ``HiGHS`` or ``CBC``; the first that is there if left out.
    """
    keep = undominated(problem, DOMINANCE_WORK)
    smaller = problem.restricted(keep)
    start = start if start is not None and problem.fits(start) else None
    rows = _Rows(smaller, 2 * problem.cost_s(start) if start is not None else math.inf)
    kept = None
    if start is not None:
        found = [np.flatnonzero(k == c) for k, c in zip(keep, start, strict=True)]
        kept = [int(f[0]) if len(f) else None for f in found]
    time_s = min(limits.time_s if limits is not None else math.inf, left_s())
    program = program or ("HiGHS" if pulp.HiGHS(msg=False).available() else "CBC")
    run = _highs if program == "HiGHS" else _cbc
    max_nodes = limits.max_nodes if limits is not None else None
    answer = run(rows, kept, None if math.isinf(time_s) else max(time_s, 0.0), max_nodes)
    return _solution(problem, rows, keep, answer)


@dataclass(frozen=True, slots=True)
class _Answer:
    """What a program says: its status, and a bound of the scaled objective."""

    status: Status
    bound: float


def _solution(problem: Problem, rows: "_Rows", keep: Sequence[np.ndarray[Any, Any]], answer: _Answer) -> Solution:
    bound_s = max(answer.bound / rows.scale, 0.0)
    if math.isnan(bound_s) or math.isinf(bound_s):
        bound_s = 0.0
    if not answer.status.has_solution:
        return Solution(answer.status, None, math.inf, math.inf if answer.status is Status.INFEASIBLE else bound_s)
    choice: Choice = tuple(int(kept[p]) for kept, p in zip(keep, rows.picked(), strict=True))
    cost_s = problem.cost_s(choice)
    if not problem.fits(choice):
        return Solution(Status.FAILED, None, math.inf, bound_s)
    stats = {"columns": float(rows.num_options), "options": float(sum(problem.sizes))}
    is_optimal = answer.status is Status.OPTIMAL
    return Solution(answer.status, choice, cost_s, cost_s if is_optimal else min(bound_s, cost_s), stats)


class _StartedHighs(pulp.HiGHS):  # type: ignore[misc]  # pulp has no types
    """HiGHS with the options of a start; PuLP's own has no warm start."""

    def __init__(self, start: Mapping[Any, float], **options: str | float | None) -> None:
        super().__init__(**options)
        self._start = start

    def callSolver(self, lp: pulp.LpProblem) -> None:  # noqa: N802  # PuLP's name
        if self._start:
            index = np.array([variable.index for variable in self._start], dtype=np.int32)
            lp.solverModel.setSolution(len(index), index, np.array(list(self._start.values())))
        super().callSolver(lp)


def _highs(rows: "_Rows", start: Sequence[int | None] | None, time_s: float | None, max_nodes: int | None) -> _Answer:
    # one thread: which of several optima is found does not depend on the machine
    options = {} if max_nodes is None else {"mip_max_nodes": max_nodes}
    solver = _StartedHighs(rows.start(start), msg=False, timeLimit=time_s, gapRel=0.0, gapAbs=0.0, threads=1, **options)
    rows.program.solve(solver)
    native = rows.program.solverModel
    status = status_of(native.getModelStatus().name, has_incumbent=rows.has_values())
    return _Answer(status, float(native.getInfo().mip_dual_bound))


def _cbc(rows: "_Rows", start: Sequence[int | None] | None, time_s: float | None, max_nodes: int | None) -> _Answer:
    values = rows.start(start)
    for variable, value in values.items():
        variable.setInitialValue(value)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "cbc.log"
        limit_s = None if time_s is None else max(time_s, _LEAST_CBC_S)
        rows.program.solve(
            pulp.COIN_CMD(
                path=cbc_path(), msg=False, timeLimit=limit_s, gapRel=0.0, gapAbs=0.0,
                warmStart=bool(values), logPath=str(log), threads=1, maxNodes=max_nodes,
            )
        )  # fmt: skip
        text = log.read_text(encoding="utf-8", errors="replace")
    status = _CBC_STATUS.get(rows.program.sol_status, Status.FAILED)
    if status.has_solution and not rows.has_values():
        status = Status.FAILED
    return _Answer(status, _cbc_bound(text))


def cbc_path() -> str | None:
    """Return where CBC is: on the path of executables, or the one that PuLP 3 brings along."""
    bundled = getattr(pulp.apis.coin_api, "pulp_cbc_path", None)
    return shutil.which("cbc") or (bundled if bundled is not None and Path(bundled).exists() else None)


def _cbc_bound(log: str) -> float:
    """Return the lower bound that CBC printed; 0 where it printed none."""
    for line in log.splitlines():
        if line.startswith("Lower bound:"):
            return float(line.split(":")[1])
    return 0.0


class _Rows:
    """The integer program of a problem.

    Attributes:
        scale: of its objective: costs near 1000, far above the absolute tolerances of the programs.
    """

    def __init__(self, problem: Problem, cap_s: float = math.inf) -> None:
        if problem.chain is None and cap_s < math.inf:
            node_s = tuple(np.minimum(costs, cap_s) for costs in problem.node_s)
            edge_s = {pair: np.minimum(costs, cap_s) for pair, costs in problem.edge_s.items()}
            problem = replace(problem, node_s=node_s, edge_s=edge_s)
        self._problem = problem
        self.program = pulp.LpProblem("layerwise", pulp.LpMinimize)
        largest = max((float(c.max()) for c in (*problem.node_s, *problem.edge_s.values())), default=1.0)
        if problem.chain is not None:
            largest = max(largest, *(float(c.max(initial=0.0)) for c in problem.chain.sync_s), 0.0)
        self.scale = 1000.0 / largest if largest > 0 else 1.0
        self._x = [
            [self.program.add_variable(f"x_{i}_{a}", cat=pulp.LpBinary) for a in range(len(costs))]
            for i, costs in enumerate(problem.node_s)
        ]
        self._y: dict[Pair, list[list[Any]]] = {}
        objective: Terms = []
        for variables, costs in zip(self._x, problem.node_s, strict=True):
            objective += _terms(variables, costs * self.scale)
            self.program += pulp.lpSum(variables) == 1
        for pair, costs in problem.edge_s.items():
            if costs.any():
                self._edge_rows(pair)
                for variables, row in zip(self._y[pair], costs * self.scale, strict=True):
                    objective += _terms(variables, row)
        if problem.limit_bytes is not None:
            self._memory_rows()
        if problem.chain is not None:
            objective.append((self._chain_rows(), 1.0))
        self.program.setObjective(pulp.LpAffineExpression(objective))

    @property
    def num_options(self) -> int:
        """Columns that stand for options."""
        return sum(map(len, self._x))

    def start(self, choice: Sequence[int | None] | None) -> dict[Any, float]:
        """Return values of the columns of a choice; variables whose option has no column are left to the program."""
        if choice is None:
            return {}
        return {
            variable: float(a == picked)
            for variables, picked in zip(self._x, choice, strict=True) if picked is not None
            for a, variable in enumerate(variables)
        }  # fmt: skip

    def has_values(self) -> bool:
        """Return whether the program found one option for every variable."""
        values = [[v.value() for v in variables] for variables in self._x]
        return all(v is not None for row in values for v in row) and all(abs(sum(row) - 1) < 1e-4 for row in values)

    def picked(self) -> Choice:
        """Return the options that the program found."""
        values = [[v.value() for v in variables] for variables in self._x]
        return tuple(max(range(len(row)), key=row.__getitem__) for row in values)

    def _edge_rows(self, pair: Pair) -> None:
        i, j = pair
        rows = [
            [self.program.add_variable(f"y_{i}_{j}_{a}_{b}", 0, 1) for b in range(len(self._x[j]))]
            for a in range(len(self._x[i]))
        ]
        for variables, source in zip(rows, self._x[i], strict=True):
            self.program += pulp.lpSum(variables) == source
        for column, target in zip(zip(*rows, strict=True), self._x[j], strict=True):
            self.program += pulp.lpSum(column) == target
        self._y[pair] = rows

    def _memory_rows(self) -> None:
        problem = self._problem
        assert problem.limit_bytes is not None
        resident_bytes = [held - held.min() for held in problem.resident_bytes]
        least = max(int(needed.min()) for needed in problem.transient_bytes)
        room = problem.limit_bytes - least - sum(int(held.min()) for held in problem.resident_bytes)
        unit = max(room / _MEMORY_UNITS, 1.0)
        z = self.program.add_variable("transient", 0)
        resident: Terms = []
        for variables, held, needed in zip(self._x, resident_bytes, problem.transient_bytes, strict=True):
            resident += _terms(variables, held / unit)
            self.program += pulp.LpAffineExpression(_terms(variables, (needed - least) / unit)) <= z
        self.program += pulp.LpAffineExpression(resident) + z <= (room + 0.5) / unit  # bytes are whole

    def _chain_rows(self) -> pulp.LpVariable:
        """Return w, the scaled seconds of reductions that backward does not hide."""
        chain = self._problem.chain
        assert chain is not None
        exposed = self.program.add_variable("exposed", 0)
        posted: list[Any] = [None] * chain.num_levels  # the last u of each level
        passed: list[Terms] = [[] for _ in posted]  # backward since then
        transfers = chain.transfers_of()
        for v in chain.order:
            own = _terms(self._x[v], chain.backward_s[v] * self.scale)
            moved: Terms = []
            for producer, costs in transfers[v]:
                moved += self._transfer_terms(producer, v, costs * self.scale)
            for level, sync in enumerate(chain.sync_s[v]):
                passed[level] += own
                if sync.any():
                    left = self.program.add_variable(f"u_{level}_{v}", 0)
                    posts = pulp.LpAffineExpression(_terms(self._x[v], sync * self.scale))
                    self.program += left >= posts
                    if posted[level] is not None:
                        self.program += left >= posted[level] - _total(passed[level]) + posts
                    posted[level], passed[level] = left, []
                passed[level] += moved
        for last, seconds in zip(posted, passed, strict=True):
            if last is not None:
                self.program += exposed >= last - _total(seconds)
        return exposed

    def _transfer_terms(self, producer: int, consumer: int, costs: Costs) -> Terms:
        if not costs.any():
            return []
        is_turned = producer > consumer
        rows = self._y[min(producer, consumer), max(producer, consumer)]
        return [
            term
            for variables, row in zip(rows, costs.T if is_turned else costs, strict=True)
            for term in _terms(variables, row)
        ]


def _terms(variables: Sequence[Any], factors: Costs) -> Terms:
    return [(v, float(f)) for v, f in zip(variables, factors, strict=True) if f]


def _total(terms: Terms) -> pulp.LpAffineExpression:
    return pulp.lpSum(v * f for v, f in terms)
