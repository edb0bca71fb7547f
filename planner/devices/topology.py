"""How a bus or network joins its ends: the switches and links of every topology."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from planner.devices.graph import Level, Link
from planner.devices.schema import FatTree, HTree, LinkKind, OneSwitch, Pairs, Sockets, Switches, Torus
from planner.errors import UsageError

_BRANCH = 4
"""Ends of the smallest part of an H-tree that is a level: two binary splits inside, the others above."""


@dataclass(frozen=True, slots=True)
class Wiring:
    """What joins some devices, or the network cards of some nodes.

    Attributes:
        hub: the switch that a node's network card hangs on; None where no switch joins all.
        outer: the level above the ends: its name, and in how many equal parts it cuts them. None
            where there is one part, or parts would be unequal.
    """

    switches: tuple[str, ...]
    links: tuple[Link, ...]
    hub: str | None
    outer: Level | None = None


def wire(ends: Sequence[str], hub: str, kind: LinkKind) -> Wiring:  # noqa: PLR0911  # a table of topologies
    """Return the switches and links of this kind that join ends.

    Args:
        ends: ids, in rank order; neighbours in it are near each other.
        hub: the name of the first switch; others begin with it.
        kind: of the links; its topology.

    Raises:
        UsageError: the topology does not exist for so many ends.
    """
    match kind.topology:
        case OneSwitch():
            return Wiring((hub,), tuple(_link(end, hub, kind) for end in ends), hub)
        case Switches() as tree:
            return _switches(ends, hub, kind, tree)
        case Sockets() as host:
            return _sockets(ends, hub, kind, host)
        case FatTree() as tree:
            return _fat_tree(ends, hub, kind, tree)
        case Torus():
            return _torus(ends, kind)
        case HTree():
            return _h_tree(ends, hub, kind)
        case Pairs():
            return Wiring((), tuple(_link(a, b, kind) for a, b in itertools.combinations(ends, 2)), None)


def _link(a: str, b: str, kind: LinkKind, bandwidth_bytes_per_s: float | None = None) -> Link:
    return Link(a, b, kind.name, kind.latency_s, bandwidth_bytes_per_s or kind.bandwidth_bytes_per_s, kind.duplex)


def _under(ends: Sequence[str], per_switch: int, prefix: str, kind: LinkKind) -> tuple[list[str], list[Link]]:
    """Return switches for so many consecutive ends each, and the links between."""
    switches = [f"{prefix}{index}" for index in range(-(-len(ends) // per_switch))]
    return switches, [_link(end, switches[i // per_switch], kind) for i, end in enumerate(ends)]


def _switches(ends: Sequence[str], hub: str, kind: LinkKind, tree: Switches) -> Wiring:
    """A PCIe tree under one host; its parts are factors of a level, not a level."""
    if len(ends) <= tree.per_switch:
        return wire(ends, hub, kind.model_copy(update={"topology": OneSwitch(kind="switch")}))
    leaves, down = _under(ends, tree.per_switch, hub, kind)
    up = (_link(leaf, hub, kind, tree.uplink_bandwidth_bytes_per_s) for leaf in leaves)
    return Wiring((hub, *leaves), (*down, *up), hub)


def _sockets(ends: Sequence[str], hub: str, kind: LinkKind, host: Sockets) -> Wiring:
    """PCIe trees under processors that are joined pairwise; devices spread evenly over the sockets."""
    size = -(-len(ends) // host.sockets)
    switches, links = list[str](), list[Link]()
    roots = [f"{hub}-socket{index}" for index in range(-(-len(ends) // size))]
    for index, root in enumerate(roots):
        leaves, down = _under(ends[index * size : (index + 1) * size], host.per_switch, f"{hub}{index}-", kind)
        switches += [root, *leaves]
        links += [*down, *(_link(leaf, root, kind, host.uplink_bandwidth_bytes_per_s) for leaf in leaves)]
    links += (
        Link(a, b, kind.name, host.socket_latency_s, host.socket_bandwidth_bytes_per_s, kind.duplex)
        for a, b in itertools.combinations(roots, 2)
    )
    return Wiring(tuple(switches), tuple(links), roots[0], _outer("socket", len(ends), size))


def _fat_tree(ends: Sequence[str], hub: str, kind: LinkKind, tree: FatTree) -> Wiring:
    """Two tiers [Leiserson85, AlFares08]: every leaf switch has a link to every spine switch."""
    if len(ends) <= tree.per_switch:
        return wire(ends, hub, kind.model_copy(update={"topology": OneSwitch(kind="switch")}))
    leaves, down = _under(ends, tree.per_switch, hub, kind)
    spines = [f"{hub}-spine{index}" for index in range(tree.spines)]
    up = (_link(leaf, spine, kind, tree.uplink_bandwidth_bytes_per_s) for leaf in leaves for spine in spines)
    return Wiring((*leaves, *spines), (*down, *up), leaves[0], _outer("leaf", len(ends), tree.per_switch))


def _torus(ends: Sequence[str], kind: LinkKind) -> Wiring:
    """Two dimensions as equal as they can be, in row-major order; a ring of two is one link."""
    rows = max(d for d in range(1, math.isqrt(len(ends)) + 1) if len(ends) % d == 0)
    columns = len(ends) // rows
    right = ((i, i - i % columns + (i + 1) % columns) for i in range(len(ends)))
    below = ((i, (i + columns) % len(ends)) for i in range(len(ends)))
    pairs = dict.fromkeys(tuple(sorted(pair)) for pair in (*right, *below) if pair[0] != pair[1])
    return Wiring((), tuple(_link(ends[a], ends[b], kind) for a, b in pairs), None, _outer("row", len(ends), columns))


def _h_tree(ends: Sequence[str], hub: str, kind: LinkKind) -> Wiring:
    """A binary tree whose links double in bandwidth, and halve in number, from level to level [HyPar19]."""
    if len(ends) & (len(ends) - 1):
        raise UsageError(f"{kind.name!r} is an H-tree: it joins a power of two, not {len(ends)} devices")
    switches, links = list[str](), list[Link]()
    below, height = list(ends), 0
    while len(below) > 1:
        above = [hub] if len(below) == 2 else [f"{hub}{height}-{index}" for index in range(len(below) // 2)]
        rate = kind.bandwidth_bytes_per_s * 2**height
        links += (_link(node, above[index // 2], kind, rate) for index, node in enumerate(below))
        switches += above
        below, height = above, height + 1
    return Wiring(tuple(switches), tuple(links), below[0], _outer("branch", len(ends), _BRANCH))


def _outer(name: str, num_ends: int, per_part: int) -> Level | None:
    parts, rest = divmod(num_ends, per_part)
    return Level(name, parts) if parts > 1 and per_part > 1 and not rest else None
