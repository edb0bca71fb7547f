"""Shortest paths of a machine, and what messages that follow them put on every link."""

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import networkx
from networkx import Graph

Hop = tuple[str, str]
"""A link in the direction it is used: from the first id to the second."""
_Towards = tuple[Mapping[str, float], Sequence[tuple[str, Sequence[str]]]]

_FEMTO: Final = 10**15
_LINKS: Final = 2**17
_KEPT: Final = 512
"""Destinations whose paths are kept: all of a machine with so many switches, some of a larger one."""


def weight_of(latency_s: float) -> int:
    """Return what a link counts where routes are compared: its latency in fs, then itself.

    Whole numbers, so that equally long routes are found to be equal; of those with equal latency
    the ones with the fewest links are shortest.
    """
    return round(latency_s * _FEMTO) * _LINKS + 1


class Paths:
    """Paths with the least latency between the ids of one machine.

    Where several are equally short, a message is spread over them: evenly over the next links of
    every shortest path, at each switch again, as equal-cost multipath routing does (RFC 2992) and,
    on a torus, minimal adaptive routing. Parts of the machine that are trees have one path only;
    they hang on the core, where links form cycles.

    Attributes:
        parents: every id outside the core with the id one step nearer to it.
    """

    def __init__(self, graph: "Graph[str]") -> None:
        self._graph = graph
        core = set(networkx.k_core(graph, 2))
        if not core:  # a tree: one of its nodes, a switch, so that climbs are short
            core = {max(graph, key=lambda node: graph.degree[node])}
        self._core = graph.subgraph(core)
        self.parents: dict[str, str] = {}
        self._depth = dict.fromkeys(core, 0)
        self._height = dict.fromkeys(core, 0)  # weight of the way to the core
        reached = list(core)
        for node in reached:  # grows while it runs
            for far in graph[node]:
                if far not in self._depth:
                    self.parents[far], self._depth[far] = node, self._depth[node] + 1
                    self._height[far] = self._height[node] + graph.edges[node, far]["weight"]
                    reached.append(far)
        self._kept: dict[str, _Towards] = {}

    def loads(self, messages: Mapping[Hop, float]) -> dict[Hop, float]:
        """Return how much of all messages together every link carries in each direction.

        Args:
            messages: amounts by source and destination.
        """
        found: dict[Hop, float] = defaultdict(float)
        through: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        for (src, dst), amount in messages.items():
            first, last, hops = self._climb(src, dst)
            for hop in hops:
                found[hop] += amount
            if first != last:
                through[last][first] += amount
        for last, sources in through.items():
            self._spread(last, sources, found)
        return found

    def ways(self, src: str, dst: str) -> list[tuple[float, list[Hop]]]:
        """Return the paths that a message takes, and the share of it that takes each."""
        first, last, hops = self._climb(src, dst)
        up = [hop for hop in hops if self._depth[hop[0]] > self._depth[hop[1]]]
        down = [hop for hop in reversed(hops) if self._depth[hop[0]] < self._depth[hop[1]]]
        nexts = dict(self._towards(last)[1]) if first != last else {}
        unfinished: list[tuple[float, str, list[Hop]]] = [(1.0, first, up)]
        for share, node, way in unfinished:  # grows while it runs
            unfinished += ((share / len(nexts[node]), far, [*way, (node, far)]) for far in nexts.get(node, ()))
        return [(share, way + down) for share, node, way in unfinished if node == last]

    def pair_loads(self, groups: Iterable[Sequence[str]]) -> dict[Hop, float]:
        """Return the loads of one message of 1 between each ordered pair of ids of each group.

        A link outside the core is a cut: it carries (ids behind it) x (ids in front of it) each way.
        """
        found: dict[Hop, float] = defaultdict(float)
        through: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        for group in groups:
            inside = Counter(node for member in group for node in self._up(member))
            for node, count in inside.items():
                if node in self.parents and count < len(group):
                    for hop in ((node, self.parents[node]), (self.parents[node], node)):
                        found[hop] += count * (len(group) - count)
            entries = [(node, count) for node, count in inside.items() if node not in self.parents]
            for (first, here), (last, there) in itertools.permutations(entries, 2):
                through[last][first] += here * there
        for last, sources in through.items():
            self._spread(last, sources, found)
        return found

    def latency_s(self, src: str, dst: str) -> float:
        """Return the latency of the paths between two ids."""
        first, last, _ = self._climb(src, dst)
        weight = self._towards(last)[0][first] if first != last else 0
        return latency_of(self._height[src] - self._height[first] + weight + self._height[dst] - self._height[last])

    def longest_s(self, group: Sequence[str]) -> float:
        """Return the largest latency between two ids of a group."""
        at: dict[str, list[str]] = defaultdict(list)
        for member in group:
            at[self._up(member)[-1]].append(member)
        # the longest path between nodes of one tree ends farthest from any of them
        far = [max(members, key=lambda member: self.latency_s(members[0], member)) for members in at.values()]
        within = max(self.latency_s(a, b) for a, members in zip(far, at.values(), strict=True) for b in members)
        heights = {node: max(self._height[member] for member in members) for node, members in at.items()}
        across = (
            heights[last] + self._towards(last)[0][first] + height
            for last in heights for first, height in heights.items() if first != last
        )  # fmt: skip
        return max(within, latency_of(max(across, default=0)))

    def _up(self, node: str) -> list[str]:
        way = [node]
        while way[-1] in self.parents:
            way.append(self.parents[way[-1]])
        return way

    def _climb(self, src: str, dst: str) -> tuple[str, str, list[Hop]]:
        """Return where a message enters and leaves the core, or twice where it turns, and its hops outside."""
        hops = []
        while src != dst and (self._depth[src] or self._depth[dst]):
            if self._depth[src] >= self._depth[dst]:
                hops.append((src, self.parents[src]))
                src = self.parents[src]
            else:
                hops.append((self.parents[dst], dst))
                dst = self.parents[dst]
        return src, dst, hops

    def _towards(self, dst: str) -> "_Towards":
        """Return distances to an id of the core, and the next ids of every other one, farthest first."""
        if dst not in self._kept:
            if len(self._kept) >= _KEPT:
                self._kept.clear()
            nexts, weights = networkx.dijkstra_predecessor_and_distance(self._core, dst)
            order = sorted(weights, key=weights.__getitem__, reverse=True)
            self._kept[dst] = weights, [(node, nexts[node]) for node in order[:-1]]
        return self._kept[dst]

    def _spread(self, dst: str, sources: Mapping[str, float], found: dict[Hop, float]) -> None:
        waiting = defaultdict(float, sources)
        for node, nexts in self._towards(dst)[1]:
            if share := waiting[node] / len(nexts):
                for far in nexts:
                    found[node, far] += share
                    waiting[far] += share


def latency_of(weight: float) -> float:  # whole, whatever networkx calls it
    """Return the latency of a path of so much weight, in seconds."""
    return weight // _LINKS / _FEMTO
