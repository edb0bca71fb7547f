from pathlib import Path

import pytest

from planner.devices import (
    NetworkKind,
    bus_kinds,
    cluster,
    clusters,
    device_kinds,
    equal_devices,
    files,
    network_kinds,
    profiles_path,
    two_level,
    write_cluster,
)
from planner.errors import UnknownNameError, UsageError

SIZES = {
    "8xa100-nvlink": (8,),
    "8xh100-nvlink": (8,),
    "4x8-h100-ib400": (4, 8),
    "4x4-p100-ib100": (4, 4),
    "8xk20-pcie": (8,),
    "16x1-t4-eth10": (16, 1),
    "8xk80-qpi": (2, 4),
    "36x4-p100-fat100": (2, 18, 4),
    "16xhmc-htree": (4, 4),
    "16xhmc-torus": (4, 4),
}


def test_the_shipped_examples_are_clusters_with_a_description() -> None:
    assert list(clusters()) == list(SIZES)
    for name, description in clusters().items():
        graph = cluster(name)
        assert graph.name == name
        assert tuple(level.size for level in graph.levels) == SIZES[name]
        assert description


def test_one_node_may_be_left_out() -> None:
    assert cluster("1x4-a100-nvlink") == cluster("4xa100-nvlink")
    assert cluster("4xa100-nvlink").name == "4xa100-nvlink"


def test_a_bus_can_be_named_with_its_generation() -> None:
    assert cluster("4xa100-nvlink3").digest == cluster("4xa100-nvlink").digest
    assert {link.kind for link in cluster("4xa100-pcie").links} == {"pcie4"}


def test_the_name_says_the_network_and_the_device_kind_the_bus() -> None:
    kinds = {link.kind for link in cluster("4x4-p100-ib100").links}
    assert kinds == {"nvlink1", "ib100"}
    assert {link.kind for link in cluster("2x4-t4-eth10").links} == {"pcie3", "eth10"}


@pytest.mark.parametrize(("name", "cards"), [("4x8-h100-ib100", 4), ("4x8-h100-ib400", 32)])
def test_network_cards_are_per_node_or_per_device(name: str, cards: int) -> None:
    assert sum("network" in (link.a, link.b) for link in cluster(name).links) == cards


def test_one_node_of_a_cluster_has_no_network() -> None:
    graph = cluster("1x4-t4-eth10")
    assert {link.kind for link in graph.links} == {"pcie3"}
    assert graph.mesh().shape == (4,)


def test_k20s_hang_on_two_switches_with_an_uplink_of_half_their_rate() -> None:
    graph = cluster("8xk20-pcie")
    assert graph.switches == ("switch", "switch0", "switch1")
    uplinks = [link for link in graph.links if link.b == "switch"]
    assert [link.bandwidth_bytes_per_s for link in uplinks] == [4 * 6e9 / 2] * 2
    assert cluster("4xk20-pcie").switches == ("switch",)


def test_devices_n_is_one_level_of_fixed_data_sheet_accelerators() -> None:
    graph = equal_devices(4)
    assert [level.name for level in graph.levels] == ["gpu"]
    device = graph.devices[3]
    assert device.peak_flop_per_s == {"fp32": 19.5e12, "tf32": 156e12, "bf16": 312e12}
    assert device.memory_bytes == 80 * 10**9
    assert {link.bandwidth_bytes_per_s for link in graph.links} == {300e9}


def test_a_measured_host_has_the_level_cpu() -> None:
    bus = bus_kinds()["shm"].model_copy(update={"bandwidth_bytes_per_s": 1e9})
    graph = two_level("local-2", 1, 2, device_kinds()["cpu"], bus)
    assert graph.name == "local-2"
    assert [axis.name for axis in graph.mesh().axes] == ["cpu"]
    assert [device.id for device in graph.devices] == ["cpu0", "cpu1"]
    assert {link.bandwidth_bytes_per_s for link in graph.links} == {1e9}


def test_every_bus_of_every_device_kind_is_known() -> None:
    for device in device_kinds().values():
        for name in device.links:
            assert two_level("x", 1, 2, device, bus_kinds()[name]).digest


@pytest.mark.parametrize("network", network_kinds().values(), ids=lambda kind: kind.name)
def test_inside_a_node_the_network_is_never_the_shorter_way(network: NetworkKind) -> None:
    for device in device_kinds().values():
        if device.level == "cpu" and network.card_per == "device":
            continue  # processes of one host would rather use its cards
        if bus_kinds()[device.links[0]].topology.kind == "pairs":
            continue  # boards on a shared medium are no node
        alone, two = (two_level("x", nodes, 8, device, bus_kinds()[device.links[0]], network) for nodes in (1, 2))
        everyone = [member.id for member in alone.devices]
        inside = [f"node1.{member}" for member in everyone]
        assert alone.paths.longest_s(everyone) == two.paths.longest_s(inside)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("8xa100-nvlnk", "unknown link of a100 'nvlnk'.*Did you mean 'nvlink'"),
        ("8xk20-nvlink", "unknown link of k20 'nvlink'.*pcie2"),
        ("8xa1000-nvlink", "unknown device 'a1000'.*Did you mean 'a100'"),
        ("8xa100nvlink", "unknown cluster.*Did you mean '8xa100-nvlink'.*{nodes}x{devices}"),
        ("local-4", "unknown cluster 'local-4'"),
        ("local2", "unknown cluster 'local2'. Did you mean 'local-2'"),
        ("4xa10", "unknown cluster '4xa10'. Did you mean '4xa100-nvlink"),
        ("2x4-a100", "unknown cluster '2x4-a100'. Did you mean .*'2x4-a100-"),
    ],
)
def test_an_unknown_name_comes_with_close_ones_and_the_grammar(name: str, message: str) -> None:
    with pytest.raises(UnknownNameError, match=message) as caught:
        cluster(name)
    assert "A cluster is {nodes}x{devices}" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("0xa100-nvlink", "has 0 devices, not 1 to 65536"),
        ("999999x8-a100-ib100", "has 7999992 devices"),
        ("4xt4-eth10", "write 4x1-t4-eth10 or 1x4-t4-eth10"),
        ("2x4-a100-nvlink", "has 2 nodes: name the network between them, one of ib100"),
        ("none/machine.json", "cannot read cluster file 'none/machine.json': No such file"),
        ("machine.json", "cannot read cluster file"),
    ],
)
def test_a_request_that_cannot_be_met_says_why(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        cluster(name)


def test_nodes_need_a_network() -> None:
    with pytest.raises(UsageError, match="no network between them"):
        two_level("x", 2, 2, device_kinds()["t4"], bus_kinds()["pcie3"])


def test_a_path_is_read(tmp_path: Path) -> None:
    graph = cluster("4x4-p100-ib100")
    write_cluster(graph, tmp_path / "mine.json")
    assert cluster(tmp_path / "mine.json") == cluster(str(tmp_path / "mine.json")) == graph


def test_data_is_read_from_the_checkout_if_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (profiles_path() / "devices" / "kinds.json").is_file()
    monkeypatch.setattr(files, "_PLANNER", tmp_path / "planner")
    assert profiles_path() == tmp_path / "planner" / "_profiles"
    (tmp_path / "profiles").mkdir()
    assert profiles_path() == tmp_path / "planner" / "_profiles"
    (tmp_path / "pyproject.toml").touch()
    assert profiles_path() == tmp_path / "profiles"
