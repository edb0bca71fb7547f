"""What groups of ranks can send through the machine when they all talk at the same time."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from planner.devices.graph import Cluster
from planner.devices.paths import Hop
from planner.ir.mesh import Mesh

_Lane = tuple[int, int]  # index of the link; 0 for a to b, 1 for b to a, always 0 if half duplex

Pattern = Callable[..., Iterable[tuple[int, int]]]
"""Messages of a group that are sent at the same time, as (from, to) positions in it.

Called with the size of the group and further arguments. Every message has the same size; a pair
that appears twice sends twice as much.
"""


@dataclass(frozen=True, slots=True)
class PathCost:
    """What every one of some messages gets that are sent at the same time.

    Attributes:
        latency_s: of the longest route.
        bandwidth_bytes_per_s: that all of them have at once; infinite where nothing is sent.
    """

    latency_s: float
    bandwidth_bytes_per_s: float


class Router:
    """Routes between the ranks of a mesh.

    A route is the path of least latency (``planner.devices.paths`` says what happens where there
    are several); all groups along the given axes communicate at once and share the links evenly.
    Results are kept per set of axes for the lifetime of the instance.
    """

    def __init__(self, graph: Cluster, mesh: Mesh) -> None:
        self.graph, self.mesh = graph, mesh
        self._lanes: dict[Hop, _Lane] = {}
        for index, link in enumerate(graph.links):
            self._lanes[link.a, link.b] = (index, 0)
            self._lanes[link.b, link.a] = (index, 0 if link.duplex == "half" else 1)
        self._kept: dict[tuple[frozenset[int], Pattern, tuple[int, ...]], PathCost] = {}
        self._alltoalls: dict[frozenset[int], tuple[float, float]] = {}

    def ring(self, axes: Iterable[int]) -> PathCost:
        """Return what rings along these mesh axes get, all of them at the same time.

        Every group is one ring in row-major order and sends one way round. Latency is that of the
        longest route between neighbours; bandwidth the least, over all links, of the link's
        bandwidth / the number of its flows. A group of one gets 0 s and infinity.
        """
        return self.together(axes, ring)

    def together(self, axes: Iterable[int], pattern: Pattern, *arguments: int) -> PathCost:
        """Return what messages get that all groups along these mesh axes send at the same time."""
        key = (frozenset(axes), pattern, arguments)
        if key not in self._kept:
            groups = self._groups(key[0])
            pairs = list(pattern(len(groups[0]), *arguments))
            self._kept[key] = self._cost((group[src], group[dst]) for group in groups for src, dst in pairs)
        return self._kept[key]

    def between(self, pairs: Iterable[tuple[int, int]]) -> PathCost:
        """Return what messages get that are sent at the same time, as (from, to) positions in the mesh."""
        (everyone,) = self._groups(range(len(self.mesh.axes)))
        return self._cost((everyone[src], everyone[dst]) for src, dst in pairs)

    def alltoall(self, axes: Iterable[int]) -> tuple[float, float]:
        r"""Return latency and seconds per byte of uniform exchanges within all groups at once.

        An exchange in which each of p ranks sends m bytes in total, m / (p - 1) to each other
        one at the same time, takes latency + m * seconds per byte. The most loaded link decides:

        .. math:: \max_l \frac{f_l}{(p - 1) B_l}

        with f_l ordered pairs of ranks whose route uses link l.
        """
        key = frozenset(axes)
        if key not in self._alltoalls:
            groups = self._groups(key)
            others = len(groups[0]) - 1
            self._alltoalls[key] = (0.0, 0.0) if not others else (
                max(map(self.graph.paths.longest_s, groups)),
                1 / (self._share(self.graph.paths.pair_loads(groups)) * others),
            )  # fmt: skip
        return self._alltoalls[key]

    def _groups(self, axes: Iterable[int]) -> Sequence[Sequence[str]]:
        ids = [self.graph.devices[rank].id for rank in self.mesh.ranks]
        return [[ids[position] for position in group] for group in self.mesh.groups(axes)]

    def _cost(self, pairs: Iterable[Hop]) -> PathCost:
        messages = Counter(pair for pair in pairs if pair[0] != pair[1])
        if not messages:
            return PathCost(0.0, math.inf)
        paths = self.graph.paths
        latency_s = max(paths.latency_s(*pair) for pair in messages)
        return PathCost(latency_s, self._share(paths.loads(messages)))

    def _share(self, loads: Mapping[Hop, float]) -> float:
        """Return what each message gets of the most loaded link, in bytes/s."""
        lanes: dict[_Lane, float] = defaultdict(float)
        for hop, load in loads.items():
            lanes[self._lanes[hop]] += load
        return min(self.graph.links[index].bandwidth_bytes_per_s / load for (index, _), load in lanes.items())


def ring(size: int, step: int = 1) -> Iterable[tuple[int, int]]:
    """Every member sends to the one ``step`` places on, around the end."""
    return [(i, (i + step) % size) for i in range(size)] if size > 1 else []


def neighbours(size: int) -> Iterable[tuple[int, int]]:
    """Every member sends to both of its neighbours; the first and the last have one."""
    return [pair for i in range(size - 1) for pair in ((i, i + 1), (i + 1, i))]
