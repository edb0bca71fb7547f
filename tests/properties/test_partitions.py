"""The search for partitions against its definition, against brute force, and against nothing: always valid."""

import os

import numpy as np
import pytest

from planner.errors import InfeasibleError, NoPlanError
from planner.inference.evaluate import evaluate
from planner.inference.passes import _best_operation, improve, kick, run_pass
from planner.inference.problem import FREE, Objective
from planner.inference.search import Limits, partition
from planner.inference.starts import best_fit, equal_shares, greedy, layer_wise, packed, tiled
from planner.inference.state import State
from support.partitions import best_of_all, by_definition, random_problem

FACTOR = 10 if os.environ.get("LAYERWISE_FULL") else 1
BOTH = pytest.mark.parametrize("objective", list(Objective))


@BOTH
@pytest.mark.parametrize("seed", range(20 * FACTOR))
def test_the_figures_are_those_of_the_definition(objective: Objective, seed: int) -> None:
    generator = np.random.default_rng(seed)
    problem = random_problem(generator, 12, 4, objective, 2.0)
    parts = generator.integers(4, size=12)
    found = evaluate(problem, parts)
    period, communication, used = by_definition(problem, parts.tolist())
    assert 1 / found.rate_per_s == pytest.approx(period, rel=1e-12)
    assert (found.communication_bytes, found.used_bytes.tolist()) == (communication, used)


@BOTH
@pytest.mark.parametrize("seed", range(10 * FACTOR))
def test_a_moved_partition_knows_what_a_new_one_counts(objective: Objective, seed: int) -> None:
    generator = np.random.default_rng(seed)
    problem = random_problem(generator, 14, 5, objective, 3.0)
    state = State(problem, generator.integers(5, size=14))
    for _ in range(15):
        before, changes = state.potential(), state.changes(np.arange(14))
        group, there = int(generator.integers(14)), int(generator.integers(5))
        state.move(group, there)
        assert state.potential() - before == pytest.approx(changes[group, there], rel=1e-9, abs=1e-9)
        fresh = State(problem, state.part)
        assert state.value == pytest.approx(fresh.value, rel=1e-12)
        for name in ("count", "load", "traffic", "used", "present"):
            np.testing.assert_array_equal(getattr(state, name), getattr(fresh, name))


@BOTH
@pytest.mark.parametrize("seed", range(15 * FACTOR))
def test_operations_cost_what_they_say_and_respect_memory(objective: Objective, seed: int) -> None:
    generator = np.random.default_rng(seed)
    problem = random_problem(generator, 12, 3, objective, 1.6)
    start = tiled(problem, generator)
    if start is None:
        return
    state, swaps = State(problem, start), 0
    for _ in range(12):
        operation = _best_operation(state, problem.fixed == FREE, generator)
        if operation is None:
            break
        before = state.potential()
        for group, there in operation.moves:
            state.move(group, there)
        swaps += len(operation.moves) == 2
        assert state.potential() - before == pytest.approx(operation.change, rel=1e-7, abs=1e-7)
        assert evaluate(problem, state.part).fits


@BOTH
@pytest.mark.parametrize("seed", range(10 * FACTOR))
def test_passes_and_kicks_stay_valid_and_passes_never_lose(objective: Objective, seed: int) -> None:
    generator = np.random.default_rng(seed)
    problem = random_problem(generator, 20, 4, objective, 1.8)
    start = packed(problem, generator)
    if start is None:
        return
    state = State(problem, start)
    for _ in range(3):
        before = state.value
        run_pass(state, generator)
        assert state.value <= before * (1 + 1e-9)
        kick(state, generator)
        assert evaluate(problem, state.part).fits
    improve(state, generator, 10)
    assert state.value == pytest.approx(evaluate(problem, state.part).value(objective), rel=1e-12)


@BOTH
def test_the_search_finds_what_brute_force_finds(objective: Objective) -> None:
    optimal = tried = 0
    for seed in range(2 * FACTOR):
        problem = random_problem(np.random.default_rng(seed), 6, 3, objective, 1.7)
        best = best_of_all(problem)
        if best is None:
            with pytest.raises((InfeasibleError, NoPlanError)):
                partition(problem)
            continue
        try:
            found = partition(problem, Limits(kicks=8)).evaluation
        except NoPlanError:  # it says that this is no proof
            continue
        assert found.fits
        assert found.value(objective) >= best.value(objective) * (1 - 1e-12)
        tried += 1
        optimal += found.value(objective) <= best.value(objective) * (1 + 1e-9)
    assert optimal >= 0.8 * tried > 0


@pytest.mark.parametrize("seed", range(15 * FACTOR))
def test_what_simple_methods_place_is_valid(seed: int) -> None:
    generator = np.random.default_rng(seed)
    problem = random_problem(generator, 15, 4, Objective.INFERENCE_RATE, 1.5)
    for method in (greedy, best_fit, equal_shares, layer_wise):
        found = method(problem)
        assert found is None or evaluate(problem, found).fits
    for random_method in (packed, tiled):
        found = random_method(problem, generator)
        assert found is None or evaluate(problem, found).fits
