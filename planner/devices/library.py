"""Clusters by name or path, made of the known kinds of devices and links."""

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Final, TypeVar

from planner.devices.files import profiles_path
from planner.devices.graph import Cluster, Device, Level
from planner.devices.schema import (
    MAX_DEVICES,
    BusKind,
    DeviceKind,
    DeviceKindsFile,
    LinkKindsFile,
    NetworkKind,
    read_cluster,
)
from planner.devices.topology import Wiring, wire
from planner.errors import UnknownNameError, UsageError
from planner.ir.canonical import decode_file

GRAMMAR: Final = (
    "A cluster is {nodes}x{devices}-{device}-{link}, such as 4x8-h100-ib400, where one node may be "
    "left out, as in 4xa100-nvlink; local-2, this host with two processes; or the path of a cluster file, "
    "with a '/' or ending in .json."
)
_NAME: Final = re.compile(r"([0-9]{1,9})x(?:([0-9]{1,9})-)?([a-z][a-z0-9]*)-([a-z][a-z0-9]*)")
_SHIPPED: Final = {
    "8xa100-nvlink": "one node of 8 A100 80GB on NVSwitch",
    "8xh100-nvlink": "one node of 8 H100 on NVSwitch",
    "4x8-h100-ib400": "4 nodes of 8 H100, NVSwitch inside, one 400 Gbit/s InfiniBand card per GPU",
    "4x4-p100-ib100": "OptCNN's cluster: 4 nodes of 4 P100, NVLink inside, 100 Gbit/s between",
    "8xk20-pcie": "one weird trick's machine: 8 K20, 4 on each of two PCIe 2.0 switches",
    "16x1-t4-eth10": "16 nodes of one T4 on 10 Gbit/s Ethernet",
    "8xk80-qpi": "8 K80 halves, two behind each PCIe 3.0 switch, four on each of two sockets joined by QPI",
    "36x4-p100-fat100": "36 nodes of 4 P100, 18 on each leaf of a fat tree of 36-port InfiniBand switches",
    "16xhmc-htree": "HyPar's machine: 16 accelerators on an H-tree of 1600 Mbit/s links",
    "16xhmc-torus": "HyPar's alternative: the same 16 on a 4 x 4 torus",
}
_KindT = TypeVar("_KindT", DeviceKind, BusKind, NetworkKind)


@cache  # shipped files do not change while a process runs
def device_kinds() -> Mapping[str, DeviceKind]:
    """Return the known kinds of devices by name."""
    path = profiles_path() / "devices" / "kinds.json"
    return _by_name(decode_file(DeviceKindsFile, path, "device kinds").kinds)


@cache
def _link_kinds() -> LinkKindsFile:
    return decode_file(LinkKindsFile, profiles_path() / "links" / "kinds.json", "link kinds")


def bus_kinds() -> Mapping[str, BusKind]:
    """Return the known kinds of links inside a node by name."""
    return _by_name(_link_kinds().buses)


def network_kinds() -> Mapping[str, NetworkKind]:
    """Return the known kinds of links between nodes by name."""
    return _by_name(_link_kinds().networks)


def clusters() -> Mapping[str, str]:
    """Return the shipped examples of cluster names with a description each."""
    return dict(_SHIPPED)


def cluster(name_or_path: str | Path) -> Cluster:
    """Return a cluster by name, such as ``4x8-h100-ib400``, or read it from a file.

    With several nodes the link named is the network between them, and the devices of a node are
    joined by their kind's usual bus; with one node it is that bus. ``1xD-`` with a network is one
    node of such a cluster.

    Raises:
        UnknownNameError: not a cluster name, or a device or link that is not known.
        UsageError: no such file, no devices, too many, or a bus where a network is needed.
    """
    text = str(name_or_path)
    if isinstance(name_or_path, Path) or "/" in text or text.endswith(".json"):
        return read_cluster(Path(name_or_path))
    match = _NAME.fullmatch(text)
    if match is None:
        raise UnknownNameError("cluster", text, _meant(text), GRAMMAR)
    first, second, device_name, link_name = match.groups()
    nodes, devices = (int(first), int(second)) if second else (1, int(first))
    device = _known("device", device_name, device_kinds())
    if link_name in (networks := network_kinds()):
        if second is None:
            raise UsageError(
                f"{link_name!r} joins nodes, and {text!r} does not say how many: write "
                f"{devices}x1-{device_name}-{link_name} or 1x{devices}-{device_name}-{link_name}"
            )
        bus = bus_kinds()[device.links[0]]
        return two_level(text, nodes, devices, device, bus, networks[link_name])
    bus = _bus(device, link_name)
    if nodes > 1:
        raise UsageError(
            f"{link_name!r} joins the devices of one node, and {text!r} has {nodes} nodes: name "
            f"the network between them, one of {', '.join(networks)}"
        )
    return two_level(f"{devices}x{device_name}-{link_name}", 1, devices, device, bus)


