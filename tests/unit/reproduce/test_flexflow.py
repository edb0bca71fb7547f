"""The exhaustive search that MCMC is held against, against simulating everything."""

import itertools

import pytest

from planner.cost.simulate import simulated_step_s
from planner.cost.table import CostTable
from planner.reproduce.flexflow import shortest_step
from planner.search.formulate import formulate
from support.tables import lenet_table, linear_table, residual_table

BUCKET_BYTES = 100_000
TABLES = {
    "chain": lambda: linear_table((256, 2048, 2048, 64), "4x1-p100-eth10"),
    "lenet": lambda: lenet_table("4x1-p100-eth10"),
    "no chain": lambda: residual_table(1, "4x1-p100-eth10"),
    "reductions slow computation down": lambda: residual_table(1, "4xp100-pcie3", loaded=True),
}


@pytest.mark.parametrize("name", TABLES)
def test_what_it_leaves_out_is_not_shorter(name: str) -> None:
    table: CostTable = TABLES[name]()
    formulation = formulate(table)
    everything = itertools.product(*(range(len(costs)) for costs in formulation.problem.node_s))
    steps = [simulated_step_s(table, formulation.layer_choice(options), BUCKET_BYTES) for options in everything]
    found_s, simulated = shortest_step(table, formulation, BUCKET_BYTES)
    assert found_s == pytest.approx(min(steps), rel=1e-12)
    assert 1 <= simulated < len(steps)
