"""Latency and bandwidth of links, fitted to measured collectives."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from planner.devices.graph import Cluster
from planner.devices.library import bus_kinds, two_level
from planner.devices.measured import CollectiveKind, MeasuredCollective
from planner.devices.schema import DeviceKind, NetworkKind

FAST: Final = 1e15
"""Bandwidth, in bytes/s, of a bus with one device, which nothing crosses but what goes on to the network."""
LEAST_S: Final = 1e-7
"""Of a latency: a fit must not claim that messages are free."""


@dataclass(frozen=True, slots=True)
class AlphaBeta:
    r"""The latency-bandwidth model fitted to one collective.

    .. math:: T(m) = r \, (\alpha + s(p) \, m / B)

    with r rounds of a ring of p ranks and s(p) m the bytes sent in each.

    Attributes:
        latency_s: alpha.
        bandwidth_bytes_per_s: B, per direction.
        median_error: median over the sizes of |fit / measured - 1|.
        worst_error: the largest.
    """

    latency_s: float
    bandwidth_bytes_per_s: float
    median_error: float
    worst_error: float


def rounds(kind: CollectiveKind, num_ranks: int) -> tuple[float, float]:
    """Return the rounds of a ring, and the share of the collective's bytes that a rank sends in each."""
    if kind is CollectiveKind.ALL_REDUCE:
        return 2 * (num_ranks - 1), 1 / num_ranks
    if kind is CollectiveKind.ALL_TO_ALL:
        return num_ranks - 1, 1 / (num_ranks - 1)
    return num_ranks - 1, 1 / num_ranks


def fit_alpha_beta(measured: MeasuredCollective, num_ranks: int) -> AlphaBeta:
    """Return latency and bandwidth by least squares on relative residuals: every size counts as much."""
    count, share = rounds(measured.kind, num_ranks)
    sizes = np.array([point.num_bytes for point in measured.points], dtype=np.float64)
    seconds = np.array([point.seconds for point in measured.points])
    rows = np.stack([np.full_like(sizes, count), count * share * sizes], axis=1) / seconds[:, None]
    latency_s, seconds_per_byte = _non_negative(rows, np.ones(len(sizes)))
    errors = np.abs(rows @ np.array([latency_s, seconds_per_byte]) - 1)
    return AlphaBeta(
        max(latency_s, LEAST_S), 1 / max(seconds_per_byte, 1e-15), float(np.median(errors)), float(errors.max())
    )


def _non_negative(rows: np.ndarray, targets: np.ndarray) -> tuple[float, float]:
    from scipy.optimize import nnls

    (first, second), _ = nnls(rows, targets)
    return float(first), float(second)


def link_between(collectives: Sequence[MeasuredCollective], level: str, num_ranks: int) -> AlphaBeta:
    """Return the link of a level: that which explains its all-reduces.

    Raises:
        ValueError: no all-reduce over this level alone was measured.
    """
    for measured in collectives:
        if measured.kind is CollectiveKind.ALL_REDUCE and measured.levels == (level,):
            return fit_alpha_beta(measured, num_ranks)
    raise ValueError(f"no all-reduce over level {level!r} was measured")


def measured_graph(
    name: str,
    nodes: int,
    devices: int,
    device: DeviceKind,
    collectives: Sequence[MeasuredCollective],
) -> Cluster:
    """Return a machine of equal nodes whose links explain the measured all-reduces, with these beside them.

    Within a node one switch joins the devices. Between nodes each node has one card, with what all
    devices of a node reached together.

    Args:
        name: of the machine.
        nodes: their number.
        devices: of each node.
        device: their kind.
        collectives: over every combination of levels of more than one.
    """
    bus = bus_kinds()["shm"].model_copy(update={"name": "measured", "latency_s": 0.0, "bandwidth_bytes_per_s": FAST})
    if devices > 1:
        found = link_between(collectives, device.level, devices)
        bus = bus.model_copy(
            update={"latency_s": found.latency_s / 2, "bandwidth_bytes_per_s": found.bandwidth_bytes_per_s}
        )  # a route crosses two links, to the switch and from it
    network = None
    if nodes > 1:
        found = link_between(collectives, "node", nodes)
        inside_s = 2 * bus.latency_s if devices > 1 else 0.0
        network = NetworkKind(
            name="measured", card_per="node", duplex="full", source="measured",
            latency_s=max((found.latency_s - inside_s) / 2, LEAST_S),
            bandwidth_bytes_per_s=found.bandwidth_bytes_per_s * devices,
        )  # fmt: skip
    graph = two_level(name, nodes, devices, device, bus, network)
    return replace(graph, collectives=tuple(collectives))
