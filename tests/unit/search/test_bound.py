"""Lower bounds of the overlapped step: below every choice's chain, and below every simulated step."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.cost.simulate import simulated_step_s
from planner.cost.table import CostTable
from planner.cost.transfer import StepPricer
from planner.devices.library import cluster
from planner.devices.route import Router
from planner.ir.split import LayerId
from planner.search.auto import BUCKET_BYTES
from planner.search.dual import bound_chain
from planner.search.exhaustive import solve_exhaustively
from planner.search.formulate import formulate
from planner.search.problem import Chain, Problem
from support.tables import linear_table, residual_table

ROUNDING = 1 + 1e-9


@st.composite
def chains(draw: st.DrawFn) -> Problem:
    """A path or diamonds of up to five variables whose reductions hide on one or two levels."""
    count, levels = draw(st.integers(1, 5)), draw(st.integers(1, 2))
    sizes = [draw(st.integers(1, 3)) for _ in range(count)]
    pairs = [*itertools.pairwise(range(count))]
    if draw(st.booleans()):
        pairs += [(i, i + 2) for i in range(0, count - 2, 2)]
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    top = draw(st.sampled_from([2, 1000]))

    def seconds(*shape: int) -> np.ndarray:
        return rng.integers(0, top + 1, shape) / 8

    backward, update = ([seconds(n) for n in sizes] for _ in range(2))
    node = [seconds(n) + b + u for n, b, u in zip(sizes, backward, update, strict=True)]
    moved = {(i, j): seconds(sizes[i], sizes[j]) for i, j in pairs}
    edge = {(i, j): seconds(sizes[i], sizes[j]) + moved[i, j] for i, j in pairs}
    sync = tuple(seconds(levels, n) for n in sizes)
    order = tuple(reversed(range(count)))
    return Problem(tuple(node), edge, chain=Chain(order, tuple(backward), tuple(update), moved, sync))


@given(chains())
def test_a_bound_of_a_chain_is_below_its_optimum_and_not_below_that_without_reductions(problem: Problem) -> None:
    optimum = solve_exhaustively(problem)
    found = bound_chain(problem)
    assert found.lower_bound_s <= optimum.cost_s * ROUNDING
    assert found.lower_bound_s * ROUNDING >= solve_exhaustively(problem.additive()).cost_s
    for choice in found.choices:
        assert problem.cost_s(choice) * ROUNDING >= optimum.cost_s


def test_weights_between_two_sums_prove_more_than_either() -> None:
    """Fast with 8 s of reductions behind nothing, or slow with none: 10 s at best, but neither sum alone says so.

    Option 0 computes 2 s and reduces 8 s; option 1 computes 10 s. The compute chain alone is 2 s at least, and the sum
    with all reductions, 2 + 8 or 10 + 0, is 10 s for both, which is the optimum.
    """
    compute, sync = np.array([2.0, 10.0]), np.array([[8.0, 0.0]])
    nothing = np.zeros(2)
    chain = Chain((0,), (compute,), (nothing,), {}, (sync,))
    found = bound_chain(Problem((compute,), {}, chain=chain), evaluations=20)
    assert solve_exhaustively(Problem((compute,), {}, chain=chain)).cost_s == 10
    assert 8.5 < found.lower_bound_s <= 10


def tied(table: CostTable, *names: str) -> CostTable:
    """Return the table with these layers split alike."""
    return replace(table, space=replace(table.space, ties=(tuple(map(LayerId, names)),)))


TABLES = {
    "residual": lambda: residual_table(1),
    "two levels": lambda: residual_table(1, "2x4-t4-eth10"),
    "linear": lambda: linear_table((64, 4096, 4096, 16), "2x2-a100-ib400"),
    "slow links": lambda: linear_table((512, 512, 512), "4xk20-pcie"),
    # reductions of what backward reaches first hide behind the rest, though the first layer decides on them too
    "tied": lambda: tied(linear_table((4096, 4096, 4096, 4096, 4096), "2x2-a100-ib400"), "fc0", "fc3"),
}


@pytest.mark.parametrize("name", TABLES)
def test_no_simulated_step_is_shorter_than_the_bound(name: str) -> None:
    table: CostTable = TABLES[name]()
    formulation = formulate(table, objective="chain", least_of_bucket=max(BUCKET_BYTES))
    bound_s = bound_chain(formulation.problem).lower_bound_s
    problem = formulation.problem
    rng = np.random.default_rng(5)
    every = math.prod(problem.sizes)
    choices = itertools.product(*map(range, problem.sizes)) if every <= 500 else (
        tuple(int(rng.integers(n)) for n in problem.sizes) for _ in range(500)
    )  # fmt: skip
    shortest_s = math.inf
    for choice in choices:
        layers = formulation.layer_choice(choice)
        for bucket_bytes in BUCKET_BYTES:
            step_s = simulated_step_s(table, layers, bucket_bytes)
            shortest_s = min(shortest_s, step_s)
            assert problem.cost_s(choice) <= step_s * ROUNDING
    assert 0 < bound_s <= shortest_s * ROUNDING


@pytest.mark.parametrize("machine", ["4x8-h100-ib400", "8xk20-pcie", "16x1-t4-eth10", "16xhmc-torus"])
@pytest.mark.parametrize("most_bytes", [1e3, 1e6, 64e6])
def test_no_reduction_is_cheaper_for_its_bytes_than_the_least_rate(machine: str, most_bytes: float) -> None:
    graph = cluster(machine)
    pricer = StepPricer(Router(graph, graph.mesh()))
    rank = len(graph.mesh().axes)
    for axes in itertools.chain.from_iterable(itertools.combinations(range(rank), n) for n in range(1, rank + 1)):
        for num_bytes in np.geomspace(1, most_bytes, 60).astype(int).tolist():
            least_s = pricer.least_reduction_s(axes, num_bytes, most_bytes)
            assert 0 < least_s <= pricer.reduction(axes, num_bytes).seconds * ROUNDING
