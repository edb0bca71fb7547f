"""HyPar's levels against its worked examples, against formulas written out, and against every assignment there is."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.cost.table import CostTable
from planner.ir.dimension import Dimension
from planner.search.formulate import formulate
from planner.search.problem import Problem
from planner.search.published.hypar import DP, MP, Model, evaluate, hypar, hypar_choice, hypar_exhaustive, uniform
from planner.search.published.networks import Network, Node, chain, network_of, solve_decisions
from support.published import BATCH, HYPAR_DIMENSIONS, branched, linears, table

SIZE = st.integers(1, 1000)
CHAINS = st.lists(st.tuples(SIZE, SIZE), min_size=1, max_size=4)


def written_out(layers: list[tuple[int, int]], levels: tuple[tuple[int, ...], ...], model: Model) -> float:
    """The total of a chain on levels of two, from the docstring's formulas."""
    count, total = len(layers), 0.0
    b, k = [1] * count, [1] * count
    for h, level in enumerate(levels):
        pair = 0.0
        for i, (weights, outputs) in enumerate(layers):
            pair += weights / k[i] if level[i] == DP else outputs / b[i]
            if i + 1 < count:
                seen = outputs / (b[i + 1] * k[i + 1])
                if level[i] == DP and level[i + 1] == MP:
                    pair += seen / 4 + seen / 4
                elif level[i] == MP and model is Model.TABLE2:
                    pair += seen / 2
        total += 2**h * 2 * pair
        for i in range(count):
            b[i] *= 2 if level[i] == DP else 1
            k[i] *= 2 if level[i] == MP else 1
    return total


# The paper's own examples


@pytest.mark.parametrize(
    ("weights", "outputs", "data_bytes", "model_bytes"),
    [
        (70 * 100, 32 * 100, 56_000, 25_600),  # Fig. 1: batch 32, 70 -> 100
        (5 * 5 * 20 * 50, 32 * 8 * 8 * 50, 200_000, 819_200),  # 12 x 12 x 20 -> 8 x 8 x 50
    ],
)
def test_one_layer_moves_what_the_paper_says(weights: int, outputs: int, data_bytes: int, model_bytes: int) -> None:
    network = chain([(weights, outputs)])
    assert 4 * uniform(network, DP, (2,)).elements == data_bytes
    assert 4 * uniform(network, MP, (2,)).elements == model_bytes
    assert hypar(network, (2,)).levels == ((DP if data_bytes < model_bytes else MP,),)


def test_data_parallelism_on_16_moves_30_times_the_weights() -> None:
    network = chain([(700, 10), (300, 20)])
    assert uniform(network, DP).elements == 2 * (1 + 2 + 4 + 8) * 1000
    assert uniform(network, DP).by_level == (2000, 4000, 8000, 16000)


# Against formulas and enumeration


@given(CHAINS, st.data(), st.sampled_from(Model))
def test_any_plan_costs_what_the_formulas_say(layers: list[tuple[int, int]], data: st.DataObject, model: Model) -> None:
    levels = tuple(tuple(data.draw(st.integers(0, 1)) for _ in layers) for _ in range(3))
    assert evaluate(chain(layers), levels, (2, 2, 2), model).elements == pytest.approx(
        written_out(layers, levels, model), rel=1e-12
    )


@given(CHAINS, st.sampled_from(Model))
def test_each_level_is_the_best_for_what_the_ones_above_left(layers: list[tuple[int, int]], model: Model) -> None:
    plan = hypar(chain(layers), (2, 2, 2), model)
    for h in range(3):
        above = plan.levels[:h]
        reached = written_out(layers, plan.levels[: h + 1], model)
        for other in itertools.product((DP, MP), repeat=len(layers)):
            assert reached <= written_out(layers, (*above, other), model) * (1 + 1e-12)


@settings(max_examples=30)
@given(st.lists(st.tuples(SIZE, SIZE), min_size=1, max_size=3), st.sampled_from(Model))
def test_the_exhaustive_plan_is_the_least_of_all_assignments(layers: list[tuple[int, int]], model: Model) -> None:
    found = hypar_exhaustive(chain(layers), (2, 2, 2), model)
    level = list(itertools.product((DP, MP), repeat=len(layers)))
    least = min(written_out(layers, levels, model) for levels in itertools.product(level, repeat=3))
    assert found.elements == pytest.approx(least, rel=1e-12)
    assert found.elements == pytest.approx(written_out(layers, found.levels, model), rel=1e-12)
    assert found.elements <= hypar(chain(layers), (2, 2, 2), model).elements * (1 + 1e-12)


# Axes of more than two parts


@given(CHAINS, st.data())
def test_an_axis_of_four_is_two_levels_of_the_same_decisions(
    layers: list[tuple[int, int]], data: st.DataObject
) -> None:
    level = tuple(data.draw(st.integers(0, 1)) for _ in layers)
    network = chain(layers)
    assert evaluate(network, [level], (4,)).elements == pytest.approx(
        evaluate(network, [level, level], (2, 2)).elements, rel=1e-12
    )


