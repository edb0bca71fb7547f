"""PipeDream's partitions and what is printed of pipelines elsewhere; see ``layerwise reproduce pipedream``."""

import pytest

from planner.devices.files import profiles_path
from planner.profile.pipedream import MeasuredLayer, read_pipedream
from planner.reproduce import pipelines
from planner.reproduce.pipedream import PUBLISHED, RELEASED, by_level, flat
from planner.reproduce.pipelines import TABLE_5, TABLE_9
from planner.search.published.pipedream import SyncTerm

PRINTED = SyncTerm.PRINTED
CLUSTER_A, CLUSTER_B = "4 x 4, 10 Gb/s", "2 x 8, 25 Gb/s"


def layers(network: str) -> tuple[MeasuredLayer, ...]:
    return read_pipedream(profiles_path() / "pipedream" / f"{network}.txt").layers


@pytest.mark.parametrize(
    ("name", "devices", "rate", "text", "bottleneck_s"),
    [
        ("VGG-16", 16, 10, "15-1", 82.2e-3),
        ("VGG-16", 16, 25, "15-1", 42.3e-3),
        ("VGG-16", 4, 10, "3-1", 171.4e-3),
        ("AlexNet", 4, 10, "3-1", 25.4e-3),
        ("AlexNet", 16, 10, "15-1", 15.1e-3),
    ],
)
def test_the_printed_formula_on_one_level(name: str, devices: int, rate: float, text: str, bottleneck_s: float) -> None:
    found = flat(name, devices, rate, PRINTED)
    assert found.text == text
    assert found.bottleneck_s == pytest.approx(bottleneck_s, rel=2e-3)
    assert found.in_flight == 2  # 16 over 15 replicas, 4 over 3, rounded up


def test_vgg_on_16_is_cut_in_front_of_its_last_three_convolutions() -> None:
    network = layers("vgg16")
    found = flat("VGG-16", 16, 10, PRINTED)
    cut = found.stages[1].start
    assert [x.description.split("(")[0] for x in network[cut:]].count("Conv2d") == 3
    # the slowest thing is the 51 MB in front of that cut, there and back at 1.25 GB/s
    assert found.bottleneck_s == pytest.approx(2 * network[cut - 1].output_bytes / 1.25e9)
    assert network[cut - 1].output_bytes == 128 * 512 * 14 * 14 * 4


def test_level_by_level_all_convolutions_are_on_three_servers() -> None:
    found = by_level("VGG-16", CLUSTER_A)
    assert found.stages[0].replicas == 12
    assert sum(stage.replicas for stage in found.stages[1:]) == 4
    assert found.bottleneck_s == pytest.approx(62.8e-3, rel=1e-3)
    behind = layers("vgg16")[found.stages[1].start :]
    assert not [x for x in behind if x.description.startswith("Conv2d")]
    assert [x.description[:6] for x in behind].count("Linear") == 3


def test_level_by_level_on_two_servers() -> None:
    found = by_level("VGG-16", CLUSTER_B)
    assert found.text == "8-6-2"
    assert found.bottleneck_s == pytest.approx(65.8e-3, rel=1e-3)


@pytest.mark.parametrize(("name", "devices"), RELEASED)
def test_the_released_planner(name: str, devices: int) -> None:
    text, speed_up = RELEASED[name, devices]
    found = flat(name, devices, 10, SyncTerm.RELEASED)
    assert found.text == text
    assert f"{found.speed_up:.2f}" == f"{speed_up:.2f}"


def test_resnet50_stays_data_parallel_on_the_faster_cluster_only() -> None:
    assert PUBLISHED["ResNet-50", CLUSTER_A][0] == PUBLISHED["ResNet-50", CLUSTER_B][0] == "16"
    assert by_level("ResNet-50", CLUSTER_B).text == "16"
    assert by_level("ResNet-50", CLUSTER_A).speed_up > 1.6
    assert flat("ResNet-50", 16, 10, PRINTED).speed_up > 1.8
    chain = flat("ResNet-50", 16, 10, PRINTED, chain=True)
    assert (chain.text, round(chain.bottleneck_s * 1e3, 1)) == ("13-2-1", 41.1)


@pytest.mark.parametrize("partitions", [1, 2, 3, 8])
@pytest.mark.parametrize("microbatches", [1, 4, 32])
def test_gpipes_bubble_is_what_the_simulated_schedule_leaves_idle(partitions: int, microbatches: int) -> None:
    expected = (partitions - 1) / (microbatches + partitions - 1)
    assert pipelines.bubble(partitions, microbatches) == pytest.approx(expected)


def test_more_partitions_gain_less_than_the_bubbles_limit() -> None:
    for m, printed in pipelines.GPIPE.items():
        if m == 1:
            continue  # there the limit says that partitions gain nothing
        limits = [pipelines.throughput_limit(k, m) for k in pipelines.PARTITIONS]
        assert printed[1] / printed[0] < limits[1] / limits[0]
        assert all(measured < limit for measured, limit in zip(printed, limits, strict=True))


@pytest.mark.parametrize("name", TABLE_5)
def test_hybrids_pipelined_about_half_of_their_iterations(name: str) -> None:
    run = TABLE_5[name]
    assert 0.48 < run.share < 0.5
    assert run.halved_s == pytest.approx((run.plain_s + run.pipelined_s) / 2)
    assert run.halved_s == pytest.approx(run.hybrid_s, rel=0.01)


@pytest.mark.parametrize("name", TABLE_9)
def test_a_stash_of_four_copies_is_the_difference_of_the_memory_columns(name: str) -> None:
    row = TABLE_9[name]
    difference = 100 * 4 * row.weights / (row.activations * row.batch + row.weights)
    assert abs(difference - (row.pipedream - row.stale)) < 1  # both columns are rounded


@pytest.mark.parametrize("name", [name for name, row in TABLE_9.items() if row.network])
def test_the_activations_of_the_memory_table_are_results_and_gradients_of_modules(name: str) -> None:
    row = TABLE_9[name]
    found = pipelines.shares_of(row)
    assert round(found.module_mib, 2) == row.activations
    pipedream, stale = pipelines.added(row, found)
    assert 0 < stale < pipedream  # the direction
    if name != "VGG-16, ImageNet":
        assert stale == pytest.approx(row.stale, rel=0.1)


def test_vggs_printed_memory_is_that_of_a_cut_behind_its_sixth_convolution() -> None:
    row = TABLE_9["VGG-16, ImageNet"]
    _, printed = pipelines.added(row, pipelines.shares("vgg16", pipelines.SIXTH, element_wise=True))
    assert round(printed) == row.stale
