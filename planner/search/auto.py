"""`auto`: exact searches and fixed strategies as starts, local search on the simulated step."""

import contextlib
import functools
import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from planner.cost.simulate import Timeline, simulate, simulated_step_s
from planner.cost.table import CostTable
from planner.errors import InfeasibleError, LayerwiseError, NoPlanError, UsageError
from planner.ir.bucket import DEFAULT_BUCKET_BYTES
from planner.search.elimination import solve_dp
from planner.search.exhaustive import solve_exhaustively
from planner.search.fixed import ALIASES, FIXED, fixed_strategy
from planner.search.floor import Floor
from planner.search.formulate import Formulation, formulate
from planner.search.ilp import solve_ilp
from planner.search.problem import Choice, Limits, Problem, Solution, Solver, Status
from planner.search.verify import problems_of
from planner.units import MIB, format_bytes

_log = logging.getLogger(__name__)

SYNC_WEIGHTS: Final = (1.0, 0.5, 0.0)
"""Shares of the gradient sync that the additive starts pay; behind backward, none to all is hidden."""
BUCKET_BYTES: Final = (1 * MIB, 4 * MIB, DEFAULT_BUCKET_BYTES)
"""Bucket sizes that are tried; small ones start early, large ones have fewer latencies."""
MAX_TRIALS: Final = 2000
"""Simulated steps that local search may try; a count, so that the plan does not depend on the clock."""

SOLVERS: Final = ("auto", "dp", "ilp", "exhaustive", *FIXED, *ALIASES)
"""Names of ``--solver``."""


@dataclass(frozen=True, slots=True)
class Planned:
    """A strategy with what is known of it.

    Attributes:
        solver: what found it.
        choice: position of every layer's split.
        bucket_bytes: of the gradient reductions.
        timeline: the simulated step.
        status: ``optimal`` for the objective that the solver names, else ``feasible``.
        lower_bound_s: no strategy of this space has a shorter simulated step.
        num_replaced: layers where a fixed strategy's dimension is illegal.
    """

    solver: str
    choice: Choice
    bucket_bytes: int
    timeline: Timeline
    status: Status
    lower_bound_s: float
    num_replaced: int = 0

    @property
    def gap(self) -> float:
        """How much shorter a better plan could at most be, relative to this one."""
        return max(1 - self.lower_bound_s / self.timeline.step_s, 0.0)