def test_three_parts_reduce_two_copies_and_exchange_all_to_all() -> None:
    network = chain([(50, 60), (70, 80)])
    # 2 directions: two copies of 50 weights, two of 80 outputs; 60 in and as many gradients back, of which each part
    # has a third of the third that it wants
    found = evaluate(network, [(DP, MP)], (3,)).elements
    assert found == pytest.approx(2 * (2 * 50 + 2 * 80) + 2 * 60 * 2 / 3)


# Any layer graph


def test_a_join_is_cut_as_its_neighbours_are_or_recut() -> None:
    nodes = (Node("a", 10, 100), Node("b", 1000, 100), Node("sum", 0, 100), Node("c", 1000, 8))
    network = Network(nodes, ((0, 1, 100), (0, 2, 100), (1, 2, 100), (2, 3, 100)))
    # a samples, b and c channels: a to b 100/2, a to the sum 0 and the sum to c 100/2, or 100/2 and 0; in pairs
    assert evaluate(network, [(DP, MP, DP, MP)], (2,)).elements == 2 * (10 + 100 + 8 + 50 + 50)
    assert evaluate(network, [(DP, MP, MP, MP)], (2,)).elements == 2 * (10 + 100 + 8 + 50 + 50)
    assert evaluate(network, [(DP, DP, MP, DP)], (2,)).elements == 2 * (10 + 1000 + 1000 + 50 + 50 + 50)
    best = min(evaluate(network, [c], (2,)).elements for c in itertools.product((DP, MP), repeat=4))
    assert hypar(network, (2,)).elements == best


def test_nodes_that_are_tied_take_the_option_that_is_best_for_both() -> None:
    problem = Problem((np.array([10.0, 30.0]), np.array([50.0, 5.0])), {(0, 1): np.array([[0.0, 3.0], [3.0, 4.0]])})
    assert solve_decisions(problem, (0, 1), [(DP, MP)] * 2) == ((DP, MP), 10 + 5 + 3)
    assert solve_decisions(problem, (7, 7), [(DP, MP)] * 2) == ((MP, MP), 30 + 5 + 4)
    assert solve_decisions(problem, (0, 1), [(MP,), (DP,)]) == ((MP, DP), 30 + 50 + 3)


def test_pools_belong_to_the_layer_in_front_and_joins_stay() -> None:
    network, layer_of = network_of(branched())
    graph = branched()
    assert [graph.layers[i].id for i in layer_of] == ["stem", "left", "right", "sum", "cat", "last"]
    assert [node.weights for node in network.nodes] == [3 * 4 * 9, 4 * 4 * 9, 4 * 4 * 9, 0, 0, 8 * 4 * 9]
    tensor = BATCH * 4 * 4 * 4
    assert list(network.edges) == [
        (0, 1, tensor), (0, 2, tensor), (1, 3, tensor), (2, 3, tensor), (3, 4, tensor), (0, 4, tensor),
        (4, 5, 2 * tensor),
    ]  # fmt: skip
    assert [node.outputs for node in network.nodes] == [tensor] * 4 + [2 * tensor, tensor]


# As a solver


def chosen(found: CostTable) -> dict[str, tuple[Dimension, ...]]:
    return {k: split.dimensions for k, split in found.strategy(hypar_choice(found, formulate(found))).items()}


def test_the_solver_splits_as_the_numbers_say() -> None:
    graph = linears((64, 4, 256, 64, 8))
    plan = hypar(network_of(graph)[0], (2, 2))
    assert {d for level in plan.levels for d in level} == {DP, MP}
    splits = chosen(table(graph, (2, 2), *HYPAR_DIMENSIONS, Dimension.OUT_CHANNEL))
    for i in range(4):
        for axis, level in enumerate(plan.levels):
            dimension = splits[f"fc{i}"][axis]
            assert dimension is Dimension.SAMPLE if level[i] == DP else dimension in HYPAR_DIMENSIONS[1:]


def test_a_layer_replicates_where_neither_dimension_is_legal() -> None:
    graph = linears((3, 5, 64))  # 3 and 5 input channels do not divide by 4
    splits = chosen(table(graph, (4,), Dimension.IN_CHANNEL, Dimension.OUT_CHANNEL))
    assert splits["fc0"] == splits["fc1"] == (Dimension.REPLICATE,)


def test_without_input_channels_it_is_data_parallelism() -> None:
    splits = chosen(table(linears((64, 512, 512, 8)), (2, 2), Dimension.SAMPLE, Dimension.OUT_CHANNEL))
    assert {splits[f"fc{i}"] for i in range(3)} == {(Dimension.SAMPLE, Dimension.SAMPLE)}
