"""HyPar's ten plans and totals from layer shapes; performance and energy from the constants that are known of it.

``layerwise reproduce hypar`` prints all of it, also what does not agree.
"""

import math

import pytest

from planner.cost.model import CostModel, Settings
from planner.cost.table import CostTable
from planner.devices.library import cluster
from planner.ir.rules import default_io
from planner.profile.roofline import Roofline
from planner.profile.table import ProfileTable
from planner.reproduce import hypar as reproduced
from planner.reproduce.hypar_platform import (
    ENERGY_BYTES_PER_MAC,
    TIME_BYTES_PER_MAC,
    bytes_per_mac_of,
    gain,
)
from planner.reproduce.hypar_published import GMEAN_GB, NETWORKS
from planner.reproduce.hypar_simulated import Simulated, simulated
from planner.reproduce.traced import layer_graph
from planner.search.formulate import formulate
from planner.search.published.hypar import DP, MP, Model, hypar, hypar_choice, hypar_exhaustive, uniform
from planner.search.published.networks import network_of
from planner.space.enumerate import enumerate_splits
from support.published import HYPAR_DIMENSIONS

FOUND = {found.published.title: found for found in reproduced.computed()}
TABLE2_GB = {
    "SFC": 0.773, "Lenet-c": 0.0176, "Cifar-c": 0.0138, "AlexNet": 0.303, "VGG-A": 1.525, "VGG-B": 1.547,
    "VGG-C": 1.618, "VGG-D": 2.184, "VGG-E": 2.821,
}  # fmt: skip
"""By an implementation of its own of the printed factors, with which no total of Fig. 8 but SCONV's follows."""


def gb(elements: float) -> float:
    return 4 * elements / 1e9


def to_three_digits(value: float) -> str:
    return f"{value:.2e}"


@pytest.mark.parametrize("title", FOUND)
def test_the_plan_is_that_of_fig_5(title: str) -> None:
    assert reproduced.plan_text(FOUND[title].plan) == FOUND[title].published.plan


@pytest.mark.parametrize(
    "title",
    [
        pytest.param(t, marks=pytest.mark.xfail(reason="1.99496, 344 weights short of 2.00")) if t == "AlexNet" else t
        for t in FOUND
    ],
)
def test_data_parallelism_moves_what_fig_8_says(title: str) -> None:
    found = FOUND[title]
    weights = sum(node.weights for node in found.network.nodes)
    assert found.data_bytes == 2 * (1 + 2 + 4 + 8) * 4 * weights
    assert to_three_digits(found.data_bytes / 1e9) == to_three_digits(found.published.data_gb)


@pytest.mark.parametrize(
    "title",
    [
        pytest.param(t, marks=pytest.mark.xfail(reason="the label is a slip for 1.49")) if t == "VGG-B" else t
        for t in FOUND
    ],
)
def test_the_plan_moves_what_fig_8_says(title: str) -> None:
    assert to_three_digits(FOUND[title].hypar_bytes / 1e9) == to_three_digits(FOUND[title].published.hypar_gb)


def test_the_mean_of_fig_8_tells_the_slip_of_vgg_b() -> None:
    _, data, plan = GMEAN_GB
    ours = [found.hypar_bytes / 1e9 for found in FOUND.values()]
    printed = [found.published.hypar_gb for found in FOUND.values()]
    assert to_three_digits(reproduced.gmean(ours)) == to_three_digits(plan)
    assert to_three_digits(reproduced.gmean(printed)) != to_three_digits(plan)
    assert to_three_digits(reproduced.gmean([f.data_bytes / 1e9 for f in FOUND.values()])) == to_three_digits(data)


@pytest.mark.parametrize("title", TABLE2_GB)
def test_table_2_as_printed_gives_other_totals(title: str) -> None:
    found = hypar(FOUND[title].network, model=Model.TABLE2)
    assert gb(found.elements) == pytest.approx(TABLE2_GB[title], abs=10 ** -_places(TABLE2_GB[title]))
    assert gb(found.elements) > 1.015 * gb(FOUND[title].plan.elements)


def _places(value: float) -> int:
    return len(str(value).partition(".")[2])


@pytest.mark.parametrize("title", ["SFC", "SCONV", "Lenet-c"])
def test_best_level_by_level_is_best_of_all(title: str) -> None:
    network = FOUND[title].network
    assert hypar_exhaustive(network, (2, 2, 2, 2)).elements == hypar(network).elements


