r"""`mcmc`: FlexFlow's search [FlexFlow19, section 6], a random walk over strategies by their simulated step.

Pick a variable at random, propose another option for it at random, and accept a proposal S* instead of S with

.. math:: \min(1, e^{\beta (t(S) - t(S^*))})

so a better one always, a worse one the less likely the worse it is. Walks start from data parallelism and from a
random strategy; each stops after its proposals, or when half of them have brought nothing better. The best strategy on
the way is the answer. Steps come from ``planner.cost.resimulate``.

No beta serves all networks: with few layers every change is large, and a walk that refuses it stays where it is; with
hundreds of layers a walk that takes such changes never gets better. So there are walks with several (``SHARPNESSES``).

**Deviations**: a count of proposals stops the walk, not a clock, so that the same input gives the same plan; the paper
gives no beta; a plan that does not fit in memory is never accepted,
unless the one before does not fit either and needs more; which devices compute a part is given by the mesh.
"""

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from planner.cost.resimulate import Resimulation
from planner.cost.table import CostTable
from planner.deadline import left_s
from planner.errors import InfeasibleError, UsageError
from planner.ir.bucket import DEFAULT_BUCKET_BYTES
from planner.search.fixed import fixed_strategy
from planner.search.formulate import Formulation
from planner.search.problem import Choice
from planner.units import format_bytes

SEED: Final = 20190331
"""Of the random numbers; constant, so that the same input gives the same plan."""
PROPOSALS_PER_OPTION: Final = 10
"""Of a walk, for every option of every variable, but at least and at most so many:"""
LEAST_PROPOSALS, MOST_PROPOSALS = 1000, 5000
SHARPNESSES: Final = (10.0, 100.0, 1000.0)
"""Beta times the step of the start: proposals that are 10 %, 1 % or 0.1 % of it slower are accepted with 1 / e."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What a walk obeys.

    Attributes:
        limit_bytes: memory of the smallest device; None where memory does not matter.
        bucket_bytes: of the gradient reductions.
        proposals: at most; the walk also ends when half of them have brought nothing better. None: as many as the
            number of options asks for.
        sharpness: beta times the step of the start.
        time_limit_s: a finite one makes the plan depend on the clock.
    """

    limit_bytes: int | None = None
    bucket_bytes: int = DEFAULT_BUCKET_BYTES
    proposals: int | None = None
    sharpness: float = SHARPNESSES[0]
    time_limit_s: float = math.inf


@dataclass(frozen=True, slots=True)
class Walk:
    """What a walk from one start found.

    Attributes:
        choice: option of every variable; None where nothing on the way fits in memory.
        step_s: of the choice; inf without one.
        proposals: made.
    """

    choice: Choice | None
    step_s: float
    proposals: int


def mcmc_choice(
    table: CostTable,
    formulation: Formulation,
    limit_bytes: int | None = None,
    rules: Rules | None = None,
    seed: int = SEED,
) -> Choice:
    """Return the best strategy that walks from all starts come by: the position of every layer's split.

    Args:
        table: the costs.
        formulation: its variables.
        limit_bytes: memory of the smallest device, where no rules say it.
        rules: for each walk but for their sharpness; those of ``Rules`` if left out.
        seed: of the random numbers.

    Raises:
        InfeasibleError: no strategy on the way fits in memory.
    """
    rules = rules or Rules(limit_bytes)
    runs = itertools.product(starts(table, formulation, seed), SHARPNESSES)
    walks = [
        walk(table, formulation, start, replace(rules, sharpness=sharpness), np.random.default_rng([seed, number]))
        for number, (start, sharpness) in enumerate(runs)
    ]
    best = min(walks, key=lambda found: found.step_s)
    if best.choice is None:
        raise InfeasibleError(
            f"mcmc came by no strategy that fits in {format_bytes(rules.limit_bytes or 0)} per device in "
            f"{sum(found.proposals for found in walks)} proposals. Use --solver auto, which also solves the integer "
            "program, more devices, a smaller batch, or raise --memory-limit."
        )
    return formulation.layer_choice(best.choice)


