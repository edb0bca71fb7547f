"""Paths of machines of hubs are those that shortest-path search finds."""

import itertools

import networkx
import numpy as np
import pytest

from planner.devices.hubs import HubPaths
from planner.devices.library import cluster
from planner.devices.paths import Paths, weight_of


def machine(hubs: dict[str, tuple[float, list[str]]]) -> "networkx.Graph[str]":
    """Return a machine of switches with a latency and devices each."""
    graph: networkx.Graph[str] = networkx.Graph()
    for name, (latency_s, devices) in hubs.items():
        graph.add_edges_from((name, device, {"weight": weight_of(latency_s)}) for device in devices)
    return graph


EVERYONE = [f"d{i}" for i in range(8)]
MACHINES = {
    "nodes and a network": {"a": (1e-6, EVERYONE[:4]), "b": (1e-6, EVERYONE[4:]), "net": (3e-6, EVERYONE)},
    "a network that is faster than the nodes": {"a": (3e-6, EVERYONE[:4]), "net": (1e-6, EVERYONE)},
    "two networks alike": {"a": (1e-6, EVERYONE[:2]), "net": (2e-6, EVERYONE), "too": (2e-6, EVERYONE)},
    "a node as slow as the network": {"a": (2e-6, EVERYONE[:3]), "net": (2e-6, EVERYONE)},
    "three levels": {
        "a": (1e-6, EVERYONE[:2]), "b": (1e-6, EVERYONE[2:4]), "half": (2e-6, EVERYONE[:4]), "net": (4e-6, EVERYONE),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", MACHINES)
def test_paths_through_hubs_are_the_shortest(name: str) -> None:
    graph = machine(MACHINES[name])
    hubs, paths = HubPaths.of(graph, EVERYONE), Paths(graph)
    assert hubs is not None
    for src, dst in itertools.permutations(EVERYONE, 2):
        assert hubs.latency_s(src, dst) == pytest.approx(paths.latency_s(src, dst))
        assert sorted(hubs.ways(src, dst)) == sorted(paths.ways(src, dst))
    rng = np.random.default_rng(3)
    messages = {pair: float(rng.random()) for pair in itertools.permutations(EVERYONE, 2)}
    assert hubs.loads(messages) == pytest.approx(paths.loads(messages))
    for groups in ([EVERYONE], [EVERYONE[:4], EVERYONE[4:]], [EVERYONE[::2], EVERYONE[1::2]], [EVERYONE[1:4]]):
        expected = {hop: load for hop, load in paths.pair_loads(groups).items() if load}
        assert hubs.pair_loads(groups) == pytest.approx(expected)
        for group in groups:
            assert hubs.longest_s(group) == pytest.approx(paths.longest_s(group))


@pytest.mark.parametrize(
    "hubs",
    [
        {"a": (1e-6, EVERYONE[:5]), "b": (1e-6, EVERYONE[3:])},  # neither nested nor apart
        {"a": (1e-6, EVERYONE), "b": (1e-6, ["a"])},  # a switch on a switch
        {"a": (1e-6, EVERYONE), "d0": (1e-6, ["d1"])},  # a device on a device
    ],
)
def test_other_machines_are_none_of_hubs(hubs: dict[str, tuple[float, list[str]]]) -> None:
    assert HubPaths.of(machine(hubs), EVERYONE) is None


def test_a_shipped_machine_with_a_card_for_each_device_is_one_of_hubs() -> None:
    assert isinstance(cluster("4x8-h100-ib400").paths, HubPaths)
    assert isinstance(cluster("4x8-a100-ib100").paths, Paths)
