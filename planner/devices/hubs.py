"""Paths of machines in which every device hangs on switches, and switches on devices only.

Such are nodes of devices on one switch whose devices all have a network card of their own. Every device is part of a
cycle there, so that ``planner.devices.paths`` would look for shortest paths from each of them; with thousands that
takes minutes. But where the sets of devices of any two switches are nested or apart, the path of least latency between
two devices goes through one switch: of two switches on a longer path that meet in a device, one has all devices of the
other, so it has both ends, and the path through it alone is shorter.
"""

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from networkx import Graph

from planner.devices.paths import Hop, latency_of


@dataclass(frozen=True, slots=True)
class Hub:
    """A switch.

    Attributes:
        name: its id.
        weight: of a path through it, see ``planner.devices.paths.weight_of``.
        members: its devices.
    """

    name: str
    weight: int
    members: frozenset[str]


class HubPaths:
    """What ``planner.devices.paths.Paths`` says, of a machine of hubs.

    Attributes:
        hubs: of every device, those with the fewest members first; each has all members of those before.
    """

    def __init__(self, hubs: Mapping[str, tuple[Hub, ...]]) -> None:
        self.hubs = hubs

    @staticmethod
    def of(graph: "Graph[str]", devices: Sequence[str]) -> "HubPaths | None":
        """Return the paths of a machine, or None if it is not one of hubs."""
        known = set(devices)
        found: dict[str, list[Hub]] = {device: [] for device in devices}
        for node in graph:
            if node in known:
                continue
            around = graph[node]
            weights = {around[device]["weight"] for device in around}
            if not known.issuperset(around) or len(weights) != 1:
                return None
            hub = Hub(node, 2 * weights.pop(), frozenset(around))
            for device in around:
                found[device].append(hub)
        ordered = {device: tuple(sorted(hubs, key=lambda h: len(h.members))) for device, hubs in found.items()}
        if any(known & set(graph[device]) for device in devices) or not _are_nested(ordered.values()):
            return None
        return HubPaths(ordered)

    def loads(self, messages: Mapping[Hop, float]) -> dict[Hop, float]:
        """Return how much of all messages together every link carries in each direction."""
        found: dict[Hop, float] = defaultdict(float)
        for (src, dst), amount in messages.items():
            for share, way in self.ways(src, dst):
                for hop in way:
                    found[hop] += share * amount
        return found

    def ways(self, src: str, dst: str) -> list[tuple[float, list[Hop]]]:
        """Return the paths that a message takes, and the share of it that takes each."""
        if src == dst:
            return [(1.0, [])]
        between = self._between(src, dst)
        return [(1 / len(between), [(src, hub.name), (hub.name, dst)]) for hub in between]

    def pair_loads(self, groups: Iterable[Sequence[str]]) -> dict[Hop, float]:
        """Return the loads of one message of 1 between each ordered pair of ids of each group."""
        found: dict[Hop, float] = defaultdict(float)
        for group in groups:
            inside = Counter(hub.name for device in group for hub in self.hubs[device])
            for device in group:
                for partners, hubs in self._rings(device, inside):
                    for hub in hubs:
                        found[device, hub.name] += partners / len(hubs)
                        found[hub.name, device] += partners / len(hubs)
        return found

    def latency_s(self, src: str, dst: str) -> float:
        """Return the latency of the paths between two ids."""
        return latency_of(self._between(src, dst)[0].weight) if src != dst else 0.0

    def longest_s(self, group: Sequence[str]) -> float:
        """Return the largest latency between two ids of a group."""
        inside = Counter(hub.name for device in group for hub in self.hubs[device])
        weights = (hubs[0].weight for device in group for _, hubs in self._rings(device, inside))
        return latency_of(max(weights, default=0))

    def _rings(self, device: str, inside: Mapping[str, int]) -> list[tuple[int, tuple[Hub, ...]]]:
        """Return how many devices of a group a device reaches through which hubs, nearest first."""
        found, nearer = [], 1  # itself
        hubs = self.hubs[device]
        for i, hub in enumerate(hubs):
            if partners := inside[hub.name] - nearer:
                found.append((partners, _lightest(hubs[i:])))
                nearer = inside[hub.name]
        return found

    def _between(self, src: str, dst: str) -> tuple[Hub, ...]:
        hubs = self.hubs[src]
        first = next(i for i, hub in enumerate(hubs) if dst in hub.members)
        return _lightest(hubs[first:])


def _lightest(hubs: Sequence[Hub]) -> tuple[Hub, ...]:
    least = min(hub.weight for hub in hubs)
    return tuple(hub for hub in hubs if hub.weight == least)


def _are_nested(chains: Iterable[tuple[Hub, ...]]) -> bool:
    seen = set(chains)
    return all(len(hubs) > 0 and all(a.members <= b.members for a, b in itertools.pairwise(hubs)) for hubs in seen)
