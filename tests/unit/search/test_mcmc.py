"""FlexFlow's walk against brute force over the simulated step."""

import functools
import itertools

import numpy as np
import pytest

from planner.cost.simulate import simulated_step_s
from planner.cost.table import CostTable
from planner.errors import InfeasibleError
from planner.ir.bucket import DEFAULT_BUCKET_BYTES
from planner.ir.dimension import Dimension
from planner.search.formulate import Formulation, formulate
from planner.search.mcmc import SHARPNESSES, Rules, mcmc_choice, starts, walk
from planner.search.problem import Choice
from support.tables import lenet_table, linear_table


def brute_force(table: CostTable, formulation: Formulation, limit_bytes: int | None = None) -> tuple[float, Choice]:
    """Return the shortest step of all choices that fit, simulating each."""
    sizes = [range(len(costs)) for costs in formulation.problem.node_s]
    fitting = (
        c for c in itertools.product(*sizes)
        if limit_bytes is None or formulation.problem.memory_bytes(c) <= limit_bytes
    )  # fmt: skip
    choices = map(formulation.layer_choice, fitting)
    return min((simulated_step_s(table, choice, DEFAULT_BUCKET_BYTES), choice) for choice in choices)


@functools.cache
def table(kind: str) -> CostTable:
    if kind == "linear":
        return linear_table((256, 2048, 2048, 64), "4x1-p100-eth10")
    return lenet_table("4xp100-nvlink" if kind == "lenet, nvlink" else "4x1-p100-eth10")


@pytest.mark.parametrize("kind", ["lenet, nvlink", "lenet, ethernet", "linear"])
def test_it_finds_the_shortest_step_of_all_on_four_devices(kind: str) -> None:
    """All its walks together; and those from the random start alone, which is far from the best, with two seeds."""
    costs = table(kind)
    formulation = formulate(costs)
    wanted, _ = brute_force(costs, formulation)
    assert simulated_step_s(costs, mcmc_choice(costs, formulation), DEFAULT_BUCKET_BYTES) == pytest.approx(wanted)
    _, random = starts(costs, formulation)
    assert simulated_step_s(costs, formulation.layer_choice(random), DEFAULT_BUCKET_BYTES) > 1.1 * wanted
    found = min(
        (
            walk(costs, formulation, random, Rules(sharpness=sharpness), np.random.default_rng(seed))
            for sharpness in SHARPNESSES
            for seed in range(2)
        ),
        key=lambda found: found.step_s,
    )
    assert found.step_s == pytest.approx(wanted)
    assert found.choice is not None
    choice = formulation.layer_choice(found.choice)
    assert simulated_step_s(costs, choice, DEFAULT_BUCKET_BYTES) == pytest.approx(found.step_s, rel=1e-12)


def test_data_parallelism_is_a_start_and_not_the_best_here() -> None:
    costs = table("linear")
    formulation = formulate(costs)
    data, random = starts(costs, formulation)
    strategy = costs.strategy(formulation.layer_choice(data))
    assert {d for split in strategy.values() for d in split.dimensions} == {Dimension.SAMPLE}
    data_s, random_s = (
        simulated_step_s(costs, formulation.layer_choice(c), DEFAULT_BUCKET_BYTES) for c in (data, random)
    )
    assert brute_force(costs, formulation)[0] < 0.9 * min(data_s, random_s)


def test_the_same_input_gives_the_same_plan() -> None:
    costs = table("linear")
    few = Rules(proposals=60)
    found = [mcmc_choice(costs, formulate(costs), rules=few) for _ in range(3)]
    assert found[0] == found[1] == found[2]
    walks = {
        walk(costs, formulate(costs), next(starts(costs, formulate(costs))), few, np.random.default_rng(seed)).choice
        for seed in range(12)
    }
    assert len(walks) > 1  # it is the seed that decides, and so few proposals do not reach the best from everywhere


@pytest.mark.parametrize("share", [0.999, 0.7, 0.5])
def test_it_obeys_the_memory_limit(share: float) -> None:
    """Data parallelism keeps most: what fits in a share of it is found although that start does not fit."""
    costs = table("linear")
    formulation = formulate(costs)
    data = next(starts(costs, formulation))
    limit = int(share * formulation.problem.memory_bytes(data))
    wanted, _ = brute_force(costs, formulation, limit)
    choice = mcmc_choice(costs, formulation, limit)
    kept = [layer[c].memory for layer, c in zip(costs.layers, choice, strict=True)]
    assert sum(m.resident for m in kept) + max(m.transient for m in kept) <= limit
    assert simulated_step_s(costs, choice, DEFAULT_BUCKET_BYTES) == pytest.approx(wanted)


def test_a_network_that_fits_in_no_way_is_refused() -> None:
    costs = table("linear")
    with pytest.raises(InfeasibleError, match="mcmc came by no strategy that fits in 1"):
        mcmc_choice(costs, formulate(costs), 1024)


def test_a_walk_ends_when_half_of_its_proposals_bring_nothing_better() -> None:
    costs = table("linear")
    formulation = formulate(costs)
    _, best = brute_force(costs, formulation)
    options = tuple(
        formulation.options[layer].index(best[layer])
        for v in range(len(formulation.problem.node_s))
        for layer in [formulation.variable_of.index(v)]
    )
    assert walk(costs, formulation, options, Rules(proposals=101), np.random.default_rng(0)).proposals == 51


def test_a_time_limit_ends_a_walk() -> None:
    costs = table("linear")
    start = next(starts(costs, formulate(costs)))
    assert walk(costs, formulate(costs), start, Rules(time_limit_s=0.0), np.random.default_rng(0)).proposals == 0
