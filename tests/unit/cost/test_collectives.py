"""Arithmetic spelled out, bounds, and the order of things; the simulator is in ``examples/benchmarks``."""

import itertools
import math
from collections import Counter

import networkx
import pytest

from planner.cost.collectives import (
    MAX_CHUNKS,
    Library,
    all_gather_s,
    all_reduce_s,
    binomial_broadcast_s,
    broadcast_s,
    exchange_s,
    halo_s,
    halving_doubling_all_reduce_s,
    hierarchical_all_reduce_s,
    library_of,
    point_to_point_s,
    reduce_scatter_s,
    ring_all_gather_s,
    ring_all_reduce_s,
    tree_all_reduce_s,
    tree_chunks,
)
from planner.cost.patterns import double_tree, flip, fold, spread, tree_parent
from planner.devices import Cluster, Device, Level, Link, PathCost, Router, cluster

MB = 2**20
NAMES = ("8xa100-nvlink", "8xk20-pcie", "8xk80-qpi", "4x4-p100-ib100", "4x8-h100-ib400", "16xhmc-torus", "16xhmc-htree")


def star(size: int, latency_s: float = 1.0, rate: float = 8.0, duplex: str = "full") -> Router:
    """Ranks on one switch; a message pays two links."""
    devices = tuple(Device(f"gpu{i}", "x", 2**30, {"fp32": 1e12}, 1e11) for i in range(size))
    links = tuple(Link(device.id, "hub", "wire", latency_s / 2, rate, duplex) for device in devices)  # type: ignore[arg-type]
    graph = Cluster("star", devices, ("hub",), links, (Level("gpu", size),))
    return Router(graph, graph.mesh())


def whole(name: str) -> tuple[Router, tuple[int, ...]]:
    graph = cluster(name)
    return Router(graph, graph.mesh()), tuple(range(len(graph.mesh().axes)))


def test_rings_take_p_minus_1_rounds_of_a_piece() -> None:
    path = PathCost(2.0, 10.0)
    assert ring_all_gather_s(400.0, 4, path) == 3 * (2 + 100 / 10)
    assert ring_all_reduce_s(400.0, 4, path) == 6 * (2 + 100 / 10)
    assert all_gather_s(star(4), (0,), 64) == reduce_scatter_s(star(4), (0,), 64) == 3 * (1 + 16 / 8)


def test_a_ring_on_half_duplex_links_takes_twice_as_long_for_its_bytes() -> None:
    # in and out of a rank share its link
    assert all_reduce_s(star(4, duplex="half"), (0,), 64, Library.GLOO) == 6 * (1 + 16 / 4)


def test_halving_and_doubling_takes_2_log_p_rounds() -> None:
    # 8 ranks: 32, 16 and 8 bytes there, and back
    assert halving_doubling_all_reduce_s(star(8), (0,), 64) == 2 * (3 * 1 + (32 + 16 + 8) / 8)


def test_ranks_that_are_no_power_of_two_fold_first() -> None:
    # of 6 ranks two hand 64 bytes over and get them back; four take 2 (2 + (32 + 16) / 8)
    assert halving_doubling_all_reduce_s(star(6), (0,), 64) == 2 * (1 + 64 / 8) + 2 * (2 + (32 + 16) / 8)
    assert list(fold(6)) == [(0, 1), (2, 3)]
    assert list(flip(6, 0)) == [(1, 3), (3, 1), (4, 5), (5, 4)]
    assert list(flip(6, 1)) == [(1, 4), (3, 5), (4, 1), (5, 3)]


def test_a_double_tree_is_filled_and_then_limited_by_its_links() -> None:
    # 4 ranks, trees 1 -> 2, 3 -> 2, 2 -> 0 and 2 -> 1, 0 -> 1, 1 -> 3 of 32 bytes each. The lowest ranks share
    # their parent's link of 8 bytes/s, in round(sqrt(64 / 4 + 64 / 8)) = 5 chunks of 6.4 bytes. Into rank 2 come
    # its children's and its parent's of one tree, and its parent's of the other: 4 x 32 bytes in the steady state.
    router = star(4)
    steady = 4 * 32 / 8
    assert tree_chunks(router, (0,), 64) == 5
    first, second = 1 + 6.4 / 4, 1 + 6.4 / 8
    assert tree_all_reduce_s(router, (0,), 64) == pytest.approx(2 * (first + second) - first + max(5 * first, steady))


