"""SoyBean's conversion table, its recursion, and HyPar as its special case; see ``layerwise reproduce soybean``."""

import pytest

from planner.reproduce import hypar as hypar_figures
from planner.reproduce.soybean import BATCH, NETWORKS, counted, reproduce
from planner.reproduce.traced import layer_graph
from planner.search.published.hypar import DP, MP, hypar
from planner.search.published.networks import network_of
from planner.search.published.soybean import MATCHED, STORED, Form, Tiling, conversion, soybean

HYPAR_FORMS = {(Form.SAMPLE, Form.SAMPLE): DP, (Form.IN, Form.IN): MP}
FOUND = {found.published.title: found for found in hypar_figures.computed()}


@pytest.mark.parametrize("source", Tiling)
@pytest.mark.parametrize("target", STORED)
def test_a_conversion_moves_what_our_layouts_count(source: Tiling, target: Tiling) -> None:
    assert conversion(source, target) == counted(source, target)


@pytest.mark.parametrize("title", FOUND)
def test_with_samples_and_input_channels_alone_it_is_hypar(title: str) -> None:
    network = FOUND[title].network
    found, published = soybean(network, (2, 2, 2, 2), HYPAR_FORMS, divide=False), FOUND[title].plan
    assert [tuple(HYPAR_FORMS[forms] for forms in cut) for cut in found.cuts] == list(published.levels)
    assert found.elements == published.elements


@pytest.mark.parametrize("title", FOUND)
def test_data_parallelism_is_hypars(title: str) -> None:
    found = soybean(FOUND[title].network, (2, 2, 2, 2), [(Form.SAMPLE, Form.SAMPLE)])
    assert 4 * found.elements == FOUND[title].data_bytes


@pytest.mark.parametrize("name", NETWORKS)
def test_three_cuts_cost_the_first_and_twice_the_other_two(name: str) -> None:
    network, _ = network_of(layer_graph(NETWORKS[name], BATCH))
    first, second, third = soybean(network, (2, 2, 2), MATCHED).by_cut
    assert soybean(network, (2, 2, 2), MATCHED).elements == first + 2 * (second + 2 * third)
    assert first <= 2 * second <= 4 * third  # [Tofu19]: what all groups of a cut move never falls


@pytest.mark.parametrize("name", NETWORKS)
def test_cuts_of_all_three_kinds_move_less_than_hypar_and_data_parallelism(name: str) -> None:
    network, _ = network_of(layer_graph(NETWORKS[name], BATCH))
    found, data = soybean(network, (2, 2, 2)), soybean(network, (2, 2, 2), [(Form.SAMPLE, Form.SAMPLE)])
    assert found.elements < hypar(network, (2, 2, 2)).elements < data.elements / 4


def test_the_command_agrees_with_the_table_of_the_code() -> None:
    conversions = reproduce().parts[0][1]
    assert len(conversions) == 7
    assert all(figure.is_equal and not figure.remark for figure in conversions)
