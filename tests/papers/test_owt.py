"""One weird trick's schemes: every byte, by hand and against the layouts of our own all-gather."""

import pytest

from planner.cost.accounting import received_elements
from planner.ir.layout import BALANCED, Layout, Whole
from planner.ir.mesh import Mesh
from planner.ir.turns import Scheme
from planner.reproduce.owt import BATCH, SCHEMES, WORKERS, example_s, scheme_volumes
from planner.reproduce.owt_schemes import passes, volumes
from planner.reproduce.traced import layer_graph

FLOATS, FILTERS = 256 * 6 * 6, (64, 192, 384, 384, 256)
"""Activations of an image behind the last pool of the printed network, and its convolutions."""


@pytest.mark.parametrize(
    ("scheme", "handed"),
    [
        ("a", ((8, 8, 8, 8),)),
        ("b", ((8, 0, 0, 0), (0, 8, 0, 0), (0, 0, 8, 0), (0, 0, 0, 8))),
        ("c", ((2, 2, 2, 2),) * 4),
    ],
)
def test_who_sends_how_many_images_in_which_pass(scheme: Scheme, handed: tuple[tuple[int, ...], ...]) -> None:
    assert passes(scheme, 4, 8) == handed


@pytest.mark.parametrize(
    ("scheme", "peak", "in_turn", "once", "hidden"),
    [
        ("a", 3 * 8 * 10, 3 * 8 * 10, 8 * 10, 0),
        ("b", 3 * 8 * 10, 4 * 3 * 8 * 10, 4 * 8 * 10, 3 / 4),
        ("c", 3 * 2 * 10, 3 * 8 * 10, 8 * 10, 3 / 4),
    ],
)
def test_four_workers_with_eight_images_of_ten_bytes(
    scheme: Scheme, peak: float, in_turn: float, once: float, hidden: float
) -> None:
    found = volumes(scheme, 4, images=8, activation_bytes=10, weight_bytes=100)
    assert (found.peak, found.in_turn, found.in_turn_once, found.hidden) == (peak, in_turn, once, hidden)
    # 8 images to 3 others; an addend of the gradient of 24 images of others; 3 quarters of the weights, twice
    assert (found.sent, found.weights) == (2 * 3 * 8 * 10, 2 * 3 * 25)


def test_one_worker_sends_nothing_and_none_are_refused() -> None:
    for scheme in SCHEMES:
        found = volumes(scheme, 1, images=8, activation_bytes=10, weight_bytes=100)
        assert found == type(found)(0, 0, 0, 0, 0, 0)
    with pytest.raises(ValueError, match="at least one"):
        volumes("a", 0, images=8, activation_bytes=10, weight_bytes=100)


@pytest.mark.parametrize("workers", WORKERS)
def test_the_printed_network(workers: int) -> None:
    graph = layer_graph("alexnet-owt", BATCH)
    kernels, channels = (11, 5, 3, 3, 3), (3, *FILTERS[:-1])
    weights = sum(n * c * k * k + n for n, c, k in zip(FILTERS, channels, kernels, strict=True))
    for scheme in SCHEMES:
        found = scheme_volumes(graph, scheme, workers)
        assert found.sent == 2 * (workers - 1) * 128 * FLOATS * 4
        assert found.weights == pytest.approx(2 * (workers - 1) / workers * weights * 4, rel=1e-12)


@pytest.mark.parametrize("workers", [2, 4, 8])
def test_scheme_a_receives_what_our_layouts_gather(workers: int) -> None:
    mesh = Mesh.of(gpu=workers)
    cuts = (BALANCED, BALANCED)
    own = Layout((workers * BATCH, FLOATS), mesh, (0,), cuts)
    everything = Layout((workers * BATCH, FLOATS), mesh, (Whole.SHARED,), cuts)
    both_ways = received_elements(own, everything) + received_elements(everything.gradient, own.gradient)
    found = scheme_volumes(layer_graph("alexnet-owt", BATCH), "a", workers)
    assert workers * found.sent == 4 * both_ways


def test_the_example_of_one_product() -> None:
    product_s, transfer_s = example_s()
    assert product_s == pytest.approx(2 * 16_777_216 / 8 / 2e12) == pytest.approx(2.09e-6, rel=0.005)
    assert f"{transfer_s:.2e}" == "2.73e-06"
