import itertools
import math
from collections import Counter

import networkx
import pytest

from planner.devices import Cluster, Device, Level, Link, PathCost, Router, cluster
from planner.ir.mesh import Mesh

GB = 1e9


def device(index: int) -> Device:
    return Device(f"gpu{index}", "x", 2**30, {"fp32": 1e12}, 1e11)


def flat(num: int, links: list[Link], switches: tuple[str, ...] = ()) -> Cluster:
    levels = (Level("gpu", num),)
    return Cluster("flat", tuple(map(device, range(num))), switches, tuple(links), levels)


def router(name: str, mesh: str = "") -> Router:
    machine = cluster(name)
    return Router(machine, machine.parse_mesh(mesh) if mesh else machine.mesh())


def test_a_ring_on_one_switch_has_every_link_to_itself() -> None:
    # 2 links of 1 us; each link carries one flow out and one in, and it is full duplex
    assert router("8xa100-nvlink").ring((0,)) == PathCost(2e-6, 300 * GB)


def test_eight_rings_through_one_card_get_an_eighth_each() -> None:
    # 12.5 GB/s / 8 rings; NVLink, InfiniBand, InfiniBand, NVLink: 1 + 2.5 + 2.5 + 1 us
    cost = router("4x8-a100-ib100").ring((0,))
    assert cost.bandwidth_bytes_per_s == 12.5 * GB / 8
    assert cost.latency_s == pytest.approx(7e-6)


def test_one_ring_over_all_ranks_crosses_each_card_once() -> None:
    assert router("4x8-a100-ib100").ring((0, 1)).bandwidth_bytes_per_s == 12.5 * GB


def test_a_card_per_device_is_not_shared() -> None:
    assert router("4x8-h100-ib400").ring((0,)) == PathCost(5e-6, 50 * GB)


def test_inside_a_node_the_network_is_not_used() -> None:
    assert router("2x8-t4-ib400").ring((1,)).bandwidth_bytes_per_s == 12 * GB


def test_k20s_get_half_when_all_talk_across_the_two_switches() -> None:
    # 4 rings of 2 over an uplink of 12 GB/s: 3 GB/s each, half of 6; inside a switch all of it
    across = router("8xk20-pcie", "gpu=2x4")
    assert across.ring((0,)).bandwidth_bytes_per_s == 3 * GB
    assert across.ring((1,)).bandwidth_bytes_per_s == 6 * GB
    assert across.ring((0,)).latency_s == pytest.approx(4e-6)


def test_half_duplex_links_share_both_directions() -> None:
    wires = [Link("gpu0", "gpu1", "wire", 1e-6, 4 * GB, "half")]
    half = Router(flat(2, wires), Mesh.of(gpu=2))
    assert half.ring((0,)).bandwidth_bytes_per_s == 2 * GB  # there and back
    assert half.alltoall((0,)) == (1e-6, 1 / (2 * GB))


def test_all_to_all_on_one_switch_is_limited_by_a_device_link() -> None:
    # a rank's m bytes leave over its own link of 300 GB/s
    latency_s, seconds_per_byte = router("8xa100-nvlink").alltoall((0,))
    assert latency_s == 2e-6
    assert seconds_per_byte == pytest.approx(1 / (300 * GB))


def test_all_to_all_between_nodes_is_limited_by_the_card() -> None:
    # 8 ranks of a node send 24 / 31 of their m bytes out over 12.5 GB/s
    latency_s, seconds_per_byte = router("4x8-a100-ib100").alltoall((0, 1))
    assert latency_s == pytest.approx(7e-6)
    assert seconds_per_byte == pytest.approx(8 * 24 / 31 / (12.5 * GB))


def test_all_to_all_of_k20s_is_limited_by_the_uplink() -> None:
    # 4 x 4 pairs out of a switch, each m / 7 bytes, over 12 GB/s: more than m over 6 GB/s
    assert router("8xk20-pcie").alltoall((0,))[1] == pytest.approx(16 / 7 / (12 * GB))


def test_all_groups_of_an_all_to_all_share_the_links() -> None:
    # 8 groups of 4, one rank of each in a node: 8 m bytes over 12.5 GB/s
    assert router("4x8-a100-ib100").alltoall((0,))[1] == pytest.approx(8 / (12.5 * GB))


@pytest.mark.parametrize("axes", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("name", ["4x8-a100-ib100", "3x5-k20-eth10"])
def test_counting_cuts_equals_listing_every_route(name: str, axes: tuple[int, ...]) -> None:
    graph = cluster(name)
    mesh = graph.mesh()
    paths = dict(networkx.all_pairs_dijkstra_path(graph.nx()))
    flows: Counter[tuple[str, str]] = Counter()
    worst_s = 0.0
    for group in mesh.groups(axes):
        for src, dst in itertools.permutations(group, 2):
            hops = list(itertools.pairwise(paths[graph.devices[src].id][graph.devices[dst].id]))
            flows.update(hops)
            worst_s = max(worst_s, sum(graph.nx().edges[hop]["link"].latency_s for hop in hops))
    others = len(mesh.groups(axes)[0]) - 1
    slowest = max(count / graph.nx().edges[hop]["link"].bandwidth_bytes_per_s for hop, count in flows.items())
    assert Router(graph, mesh).alltoall(axes) == pytest.approx((worst_s, slowest / others))


def test_a_machine_that_is_no_tree_takes_the_route_of_least_latency() -> None:
    # a square with one slow side: gpu3 reaches gpu0 over gpu2 and gpu1, 3 us instead of 10
    sides = [Link(f"gpu{i}", f"gpu{(i + 1) % 4}", "wire", 1e-6, GB) for i in range(3)]
    square = Router(flat(4, [*sides, Link("gpu3", "gpu0", "slow", 10e-6, GB)]), Mesh.of(gpu=4))
    assert square.ring((0,)).latency_s == pytest.approx(3e-6)
    assert square.ring((0,)).bandwidth_bytes_per_s == GB
    # 2 x 2 ordered pairs over the middle link in each direction, m / 3 bytes each
    assert square.alltoall((0,)) == pytest.approx((3e-6, 4 / 3 / GB))


def test_equal_latencies_go_to_fewer_links() -> None:
    switch = [Link(f"gpu{i}", "hub", "free", 0, 100 * GB) for i in range(3)]
    direct = Link("gpu0", "gpu1", "direct", 0, GB)
    graph = flat(3, [*switch, direct], ("hub",))
    assert Router(graph, Mesh.of(gpu=3)).ring((0,)).bandwidth_bytes_per_s == GB


def test_the_ranks_of_a_mesh_say_which_devices_talk() -> None:
    # ranks 0 and 4 sit on different switches, 0 and 1 on one
    graph = cluster("8xk20-pcie")
    near, far = Mesh.of(gpu=2), Mesh(Mesh.of(gpu=2).axes, (0, 4))
    assert Router(graph, near).ring((0,)).latency_s == pytest.approx(2e-6)
    assert Router(graph, far).ring((0,)).latency_s == pytest.approx(4e-6)


def test_a_group_of_one_costs_nothing() -> None:
    alone = router("1xa100-nvlink")
    assert alone.ring(()) == PathCost(0.0, math.inf)
    assert alone.alltoall(()) == (0.0, 0.0)