def _meant(text: str) -> list[str]:
    """Return what a name that is none may have meant: shipped ones, and all kinds of devices in its own numbers."""
    if local := re.fullmatch(r"local[^-0-9]?([0-9]+)", text):
        return [f"local-{local[1]}"]
    if (counts := re.match(r"[0-9]+x([0-9]+-?)?", text)) is None:
        return list(_SHIPPED)
    start = counts[0] if counts[1] is None else counts[0].removesuffix("-") + "-"
    links = {kind.name: network_kinds() if counts[1] else kind.links[:1] for kind in device_kinds().values()}
    return [*_SHIPPED, *(f"{start}{kind}-{link}" for kind, own in links.items() for link in own)]


def equal_devices(num_devices: int) -> Cluster:
    """Return the cluster of ``--devices N``: one level of N data-sheet accelerators."""
    return cluster(f"{num_devices}xaccelerator-nvlink")


def two_level(
    name: str,
    nodes: int,
    devices: int,
    device: DeviceKind,
    bus: BusKind,
    network: NetworkKind | None = None,
) -> Cluster:
    """Return ``nodes`` times ``devices`` devices: a bus inside each node, a network between them.

    Network cards hang on the node's switch or on each device. One node has no network. Levels are
    the nodes and the devices of each, with one more above each where the topology has one: the
    leaves of a fat tree, sockets, the rows of a torus, the branches of an H-tree.

    Raises:
        UsageError: no devices or more than 65,536, several nodes without a network, or a topology
            that does not exist for so many.
    """
    if not 1 <= nodes * devices <= MAX_DEVICES:
        raise UsageError(f"{name!r} has {nodes * devices} devices, not 1 to {MAX_DEVICES}")
    if nodes > 1 and network is None:
        raise UsageError(f"{name!r} has {nodes} nodes and no network between them")
    prefixes = [f"node{node}." if nodes > 1 else "" for node in range(nodes)]
    ids = [[f"{prefix}{device.level}{index}" for index in range(devices)] for prefix in prefixes]
    wirings = [wire(ends, f"{prefix}switch", bus) for prefix, ends in zip(prefixes, ids, strict=True)]
    levels = _levels(Level(device.level, devices), wirings[0].outer)
    if network is not None and nodes > 1:
        between = wire(_cards(name, network, wirings, ids), "network", network)
        wirings.insert(0, between)
        levels = (*_levels(Level("node", nodes), between.outer), *levels)
    return Cluster(
        name,
        tuple(_device(member, device) for ends in ids for member in ends),
        tuple(switch for wiring in wirings for switch in wiring.switches),
        tuple(link for wiring in wirings for link in wiring.links),
        levels,
    )


def _cards(name: str, network: NetworkKind, nodes: list[Wiring], devices: list[list[str]]) -> list[str]:
    """Return what the network's cards hang on."""
    if network.card_per == "device":
        return [member for ends in devices for member in ends]
    hubs = [node.hub for node in nodes if node.hub is not None]
    if len(hubs) < len(nodes):
        raise UsageError(
            f"{name!r}: {network.name!r} has one card for a node, which hangs on the node's switch, and there is "
            f"none; name a network with a card for each device, or write a cluster file"
        )
    return hubs


def _levels(inner: Level, outer: Level | None) -> tuple[Level, ...]:
    """Return the levels of a bus or network: parts that hold several ends, then these."""
    if outer is None or inner.size % outer.size:  # parts of cards may cut through a node
        return (inner,)
    return outer, Level(inner.name, inner.size // outer.size)


def _device(device_id: str, kind: DeviceKind) -> Device:
    return Device(
        id=device_id,
        kind=kind.name,
        memory_bytes=kind.memory_bytes,
        peak_flop_per_s={str(key): peak for key, peak in kind.peak_flop_per_s.items()},
        memory_bandwidth_bytes_per_s=kind.memory_bandwidth_bytes_per_s,
    )


def _bus(device: DeviceKind, name: str) -> BusKind:
    """Return the device's bus of that name, with (``nvlink3``) or without its generation."""
    names = {bus.rstrip("0123456789"): bus for bus in reversed(device.links)}
    names |= {bus: bus for bus in device.links}
    if name not in names:
        known = (*names, *network_kinds())
        raise UnknownNameError(f"link of {device.name}", name, known, GRAMMAR)
    return bus_kinds()[names[name]]


def _known(what: str, name: str, kinds: Mapping[str, _KindT]) -> _KindT:
    if name not in kinds:
        raise UnknownNameError(what, name, kinds, GRAMMAR)
    return kinds[name]


def _by_name(kinds: tuple[_KindT, ...]) -> Mapping[str, _KindT]:
    return {kind.name: kind for kind in kinds}
