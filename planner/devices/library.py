"""Clusters by name or path, made of the known kinds of devices and links."""

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Final, TypeVar

from planner.devices.files import profiles_path
from planner.devices.graph import Device, DeviceGraph, Level, Link
from planner.devices.schema import (
    MAX_DEVICES,
    BusKind,
    DeviceKind,
    DeviceKindsFile,
    LinkKind,
    LinkKindsFile,
    NetworkKind,
    read_cluster,
)
from planner.errors import UnknownNameError, UsageError
from planner.ir.canonical import decode_file

GRAMMAR: Final = (
    "A cluster is {nodes}x{devices}-{device}-{link}, such as 4x8-h100-ib400, where one node may be "
    "left out, as in 4xa100-nvlink; or the path of a cluster file, with a '/' or ending in .json."
)
_NAME: Final = re.compile(r"([0-9]{1,9})x(?:([0-9]{1,9})-)?([a-z][a-z0-9]*)-([a-z][a-z0-9]*)")
_SHIPPED: Final = {
    "8xa100-nvlink": "one node of 8 A100 80GB on NVSwitch",
    "8xh100-nvlink": "one node of 8 H100 on NVSwitch",
    "4x8-h100-ib400": "4 nodes of 8 H100, NVSwitch inside, one 400 Gbit/s InfiniBand card per GPU",
    "4x4-p100-ib100": "OptCNN's cluster: 4 nodes of 4 P100, NVLink inside, 100 Gbit/s between",
    "8xk20-pcie": "one weird trick's machine: 8 K20, 4 on each of two PCIe 2.0 switches",
    "16x1-t4-eth10": "16 nodes of one T4 on 10 Gbit/s Ethernet",
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


def cluster(name_or_path: str | Path) -> DeviceGraph:
    """Return a machine by name, such as ``4x8-h100-ib400``, or read it from a file.

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
        raise UnknownNameError("cluster", text, _SHIPPED, GRAMMAR)
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


def equal_devices(num_devices: int) -> DeviceGraph:
    """Return the machine of ``--devices N``: one level of N data-sheet accelerators."""
    return cluster(f"{num_devices}xaccelerator-nvlink")


def host_graph(num_ranks: int, device: DeviceKind, bus: BusKind) -> DeviceGraph:
    """Return one host whose ranks have these, usually measured, values."""
    return two_level(f"local-{num_ranks}", 1, num_ranks, device, bus)


def two_level(
    name: str,
    nodes: int,
    devices: int,
    device: DeviceKind,
    bus: BusKind,
    network: NetworkKind | None = None,
) -> DeviceGraph:
    """Return ``nodes`` times ``devices`` devices: a bus inside each node, a network between them.

    Every node has a switch for its devices, with a switch of its own for each island where the
    bus has islands. Network cards hang on the node's switch or on each device. One node has a
    single level, and no network.

    Raises:
        UsageError: no devices or more than 65,536, or several nodes without a network.
    """
    if not 1 <= nodes * devices <= MAX_DEVICES:
        raise UsageError(f"{name!r} has {nodes * devices} devices, not 1 to {MAX_DEVICES}")
    if nodes == 1:
        switches, links = _node("", devices, device, bus)
        return DeviceGraph(name, _devices([""], devices, device), switches, links, (Level(device.level, devices),))
    if network is None:
        raise UsageError(f"{name!r} has {nodes} nodes and no network between them")
    prefixes = [f"node{node}." for node in range(nodes)]
    all_switches, all_links = ["network"], list[Link]()
    for prefix in prefixes:
        switches, links = _node(prefix, devices, device, bus)
        ends = ["switch"]
        if network.card_per == "device":
            ends = [f"{device.level}{index}" for index in range(devices)]
        all_switches += switches
        all_links += [*links, *(_link(prefix + end, "network", network) for end in ends)]
    return DeviceGraph(
        name,
        _devices(prefixes, devices, device),
        tuple(all_switches),
        tuple(all_links),
        (Level("node", nodes), Level(device.level, devices)),
    )


def _devices(prefixes: list[str], devices: int, kind: DeviceKind) -> tuple[Device, ...]:
    return tuple(
        Device(
            id=f"{prefix}{kind.level}{index}",
            kind=kind.name,
            memory_bytes=kind.memory_bytes,
            peak_flop_per_s={str(key): peak for key, peak in kind.peak_flop_per_s.items()},
            memory_bandwidth_bytes_per_s=kind.memory_bandwidth_bytes_per_s,
        )
        for prefix in prefixes
        for index in range(devices)
    )


def _node(prefix: str, devices: int, device: DeviceKind, bus: BusKind) -> tuple[tuple[str, ...], tuple[Link, ...]]:
    """Return the switches and links of one node."""
    ids = [f"{prefix}{device.level}{index}" for index in range(devices)]
    hub, islands = f"{prefix}switch", bus.islands
    if islands is None or devices <= islands.devices:
        return (hub,), tuple(_link(member, hub, bus) for member in ids)
    uplink = bus.model_copy(update={"bandwidth_bytes_per_s": islands.uplink_bandwidth_bytes_per_s})
    leaves = [f"{hub}{index}" for index in range(-(-devices // islands.devices))]
    down = (_link(member, leaves[i // islands.devices], bus) for i, member in enumerate(ids))
    return (hub, *leaves), (*down, *(_link(leaf, hub, uplink) for leaf in leaves))


def _link(a: str, b: str, kind: LinkKind) -> Link:
    return Link(a, b, kind.name, kind.latency_s, kind.bandwidth_bytes_per_s, kind.duplex)


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