class Search:
    """All solvers on one table of costs under one memory limit."""

    def __init__(self, table: CostTable, limit_bytes: int | None, limits: Limits | None = None) -> None:
        self.table = table
        self._limit_bytes, self._limits = limit_bytes, limits or Limits()
        self.formulation = formulate(table, limit_bytes=limit_bytes)
        self._bound_s: float | None = None

    def solve(self, solver: str) -> Planned:
        """Return the plan of a solver; ``auto`` is to be followed by ``refine``.

        Raises:
            InfeasibleError: no strategy, or not this fixed one, obeys the memory limit.
            NoPlanError: stopped before there was a plan.
        """
        if solver in FIXED:
            planned = self.fixed(solver)
            self._require_memory(planned)
            return planned
        if solver == "auto":
            return self._best_start()
        solvers: dict[str, Solver] = {"dp": self._dp, "ilp": solve_ilp, "exhaustive": solve_exhaustively}
        solution = solvers[solver](self.formulation.problem, self._limits)
        if wrong := problems_of(self.formulation.problem, solution):
            raise NoPlanError(f"solver {solver!r} gave an answer that does not verify: {'; '.join(wrong)}")
        return self._planned(solver, self._layer_choice(solution, self.formulation), solution.status)

    def fixed(self, name: str) -> Planned:
        """Return a fixed strategy whether or not it fits in memory."""
        found = fixed_strategy(name, self.table, self.formulation)
        return self._planned(name, found.choice, Status.FEASIBLE, found.num_replaced)

    def forced(self, choice: Choice) -> Planned:
        """Return the plan of a given choice of splits."""
        return self._planned("forced", choice, Status.FEASIBLE)

    def fits(self, planned: Planned) -> bool:
        """Return whether a plan obeys the memory limit."""
        return self._limit_bytes is None or planned.timeline.memory_bytes <= self._limit_bytes

    def _dp(self, problem: Problem, limits: Limits) -> Solution:
        """Solve by elimination; where its optimum breaks the memory limit, by the integer program."""
        solution = solve_dp(problem, limits)
        if solution.choice is not None:
            return solution
        _log.info("the fastest strategy breaks the memory limit: solving the integer program")
        return solve_ilp(problem, limits)

    def _layer_choice(self, solution: Solution, formulation: Formulation) -> Choice:
        if solution.choice is None:
            if solution.status is Status.INFEASIBLE:
                raise self._infeasible()
            raise NoPlanError(f"the solver ended without a plan: {solution.status}. Raise --time-limit.")
        return formulation.layer_choice(solution.choice)

    def _best_start(self) -> Planned:
        """Return the best of the exact searches, with more and less of the sync priced, and the fixed strategies."""
        starts: list[tuple[str, Choice]] = []
        failure: LayerwiseError | None = None
        for name in FIXED:
            with contextlib.suppress(InfeasibleError, UsageError):  # its dimension is forbidden; tables too large
                starts.append((name, fixed_strategy(name, self.table, self.formulation).choice))
        for weight in SYNC_WEIGHTS:
            try:
                formulation = (
                    self.formulation
                    if weight == 1
                    else formulate(self.table, sync_weight=weight, limit_bytes=self._limit_bytes)
                )
                solution = self._dp(formulation.problem, self._limits)
                starts.append((f"dp, {weight:g} of sync", self._layer_choice(solution, formulation)))
            except (InfeasibleError, NoPlanError, UsageError) as error:
                failure = failure or error
        plans = [self._planned("auto", choice, Status.FEASIBLE) for _, choice in starts]
        for (name, _), plan in zip(starts, plans, strict=True):
            _log.debug("start %s: %.6g s", name, plan.timeline.step_s)
        fitting = [plan for plan in plans if self.fits(plan)]
        if not fitting:
            raise failure or self._infeasible()
        return min(fitting, key=lambda plan: plan.timeline.step_s)

    def refine(self, start: Planned) -> Planned:
        """Return a plan after local search: one variable at a time, as long as the simulated step gets shorter."""
        formulation = self.formulation
        members: list[list[int]] = [[] for _ in formulation.problem.node_s]
        for layer, v in enumerate(formulation.variable_of):
            members[v].append(layer)
        floor = Floor(self._unhidden, self._picked(start.choice, members))
        choice, best_s = list(start.choice), start.timeline.step_s
        trials = itertools.count()
        improved = True
        while improved:
            improved = False
            for v in sorted(range(len(members)), key=lambda v: -len(formulation.problem.node_s[v])):
                for option in range(len(formulation.problem.node_s[v])):
                    if floor.with_option(v, option) >= best_s:
                        continue  # longer even if all gradient sync were hidden
                    trial = list(choice)
                    for layer in members[v]:
                        trial[layer] = formulation.options[layer][option]
                    if trial == choice:
                        continue
                    if next(trials) >= MAX_TRIALS:
                        return self._planned("auto", tuple(choice), Status.FEASIBLE)
                    step_s = simulated_step_s(self.table, trial, start.bucket_bytes)
                    if step_s < best_s * (1 - 1e-9) and self._choice_fits(trial):
                        choice, best_s, improved = trial, step_s, True
                        floor.pick(v, option)
        return self._planned("auto", tuple(choice), Status.FEASIBLE)

    def _picked(self, choice: Sequence[int], members: Sequence[Sequence[int]]) -> list[int]:
        """Return the option of every variable in a choice of splits."""
        return [self.formulation.options[layers[0]].index(choice[layers[0]]) for layers in members]

    def _choice_fits(self, choice: Sequence[int]) -> bool:
        if self._limit_bytes is None:
            return True
        costs = [layer[c].memory for layer, c in zip(self.table.layers, choice, strict=True)]
        return sum(m.resident for m in costs) + max(m.transient for m in costs) <= self._limit_bytes

    def _planned(self, solver: str, choice: Choice, status: Status, num_replaced: int = 0) -> Planned:
        timelines = [(simulate(self.table, choice, size), size) for size in BUCKET_BYTES]
        timeline, bucket_bytes = min(timelines, key=lambda pair: pair[0].step_s)
        return Planned(solver, choice, bucket_bytes, timeline, status, self.lower_bound_s(), num_replaced)

    def lower_bound_s(self) -> float:
        """Return a proven lower bound of every simulated step: time that nothing can hide.

        Compute, blocking transfers and updates follow each other in the simulator; gradient sync,
        which may hide behind them, is left out. The exact minimum of that sum bounds every step.
        """
        if self._bound_s is None:
            try:
                self._bound_s = solve_dp(self._unhidden).lower_bound_s
            except UsageError:  # the tables are too large: without the edges the bound is weaker, but holds
                self._bound_s = float(sum(costs.min() for costs in self._unhidden.node_s))
        return self._bound_s

    @functools.cached_property
    def _unhidden(self) -> Problem:
        """The problem whose cost is below the simulated step of every choice: gradient sync is left out."""
        return formulate(self.table, sync_weight=0.0).problem

    def _require_memory(self, planned: Planned) -> None:
        if not self.fits(planned):
            raise InfeasibleError(
                f"strategy {planned.solver!r} needs {format_bytes(planned.timeline.memory_bytes)} per device, but the "
                f"limit is {format_bytes(self._limit_bytes or 0)}. Use --solver auto, more devices, a smaller batch, "
                "or raise --memory-limit."
            )

    def _infeasible(self) -> InfeasibleError:
        """Return the error that names the layer that needs most even under its cheapest split."""
        least = [min(c.memory.resident + c.memory.transient for c in costs) for costs in self.table.layers]
        total = sum(min(c.memory.resident for c in costs) for costs in self.table.layers)
        worst = max(range(len(least)), key=least.__getitem__)
        layer = self.table.space.graph.layers[worst]
        return InfeasibleError(
            f"no strategy fits in {format_bytes(self._limit_bytes or 0)} per device: even with the smallest pieces of "
            f"every layer the network keeps {format_bytes(total)}, and layer {layer.id!r} ({layer.op.kind}) alone "
            f"needs {format_bytes(least[worst])}. Use more devices, a smaller batch, or raise --memory-limit."
        )
