"""`auto`: exact searches and fixed strategies as starts, local search on the simulated step."""

import contextlib
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from planner.cost.simulate import Timeline, held_bytes, simulate, simulated_step_s
from planner.cost.table import CostTable
from planner.errors import InfeasibleError, LayerwiseError, NoPlanError
from planner.ir.bucket import DEFAULT_BUCKET_BYTES
from planner.search.dual import Bounded, bound_chain
from planner.search.elimination import solve_dp
from planner.search.exhaustive import solve_exhaustively
from planner.search.fixed import ALIASES, FIXED, fixed_strategy
from planner.search.formulate import Formulation, formulate
from planner.search.ilp import solve_ilp
from planner.search.local import Neighbourhood, improved
from planner.search.mcmc import SEED, Rules, mcmc_choice, walk
from planner.search.problem import Choice, Limits, Problem, Solution, Solver, Status
from planner.search.published.hypar import hypar_choice
from planner.search.published.optcnn import optcnn_choice
from planner.search.published.pase import pase_choice
from planner.search.published.soybean import soybean_choice
from planner.search.recompute import HaloRecompute, recomputed, with_tiles
from planner.search.verify import problems_of
from planner.units import KIB, MIB, format_bytes

_log = logging.getLogger(__name__)

SYNC_WEIGHTS: Final = (1.0, 0.5)
"""Shares of the gradient sync that additive starts pay; the bound's choices pay from none of it to all."""
BUCKET_BYTES: Final = (*(4**k * KIB for k in range(1, 6)), 4 * MIB, 8 * MIB, 16 * MIB, DEFAULT_BUCKET_BYTES)
"""Bucket sizes that may be tried; small ones start early, large ones have fewer latencies."""
MAX_BUCKETS: Final = 256
"""Sizes that would make more buckets than this are not tried."""
MAX_TRIALS: Final = 2000
"""Simulated steps that local search may try from one start."""
MAX_REFINED: Final = 3
"""Starts from which local search goes on; only such that are at most ``PROMISING`` slower than the best."""
PROMISING: Final = 0.1
ILP_GAP: Final = 0.01
"""Gap above which ``auto`` asks the integer program for the chain, where it has at most ``ILP_COLUMNS`` columns."""
ILP_COLUMNS: Final = 6000
ILP_TOLERANCE: Final = 1e-6
"""By which its bound is lowered, relative: the program calls constraints met, and costs equal, within tolerances."""
ILP_NODES: Final = 200
"""Of its branch and bound; a count, so that the plan does not depend on the clock."""

PUBLISHED: Final[Mapping[str, Callable[[CostTable, Formulation], Choice]]] = {
    "hypar": hypar_choice,
    "soybean": soybean_choice,
    "optcnn": optcnn_choice,
    "pase": pase_choice,
}
"""Published planners: their cost on our space."""
QUICK: Final = ("hypar", "pase")
"""Those from which local search starts on any network; the others take longer than all the rest of ``auto``."""
FEW_PAIRS: Final = 60_000
"""Pairs of options on all edges up to which local search starts from all published ones."""
FEW_RANKS: Final = 32
"""Of the mesh, likewise: `optcnn` looks at the boxes of every rank."""
FEW_LAYERS: Final = 60
"""Of the network, likewise; on such ones random walks (``planner.search.mcmc``) start from the best plan."""
WALKS: Final = (10.0, 100.0)
"""Their sharpness."""
WALK_PROPOSALS: Final = 2000
SEARCHING: Final = ("auto", "dp", "ilp", *PUBLISHED, "mcmc", "exhaustive")
"""Solvers that look for a strategy."""
SOLVERS: Final = (*SEARCHING, *FIXED, *ALIASES)
"""Names of ``--solver``."""


