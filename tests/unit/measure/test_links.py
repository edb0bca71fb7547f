"""Latency and bandwidth from times, and the machine that is made of them."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.cost.collectives import ring_all_reduce_s
from planner.cost.transfer import StepPricer
from planner.devices import Router, cluster, device_kinds
from planner.devices.measured import CollectiveKind, CollectivePoint, MeasuredCollective
from planner.measure.links import fit_alpha_beta, link_between, measured_graph

SIZES = (2**6, 2**12, 2**18, 2**24)


def ring(
    kind: CollectiveKind, levels: tuple[str, ...], ranks: int, alpha: float, bandwidth: float
) -> MeasuredCollective:
    """Times of a ring, written out per kind."""

    def seconds(m: float) -> float:
        match kind:
            case CollectiveKind.ALL_REDUCE:
                return 2 * (ranks - 1) * (alpha + m / ranks / bandwidth)
            case CollectiveKind.ALL_TO_ALL:
                return (ranks - 1) * alpha + m / bandwidth
            case _:
                return (ranks - 1) * (alpha + m / ranks / bandwidth)

    return MeasuredCollective(kind, levels, tuple(CollectivePoint(m, seconds(m), seconds(m), 0.0) for m in SIZES))


@given(
    st.sampled_from(list(CollectiveKind)), st.integers(2, 16),
    st.floats(1e-6, 1e-3), st.floats(1e7, 1e11),
)  # fmt: skip
def test_the_fit_finds_what_the_times_were_made_of(
    kind: CollectiveKind, ranks: int, alpha: float, bandwidth: float
) -> None:
    fit = fit_alpha_beta(ring(kind, ("gpu",), ranks, alpha, bandwidth), ranks)
    assert fit.latency_s == pytest.approx(alpha, rel=1e-6)
    assert fit.bandwidth_bytes_per_s == pytest.approx(bandwidth, rel=1e-6)
    assert fit.worst_error < 1e-6


def test_one_slow_size_shows_as_the_worst_error() -> None:
    exact = ring(CollectiveKind.ALL_REDUCE, ("gpu",), 4, 1e-5, 1e9)
    slow = dataclasses.replace(exact.points[1], seconds=2 * exact.points[1].seconds)
    points = (exact.points[0], slow, *exact.points[2:])
    assert 0.2 < fit_alpha_beta(dataclasses.replace(exact, points=points), 4).worst_error < 0.6


def test_the_machine_explains_the_times_it_was_made_of() -> None:
    """2 nodes of 4: 1 GB/s for each of the 4 rings between the nodes, 10 GB/s inside."""
    collectives = [
        ring(CollectiveKind.ALL_REDUCE, ("node",), 2, 30e-6, 1e9),
        ring(CollectiveKind.ALL_REDUCE, ("gpu",), 4, 2e-6, 10e9),
    ]
    graph = measured_graph("lab", 2, 4, device_kinds()["h200"], collectives)
    links = Router(dataclasses.replace(graph, collectives=()), graph.mesh())
    for measured, size, axes in zip(collectives, (2, 4), ((0,), (1,)), strict=True):
        for point in measured.points:
            assert ring_all_reduce_s(point.num_bytes, size, links.ring(axes)) == pytest.approx(point.seconds, rel=0.05)


def test_a_link_needs_an_all_reduce_over_its_level() -> None:
    with pytest.raises(ValueError, match="node"):
        link_between([ring(CollectiveKind.ALL_GATHER, ("node",), 2, 1e-5, 1e9)], "node", 2)


def test_whole_levels_take_the_measured_times_and_their_factors_the_links() -> None:
    measured = ring(CollectiveKind.ALL_REDUCE, ("gpu",), 4, 1.0, 1e9)
    graph = dataclasses.replace(cluster("2x4-a100-ib100"), collectives=(measured,))
    whole = StepPricer(Router(graph, graph.mesh()))
    factors = StepPricer(Router(graph, graph.parse_mesh("node=2,gpu=2x2")))
    num_bytes = 2**18
    assert whole.all_reduce((1,), num_bytes).seconds == pytest.approx(2 * 3 * (1.0 + num_bytes / 4 / 1e9))
    assert factors.all_reduce((1, 2), num_bytes).seconds == whole.all_reduce((1,), num_bytes).seconds
    assert whole.reduction((1,), num_bytes).seconds == whole.all_reduce((1,), num_bytes).seconds
    for pricer, axes in ((factors, (1,)), (factors, (2,)), (factors, (0, 1, 2)), (whole, (0,))):
        assert pricer.all_reduce(axes, num_bytes).seconds < 1.0


def test_factors_of_a_level_lose_in_proportion_to_it() -> None:
    """The whole level takes twice as long behind computation, which loses as much as it takes alone."""
    alone = ring(CollectiveKind.ALL_REDUCE, ("gpu",), 4, 1e-5, 1e9)
    points = tuple(CollectivePoint(p.num_bytes, p.seconds, 2 * p.seconds, p.seconds) for p in alone.points)
    graph = dataclasses.replace(cluster("4xa100-nvlink"), collectives=(dataclasses.replace(alone, points=points),))
    found = StepPricer(Router(graph, graph.parse_mesh("gpu=2x2"))).reduction((0,), 2**18)
    assert found.loaded_s == pytest.approx(2 * found.seconds)
    assert found.lost_s == pytest.approx(found.seconds)


def test_one_rank_on_each_node_has_no_bus_in_the_way() -> None:
    measured = ring(CollectiveKind.ALL_REDUCE, ("node",), 2, 5e-6, 12e9)
    graph = measured_graph("lab", 2, 1, device_kinds()["h200"], [measured])
    links = Router(dataclasses.replace(graph, collectives=()), graph.mesh())
    for point in measured.points:
        assert ring_all_reduce_s(point.num_bytes, 2, links.ring((0,))) == pytest.approx(point.seconds, rel=0.05)


def test_levels_are_bits() -> None:
    graph = cluster("2x4-a100-ib100")
    pricer = StepPricer(Router(graph, graph.parse_mesh("node=2,gpu=2x2")))
    found = {axes: pricer.levels(axes) for axes in ((0,), (1,), (2,), (1, 2), (0, 2))}
    assert found == {(0,): 1, (1,): 2, (2,): 2, (1, 2): 2, (0, 2): 3}
    assert math.prod(graph.mesh().shape) == 8