def starts(table: CostTable, formulation: Formulation, seed: int = SEED) -> Iterator[Choice]:
    """Yield the options of every variable to start from: data parallelism, where it is legal, and random ones."""
    try:
        data = fixed_strategy("data", table, formulation).choice
        yield formulation.options_of(data)
    except (InfeasibleError, UsageError):  # samples are not to be split; too large a table for the layers between
        pass
    rng = np.random.default_rng(seed)
    yield tuple(int(rng.integers(len(costs))) for costs in formulation.problem.node_s)


def walk(table: CostTable, formulation: Formulation, start: Choice, rules: Rules, rng: np.random.Generator) -> Walk:
    """Walk from one start, given as the option of every variable."""
    members = formulation.members()
    sizes = [len(costs) for costs in formulation.problem.node_s]
    free = [v for v, size in enumerate(sizes) if size > 1]
    options = list(start)
    memory = _Memory(formulation, options, rules.limit_bytes)
    steps = Resimulation(table, formulation.layer_choice(start), rules.bucket_bytes)
    step_s = steps.step_s()
    beta = rules.sharpness / step_s if step_s else 0.0
    proposals = rules.proposals
    if proposals is None:
        proposals = min(max(PROPOSALS_PER_OPTION * sum(sizes), LEAST_PROPOSALS), MOST_PROPOSALS)
    best, best_s = (tuple(options), step_s) if memory.excess() <= 0 else (None, math.inf)
    done = improved_at = 0
    begin = time.perf_counter()
    while free and done < proposals and done - improved_at < (proposals + 1) // 2:
        if time.perf_counter() - begin > rules.time_limit_s or left_s() == 0:
            break
        done += 1
        v = free[int(rng.integers(len(free)))]
        option = int(rng.integers(sizes[v] - 1))
        option += option >= options[v]  # any but the present one
        chance = rng.random()
        before, after = memory.excess(), memory.excess(v, option)
        if after > 0 and after >= before:
            continue
        changes = {layer: formulation.options[layer][option] for layer in members[v]}
        new_s = steps.step_s(changes)
        if before <= 0 and new_s > step_s and chance >= math.exp(beta * (step_s - new_s)):
            continue
        steps.apply(changes)
        memory.pick(v, option)
        options[v], step_s = option, new_s
        if after <= 0 and new_s < best_s * (1 - 1e-12):
            best, best_s, improved_at = tuple(options), new_s, done
    return Walk(best, best_s, done)


class _Memory:
    """By how much options of variables exceed the memory limit, kept up to date; never, without a limit."""

    def __init__(self, formulation: Formulation, options: Sequence[int], limit_bytes: int | None) -> None:
        self._limit_bytes = limit_bytes
        if limit_bytes is None:
            return
        problem = formulation.problem
        self._resident, self._transient = problem.resident_bytes, problem.transient_bytes
        self._sum = sum(int(b[o]) for b, o in zip(self._resident, options, strict=True))
        self._each = [int(b[o]) for b, o in zip(self._transient, options, strict=True)]
        self._options = list(options)

    def excess(self, variable: int | None = None, option: int = 0) -> int:
        """Return bytes beyond the limit, of the options or with one of them changed; positive where they do not fit."""
        if self._limit_bytes is None:
            return 0
        if variable is None:
            return self._sum + max(self._each) - self._limit_bytes
        resident, each = self._resident[variable], list(self._each)
        each[variable] = int(self._transient[variable][option])
        total = self._sum + int(resident[option]) - int(resident[self._options[variable]])
        return total + max(each) - self._limit_bytes

    def pick(self, variable: int, option: int) -> None:
        """Change an option."""
        if self._limit_bytes is None:
            return
        self._sum += int(self._resident[variable][option]) - int(self._resident[variable][self._options[variable]])
        self._each[variable] = int(self._transient[variable][option])
        self._options[variable] = option
