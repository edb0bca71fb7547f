"""Every topology: what is linked to what, which levels it has, and routes against brute force."""

import itertools
import json
import math
from collections import Counter, defaultdict

import networkx
import pytest

from planner.devices import (
    BusKind,
    Cluster,
    Link,
    NetworkKind,
    Router,
    bus_kinds,
    cluster,
    device_kinds,
    network_kinds,
    two_level,
)
from planner.devices.route import neighbours, ring
from planner.devices.schema import FatTree, LinkKindsFile, Topology, Torus
from planner.errors import FormatError, UsageError
from planner.ir.canonical import decode

GB = 1e9
LEAVES = FatTree(kind="fat_tree", per_switch=4, spines=2, uplink_bandwidth_bytes_per_s=1.25 * GB)


def fat_tree(nodes: int = 16, devices: int = 1, card_per: str = "node") -> Cluster:
    """Leaves of 4 cards of 1.25 GB/s, 2 spines: 5 GB/s below a leaf and 2.5 GB/s above."""
    network = network_kinds()["eth10"].model_copy(update={"topology": LEAVES, "card_per": card_per})
    return two_level("leaves", nodes, devices, device_kinds()["t4"], bus_kinds()["pcie3"], network)


def bus(topology: Topology) -> BusKind:
    return bus_kinds()["shm"].model_copy(update={"topology": topology})


def json_bytes(content: object) -> bytes:
    return json.dumps(content).encode()


def torus(size: int) -> Cluster:
    return two_level("torus", 1, size, device_kinds()["hmc"], bus_kinds()["torus"])


def shape(graph: Cluster) -> dict[str, int]:
    return {level.name: level.size for level in graph.levels}


MACHINES = {
    "two sockets": cluster("8xk80-qpi"),
    "torus": torus(16),
    "torus of 2 x 4": torus(8),
    "a ring": torus(5),
    "H-tree": cluster("16xhmc-htree"),
    "fat tree": fat_tree(),
    "fat tree of nodes": fat_tree(8, 2),
    "nodes on one switch": cluster("3x5-k20-eth10"),
}


def test_two_gpus_are_behind_each_pcie_switch_and_two_switches_on_each_socket() -> None:
    graph = cluster("8xk80-qpi")
    joined = graph.nx()
    assert shape(graph) == {"socket": 2, "gpu": 4}
    assert sorted(joined["switch0-0"]) == ["gpu0", "gpu1", "switch-socket0"]
    assert sorted(joined["switch-socket1"]) == ["switch-socket0", "switch1-0", "switch1-1"]
    assert joined.edges["switch-socket0", "switch-socket1"]["link"].bandwidth_bytes_per_s == 38.4 * GB
    # a ring over all 8 crosses every link once each way; 4 pairs across share two uplinks
    router = Router(graph, graph.mesh())
    assert router.ring((0, 1)).bandwidth_bytes_per_s == 12 * GB
    assert router.ring((0,)).bandwidth_bytes_per_s == 6 * GB
    assert router.ring((0,)).latency_s == pytest.approx(5e-6)


