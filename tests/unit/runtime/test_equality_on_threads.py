"""The real lowered modules of all ranks, as threads of one process, equal one device."""

import os

import pytest

from planner.ir.dimension import Dimension
from planner.space.enumerate import DEFAULT_DIMENSIONS
from support.equality import NETS, TOLERANCE, on_threads, planner_for, random_plan

STRATEGIES = ("data", "model", "model-in", "conv-data-fc-model", "spatial", "sample-spatial", "auto")
SPACE = (Dimension.HEIGHT, Dimension.WIDTH)
SEEDS = range(6 if os.environ.get("LAYERWISE_FULL") else 3)


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", NETS)
def test_a_strategy_equals_one_device(name: str, strategy: str, num_ranks: int) -> None:
    plan = planner_for(name, num_ranks, solver=strategy).plan()
    assert on_threads(name, plan) < TOLERANCE


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", NETS)
def test_random_mixed_strategies_equal_one_device(name: str, seed: int) -> None:
    planner = planner_for(name, (2, 3, 4)[seed % 3], dimensions=(*DEFAULT_DIMENSIONS, *SPACE))
    assert on_threads(name, random_plan(planner, seed)) < TOLERANCE


@pytest.mark.parametrize("name", ["lenet5", "resnet20"])
def test_passing_the_whole_batch_equals_one_device(name: str) -> None:
    planner = planner_for(name, 4, io="global")
    assert on_threads(name, random_plan(planner, 0)) < TOLERANCE
    assert on_threads(name, planner.plan()) < TOLERANCE
