"""SoyBean's cuts against its conversion table, against sums by hand, and against every choice of tilings."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.ir.dimension import Dimension
from planner.search.formulate import formulate
from planner.search.published.hypar import hypar
from planner.search.published.networks import Network, Node, chain, network_of
from planner.search.published.soybean import (
    ALL_FORMS,
    DIMENSIONS,
    MATCHED,
    STORED,
    Form,
    Tiling,
    conversion,
    factors,
    recursive_cost,
    soybean,
    soybean_choice,
)
from support.published import HYPAR_DIMENSIONS, branched, linears, table

C0, C1, REP, RED = Tiling
SAMPLE, OUT, IN, WHOLE = Form
SIZE = st.integers(1, 1000)
PUBLISHED = {
    (C0, C0): 0.0, (C0, C1): 0.5, (C0, REP): 1.0, (C1, C0): 0.5, (C1, C1): 0.0, (C1, REP): 1.0,
    (REP, C0): 0.0, (REP, C1): 0.0, (REP, REP): 0.0, (RED, C0): 1.0, (RED, C1): 1.0, (RED, REP): 2.0,
}  # fmt: skip
FORWARD = {SAMPLE: (C0, REP, C0), OUT: (REP, C0, C1), IN: (C1, C1, RED)}  # x, w, y
BACKWARD = {SAMPLE: (C0, C0, RED, REP, C0), OUT: (C1, REP, C0, C0, RED), IN: (REP, C1, C1, C1, C1)}  # dy, x, dw, w, dx


def test_conversions_of_two_halves_are_the_published_ones() -> None:
    assert {pair: conversion(*pair) for pair in PUBLISHED} == PUBLISHED


@pytest.mark.parametrize("k", [2, 3, 5])
def test_conversions_of_k_parts_count_what_each_part_lacks(k: int) -> None:
    """On a tensor of k x k pieces: every part holds k of them; addends are full tensors."""
    pieces, each = k * k, k
    assert conversion(C0, REP, k) * pieces == k * (pieces - each)
    assert conversion(C0, C1, k) * pieces == k * (each - 1)  # of the pieces it wants it holds one
    assert conversion(RED, C1, k) * pieces == k * each * (k - 1)  # k - 1 addends of each piece that it wants
    assert conversion(RED, REP, k) == conversion(RED, C0, k) + conversion(C0, REP, k)


@pytest.mark.parametrize("layers", [[(700, 40)], [(700, 40), (30, 50), (90, 8)]])
def test_data_parallelism_moves_twice_the_weights_in_each_cut(layers: list[tuple[int, int]]) -> None:
    weights = sum(w for w, _ in layers)
    assert list(soybean(chain(layers), (2, 2, 2), [(SAMPLE, SAMPLE)]).by_cut) == [2 * weights] * 3
    assert soybean(chain(layers), (2, 2, 2), [(SAMPLE, SAMPLE)]).elements == 2 * weights * (1 + 2 + 4)
    assert soybean(chain(layers), (3,), [(SAMPLE, SAMPLE)]).elements == 2 * weights * 2


def test_a_split_of_the_reduction_moves_twice_the_outputs_in_each_cut() -> None:
    found = soybean(chain([(700, 40), (30, 50)]), (2, 2), [(IN, IN)])
    assert list(found.by_cut) == [2 * (40 + 50)] * 2
    assert found.elements == 2 * (40 + 50) * (1 + 2)


def test_a_split_of_the_output_channels_gathers_what_it_reads() -> None:
    """The input of the model is there; the second layer gathers 40 elements and reduces their gradients."""
    found = soybean(chain([(700, 40), (30, 50)]), (2, 2), [(OUT, OUT)])
    assert list(found.by_cut) == [2 * 40] * 2
    assert found.elements == 2 * 40 * 3  # an all-gather among 4, and a reduce-scatter


def test_output_then_input_channels_need_one_reduction() -> None:
    found = soybean(chain([(10_000, 4000), (10_000, 50)]), (2,))
    assert [forward for forward, _ in found.cuts[0]] == [OUT, IN]
    assert found.elements == 2 * 50


def by_enumeration(layers: list[tuple[int, int]], forms: list[Form]) -> float:
    """One cut of a chain: every form, and every stored tiling of weights, outputs and gradients."""
    count, best = len(layers), float("inf")
    stored = list(itertools.product(STORED, repeat=2))
    for chosen in itertools.product(forms, repeat=count):
        for tilings in itertools.product(stored, repeat=count):
            if tilings[-1][0] is not tilings[-1][1]:
                continue  # the loss is where the output lies
            total = 0.0
            for i, (weights, outputs) in enumerate(layers):
                (x, w, y), (dy, _, dw, _, dx) = FORWARD[chosen[i]], BACKWARD[chosen[i]]
                total += weights * min(PUBLISHED[t, w] + PUBLISHED[dw, t] for t in STORED)
                total += outputs * (PUBLISHED[y, tilings[i][0]] + PUBLISHED[tilings[i][1], dy])
                if i:
                    total += layers[i - 1][1] * (PUBLISHED[tilings[i - 1][0], x] + PUBLISHED[dx, tilings[i - 1][1]])
            best = min(best, total)
    return best


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(SIZE, SIZE), min_size=1, max_size=2),
    st.sampled_from([[SAMPLE, IN], [SAMPLE, OUT], [SAMPLE, OUT, IN]]),
)
def test_one_cut_is_the_least_over_all_forms_and_tilings(layers: list[tuple[int, int]], forms: list[Form]) -> None:
    found = soybean(chain(layers), (2,), [(f, f) for f in forms])
    assert found.elements == pytest.approx(by_enumeration(layers, forms), rel=1e-12)


@given(st.lists(st.tuples(SIZE, SIZE), min_size=1, max_size=4))
def test_with_samples_and_input_channels_alone_a_cut_is_a_level_of_hypar(layers: list[tuple[int, int]]) -> None:
    found = soybean(chain(layers), (2,), [(SAMPLE, SAMPLE), (IN, IN)])
    assert found.elements == pytest.approx(hypar(chain(layers), (2,)).elements, rel=1e-12)


@given(st.lists(st.tuples(SIZE, SIZE), min_size=1, max_size=4))
def test_more_forms_never_cost_more_in_one_cut(layers: list[tuple[int, int]]) -> None:
    network = chain(layers)
    costs = [soybean(network, (2,), forms).elements for forms in (((SAMPLE, SAMPLE),), MATCHED, ALL_FORMS)]
    assert costs[0] >= costs[1] >= costs[2]


def test_the_recursion_counts_each_cut_for_every_group() -> None:
    assert recursive_cost((100.0, 10.0, 1.0), (2, 2, 2)) == 100 + 2 * (10 + 2 * 1)
    assert recursive_cost((100.0, 10.0), (3, 2)) == 100 + 3 * 10


@pytest.mark.parametrize(("devices", "cuts"), [(1, ()), (8, (2, 2, 2)), (6, (3, 2)), (12, (3, 2, 2)), (7, (7,))])
def test_other_numbers_of_devices_are_cut_by_their_factors_largest_first(devices: int, cuts: tuple[int, ...]) -> None:
    assert factors(devices) == cuts


def test_a_form_that_does_not_divide_is_not_taken() -> None:
    layer = Node("conv", weights=1000, outputs=10, sizes=(16, 3, 5))  # reducing 10 would be cheap, but 3 is odd
    network = Network((layer,), ())
    assert soybean(network, (2,)).cuts == (((SAMPLE, SAMPLE),),)
    assert soybean(network, (2,), divide=False).cuts[0] != ((SAMPLE, SAMPLE),)
    whole = Network((Node("conv", 1000, 10, (3, 3, 5)),), ())
    found = soybean(whole, (2,))
    assert (found.cuts, found.elements) == ((((WHOLE, WHOLE),),), 0.0)


def test_what_is_divided_by_one_cut_is_not_there_for_the_next() -> None:
    layer = Node("fc", weights=1000, outputs=10, sizes=(2, 2, 2))
    forms = [cut[0] for cut in soybean(Network((layer,), ()), (2, 2, 2, 2), MATCHED).cuts]
    assert sorted(forms) == [(SAMPLE, SAMPLE), (OUT, OUT), (IN, IN), (WHOLE, WHOLE)]


def test_a_join_moves_what_its_tensors_need_to_meet() -> None:
    """Two layers by samples meet for nothing; where one is by channels, its result is reduced into samples."""
    nodes = (Node("a", 10, 100), Node("b", 5000, 100), Node("sum", 0, 100), Node("c", 10, 100))
    network = Network(nodes, ((0, 1, 100), (0, 2, 100), (1, 2, 100), (2, 3, 100)))
    found = soybean(network, (2,), [(SAMPLE, SAMPLE), (IN, IN)])
    assert [forward for forward, _ in found.cuts[0]] == [SAMPLE, IN, WHOLE, SAMPLE]
    # a and c: 2 weights; b: its input and the gradient of that change their cut, its sum and the gather of its gradient
    assert found.elements == 2 * 10 + 2 * 10 + 2 * 50 + 2 * 100


# As a solver


def test_the_solver_splits_as_the_numbers_say() -> None:
    graph = linears((64, 128, 256, 64, 8))
    plan = soybean(network_of(graph)[0], (2, 2), MATCHED, divide=False)
    found = table(graph, (2, 2), *HYPAR_DIMENSIONS, Dimension.OUT_CHANNEL)
    splits = found.strategy(soybean_choice(found, formulate(found)))
    assert len({form for cut in plan.cuts for form, _ in cut}) > 1
    for i in range(4):
        for axis, cut in enumerate(plan.cuts):
            assert splits[graph.layers[i + 1].id].dimensions[axis] in DIMENSIONS[cut[i][0]]


def test_the_solver_takes_joins_and_leaves_what_is_illegal() -> None:
    graph = branched()
    found = table(graph, (4,), Dimension.OUT_CHANNEL)
    splits = found.strategy(soybean_choice(found, formulate(found)))
    assert {splits[graph[i].id].dimensions for i in graph.index if graph[i].params} == {(Dimension.OUT_CHANNEL,)}