@pytest.mark.parametrize("title", ["SFC", "AlexNet", "VGG-E"])
def test_model_parallelism_is_not_what_the_bars_say(title: str) -> None:
    ours = gb(uniform(FOUND[title].network, MP).elements)
    assert abs(ours / FOUND[title].published.model_gb - 1) > 0.04


# Performance and energy


def test_the_known_constants_as_one_number() -> None:
    """A second computes 16 x 84 billion operations, six of them a multiply-add's, or moves 25.6 Gbit."""
    assert pytest.approx(6 / (16 * 84e9) * 25.6e9 / 8) == TIME_BYTES_PER_MAC
    assert pytest.approx(3 * 4.6 / (2 * 640) * 4) == ENERGY_BYTES_PER_MAC


def test_the_gain_is_of_compute_and_communication_together() -> None:
    assert gain(100, 50, 10, 2.0) == 250 / 210
    assert bytes_per_mac_of(250 / 210, 100, 50, 10) == pytest.approx(2.0)


FIG_6 = 0.03


@pytest.mark.parametrize(
    "title",
    [
        pytest.param(t, marks=pytest.mark.xfail(reason="needs 5.2 times the compute of these layers"))
        if t == "AlexNet"
        else t
        for t in FOUND
    ],
)
def test_one_ratio_from_vgg_a_gives_fig_6(title: str) -> None:
    calibrated, found = FOUND["VGG-A"], FOUND[title]
    ratio = bytes_per_mac_of(4.97, calibrated.macs, calibrated.data_bytes, calibrated.hypar_bytes)
    ours = gain(found.macs, found.data_bytes, found.hypar_bytes, ratio)
    assert ours == pytest.approx(found.published.performance[1], rel=FIG_6)


def test_multiply_adds_of_vgg_d_are_the_well_known_ones() -> None:
    assert FOUND["VGG-D"].macs / 256 == pytest.approx(15.47e9, rel=1e-3)
    assert FOUND["SFC"].macs / 256 == 140_722_176


def test_rank_correlation_is_one_for_one_order_and_less_for_another() -> None:
    assert reproduced.rank_correlation([1, 2, 3], [10, 50, 60]) == pytest.approx(1)
    assert reproduced.rank_correlation([1, 2, 3], [60, 50, 10]) == pytest.approx(-1)
    assert reproduced.rank_correlation([1, 2, 3, 4], [1, 2, 4, 3]) == pytest.approx(1 - 6 * 2 / (4 * 15))


# On our own spaces and simulator


@pytest.mark.parametrize("title", ["SFC", "Lenet-c", "VGG-A"])
def test_the_solver_finds_the_published_plan_on_the_papers_machine(title: str) -> None:
    found = FOUND[title]
    graph, machine = layer_graph(found.published.model, 256), cluster("16xhmc-htree")
    mesh = next(mesh for mesh in machine.meshes() if mesh.shape == (2, 2, 2, 2))
    space = enumerate_splits(graph, mesh, default_io(256, 16), HYPAR_DIMENSIONS)
    profile = ProfileTable("hmc", Roofline.of_data_sheet(84e9, 320e9))
    table = CostTable.of(space, CostModel.of(graph, machine, mesh, profile, Settings()))
    splits = table.strategy(hypar_choice(table, formulate(table)))
    _, layer_of = network_of(graph)
    levels = [
        "".join(str(DP if splits[graph.layers[i].id].dimensions[axis] is HYPAR_DIMENSIONS[0] else MP) for i in layer_of)
        for axis in range(4)
    ]
    assert " ".join(levels) == found.published.plan


@pytest.mark.slow
def test_our_simulator_gains_less_on_the_torus_than_on_the_tree() -> None:
    models = [published.model for published in NETWORKS if published.title in {"SFC", "Lenet-c", "AlexNet", "VGG-A"}]
    trees, tori = ([simulated(model, 256, f"16xhmc-{kind}").gain for model in models] for kind in ("htree", "torus"))
    assert 1 < reproduced.gmean(tori) < reproduced.gmean(trees)


def test_the_command_computes_every_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reproduced, "simulated", lambda *_: Simulated(data_s=2.0, hypar_s=1.0))  # another test's
    parts = dict(reproduced.reproduce().parts)
    assert len(parts) == 11
    assert all(figures for figures in parts.values())
    assert all(f.is_equal for f in parts["Fig. 5: plans, levels H1 to H4, 0 data and 1 model parallelism"])
    numbers = [figure.ours for figures in parts.values() for figure in figures if not isinstance(figure.ours, str)]
    assert all(value is not None and math.isfinite(value) for value in numbers)
