"""From a problem to the best partition found, beside what simpler methods find."""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from planner.errors import NoPlanError
from planner.inference.evaluate import Evaluation, evaluate
from planner.inference.metis import is_installed, metis_partitions
from planner.inference.passes import improve, is_less, kick
from planner.inference.problem import Assignment, Problem
from planner.inference.starts import best_fit, equal_shares, greedy, layer_wise, packed, tiled
from planner.inference.state import State

_log = logging.getLogger(__name__)
METIS: Final = "METIS"
_TILED: Final = 8
_PACKED: Final = 3
_PASSES: Final = 60
_PASSES_AFTER_KICK: Final = 4
_CLOSE: Final = 1e-6
"""A rate that is this near to its bound, relatively, cannot be improved."""


@dataclass(frozen=True, slots=True)
class Limits:
    """When a search ends; at the earliest behind the first start.

    Attributes:
        kicks: disturbances of the best partition, each followed by passes.
        time_limit_s: for everything; a search that it ends may find something else each time.
    """

    kicks: int = 60
    time_limit_s: float = 60.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Baseline:
    """What a simpler method found, METIS without a look at memory; None where it found no place for everything."""

    name: str
    assignment: Assignment | None
    evaluation: Evaluation | None


@dataclass(frozen=True, slots=True)
class Found:
    """The best partition of a search.

    Attributes:
        start: the name of the start that led to it.
        num_starts: that passes were run from.
        kicks: disturbances tried.
        baselines: what simpler methods found.
    """

    assignment: Assignment
    evaluation: Evaluation
    start: str
    num_starts: int
    kicks: int
    baselines: tuple[Baseline, ...]


def baselines(problem: Problem) -> tuple[Baseline, ...]:
    """Return what greedy methods, whole layers and, where it is installed, METIS make of a problem."""
    methods = {"per layer": layer_wise, "greedy": greedy, "best fit": best_fit, "equal shares": equal_shares}
    found = [(name, method(problem)) for name, method in methods.items()]
    if is_installed():
        found.append((METIS, _best_of(problem, metis_partitions(problem))))
    return tuple(Baseline(name, part, None if part is None else evaluate(problem, part)) for name, part in found)


def partition(problem: Problem, limits: Limits = Limits()) -> Found:  # a frozen value
    """Return the best partition of passes from several starts, and of passes after kicks of the best of these.

    Raises:
        InfeasibleError: proven that nothing fits.
        NoPlanError: no start fits; that nothing does is not proven.
    """
    problem.refuse_impossible()
    deadline_s = time.monotonic() + limits.time_limit_s
    generator = np.random.default_rng(limits.seed)
    simple = baselines(problem)
    best: tuple[tuple[float, float], State, str] | None = None
    for known in simple:  # what comes out is never worse than these, however little time there is
        if known.assignment is not None and known.evaluation is not None and known.evaluation.fits:
            state = State(problem, known.assignment)
            if best is None or is_less(_score(state), best[0]):
                best = _score(state), state, known.name
    num_starts = 0
    for name, assignment in _starts(problem, simple, generator):
        state = State(problem, assignment)
        improve(state, generator, _PASSES, deadline_s)
        num_starts += 1
        _log.info("%s: %s", name, f"{1 / state.value:.6g}/s" if state.value else "nothing to do")
        if best is None or is_less(_score(state), best[0]):
            best = _score(state), state, name
        if time.monotonic() > deadline_s:
            break
    if best is None:
        raise NoPlanError(
            f"no partition of {problem.graph.name} was found that fits {len(problem.devices)} devices; that there "
            "is none is not proven. More devices, smaller groups (--group) or smaller numbers "
            "(--element-bytes) would help."
        )
    assignment, kicks = _kicked(best[1], generator, limits.kicks, deadline_s)
    return Found(assignment, evaluate(problem, assignment), best[2], num_starts, kicks, simple)


def _kicked(state: State, generator: np.random.Generator, num: int, deadline_s: float) -> tuple[Assignment, int]:
    """Return the best partition after so many kicks, and how many there were."""
    problem, best, score = state.problem, state.part.copy(), _score(state)
    bound = 1 / problem.rate_bound_per_s
    for number in range(num):
        if time.monotonic() > deadline_s or score[0] <= (bound if state.is_rate else 0.0) * (1 + _CLOSE):
            return best, number
        kick(state, generator)
        improve(state, generator, _PASSES_AFTER_KICK, deadline_s)
        if not is_less(score, _score(state)):  # as good is welcome: somewhere else
            best, score = state.part.copy(), _score(state)
        else:
            state = State(problem, best)
    return best, num


def _score(state: State) -> tuple[float, float]:
    """Return value and potential, by the state's own bottleneck."""
    state.rescale()
    return state.value, state.potential()


def _starts(
    problem: Problem, simple: tuple[Baseline, ...], generator: np.random.Generator
) -> Iterator[tuple[str, Assignment]]:
    for number in range(max(_TILED, _PACKED)):
        for name, method, count in (("tiles", tiled, _TILED), ("packed", packed, _PACKED)):
            if number < count and (found := method(problem, generator)) is not None:
                yield f"{name} {number + 1}", found
        if number < len(simple):
            known = simple[-1 - number]
            if known.assignment is not None and known.evaluation is not None and known.evaluation.fits:
                yield known.name, known.assignment


def _best_of(problem: Problem, found: Iterator[Assignment]) -> Assignment | None:
    """Return the best valid partition, or the best of all where none is valid."""
    rated = [(evaluate(problem, assignment), assignment) for assignment in found]
    return min(rated, key=lambda pair: (not pair[0].fits, pair[0].value(problem.objective)), default=(None, None))[1]
