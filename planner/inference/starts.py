"""Partitions that look at memory first: the baselines of [Oliveira19], and where the search starts."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from planner.inference.problem import FREE, Assignment, Floats, Integers, Layer, Problem

_UNPLACED: Final = -1
_LONGEST: Final = 0.8
"""How often a halving cuts the longest side."""
_LARGE: Final = 8
"""A group that fills more than this part of a device is placed before others."""
Preference = Callable[[int, "Placing"], Floats]
"""Of a group: float64[P], the device with the least is taken first."""


class Placing:
    """A partition that is filled group by group; nothing is ever moved.

    Attributes:
        part: int64[V]; -1 where a group is not placed yet.
        used: int64[P], bytes.
        load: float64[P], FLOP.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.part = np.full(len(problem.graph), _UNPLACED, np.int64)
        self.used = np.zeros(len(problem.devices), np.int64)
        self.load = np.zeros(len(problem.devices))
        self._present = np.zeros((len(problem.devices), len(problem.graph.layers)), bool)
        for group in np.flatnonzero(problem.fixed != FREE).tolist():
            self._put(group, int(problem.fixed[group]))

    def after(self, group: int) -> Floats:
        """Return float64[P]: the bytes that a device would hold with this group."""
        graph = self.problem.graph
        layer = graph.layer_of[group]
        shared = np.where(self._present[:, layer], 0, graph.shared_bytes[layer])
        return np.asarray(self.used + graph.memory_bytes[group] + shared, np.float64)

    def place(self, groups: Iterable[int], preference: Preference) -> bool:
        """Put groups one after the other on the device with room that they prefer; False if there is none."""
        if (self.used > self.problem.devices.memory_bytes).any():
            return False  # by what is fixed
        for group in groups:
            if self.part[group] != _UNPLACED:
                continue
            costs = np.where(self.after(group) <= self.problem.devices.memory_bytes, preference(group, self), np.inf)
            if np.isinf(costs).all():
                return False
            self._put(group, int(np.argmin(costs)))
        return True

    def _put(self, group: int, device: int) -> None:
        self.used[device] = self.after(group)[device]
        self.load[device] += self.problem.graph.flop[group]
        self._present[device, self.problem.graph.layer_of[group]] = True
        self.part[group] = device


def greedy(problem: Problem) -> Assignment | None:
    """Fill one device after the other, in the order of the layers."""
    return _placed(problem, range(len(problem.graph)), lambda _, placing: np.arange(len(placing.used), dtype=float))


def best_fit(problem: Problem) -> Assignment | None:
    """Put each group, in the order of the layers, where the least room is left."""
    room = problem.devices.memory_bytes
    return _placed(problem, range(len(problem.graph)), lambda group, placing: room - placing.after(group))


def equal_shares(problem: Problem) -> Assignment | None:
    """Divide every layer into neighbouring shares in proportion to speed, as far as memory allows (iRgreedy)."""
    graph, speeds = problem.graph, problem.devices.flop_per_s
    shares = np.cumsum(speeds) / speeds.sum()
    wanted = np.empty(len(graph), np.int64)
    for layer in range(len(graph.layers)):
        members = np.flatnonzero(graph.layer_of == layer)
        wanted[members] = np.searchsorted(shares, (np.arange(len(members)) + 0.5) / len(members))
    num = len(speeds)
    return _placed(problem, _hard_first(problem), lambda group, _: (np.arange(num) - wanted[group]) % num * 1.0)


def packed(problem: Problem, generator: np.random.Generator) -> Assignment | None:
    """Pack memory: layers from the heaviest group on, each device filled in turn; with some disorder.

    Layers that share much come early and stay together, so that few devices hold their weights.
    """
    graph = problem.graph
    weight = (graph.memory_bytes + graph.shared_bytes[graph.layer_of]).astype(float)
    per_layer = np.array([weight[graph.layer_of == layer].max() for layer in range(len(graph.layers))])
    noisy = per_layer * generator.uniform(0.7, 1.4, len(per_layer))
    order = np.lexsort((np.arange(len(graph)), -noisy[graph.layer_of]))
    room = problem.devices.memory_bytes
    preferred = generator.permutation(len(room)).astype(float)
    return _placed(problem, order.tolist(), lambda group, placing: (room - placing.after(group)) + 1e-9 * preferred)


def tiled(problem: Problem, generator: np.random.Generator) -> Assignment | None:
    """Give each device the same tile of every layer; the tiles are made by halving the devices, again and again.

    What a tile reads is then mostly in it, but for its border. Halvings cut the longest side or, at random, another
    one, in proportion to the speeds. Where memory is scarce, a group that does not find room in its tile goes where
    it exchanges most with what is placed already; in every second start, all groups do.
    """
    graph, speeds = problem.graph, problem.devices.flop_per_s
    num = len(speeds)
    tree = _bisection(generator.permutation(num), speeds, generator)
    wanted = np.zeros(len(graph), np.int64)
    for index, layer in enumerate(graph.layers):
        members = np.flatnonzero(graph.layer_of == index)
        wanted[members] = _leaves(tree, _places(layer), len(members))
    tile_first = bool(generator.integers(2))

    def preference(group: int, placing: Placing) -> Floats:
        costs = -_exchanged(problem, placing, group) + placing.load / (speeds * (1 + placing.load.max()))
        costs[wanted[group]] -= np.inf if tile_first else 1.0
        return np.asarray(costs)

    return _placed(problem, _hard_first(problem), preference)