def test_a_double_tree_of_two_ranks_is_an_exchange() -> None:
    # each tree is one edge, 32 bytes up and 32 down: 64 each way, in round(sqrt(64 / 8)) = 3 chunks, one to fill
    router = star(2)
    assert tree_chunks(router, (0,), 64) == 3
    assert tree_all_reduce_s(router, (0,), 64) == pytest.approx((1 + 32 / 3 / 8) + 64 / 8)
    # a byte: one chunk up and one down
    assert tree_all_reduce_s(router, (0,), 1) == pytest.approx(2 * (1 + 1 / 2 / 8))


@pytest.mark.parametrize("size", [*range(2, 18), 31, 32, 33])
def test_both_trees_join_all_ranks_and_inner_ranks_differ(size: int) -> None:
    pairs = Counter(double_tree(size))
    first = {(rank, tree_parent(rank, size)) for rank in range(1, size)}
    second = Counter(pairs) - Counter([*first, *((b, a) for a, b in first)])
    assert pairs == Counter((b, a) for a, b in pairs.elements())
    edges = [{(min(pair), max(pair)) for pair in half} for half in (first, second)]
    inner = []
    for tree in edges:
        graph: networkx.Graph[int] = networkx.Graph(list(tree))
        assert networkx.is_tree(graph)
        assert len(graph) == size
        assert max(dict(graph.degree).values()) <= 3
        inner.append({rank for rank, degree in graph.degree if degree == 3})
    assert not inner[0] & inner[1]
    depths = networkx.single_source_shortest_path_length(networkx.Graph(list(first)), 0)
    assert max(depths.values()) == math.ceil(math.log2(size))  # the heights that are summed
    assert all(tree_parent(rank, size) < size for rank in range(1, size))


def test_without_latency_there_are_as_many_chunks_as_there_may_be() -> None:
    assert tree_chunks(star(8, 0.0), (0,), 1e6) == MAX_CHUNKS
    assert tree_chunks(star(8, 0.0), (0,), 3) == 3
    assert tree_chunks(star(8), (0,), 0) == 1


def test_level_by_level_sends_an_eighth_of_the_buffer_through_each_card() -> None:
    # 4 nodes of 8 GPUs on 12.5 GB/s cards, m bytes: in the node 7 rounds there and 7 back of m / 8 over
    # 80 GB/s; between nodes 8 rings at once through one card, 6 rounds of m / 8 / 4 over 12.5 / 8 GB/s
    router, axes = whole("4x8-p100-ib100")
    inside = 2 * 7 * (2e-6 + MB / 8 / 80e9)
    between = 6 * (7e-6 + MB / 32 / (12.5e9 / 8))
    found = hierarchical_all_reduce_s(router, axes, 1, MB, Library.GLOO)
    assert found == pytest.approx(inside + between)


def test_with_a_card_for_each_device_level_by_level_uses_all_of_them() -> None:
    # large buffers: one ring has one card in and one out of a node, level by level has eight
    router, axes = whole("4x8-h100-ib400")
    ring = all_reduce_s(router, axes, 1e9, Library.GLOO)
    inside, between = 2 * 7 / 8 * 1e9 / 450e9, 2 * 3 / 4 * 1e9 / 8 / 50e9
    assert ring == pytest.approx(2 * 31 / 32 * 1e9 / 50e9, rel=0.01)
    assert all_reduce_s(router, axes, 1e9) == pytest.approx(inside + between, rel=0.02)
    gather = all_gather_s(router, axes, 1e9)
    assert gather == pytest.approx((inside + between) / 2, rel=0.02)
    assert reduce_scatter_s(router, axes, 1e9) == gather
    assert all_gather_s(router, axes, 1e9, Library.GLOO) == pytest.approx(ring / 2)


def test_an_exchange_is_limited_by_the_most_loaded_link() -> None:
    # a rank's 56 bytes leave over its link
    assert exchange_s(star(8), (0,), 56) == pytest.approx(1 + 56 / 8)
    # 4 x 4 of the 8 x 7 pairs cross from switch to switch, m / 7 bytes each, over 12 GB/s; 4 links
    router, axes = whole("8xk20-pcie")
    assert exchange_s(router, axes, 7e9) == pytest.approx(4e-6 + 16 * 1e9 / 12e9)