@pytest.mark.parametrize(("size", "sockets"), [(1, 1), (2, 2), (3, 2), (4, 2), (6, 2), (16, 2)])
def test_devices_spread_evenly_over_the_sockets(size: int, sockets: int) -> None:
    graph = cluster(f"{size}xk80-qpi")
    assert sum("socket" in switch for switch in graph.switches) == sockets
    assert shape(graph) == ({"socket": 2, "gpu": size // 2} if size % 2 == 0 and size > 2 else {"gpu": size})


def test_a_card_hangs_on_the_first_socket() -> None:
    graph = two_level("x", 2, 4, device_kinds()["k80"], bus_kinds()["qpi"], network_kinds()["ib100"])
    assert sorted(graph.nx()["network"]) == ["node0.switch-socket0", "node1.switch-socket0"]
    assert shape(graph) == {"node": 2, "socket": 2, "gpu": 2}


def test_every_device_of_a_torus_has_four_neighbours() -> None:
    graph = torus(16)
    assert shape(graph) == {"row": 4, "gpu": 4}
    assert {degree for _, degree in graph.nx().degree} == {4}
    assert sorted(graph.nx()["gpu0"]) == ["gpu1", "gpu12", "gpu3", "gpu4"]
    assert len(graph.links) == 32
    assert shape(torus(8)) == {"row": 2, "gpu": 4}
    assert len(torus(8).links) == 8 + 4  # the columns of two have one link each
    assert shape(torus(5)) == {"gpu": 5}
    assert len(torus(5).links) == 5
    assert torus(1).links == ()
    assert len(torus(2).links) == 1


def test_a_torus_has_its_textbook_bisection() -> None:
    # n x n, both rings cut twice: 2 n links each way; an exchange sends (p / 2)^2 of the p (p - 1) pieces each way
    graph = torus(16)
    _, seconds_per_byte = Router(graph, graph.mesh()).alltoall((0, 1))
    at_least = 8 * 8 / 15 / (2 * 4 * 0.2 * GB)
    assert seconds_per_byte == pytest.approx(at_least)


def test_rows_of_a_torus_are_rings_of_their_own() -> None:
    graph = torus(16)
    router = Router(graph, graph.mesh())
    for axis in (0, 1):
        assert router.ring((axis,)).bandwidth_bytes_per_s == 0.2 * GB
        assert router.ring((axis,)).latency_s == pytest.approx(1e-7)


def test_the_links_of_an_h_tree_double_and_their_number_halves() -> None:
    graph = cluster("16xhmc-htree")
    assert shape(graph) == {"branch": 4, "gpu": 4}
    counts = Counter(link.bandwidth_bytes_per_s for link in graph.links)
    assert counts == {0.2 * GB: 16, 0.4 * GB: 8, 0.8 * GB: 4, 1.6 * GB: 2}
    assert {rate * count * 8 for rate, count in counts.items()} == {25.6e9}  # HyPar's total
    assert [axis.size for axis in graph.parse_mesh("branch=2x2,gpu=2x2").axes] == [2, 2, 2, 2]
    assert shape(cluster("4xhmc-htree")) == {"gpu": 4}
    assert cluster("1xhmc-htree").links == ()
    # all pairs of the two halves at once: 8 over a link of 8 x the rate
    halves = Router(graph, graph.parse_mesh("branch=2x2,gpu=4"))
    assert halves.ring((0,)).bandwidth_bytes_per_s == 0.2 * GB


def test_an_h_tree_joins_a_power_of_two() -> None:
    with pytest.raises(UsageError, match="'htree' is an H-tree: it joins a power of two, not 12 devices"):
        cluster("12xhmc-htree")


def test_every_leaf_of_a_fat_tree_is_linked_to_every_spine() -> None:
    graph = fat_tree()
    assert shape(graph) == {"leaf": 4, "node": 4, "gpu": 1}
    assert sorted(graph.nx()["network-spine0"]) == ["network0", "network1", "network2", "network3"]
    assert sorted(graph.nx()["network1"])[:2] == ["network-spine0", "network-spine1"]
    assert len(graph.links) == 16 + 16 + 4 * 2  # a GPU on a bus, a card, and uplinks
    assert shape(fat_tree(18)) == {"node": 18, "gpu": 1}  # leaves of 4, 4, 4, 4 and 2
    assert fat_tree(4).switches[0] == "network"  # one leaf needs no spine


def test_groups_between_leaves_get_what_oversubscription_leaves() -> None:
    router = Router(fat_tree(), fat_tree().mesh())
    # 4 rings leave each leaf over 2 x 1.25 GB/s; inside a leaf, and for one ring, the card is the limit
    assert router.ring((0,)).bandwidth_bytes_per_s == 2.5 / 4 * GB
    assert router.ring((1,)).bandwidth_bytes_per_s == 1.25 * GB
    assert router.ring((0, 1)).bandwidth_bytes_per_s == 1.25 * GB
    # 4 x 12 pieces of m / 15 leave a leaf
    assert router.alltoall((0, 1))[1] == pytest.approx(4 * 12 / 15 / (2.5 * GB))
    assert router.ring((0,)).latency_s == pytest.approx(2 * 1e-6 + 4 * 15e-6)


def test_leaves_of_cards_are_levels_where_they_hold_whole_nodes() -> None:
    assert shape(fat_tree(8, 2, "device")) == {"leaf": 4, "node": 2, "gpu": 2}
    assert shape(fat_tree(4, 8, "device")) == {"node": 4, "gpu": 8}  # 8 leaves, two for each node
    assert shape(cluster("36x4-p100-fat100")) == {"leaf": 2, "node": 18, "gpu": 4}
    assert shape(cluster("96x1-t4-clos10")) == {"leaf": 2, "node": 48, "gpu": 1}


def test_a_torus_has_no_switch_for_a_card() -> None:
    device, network = device_kinds()["hmc"], network_kinds()
    with pytest.raises(UsageError, match=r"'eth10' has one card for a node, .* there is none"):
        two_level("x", 2, 16, device, bus_kinds()["torus"], network["eth10"])
    assert shape(two_level("x", 2, 16, device, bus_kinds()["torus"], network["ib400"])) == {
        "node": 2, "row": 4, "gpu": 4,
    }  # fmt: skip


@pytest.mark.parametrize("kind", [*bus_kinds().values(), *network_kinds().values()], ids=lambda kind: kind.name)
def test_every_kind_joins_eight(kind: BusKind | NetworkKind) -> None:
    device, usual = device_kinds()["t4"], bus_kinds()["pcie3"]
    if isinstance(kind, NetworkKind):
        graph = two_level("x", 8, 2, device, usual, kind)
    else:
        graph = two_level("x", 1, 8, device, kind)
    assert math.prod(shape(graph).values()) == len(graph.devices)
    assert kind.name in {link.kind for link in graph.links}


def test_a_topology_that_is_not_known_is_refused_with_its_path() -> None:
    entry = bus_kinds()["torus"].model_dump() | {"topology": {"kind": "torsu"}}
    with pytest.raises(FormatError, match=r"\$.buses\[0\].topology.*torus"):
        decode(LinkKindsFile, json_bytes({"schema_version": 1, "buses": [entry], "networks": []}), "kinds")
    entry |= {"topology": {"kind": "torus", "rows": 4}}
    with pytest.raises(FormatError, match="rows"):
        decode(LinkKindsFile, json_bytes({"schema_version": 1, "buses": [entry], "networks": []}), "kinds")


def brute_force(graph: Cluster, pairs: list[tuple[str, str]]) -> dict[tuple[str, str], float]:
    """Loads by walking every shortest path that networkx lists, split evenly at every branch."""
    joined = graph.nx()
    loads: dict[tuple[str, str], float] = defaultdict(float)
    for src, dst in pairs:
        branches: dict[str, set[str]] = defaultdict(set)
        for path in networkx.all_shortest_paths(joined, src, dst, weight="weight"):
            for a, b in itertools.pairwise(path):
                branches[a].add(b)

        def walk(node: str, amount: float, dst: str = dst, branches: dict[str, set[str]] = branches) -> None:
            for far in branches[node] if node != dst else ():
                loads[node, far] += amount / len(branches[node])
                walk(far, amount / len(branches[node]))

        walk(src, 1.0)
    return loads


@pytest.mark.parametrize("graph", MACHINES.values(), ids=MACHINES)
def test_routes_equal_brute_force_over_all_shortest_paths(graph: Cluster) -> None:
    ids = [device.id for device in graph.devices]
    pairs = list(itertools.permutations(ids, 2))
    expected = pytest.approx(brute_force(graph, pairs))
    assert graph.paths.loads(dict.fromkeys(pairs, 1.0)) == expected
    assert graph.paths.pair_loads([ids]) == expected
    listed: dict[tuple[str, str], float] = defaultdict(float)
    for src, dst in pairs:
        ways = graph.paths.ways(src, dst)
        assert sum(share for share, _ in ways) == pytest.approx(1)
        for share, hops in ways:
            assert [hops[0][0], hops[-1][1]] == [src, dst]
            assert all(a[1] == b[0] for a, b in itertools.pairwise(hops))
            for hop in hops:
                listed[hop] += share
    assert listed == expected


@pytest.mark.parametrize("graph", MACHINES.values(), ids=MACHINES)
def test_latencies_equal_those_of_networkx(graph: Cluster) -> None:
    ids = [device.id for device in graph.devices]
    joined: networkx.Graph[str] = networkx.Graph()
    for link in graph.links:
        joined.add_edge(link.a, link.b, weight=link.latency_s)
    far = {pair: networkx.dijkstra_path_length(joined, *pair) for pair in itertools.permutations(ids, 2)}
    for pair, latency_s in far.items():
        assert graph.paths.latency_s(*pair) == pytest.approx(latency_s)
    assert graph.paths.longest_s(ids) == pytest.approx(max(far.values()))
    for axis in range(len(graph.mesh().axes)):
        groups = [[ids[position] for position in group] for group in graph.mesh().groups((axis,))]
        for group in groups:
            expected = max(far[pair] for pair in itertools.permutations(group, 2))
            assert graph.paths.longest_s(group) == pytest.approx(expected)


@pytest.mark.parametrize("pattern", [ring, neighbours])
@pytest.mark.parametrize("graph", MACHINES.values(), ids=MACHINES)
def test_what_a_pattern_gets_is_its_share_of_the_fullest_link(graph: Cluster, pattern: object) -> None:
    mesh, ids = graph.mesh(), [device.id for device in graph.devices]
    for axes in [(axis,) for axis in range(len(mesh.axes))] + [tuple(range(len(mesh.axes)))]:
        pairs = [
            (ids[group[src]], ids[group[dst]])
            for group in mesh.groups(axes)
            for src, dst in pattern(len(group))  # type: ignore[operator]
        ]
        loads = brute_force(graph, pairs)
        rate = min(graph.nx().edges[hop]["link"].bandwidth_bytes_per_s / load for hop, load in loads.items())
        assert Router(graph, mesh).together(axes, pattern).bandwidth_bytes_per_s == pytest.approx(rate)  # type: ignore[arg-type]


def test_both_directions_of_a_half_duplex_link_are_one() -> None:
    half = bus_kinds()["torus"].model_copy(update={"duplex": "half"})
    graph = two_level("x", 1, 4, device_kinds()["hmc"], half.model_copy(update={"topology": Torus(kind="torus")}))
    router = Router(graph, graph.mesh())
    # a ring one way round uses each link one way; both ways round, each way
    assert router.ring((1,)).bandwidth_bytes_per_s == 0.1 * GB  # columns of two: there and back over one link
    assert router.together((0, 1), neighbours).bandwidth_bytes_per_s < router.ring((1,)).bandwidth_bytes_per_s * 2


def test_a_message_over_two_spines_takes_both() -> None:
    ways = fat_tree().paths.ways("node0.gpu0", "node15.gpu0")
    assert [share for share, _ in ways] == [0.5, 0.5]
    assert {hops[2][1] for _, hops in ways} == {"network-spine0", "network-spine1"}


def test_links_of_different_latency_are_never_mixed_into_one_route() -> None:
    # 0.1 + 0.2 us one way, 0.3 us the other: equal, though not in floating point
    wires = [("gpu0", "a", 1e-7), ("a", "gpu1", 2e-7), ("gpu0", "b", 2e-7), ("b", "gpu1", 1e-7)]
    links = tuple(Link(a, b, "wire", latency_s, GB) for a, b, latency_s in wires)
    two = cluster("2xt4-pcie")
    graph = Cluster("two ways", two.devices, ("a", "b"), links, two.levels)
    assert [share for share, _ in graph.paths.ways("gpu0", "gpu1")] == [0.5, 0.5]
    assert Router(graph, graph.mesh()).ring((0,)).bandwidth_bytes_per_s == 2 * GB


def test_a_thousand_devices_need_one_search_for_each_leaf(monkeypatch: pytest.MonkeyPatch) -> None:
    searched: list[str] = []
    search = networkx.dijkstra_predecessor_and_distance

    def counting(graph: "networkx.Graph[str]", dst: str) -> object:
        searched.append(dst)
        assert len(graph) == 64 + 16  # devices, buses and cards hang on the leaves and are not searched
        return search(graph, dst)

    monkeypatch.setattr(networkx, "dijkstra_predecessor_and_distance", counting)
    leaves = FatTree(kind="fat_tree", per_switch=16, spines=16, uplink_bandwidth_bytes_per_s=1.25 * GB)
    network = network_kinds()["eth10"].model_copy(update={"topology": leaves})
    graph = two_level("x", 1024, 1, device_kinds()["t4"], bus_kinds()["pcie3"], network)
    router = Router(graph, graph.mesh())
    for axes in ((0,), (1,), (0, 1)):
        assert router.ring(axes).bandwidth_bytes_per_s == pytest.approx(1.25 * GB)
        # 16 x 1008 of the pieces leave a leaf over 16 uplinks: at most what a card sends
        assert router.alltoall(axes)[1] == pytest.approx(1 / (1.25 * GB))
    assert sorted(searched) == sorted(f"network{index}" for index in range(64))