def _exchanged(problem: Problem, placing: Placing, group: int) -> Floats:
    """Return float64[P]: the bytes that need not be sent if the group is on a device."""
    graph, part, num = problem.graph, placing.part, len(problem.devices)
    producers, readers = graph.producers[group], part[graph.readers[group]]
    producers = producers[part[producers] != _UNPLACED]
    found = np.bincount(part[producers], graph.output_bytes[producers], num).astype(np.float64)
    found[readers[readers != _UNPLACED]] += graph.output_bytes[group]
    return found


def layer_wise(problem: Problem) -> Assignment | None:
    """Return the best partition into runs of whole layers, one for each device in order; None if none fits.

    The search is over the cuts, with the busiest device as its cost; [Oliveira19]'s is by hand.
    """
    graph, devices = problem.graph, problem.devices
    num_layers, num = len(graph.layers), len(devices)
    flop = np.concatenate([[0.0], np.cumsum(np.bincount(graph.layer_of, graph.flop, num_layers))])
    own = np.bincount(graph.layer_of, graph.memory_bytes, num_layers) + graph.shared_bytes
    held = np.concatenate([[0.0], np.cumsum(own)])
    best = np.full((num + 1, num_layers + 1), np.inf)  # devices used, layers placed
    best[0, 0] = 0.0
    cut = np.zeros((num + 1, num_layers + 1), np.int64)
    for p in range(num):
        for stop in range(num_layers + 1):
            for start in range(stop + 1):
                if held[stop] - held[start] > devices.memory_bytes[p]:
                    continue
                cost = max(best[p, start], (flop[stop] - flop[start]) / devices.flop_per_s[p])
                if cost < best[p + 1, stop]:
                    best[p + 1, stop], cut[p + 1, stop] = cost, start
    if np.isinf(best[num, num_layers]):
        return None
    of_layer = np.empty(num_layers, np.int64)
    stop = num_layers
    for p in range(num, 0, -1):
        of_layer[cut[p, stop] : stop] = p - 1
        stop = int(cut[p, stop])
    found = of_layer[graph.layer_of]
    return found if ((problem.fixed == FREE) | (problem.fixed == found)).all() else None


def _placed(problem: Problem, order: Sequence[int], preference: Preference) -> Assignment | None:
    placing = Placing(problem)
    return placing.part if placing.place(order, preference) else None


def _hard_first(problem: Problem) -> list[int]:
    """Return the groups, first those that fill much of a device, then those that read much; in the order of layers."""
    graph = problem.graph
    weight = (graph.memory_bytes + graph.shared_bytes[graph.layer_of]).astype(np.float64)
    read = np.bincount(graph.edges[:, 1], graph.output_bytes[graph.edges[:, 0]], len(graph))
    weight[weight * _LARGE < problem.devices.memory_bytes.min()] = 0.0
    return [int(group) for group in np.lexsort((np.arange(len(graph)), -read, -weight))]


@dataclass(frozen=True, slots=True)
class _Halving:
    """Devices in two halves: ``share`` of the groups to the first one, along a side chosen by ``side`` of [0, 1)."""

    share: float
    side: float
    first: "_Halving | int"
    second: "_Halving | int"


def _bisection(devices: Integers, speeds: Floats, generator: np.random.Generator) -> _Halving | int:
    if len(devices) == 1:
        return int(devices[0])
    half = (len(devices) + int(generator.integers(2))) // 2
    parts = devices[:half], devices[half:]
    share = float(speeds[parts[0]].sum() / speeds[devices].sum())
    first, second = (_bisection(part, speeds, generator) for part in parts)
    return _Halving(share, float(generator.uniform()), first, second)


def _places(layer: Layer) -> Floats:
    """Return float64[groups, dimensions]: where the groups of a layer lie, in [0, 1)."""
    sizes = [size for _, size in layer.grid] or [1]
    axes = np.meshgrid(*((np.arange(size) + 0.5) / size for size in sizes), indexing="ij")
    return np.stack([axis.ravel() for axis in axes], axis=1)


def _leaves(tree: _Halving | int, places: Floats, num: int) -> Integers:
    """Return int64[num]: the device of every group."""
    found = np.zeros(num, np.int64)

    def descend(node: _Halving | int, members: Integers) -> None:
        if isinstance(node, int):
            found[members] = node
            return
        if not len(members):
            return
        extents = np.ptp(places[members], axis=0) if len(members) > 1 else np.zeros(places.shape[1])
        sides = np.argsort(-extents, kind="stable")
        side = sides[0] if node.side < _LONGEST else sides[int(node.side * 1e6) % len(sides)]
        order = members[np.argsort(places[members, side], kind="stable")]
        cut = round(node.share * len(order))
        descend(node.first, order[:cut])
        descend(node.second, order[cut:])

    descend(tree, np.arange(num))
    return found