@dataclass(frozen=True, slots=True)
class Branches:
    """What computing the branches of a network at the same time is worth.

    Attributes:
        num_regions: of the network that fork and join.
        bound: by how much it can shorten compute, by FLOP.
        step_s: the shortest simulated step with it; None where none was simulated.
        taken: the regions that the plan computes so, in words.
    """

    num_regions: int
    bound: float
    step_s: float | None
    taken: tuple[str, ...]


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
        branches: at the same time; None where that was not asked for, or the network has none.
    """

    solver: str
    choice: Choice
    bucket_bytes: int
    timeline: Timeline
    status: Status
    lower_bound_s: float
    num_replaced: int = 0
    branches: Branches | None = None

    @property
    def gap(self) -> float:
        """How much shorter a better plan could at most be, relative to this one."""
        return max(1 - self.lower_bound_s / self.timeline.step_s, 0.0)


@dataclass(frozen=True, slots=True)
class Start:
    """A choice that local search may start from.

    Attributes:
        choice: position of every layer's split.
        step_s: simulated.
        bucket_bytes: of the gradient reductions; the best size.
    """

    choice: Choice
    step_s: float
    bucket_bytes: int


class Search:
    """All solvers on one table of costs under one memory limit."""

    def __init__(self, table: CostTable, limit_bytes: int | None, limits: Limits | None = None) -> None:
        self.table = table
        self._limit_bytes, self._limits = limit_bytes, limits or Limits()
        self.formulation = formulate(table, limit_bytes=limit_bytes)
        self._ilp_bound_s = 0.0
        self._best: Start | None = None

    def solve(self, solver: str) -> Planned:
        """Return the plan of a solver.

        Raises:
            InfeasibleError: no strategy, or not this fixed one, obeys the memory limit.
            NoPlanError: stopped before there was a plan.
        """
        if solver == "auto":
            return self.refine(self.starts())
        if solver in FIXED:
            planned = self.fixed(solver)
        elif solver in PUBLISHED:
            planned = self._planned(solver, PUBLISHED[solver](self.table, self.formulation))
        elif solver == "mcmc":
            planned = self._planned(solver, self._walked())
        else:
            solvers: dict[str, Solver] = {"dp": solve_dp, "ilp": _solve_ilp, "exhaustive": solve_exhaustively}
            solution = self._verified(solver, solvers[solver], self.formulation.problem)
            planned = self._planned(solver, self._layer_choice(solution, self.formulation), solution.status)
        self._require_memory(planned)
        return replace(planned, lower_bound_s=self.lower_bound_s())

    def _walked(self) -> Choice:
        """Return what `mcmc` finds with the buckets that suit its first start."""
        bucket_bytes = DEFAULT_BUCKET_BYTES
        with contextlib.suppress(InfeasibleError):
            bucket_bytes = self.fixed("data").bucket_bytes
        return mcmc_choice(self.table, self.formulation, rules=Rules(self._limit_bytes, bucket_bytes))

    def fixed(self, name: str) -> Planned:
        """Return a fixed strategy whether or not it fits in memory; no bound is known for it."""
        found = fixed_strategy(name, self.table, self.formulation)
        return self._planned(name, found.choice, num_replaced=found.num_replaced)

    def with_recomputing(self, planned: Planned, wish: HaloRecompute) -> tuple["Search", Planned]:
        """Return a plan with halos recomputed where that is faster, or told, with the search on its only strategy.

        Where nothing recomputes, or what is faster would not fit in memory, both are as they were.

        Raises:
            InfeasibleError: what was told does not fit in memory.
        """
        layers = recomputed(self.table, planned.choice, wish, planned.bucket_bytes, self._limit_bytes)
        if not layers:
            return self, planned
        search = Search(with_tiles(self.table, planned.choice, layers)[0], self._limit_bytes, self._limits)
        found = replace(search._planned(planned.solver, (0,) * len(planned.choice)), num_replaced=planned.num_replaced)
        if search.fits(found):
            return search, found
        if wish is HaloRecompute.ALWAYS:
            raise InfeasibleError(
                f"with halos recomputed in {len(layers)} layers the plan needs "
                f"{format_bytes(found.timeline.memory_bytes)} per device, but the limit is "
                f"{format_bytes(self._limit_bytes or 0)}. Use --halo-recompute auto, more devices, a smaller batch, or "
                "raise --memory-limit."
            )
        return self, planned

    def forced(self, choice: Choice) -> Planned:
        """Return the plan of a given choice of splits."""
        return replace(self._planned("forced", choice), lower_bound_s=self.lower_bound_s())

    def fits(self, planned: Planned) -> bool:
        """Return whether a plan obeys the memory limit."""
        return self._limit_bytes is None or planned.timeline.memory_bytes <= self._limit_bytes

    def _verified(self, name: str, solver: Solver, problem: Problem) -> Solution:
        solution = solver(problem, self._limits)
        if wrong := problems_of(problem, solution):
            raise NoPlanError(f"solver {name!r} gave an answer that does not verify: {'; '.join(wrong)}")
        return solution

    def _layer_choice(self, solution: Solution, formulation: Formulation) -> Choice:
        if solution.choice is None:
            if solution.status is Status.INFEASIBLE:
                raise self._infeasible()
            raise NoPlanError(f"the solver ended without a plan: {solution.status}. Raise --time-limit.")
        return formulation.layer_choice(solution.choice)

    def starts(self) -> list[Start]:
        """Return what local search may start from, fastest first; all fit in memory.

        The fixed and the published strategies, the exact minima of the additive cost with more and less of the sync,
        and what the lower bound came by: the minima of weighted means of the chains that can decide the step.

        Raises:
            InfeasibleError: nothing fits.
        """
        found: dict[Choice, str] = {}
        failure: LayerwiseError | None = None
        for name in FIXED:
            with contextlib.suppress(InfeasibleError):  # its dimension is forbidden
                found.setdefault(fixed_strategy(name, self.table, self.formulation).choice, name)
        for name in PUBLISHED if self._has_few_pairs else QUICK:
            found.setdefault(PUBLISHED[name](self.table, self.formulation), name)
        for weight in SYNC_WEIGHTS:
            formulation = (
                self.formulation
                if weight == 1
                else formulate(self.table, sync_weight=weight, limit_bytes=self._limit_bytes)
            )
            try:
                solution = self._verified("dp", solve_dp, formulation.problem)
                found.setdefault(self._layer_choice(solution, formulation), f"dp, {weight:g} of sync")
            except (InfeasibleError, NoPlanError) as error:
                failure = failure or error
        for choice in self._bounded.choices:
            found.setdefault(self._chain.layer_choice(choice), "bound")
        fitting = [self.start(choice, name) for choice, name in found.items() if self.choice_fits(choice)]
        if not fitting:
            raise failure or self._infeasible()
        if self.lower_bound_s() < min(start.step_s for start in fitting) * (1 - ILP_GAP):
            fitting += self._by_integer_program()
        return sorted(fitting, key=lambda start: start.step_s)

    def start(self, choice: Choice, name: str) -> Start:
        """Return a choice with its simulated step and the best size of buckets; the name is for the log."""
        steps = [(simulated_step_s(self.table, choice, size), size) for size in self.bucket_sizes(choice)]
        _log.debug("start %s: %.6g s", name, min(steps)[0])
        return self._kept(Start(choice, *min(steps)))

    def _kept(self, start: Start) -> Start:
        """Keep a choice for ``so_far``, if it is the fastest yet that fits."""
        if (self._best is None or start.step_s < self._best.step_s) and self.choice_fits(start.choice):
            self._best = start
        return start

    def so_far(self) -> Planned | None:
        """Return the best plan that a search came by before it was ended; None where that was before the first.

        Its bound is what had been proven by then.
        """
        if self._best is None:
            return None
        timeline = simulate(self.table, self._best.choice, self._best.bucket_bytes)
        bound_s = self.lower_bound_s() if "_bounded" in self.__dict__ else 0.0
        return Planned("auto", self._best.choice, self._best.bucket_bytes, timeline, Status.FEASIBLE, bound_s)

    def _by_integer_program(self) -> list[Start]:
        """Return the exact minimum of the chain, if it is small enough to be asked for; raise the bound to it."""
        problem = self._chain.problem
        if sum(costs.size for costs in (*problem.node_s, *problem.edge_s.values())) > ILP_COLUMNS:
            return []
        solution = _solve_ilp(problem, replace(self._limits, max_nodes=ILP_NODES))
        if solution.choice is None or problems_of(problem, solution):
            return []  # there are other starts, and another bound
        self._ilp_bound_s = solution.lower_bound_s * (1 - ILP_TOLERANCE)
        choice = self._chain.layer_choice(solution.choice)
        return [self.start(choice, "ilp")] if self.choice_fits(choice) else []

    def refine(self, starts: Sequence[Start]) -> Planned:
        """Return the best plan that local search finds from the promising ones of these, fastest first."""
        around = Neighbourhood(self.table, self.formulation, self._unhidden, self.choice_fits)
        limit_s = starts[0].step_s * (1 + PROMISING)
        promising = [start for start in starts if start.step_s <= limit_s]
        best = starts[0]

        def descend(start: Start) -> None:
            nonlocal best
            choice, step_s = improved(around, start.choice, start.bucket_bytes, MAX_TRIALS)
            if step_s < best.step_s:
                best = self._kept(Start(choice, step_s, start.bucket_bytes))

        for start in promising[:MAX_REFINED]:
            descend(start)
        for number, sharpness in enumerate(WALKS):
            if len(self.table.layers) <= FEW_LAYERS and self.lower_bound_s() < best.step_s * (1 - ILP_GAP):
                descend(self._walked_from(best, sharpness, number))
        again = self.start(best.choice, "auto")  # other buckets may suit it better, or those of its start be left out
        bucket_bytes = min(best, again, key=lambda start: start.step_s).bucket_bytes
        timeline = simulate(self.table, best.choice, bucket_bytes)
        return Planned("auto", best.choice, bucket_bytes, timeline, Status.FEASIBLE, self.lower_bound_s())

    def _walked_from(self, start: Start, sharpness: float, number: int) -> Start:
        """Return the best that a random walk comes by: changes of several variables that only pay together."""
        rules = Rules(self._limit_bytes, start.bucket_bytes, WALK_PROPOSALS, sharpness)
        options = self.formulation.options_of(start.choice)
        found = walk(self.table, self.formulation, options, rules, np.random.default_rng([SEED, number]))
        if found.choice is None or found.step_s >= start.step_s:
            return start
        return Start(self.formulation.layer_choice(found.choice), found.step_s, start.bucket_bytes)

    @property
    def _has_few_pairs(self) -> bool:
        pairs = sum(costs.size for costs in self.formulation.problem.edge_s.values())
        return pairs <= FEW_PAIRS and self.table.space.mesh.size <= FEW_RANKS and len(self.table.layers) <= FEW_LAYERS

    def choice_fits(self, choice: Sequence[int]) -> bool:
        """Return whether a choice of splits obeys the memory limit."""
        if self._limit_bytes is None:
            return True
        return held_bytes(self.table, choice) <= self._limit_bytes

    def _planned(
        self, solver: str, choice: Choice, status: Status = Status.FEASIBLE, *, num_replaced: int = 0
    ) -> Planned:
        bucket_bytes = self.start(choice, solver).bucket_bytes
        timeline = simulate(self.table, choice, bucket_bytes)
        return Planned(solver, choice, bucket_bytes, timeline, status, 0.0, num_replaced)

    def bucket_sizes(self, choice: Sequence[int]) -> list[int]:
        """Return the bucket sizes worth trying: the first that holds all gradients, and smaller ones."""
        costs = [layer[c] for layer, c in zip(self.table.layers, choice, strict=True)]
        total = sum(num_bytes for cost in costs for num_bytes in cost.sync.values())
        first = next((size for size in BUCKET_BYTES if size >= total), BUCKET_BYTES[-1])
        return [size for size in BUCKET_BYTES if size == first or total / MAX_BUCKETS <= size < first]

    def lower_bound_s(self) -> float:
        """Return a proven lower bound of every simulated step (``planner.search.dual``)."""
        return max(self._bounded.lower_bound_s, self._ilp_bound_s)

    @functools.cached_property
    def _chain(self) -> Formulation:
        """What no simulated step is shorter than: reductions at their least behind backward."""
        return formulate(
            self.table, objective="chain", least_of_bucket=max(BUCKET_BYTES), limit_bytes=self._limit_bytes
        )

    @functools.cached_property
    def _bounded(self) -> Bounded:
        return bound_chain(self._chain.problem, self._limits)

    @property
    def _unhidden(self) -> Problem:
        """The problem whose cost is below the simulated step of every choice: gradient sync is left out."""
        return self._chain.problem.additive()

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


def _solve_ilp(problem: Problem, limits: Limits) -> Solution:
    """Solve the integer program, from the choice that elimination finds for its additive cost."""
    return solve_ilp(problem, limits, solve_dp(problem.additive(), limits).choice)
