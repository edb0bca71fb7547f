"""Why a layer is split as it is: alternatives and flips against all strategies of a small network."""

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest

from planner.api import Machine, Origin, example_inputs, machine_of, plan_model
from planner.api.comparing import planner_of
from planner.api.explaining import FACTORS, explain, overview
from planner.api.planning import Planner
from planner.cost.simulate import simulated_step_s
from planner.cost.table import CostTable
from planner.errors import UnknownNameError, UsageError
from planner.frontend.source import load_model
from planner.ir.split import LayerId
from planner.plan import Plan
from planner.search.formulate import formulate
from planner.space.enumerate import DEFAULT_DIMENSIONS

LAYER = LayerId("features.3")
ROUNDING = 1e-9


@pytest.fixture(scope="module")
def machine() -> Machine:
    return machine_of("2x1-a100-eth10")


@pytest.fixture(scope="module")
def plan(machine: Machine) -> Plan:
    loaded = load_model("lenet5", {})
    inputs = example_inputs(loaded.input_shapes, 64)
    return plan_model(loaded.module, inputs, machine=machine, origin=Origin("lenet5", "lenet5", {}), mesh="node=2")


@pytest.fixture(scope="module")
def planner(plan: Plan, machine: Machine) -> Planner:
    return planner_of(plan, machine, DEFAULT_DIMENSIONS)


def cheapest(table: CostTable, layer: LayerId) -> dict[int, list[tuple[int, ...]]]:
    """Return, of all strategies with each split of a layer, those of the least sum of costs."""
    problem, j = formulate(table).problem, table.space.graph.index[layer]
    costs: dict[int, dict[tuple[int, ...], float]] = defaultdict(dict)
    for choice in itertools.product(*(range(len(costs)) for costs in table.layers)):
        costs[choice[j]][choice] = problem.cost_s(choice)
    least = {c: min(found.values()) * (1 + ROUNDING) for c, found in costs.items()}
    return {c: [choice for choice, cost_s in found.items() if cost_s <= least[c]] for c, found in costs.items()}


def steps_s(table: CostTable, choices: Sequence[tuple[int, ...]], bucket_bytes: int) -> Iterator[float]:
    for choice in choices:
        yield simulated_step_s(table, choice, bucket_bytes)


def test_what_follows_is_the_least_sum_over_all_strategies_with_the_split(
    plan: Plan, planner: Planner, machine: Machine
) -> None:
    table = planner.table(plan.mesh)
    chosen, j = table.choice(plan.strategy), table.space.graph.index[LAYER]
    found = {each.split: each for each in explain(plan, machine, LAYER, flips=False).alternatives}
    assert set(found) == set(table.space.splits[LAYER])
    for c, choices in cheapest(table, LAYER).items():
        kept_s = simulated_step_s(table, (*chosen[:j], c, *chosen[j + 1 :]), plan.bucket_bytes)
        alternative = found[table.space.splits[LAYER][c]]
        assert alternative.kept_s == pytest.approx(kept_s)
        possible = {min(kept_s, step_s) for step_s in steps_s(table, choices, plan.bucket_bytes)}
        assert any(alternative.followed_s == pytest.approx(step_s) for step_s in possible)


def test_the_planned_split_is_first_and_its_parts_are_those_of_the_plan(plan: Plan, machine: Machine) -> None:
    for layer in plan.only_stage.layers:
        found = explain(plan, machine, layer.id, flips=False)
        planned = found.planned
        assert planned.is_planned
        assert planned.split == plan.strategy[LayerId(layer.id)]
        assert found.step_s == pytest.approx(plan.totals.step_s)
        assert planned.kept_s == pytest.approx(found.step_s)
        assert planned.compute_s == pytest.approx(layer.cost.compute_s)
        order = [each.followed_s for each in found.alternatives[1:]]
        assert order == sorted(order)


def test_the_next_best_split_of_every_layer_is_that_of_the_shortest_step(plan: Plan, machine: Machine) -> None:
    for row in overview(plan, machine).standings:
        others = explain(plan, machine, row.layer, flips=False).alternatives[1:]
        assert (row.other is None) == (not others)
        if others:
            shortest_s = min(each.kept_s for each in others)
            assert row.more_s == pytest.approx(shortest_s - plan.totals.step_s, abs=1e-12)


def test_a_flip_is_the_first_factor_at_which_another_split_has_the_least_sum_and_the_shorter_step(
    plan: Plan, planner: Planner, machine: Machine
) -> None:
    found = {(flip.what, flip.factor > 1): flip for flip in explain(plan, machine, LAYER).flips}
    assert any(what == "links" for what, _ in found)
    for is_faster in (True, False):
        flip = found.get(("links", is_faster))
        factors = [f if is_faster else 1 / f for f in FACTORS]
        for factor in factors:
            links = tuple(
                replace(x, bandwidth_bytes_per_s=x.bandwidth_bytes_per_s * factor) for x in machine.graph.links
            )
            scaled = replace(planner, machine=Machine(replace(machine.graph, links=links), machine.profile))
            table = scaled.table(plan.mesh)
            own = table.space.splits[LAYER].index(plan.strategy[LAYER])
            problem, by_split = formulate(table).problem, cheapest(table, LAYER)
            best = min(by_split, key=lambda c: problem.cost_s(by_split[c][0]))
            best_s, own_s = (min(steps_s(table, by_split[c], plan.bucket_bytes)) for c in (best, own))
            wins = best != own and best_s < own_s * (1 - ROUNDING)
            assert wins == (flip is not None and factor == flip.factor)
            if wins:
                assert flip is not None
                assert flip.split == table.space.splits[LAYER][best]
                assert flip.gain == pytest.approx(1 - best_s / own_s)
                break


def test_an_unknown_layer_and_a_pipeline_are_refused(plan: Plan, machine: Machine) -> None:
    with pytest.raises(UnknownNameError, match=r"unknown layer 'classifier.1'. Did you mean 'classifier"):
        explain(plan, machine, "classifier.1")
    pipeline = plan.model_copy(update={"stages": [*plan.stages, *plan.stages]})
    with pytest.raises(UsageError, match="plans of one stage"):
        explain(pipeline, machine, LAYER)
