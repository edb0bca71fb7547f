"""A partition that changes group by group: what a move would cost, without counting from the start."""

import numpy as np

from planner.inference.evaluate import traffic_of, used_of
from planner.inference.problem import FREE, Assignment, Booleans, Floats, Integers, Objective, Problem


class State:
    r"""A partition under way.

    The search minimises a potential, which a move off the bottleneck can lower too. For the rate it is
    :math:`\sum_i (t_i / T)^8` over the seconds t of every device and link per inference, relative to the
    largest, T, at the time of ``rescale``; for communication it is the bytes.

    Attributes:
        part: int64[V], the device of every group.
        count: int64[V, P], readers of a group on each device.
        load: float64[P], FLOP.
        traffic: float64[P, P], bytes, symmetric.
        used: int64[P], bytes.
        present: int64[P, L], groups of a layer on a device.
    """

    def __init__(self, problem: Problem, assignment: Assignment) -> None:
        self.problem, self.graph = problem, problem.graph
        self.num_devices = len(problem.devices)
        self.part = assignment.astype(np.int64)
        graph, num = self.graph, self.num_devices
        self.count = np.zeros((len(graph), num), np.int64)
        np.add.at(self.count, (graph.edges[:, 0], self.part[graph.edges[:, 1]]), 1)
        self.load = np.bincount(self.part, graph.flop, num)
        self.traffic = traffic_of(graph, self.part, num)
        self.used = used_of(graph, self.part, num)
        self.present = np.zeros((num, len(graph.layers)), np.int64)
        np.add.at(self.present, (self.part, graph.layer_of), 1)
        self._sizes = np.array([len(producers) for producers in graph.producers])
        self._first = np.cumsum(self._sizes) - self._sizes
        self._read = np.concatenate(graph.producers)
        self._bytes = graph.output_bytes.astype(np.float64)
        self.is_rate = problem.objective is Objective.INFERENCE_RATE
        self.rescale()

    def rescale(self) -> None:
        """Measure loads and traffic against the bottleneck of now."""
        devices = self.problem.devices
        period = self.period_s
        scale = 1 / period if period > 0 else 1.0
        self._per_flop = scale / devices.flop_per_s
        self._per_byte = scale / devices.link_bytes_per_s

    @property
    def period_s(self) -> float:
        """Seconds per inference: those of the busiest device or link."""
        devices = self.problem.devices
        return float(max((self.load / devices.flop_per_s).max(), (self.traffic / devices.link_bytes_per_s).max()))

    @property
    def value(self) -> float:
        """What is minimised."""
        return self.period_s if self.is_rate else float(self.traffic.sum() / 2)

    def bottleneck(self) -> Integers:
        """Return the one or two devices of the largest time."""
        devices = self.problem.devices
        times = np.diag(self.load / devices.flop_per_s) + self.traffic / devices.link_bytes_per_s
        return np.array(np.unravel_index(int(np.argmax(times)), times.shape))

    @property
    def excess_bytes(self) -> int:
        """Bytes over the limits, of all devices together."""
        return int(np.maximum(self.used - self.problem.devices.memory_bytes, 0).sum())

    def potential(self) -> float:
        """What single moves lower."""
        if not self.is_rate:
            return float(self.traffic.sum() / 2)
        return float(_steep(self.load * self._per_flop).sum() + _steep(self.traffic * self._per_byte).sum() / 2)

    def changes(self, groups: Integers) -> Floats:
        """Return float64[C, P]: by how much the potential grows if a group moves to each device; 0 where it is."""
        here, own = self.part[groups], np.arange(len(groups))
        removed, added = self._removed(groups), self._added(groups)
        if not self.is_rate:
            found = added.sum(axis=2) - removed.sum(axis=1)[:, None]
        else:
            row, per_byte = self.traffic[here], self._per_byte[here]
            fallen = _steep((row - removed) * per_byte) - _steep(row * per_byte)
            after = added + self.traffic
            after[own, :, here] -= removed
            found = _steep(after * self._per_byte).sum(axis=2) - _steep(self.traffic * self._per_byte).sum(axis=1)
            found += fallen.sum(axis=1)[:, None] - fallen  # the link between both devices is in the first term
            flop, load, per_flop = self.graph.flop[groups], self.load[here], self._per_flop[here]
            found += _steep((self.load + flop[:, None]) * self._per_flop) - _steep(self.load * self._per_flop)
            found += (_steep((load - flop) * per_flop) - _steep(load * per_flop))[:, None]
        found[own, here] = 0.0
        return np.asarray(found)

    def _removed(self, groups: Integers) -> Floats:
        """Return float64[C, P]: the bytes that the links of a group's device lose when it leaves."""
        row, producer = self._producers(groups)
        here = self.part[groups]
        last = self.count[producer, here[row]] == 1
        slots = row[last] * self.num_devices + self.part[producer[last]]
        weights = self._bytes[producer[last]]
        found: Floats = (
            np.bincount(slots, weights, len(groups) * self.num_devices).reshape(len(groups), -1).astype(np.float64)
        )
        found += self._sent(groups)
        found[np.arange(len(groups)), here] = 0.0
        return np.asarray(found)

    def _added(self, groups: Integers) -> Floats:
        """Return float64[C, P, P]: for each device, the bytes that its links gain when a group comes to it."""
        num = self.num_devices
        row, producer = self._producers(groups)
        edge, there = np.nonzero(self.count[producer] == 0)
        slots = (row[edge] * num + there) * num + self.part[producer[edge]]
        found: Floats = np.bincount(slots, self._bytes[producer[edge]], len(groups) * num * num).astype(np.float64)
        found = found.reshape(len(groups), num, num)
        found += self._sent(groups)[:, None, :]
        found[:, np.arange(num), np.arange(num)] = 0.0
        return np.asarray(found)

    def _sent(self, groups: Integers) -> Floats:
        """Return float64[C, P]: the bytes that each device needs of each group."""
        return np.asarray((self.count[groups] > 0) * self._bytes[groups, None])

    def _producers(self, groups: Integers) -> tuple[Integers, Integers]:
        """Return what groups read, one after the other, and whose each is: its position among them."""
        sizes = self._sizes[groups]
        row = np.repeat(np.arange(len(groups)), sizes)
        first = np.repeat(self._first[groups] - (np.cumsum(sizes) - sizes), sizes)
        return row, self._read[first + np.arange(len(row))]

    def fits(self, groups: Integers) -> Booleans:
        """Return bool[C, P]: a group may move there, and the device has the memory; False where it is."""
        graph, problem = self.graph, self.problem
        layers, own = graph.layer_of[groups], np.arange(len(groups))
        shared = np.where(self.present[:, layers].T == 0, graph.shared_bytes[layers, None], 0)
        allowed = self.used + graph.memory_bytes[groups, None] + shared <= problem.devices.memory_bytes
        allowed[own, self.part[groups]] = False
        allowed &= (problem.fixed[groups] == FREE)[:, None]
        return np.asarray(allowed)

    def move(self, group: int, there: int) -> None:
        """Move a group, whatever the memory says."""
        here = int(self.part[group])
        if here == there:
            return
        alone = np.array([group])
        removed, added = self._removed(alone)[0], self._added(alone)[0, there]
        self.traffic[here] -= removed
        self.traffic[:, here] -= removed
        self.traffic[there] += added
        self.traffic[:, there] += added
        graph, layer = self.graph, self.graph.layer_of[group]
        self.load[here] -= graph.flop[group]
        self.load[there] += graph.flop[group]
        producers = graph.producers[group]
        self.count[producers, here] -= 1
        self.count[producers, there] += 1
        self.used[here] -= graph.memory_bytes[group]
        self.used[there] += graph.memory_bytes[group]
        self.present[here, layer] -= 1
        self.present[there, layer] += 1
        self.used[here] -= graph.shared_bytes[layer] * (self.present[here, layer] == 0)
        self.used[there] += graph.shared_bytes[layer] * (self.present[there, layer] == 1)
        self.part[group] = there


def _steep(times: Floats) -> Floats:
    """Return the eighth powers: a sum of them is near the largest."""
    square = times * times
    fourth = square * square
    return fourth * fourth