def test_a_halo_goes_to_both_neighbours_at_once() -> None:
    assert halo_s(star(2), (0,), 16) == 1 + 16 / 8
    assert halo_s(star(4), (0,), 16) == 1 + 2 * 16 / 8  # an inner rank sends two over one link
    assert halo_s(star(4, duplex="half"), (0,), 16) == 1 + 4 * 16 / 8


def test_a_broadcast_takes_the_cheaper_of_a_tree_and_scatter_with_all_gather() -> None:
    # 8 ranks: 3 rounds of everything; or 1/2, 1/4, 1/8 of it, then 7 rounds of 1/8
    def scattered(size: float) -> float:
        return 3 * 1 + (size / 2 + size / 4 + size / 8) / 8 + 7 * (1 + size / 8 / 8)

    router = star(8)
    assert broadcast_s(router, (0,), 8) == binomial_broadcast_s(router, (0,), 8) == 3 * (1 + 8 / 8) < scattered(8)
    assert broadcast_s(router, (0,), 800) == pytest.approx(scattered(800))
    assert scattered(800) < binomial_broadcast_s(router, (0,), 800) == 3 * (1 + 800 / 8)


@pytest.mark.parametrize("size", range(2, 20))
def test_a_binomial_tree_reaches_everybody_once(size: int) -> None:
    have = {0}
    for k in reversed(range((size - 1).bit_length())):
        pairs = list(spread(size, 2**k))
        assert {src for src, _ in pairs} <= have
        assert not {dst for _, dst in pairs} & have
        have |= {dst for _, dst in pairs}
    assert have == set(range(size))


def test_messages_that_share_a_link_share_its_bandwidth() -> None:
    # two GPUs of one switch to two of the other socket: 12 GB/s for both; one alone has it all
    router, _ = whole("8xk80-qpi")
    assert point_to_point_s(router, [(0, 4)], 12e9) == pytest.approx(5e-6 + 1)
    assert point_to_point_s(router, [(0, 4), (1, 5)], 12e9) == pytest.approx(5e-6 + 2)
    assert point_to_point_s(router, [(0, 4), (2, 6)], 12e9) == pytest.approx(5e-6 + 1)
    assert point_to_point_s(router, [(3, 3)], 12e9) == 0


def test_a_library_has_its_own_algorithms() -> None:
    assert library_of(cluster("2x2-cpu-eth1")) is Library.GLOO
    assert library_of(cluster("4x4-p100-ib100")) is Library.NCCL
    router = star(8)
    ring, tree, halving = 14 * (1 + 1 / 8 / 8), tree_all_reduce_s(router, (0,), 1), 2 * (3 * 1 + 7 / 8 / 8)
    assert tree < ring
    assert all_reduce_s(router, (0,), 1, Library.GLOO) == ring
    assert all_reduce_s(router, (0,), 1, Library.NCCL) == all_reduce_s(router, (0,), 1) == tree
    assert all_reduce_s(router, (0,), 1, Library.MPI) == halving


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_bytes", [1, 2**10, MB, 2**30])
def test_an_all_reduce_takes_the_cheapest_way(name: str, num_bytes: int) -> None:
    router, axes = whole(name)
    size = len(router.mesh.ranks)
    ring = ring_all_reduce_s(num_bytes, size, router.ring(axes))
    ways = [ring, tree_all_reduce_s(router, axes, num_bytes)]
    ways += [hierarchical_all_reduce_s(router, axes, cut, num_bytes, Library.NCCL) for cut in range(1, len(axes))]
    assert all_reduce_s(router, axes, num_bytes) == pytest.approx(min(ways))
    assert all_reduce_s(router, axes[::-1], num_bytes, Library.GLOO) == pytest.approx(ring)
    halving = halving_doubling_all_reduce_s(router, axes, num_bytes)
    assert all_reduce_s(router, axes, num_bytes, Library.MPI) == pytest.approx(min(ring, halving))


COLLECTIVES = {
    "all_reduce": all_reduce_s,
    "tree": tree_all_reduce_s,
    "halving": halving_doubling_all_reduce_s,
    "all_gather": all_gather_s,
    "exchange": exchange_s,
    "halo": halo_s,
    "broadcast": broadcast_s,
}


