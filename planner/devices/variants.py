"""Machines like one that there is: with fewer of its devices, or with other links between its outermost parts."""

import math
from collections.abc import Sequence
from dataclasses import replace

from planner.devices.graph import Cluster, Level
from planner.errors import UsageError
from planner.units import format_bit_rate


def first_devices(graph: Cluster, count: int) -> Cluster:
    """Return a machine with so many devices of this one, inner levels filled first.

    Of 4 nodes of 8, 4 devices are half a node, 16 two nodes, and 12 two nodes with 6 each: every node that is used has
    as many. Devices that are left out still forward what passes them, as on a torus. What was measured over a whole
    level is left out where only a part of it remains.

    Raises:
        UsageError: there are not so many, or no such part of all levels has so many.
    """
    sizes = [level.size for level in graph.levels]
    whole = " x ".join(f"{level.name}={level.size}" for level in graph.levels) or "one device"
    if not 1 <= count <= len(graph.devices):
        raise UsageError(f"{graph.name} has {len(graph.devices)} devices ({whole}), not {count}")
    if count == len(graph.devices):
        return graph
    counts = _filled(sizes, count)
    if counts is None:
        raise UsageError(f"{graph.name} is {whole}: no equal parts of its levels have {count} devices together")
    ranks = graph.mesh_of([(n,) for n in counts]).ranks
    devices = tuple(graph.devices[rank] for rank in ranks)
    kept = [device.id for device in devices]
    hops = graph.paths.pair_loads([kept])
    used = {end for hop in hops for end in hop}.difference(kept)
    forwarding = (*graph.switches, *(device.id for device in graph.devices))
    unchanged = {level.name for level, n in zip(graph.levels, counts, strict=True) if n == level.size}
    return Cluster(
        f"{count} of {graph.name}",
        devices,
        tuple(name for name in forwarding if name in used),
        tuple(link for link in graph.links if (link.a, link.b) in hops or (link.b, link.a) in hops),
        tuple(Level(level.name, n) for level, n in zip(graph.levels, counts, strict=True)),
        tuple(measured for measured in graph.collectives if unchanged.issuperset(measured.levels)),
    )


def with_outer_rate(graph: Cluster, bandwidth_bytes_per_s: float) -> Cluster:
    """Return a machine whose outermost links have another bandwidth; latencies stay.

    Those are the links of the slowest kind that messages between the parts of its outermost level take, and messages
    inside of one part do not: between nodes the network, inside a node of one level all links. What was measured over
    them is left out, because it is of the links as they were.

    Args:
        graph: the machine.
        bandwidth_bytes_per_s: of each, in each direction.

    Raises:
        UsageError: the machine has one device.
    """
    outermost = next((level for level in graph.levels if level.size > 1), None)
    if outermost is None:
        raise UsageError(f"{graph.name} has one device, and so no links whose rate could be another")
    each = len(graph.devices) // outermost.size
    ids = [device.id for device in graph.devices]
    parts = [ids[start : start + each] for start in range(0, len(ids), each)]
    inside = {frozenset(hop) for hop in graph.paths.pair_loads(parts)}
    between = [link for link in graph.links if frozenset((link.a, link.b)) not in inside]
    kind = min(between, key=lambda link: link.bandwidth_bytes_per_s).kind
    changed = {frozenset((link.a, link.b)) for link in between if link.kind == kind}
    return replace(
        graph,
        name=f"{graph.name} at {format_bit_rate(bandwidth_bytes_per_s)}",
        links=tuple(
            replace(link, bandwidth_bytes_per_s=bandwidth_bytes_per_s)
            if frozenset((link.a, link.b)) in changed else link
            for link in graph.links
        ),
        collectives=tuple(measured for measured in graph.collectives if outermost.name not in measured.levels),
    )  # fmt: skip


def _filled(sizes: Sequence[int], count: int) -> tuple[int, ...] | None:
    """Return how many of each level give so many devices, most of the innermost ones; None where none do."""
    if not sizes:
        return () if count == 1 else None
    if count > math.prod(sizes):
        return None
    for inner in range(min(sizes[-1], count), 0, -1):
        if count % inner == 0 and (outer := _filled(sizes[:-1], count // inner)) is not None:
            return (*outer, inner)
    return None
