"""Local search on the simulated step: one variable at a time, as long as the step gets shorter."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from planner.cost.resimulate import Resimulation
from planner.cost.table import CostTable
from planner.deadline import left_s
from planner.search.floor import Floor
from planner.search.formulate import Formulation
from planner.search.problem import Choice, Problem

PROGRESS: Final = 1e-9
"""Relative; shorter steps than this count as equal: sums are rounded."""


@dataclass(frozen=True, slots=True)
class Neighbourhood:
    """What local search may do.

    Attributes:
        table: the costs of the simulated step.
        formulation: the variables: layers that change together.
        unhidden: additive costs below the simulated step of every choice. A change that costs more than the best
            step by them is not simulated (``planner.search.floor``).
        fits: whether a choice of splits obeys the memory limit.
    """

    table: CostTable
    formulation: Formulation
    unhidden: Problem
    fits: Callable[[Sequence[int]], bool]


def improved(around: Neighbourhood, start: Choice, bucket_bytes: int, max_trials: int) -> tuple[Choice, float]:
    """Return a choice of splits that no change of one variable makes faster, and its step in seconds.

    Variables with many options come first: what they do decides what others may gain.

    Args:
        around: what may be changed.
        start: the position of every layer's split.
        bucket_bytes: of the gradient reductions.
        max_trials: simulated steps after which it ends, as it does where time is over.
    """
    formulation = around.formulation
    members = formulation.members()
    picked = list(formulation.options_of(start))
    floor, steps = Floor(around.unhidden, picked), Resimulation(around.table, start, bucket_bytes)
    best_s = steps.step_s()
    trials = itertools.count()
    order = sorted(range(len(members)), key=lambda v: -len(formulation.problem.node_s[v]))
    last = len(order)  # variables since the last change
    for v in itertools.cycle(order):
        if last == 0:
            break
        last -= 1
        for option in range(len(formulation.problem.node_s[v])):
            if option == picked[v] or floor.with_option(v, option) >= best_s:
                continue  # longer even if all gradient sync were hidden
            if next(trials) >= max_trials or left_s() == 0:
                return steps.choice, best_s
            changes = {layer: formulation.options[layer][option] for layer in members[v]}
            step_s = steps.step_s(changes)
            if step_s < best_s * (1 - PROGRESS) and around.fits(_changed(steps.choice, changes)):
                best_s, picked[v], last = steps.apply(changes), option, len(order)
                floor.pick(v, option)
    return steps.choice, best_s


def _changed(choice: Choice, changes: dict[int, int]) -> list[int]:
    found = list(choice)
    for layer, position in changes.items():
        found[layer] = position
    return found
