"""What groups of ranks can send through the machine when they all talk at the same time."""

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from planner.devices.graph import DeviceGraph, Link
from planner.ir.mesh import Mesh

_Lane = tuple[int, int]  # index of the link; 0 for a to b, 1 for b to a, always 0 if half duplex
_Groups = Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True)
class PathCost:
    """Latency and bandwidth that every member of every group gets."""

    latency_s: float
    bandwidth_bytes_per_s: float


class Router:
    """Routes between the ranks of a mesh.

    A route is the path of least latency; all groups along the given axes communicate at once and
    share the links evenly. Results are kept per set of axes for the lifetime of the instance.
    """

    def __init__(self, graph: DeviceGraph, mesh: Mesh) -> None:
        self.graph, self.mesh = graph, mesh
        self._lanes: dict[tuple[str, str], _Lane] = {}
        for index, link in enumerate(graph.links):
            self._lanes[link.a, link.b] = (index, 0)
            self._lanes[link.b, link.a] = (index, 0 if link.duplex == "half" else 1)
        self._rings: dict[frozenset[int], PathCost] = {}
        self._alltoalls: dict[frozenset[int], tuple[float, float]] = {}

    def ring(self, axes: Iterable[int]) -> PathCost:
        """Return what rings along these mesh axes get, all of them at the same time.

        Every group is one ring in row-major order and sends one way round. Latency is that of the
        longest route between neighbours; bandwidth the least, over all links, of the link's
        bandwidth / the number of its flows. A group of one gets 0 s and infinity.
        """
        key = frozenset(axes)
        if key not in self._rings:
            pairs = _neighbours(self._groups(key))
            self._rings[key] = PathCost(
                max((self._latency_s(*pair) for pair in pairs), default=0.0),
                self._busiest(self._flows(pairs))[0] if pairs else math.inf,
            )
        return self._rings[key]

    def alltoall(self, axes: Iterable[int]) -> tuple[float, float]:
        r"""Return latency and seconds per byte of uniform exchanges within all groups at once.

        An exchange in which each of p ranks sends m bytes in total, m / (p - 1) to each other
        one, takes (p - 1) * latency + m * seconds per byte. The most loaded link decides:

        .. math:: \max_l \frac{f_l}{(p - 1) B_l}

        with f_l ordered pairs of ranks whose route uses link l.
        """
        key = frozenset(axes)
        if key not in self._alltoalls:
            groups = self._groups(key)
            others = len(groups[0]) - 1
            self._alltoalls[key] = (0.0, 0.0) if not others else (
                max(map(self._longest_s, groups)),
                1 / (self._busiest(self._alltoall_flows(groups))[0] * others),
            )  # fmt: skip
        return self._alltoalls[key]

    def axis_link(self, axis: int) -> Link:
        """Return the link that limits the rings along one mesh axis."""
        return self._busiest(self._flows(_neighbours(self._groups({axis}))))[1]

    def _groups(self, axes: Iterable[int]) -> _Groups:
        ids = [self.graph.devices[rank].id for rank in self.mesh.ranks]
        return [[ids[position] for position in group] for group in self.mesh.groups(axes)]

    def _route(self, src: str, dst: str) -> Iterable[_Lane]:
        return (self._lanes[hop] for hop in itertools.pairwise(self.graph.paths.between(src, dst)))

    def _flows(self, pairs: Iterable[tuple[str, str]]) -> Counter[_Lane]:
        return Counter(lane for pair in pairs for lane in self._route(*pair))

    def _busiest(self, flows: Counter[_Lane]) -> tuple[float, Link]:
        """Return each flow's share of the most loaded link, in bytes/s, and that link."""
        links = self.graph.links
        shares = {i: links[i[0]].bandwidth_bytes_per_s / count for i, count in flows.items()}
        lane = min(sorted(shares), key=shares.__getitem__)
        return shares[lane], links[lane[0]]

    def _alltoall_flows(self, groups: _Groups) -> Counter[_Lane]:
        """Count ordered pairs per lane; a link of a tree is a cut: ranks inside x ranks outside."""
        parents = self.graph.paths.parents
        if not self.graph.paths.is_tree:
            return self._flows(pair for group in groups for pair in itertools.permutations(group, 2))
        flows: Counter[_Lane] = Counter()
        for group in groups:
            inside: Counter[str] = Counter()
            for member in group:
                node = member
                while node in parents:
                    inside[node] += 1
                    node = parents[node]
            for node, count in inside.items():
                for hop in ((node, parents[node]), (parents[node], node)):
                    flows[self._lanes[hop]] += count * (len(group) - count)
        return +flows  # without the links that have all of a group on one side

    def _latency_s(self, src: str, dst: str) -> float:
        links = self.graph.links
        return sum(links[index].latency_s for index, _ in self._route(src, dst))

    def _longest_s(self, group: Sequence[str]) -> float:
        """Return the longest latency; a tree's longest path ends farthest from any of its nodes."""
        starts: Iterable[str] = group
        if self.graph.paths.is_tree:
            starts = [max(group, key=lambda member: self._latency_s(group[0], member))]
        return max(self._latency_s(src, dst) for src in starts for dst in group)


def _neighbours(groups: _Groups) -> list[tuple[str, str]]:
    rings = (zip(group, [*group[1:], group[0]], strict=True) for group in groups if len(group) > 1)
    return list(itertools.chain.from_iterable(rings))