@pytest.mark.parametrize("collective", COLLECTIVES.values(), ids=COLLECTIVES)
@pytest.mark.parametrize("name", NAMES)
def test_more_bytes_never_take_less_time(name: str, collective: object) -> None:
    router, axes = whole(name)
    sizes = [2**k for k in range(0, 30, 2)]
    seconds = [collective(router, axes, size) for size in sizes]  # type: ignore[operator]
    assert seconds == sorted(seconds)


@pytest.mark.parametrize("num_bytes", [1, 1000, MB])
@pytest.mark.parametrize("name", ["all_reduce", "tree", "all_gather", "broadcast"])
def test_more_ranks_on_a_switch_never_take_less_time(name: str, num_bytes: int) -> None:
    # not so for halving, where 3 ranks fold and 4 do not, nor for pieces that get smaller
    seconds = [COLLECTIVES[name](star(size, 1e-3, 1e6), (0,), num_bytes) for size in (2, 4, 8, 16, 32)]
    assert seconds == sorted(seconds)


def _cut_bytes_per_s(graph: Cluster, inside: set[str]) -> float:
    """The most that can leave a set of devices: the smallest cut of the machine that separates it."""
    flow: networkx.DiGraph[str] = networkx.DiGraph()
    for link in graph.links:
        for a, b in ((link.a, link.b), (link.b, link.a)):
            flow.add_edge(a, b, capacity=link.bandwidth_bytes_per_s)
    for device in graph.devices:
        if device.id in inside:
            flow.add_edge("source", device.id)
        else:
            flow.add_edge(device.id, "sink")
    return float(networkx.maximum_flow_value(flow, "source", "sink"))


@pytest.mark.parametrize("name", NAMES)
def test_nothing_beats_the_bandwidth_of_a_cut(name: str) -> None:
    graph = cluster(name)
    router, axes = whole(name)
    everyone = [device.id for device in graph.devices]
    size = len(everyone)
    for start, length in itertools.product(range(0, size, 2), (1, 2, 4, size // 2)):
        inside = {everyone[(start + i) % size] for i in range(length)}
        rate = _cut_bytes_per_s(graph, inside)
        # the ranks inside need the sum of the others, and all of the others' pieces of a gather; both of
        # these count what must enter, full duplex
        assert all_reduce_s(router, axes, MB) >= MB / rate
        assert halving_doubling_all_reduce_s(router, axes, MB) >= MB / rate
        assert all_gather_s(router, axes, MB) >= MB * (size - length) / size / rate
        assert exchange_s(router, axes, MB) >= MB * length * (size - length) / (size - 1) / rate
    slowest = max(MB / _cut_bytes_per_s(graph, {one}) for one in everyone)
    for all_reduce in (all_reduce_s, tree_all_reduce_s, halving_doubling_all_reduce_s):
        assert all_reduce(router, axes, MB) >= 2 * (size - 1) / size * slowest  # [Patarasuk09], theorem 1


@pytest.mark.parametrize("name", ["16xhmc-torus", "4x4-p100-ib100"])
def test_groups_cost_the_same_whoever_is_first(name: str) -> None:
    # both machines look the same from every device; relabelled by one node or row, prices stay
    graph = cluster(name)
    turned = Cluster("turned", graph.devices[4:] + graph.devices[:4], graph.switches, graph.links[::-1], graph.levels)
    for axes in ((0,), (1,), (0, 1)):
        for collective in COLLECTIVES.values():
            one, other = (collective(Router(g, g.mesh()), axes, MB) for g in (graph, turned))
            assert one == pytest.approx(other)


def test_rows_and_columns_of_a_square_torus_cost_the_same() -> None:
    router, _ = whole("16xhmc-torus")
    for collective in COLLECTIVES.values():
        assert collective(router, (0,), MB) == pytest.approx(collective(router, (1,), MB))


@pytest.mark.parametrize("collective", COLLECTIVES.values(), ids=COLLECTIVES)
def test_nobody_to_talk_to_takes_no_time(collective: object) -> None:
    router, _ = whole("1xa100-nvlink")
    assert collective(router, (), MB) == 0  # type: ignore[operator]
