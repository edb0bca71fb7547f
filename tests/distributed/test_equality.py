"""Plans on real gloo processes equal one device in float64."""

import itertools
import os

import pytest

from runtime.launch import run_local
from support.equality import NETS, TOLERANCE, loss_difference, planner_for, random_plan, reference

FULL = bool(
    os.environ.get("LAYERWISE_FULL")
)  # all are run on threads too, tests/unit/runtime/test_equality_on_threads.py
FIXED = ("data", "model", "model-in", "conv-data-fc-model", "auto") if FULL else ("auto",)
NUM_RANDOM = 30 if FULL else 1


def assert_equal(cases: list[dict[str, str]], num_ranks: int) -> None:
    """Run cases of a net and a plan on processes; check what they found against one device."""
    ranks = run_local("support.equality:on_process", {"cases": cases}, num_ranks=num_ranks, timeout_s=3000.0)
    references = {name: reference(name) for name in {case["net"] for case in cases}}
    failed = []
    for case, results in zip(cases, zip(*ranks, strict=True), strict=True):
        losses = [sum(column) for column in zip(*(r["losses"] for r in results), strict=True)]
        worst = max(loss_difference(losses, references[case["net"]]), *(r["worst"] for r in results))
        if not worst < TOLERANCE:
            failed.append(f"{case['net']} under {case['strategy']}: {worst:.2e}")
    assert failed == []


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_fixed_planned_and_random_strategies_equal_one_device(num_ranks: int) -> None:
    cases = []
    for name in NETS:
        planner = planner_for(name, num_ranks)
        plans = {s: planner_for(name, num_ranks, solver=s).plan() for s in FIXED}
        plans |= {f"random {seed}": random_plan(planner, seed) for seed in range(NUM_RANDOM)}
        cases += [{"net": name, "strategy": s, "plan": p.to_json()} for s, p in plans.items()]
    assert_equal(cases, num_ranks)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 4] if FULL else [2])
def test_sharded_parameters_equal_one_device(num_ranks: int) -> None:
    nets = ["vgg", "lenet5"] if num_ranks == 2 else ["resnet20", "alexnet"]
    cases = []
    for name, sharding in itertools.product(nets if FULL else nets[:1], ("optimizer", "full")):
        data = planner_for(name, num_ranks, solver="data", parameter_sharding=sharding).plan()
        mixed = random_plan(planner_for(name, num_ranks, parameter_sharding=sharding), num_ranks)
        cases += [
            {"net": name, "strategy": f"{sharding} {k}", "plan": p.to_json()} for k, p in enumerate((data, mixed))
        ]
    assert_equal(cases, num_ranks)
