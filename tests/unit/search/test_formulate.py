"""From a table of costs to numbers: what a choice costs is what its layers, edges and reductions add up to."""

import itertools

import numpy as np
import pytest

from planner.cost.table import CostTable
from planner.search.formulate import formulate
from support.tables import linear_table, residual_table

TABLES = [residual_table(2), linear_table((64, 512, 32), "2x2-a100-ib400")]


def choices(table: CostTable, count: int = 20) -> list[tuple[int, ...]]:
    rng = np.random.default_rng(0)
    return [tuple(int(rng.integers(len(costs))) for costs in table.layers) for _ in range(count)]


@pytest.mark.parametrize("table", TABLES, ids=("residual", "linear"))
def test_the_additive_cost_is_the_sum_over_layers_and_edges(table: CostTable) -> None:
    problem = formulate(table).problem
    for choice in choices(table):
        layers = [costs[c] for costs, c in zip(table.layers, choice, strict=True)]
        total_s = sum(
            c.forward_s + c.backward_s + c.collect_s + c.update_s
            + c.blocking_forward.seconds + c.blocking_backward.seconds
            + sum(table.model.sync(axes, num_bytes).seconds for axes, num_bytes in c.sync.items())
            for c in layers
        )  # fmt: skip
        total_s += sum(
            e.forward_s[choice[i], choice[j]] + e.backward_s[choice[i], choice[j]]
            for (i, j, _), e in table.edges.items()
        )
        assert problem.cost_s(choice) == pytest.approx(total_s, rel=1e-12)


@pytest.mark.parametrize("table", TABLES, ids=("residual", "linear"))
def test_the_chain_is_forward_then_backward_with_reductions_behind_it(table: CostTable) -> None:
    problem = formulate(table, objective="chain").problem
    levels = len(table.model.machine.levels)
    for choice in choices(table):
        layers = [costs[c] for costs, c in zip(table.layers, choice, strict=True)]
        now_s = sum(c.forward_s + c.blocking_forward.seconds for c in layers)
        now_s += sum(e.forward_s[choice[i], choice[j]] for (i, j, _), e in table.edges.items())
        ends_s = [0.0] * levels
        for j in range(len(layers) - 1, -1, -1):
            now_s += layers[j].backward_s + layers[j].collect_s + layers[j].blocking_backward.seconds
            for level in range(levels):
                prices = [table.model.sync(axes, num_bytes) for axes, num_bytes in layers[j].sync.items()]
                ends_s[level] = max(ends_s[level], now_s) + sum(p.seconds for p in prices if p.levels >> level & 1)
            now_s += sum(
                e.backward_s[choice[i], choice[j]] for (i, consumer, _), e in table.edges.items() if consumer == j
            )
        step_s = max(now_s, *ends_s) + sum(c.update_s for c in layers)
        assert problem.cost_s(choice) == pytest.approx(step_s, rel=1e-12)


@pytest.mark.parametrize("table", TABLES, ids=("residual", "linear"))
def test_a_pinned_problem_costs_what_the_whole_one_costs(table: CostTable) -> None:
    whole = formulate(table, objective="chain", limit_bytes=10**12)
    wanted = [len(costs) - 1 for costs in table.layers]
    formulation, problem = whole.pinned({i: [c] for i, c in enumerate(wanted)})
    none = (0,) * len(wanted)
    assert problem.sizes == [1] * len(wanted)
    assert formulation.layer_choice(none) == tuple(wanted)
    assert problem.cost_s(none) == whole.problem.cost_s(tuple(wanted))
    assert problem.memory_bytes(none) == whole.problem.memory_bytes(tuple(wanted))


def test_layers_and_edges_that_look_alike_share_their_arrays() -> None:
    table = linear_table((64, 64, 64, 64), "2x2-a100-ib400")
    problem = formulate(table).problem
    pairs = itertools.combinations(range(len(table.layers)), 2)
    alike = [(a, b) for a, b in pairs if table.layers[a] is table.layers[b]]
    assert alike
    assert all(problem.node_s[a] is problem.node_s[b] for a, b in alike)
    edges = list(table.edges.items())
    for ((i, j, _), e), ((k, m, _), f) in itertools.combinations(edges, 2):
        if e is f:
            assert problem.edge_s[i, j] is problem.edge_s[k, m]
