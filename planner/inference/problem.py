"""What is placed where: groups of neurons, devices, and what counts [Oliveira19]."""

from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Final

import numpy as np
from numpy.typing import NDArray

from planner.devices.graph import Cluster
from planner.errors import InfeasibleError
from planner.units import format_bytes

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Booleans = NDArray[np.bool_]
Assignment = Integers
"""int64[V]: the device of every group."""

FREE: Final = -1


class Objective(StrEnum):
    """What a partition is chosen for."""

    INFERENCE_RATE = "inference-rate"
    """Inferences per second of the whole pipeline, as many as possible."""
    COMMUNICATION = "communication"
    """Bytes between devices per inference, as few as possible."""


@dataclass(frozen=True, slots=True)
class Layer:
    """The groups of one layer, neighbours in numbering.

    Attributes:
        id: of the layer graph.
        op: its operator, for people.
        grid: pieces along every dimension that is cut, by its name; groups are numbered row-major. Empty: one group.
        shared_bytes: weights and biases that every device with a group of this layer holds once.
    """

    id: str
    op: str
    grid: tuple[tuple[str, int], ...]
    shared_bytes: int


@dataclass(frozen=True)
class GroupGraph:
    """A network cut into V groups of neurons, for one sample.

    Attributes:
        name: of the model.
        layers: L of them, in topological order.
        layer_of: int64[V], ascending.
        flop: float64[V], of one inference.
        memory_bytes: int64[V]: outputs, and weights of its own.
        output_bytes: int64[V]: what another device that reads it gets.
        edges: int64[E, 2], (producer, reader), each pair once.
        inputs: indices of the groups of the model's inputs.
    """

    name: str
    layers: tuple[Layer, ...]
    layer_of: Integers
    flop: Floats
    memory_bytes: Integers
    output_bytes: Integers
    edges: Integers
    inputs: Integers

    def __len__(self) -> int:
        return len(self.layer_of)

    @cached_property
    def shared_bytes(self) -> Integers:
        """int64[L]."""
        return np.array([layer.shared_bytes for layer in self.layers], np.int64)

    @cached_property
    def producers(self) -> tuple[Integers, ...]:
        """Of every group: the groups that it reads."""
        return _rows(self.edges[:, 1], self.edges[:, 0], len(self))

    @cached_property
    def readers(self) -> tuple[Integers, ...]:
        """Of every group: the groups that read it."""
        return _rows(self.edges[:, 0], self.edges[:, 1], len(self))

    @property
    def total_bytes(self) -> int:
        """Memory on a single device."""
        return int(self.memory_bytes.sum() + self.shared_bytes.sum())


@dataclass(frozen=True)
class Devices:
    """P devices, each pair joined by a link of its own.

    Attributes:
        names: of the devices.
        flop_per_s: float64[P].
        memory_bytes: int64[P].
        link_bytes_per_s: float64[P, P], symmetric: both directions together; the diagonal is infinite.
    """

    names: tuple[str, ...]
    flop_per_s: Floats
    memory_bytes: Integers
    link_bytes_per_s: Floats

    def __len__(self) -> int:
        return len(self.names)

    @classmethod
    def of(cls, graph: Cluster) -> "Devices":
        """Return the devices of a machine; a pair has the bandwidth of the slowest link of its route.

        Messages of different pairs do not slow each other down, as in [Oliveira19]: where a medium is shared, the file
        of the machine has to give each pair its part.
        """
        bandwidths: dict[tuple[str, str], float] = {}
        for link in graph.links:
            bandwidths[link.a, link.b] = bandwidths[link.b, link.a] = link.bandwidth_bytes_per_s
        names = tuple(device.id for device in graph.devices)
        links = np.full((len(names), len(names)), np.inf)
        for p, first in enumerate(names):
            for q, second in enumerate(names[:p]):
                ways = graph.paths.ways(first, second)
                slowest = min(bandwidths[hop] for _, hops in ways for hop in hops)
                links[p, q] = links[q, p] = slowest
        return cls(
            names,
            np.array([device.peak_flop_per_s["fp32"] for device in graph.devices]),
            np.array([device.memory_bytes for device in graph.devices], np.int64),
            links,
        )


@dataclass(frozen=True)
class Problem:
    """A network, devices, and what counts.

    Attributes:
        fixed: int64[V]: the device that a group must be on, or ``FREE``.
    """

    graph: GroupGraph
    devices: Devices
    objective: Objective
    fixed: Integers

    @classmethod
    def of(
        cls, graph: GroupGraph, devices: Devices, objective: Objective, input_device: int | None = None
    ) -> "Problem":
        """Return a problem in which the model's inputs are on one device, or anywhere."""
        fixed = np.full(len(graph), FREE, np.int64)
        if input_device is not None:
            fixed[graph.inputs] = input_device
        return cls(graph, devices, objective, fixed)

    @property
    def rate_bound_per_s(self) -> float:
        """A rate that no partition exceeds: all devices always busy, and the largest group on the fastest one."""
        flop = self.graph.flop
        if not flop.any():
            return float("inf")
        speeds = self.devices.flop_per_s
        return float(min(speeds.sum() / flop.sum(), speeds.max() / flop.max()))

    def refuse_impossible(self) -> None:
        """Raise where it can be proven that no partition fits.

        Raises:
            InfeasibleError: a group fits no device, or all devices together are too small.
        """
        graph, room = self.graph, self.devices.memory_bytes
        alone = graph.memory_bytes + graph.shared_bytes[graph.layer_of]
        largest = int(np.argmax(alone))
        if alone[largest] > room.max():
            layer = graph.layers[graph.layer_of[largest]]
            raise InfeasibleError(
                f"a group of layer {layer.id!r} needs {format_bytes(int(alone[largest]))} with the weights that it "
                f"shares, and the largest device has {format_bytes(int(room.max()))}. Smaller groups (--group), "
                "smaller numbers (--element-bytes) or larger devices would help."
            )
        if graph.total_bytes > room.sum():
            raise InfeasibleError(
                f"{graph.name} needs {format_bytes(graph.total_bytes)}, each layer's weights counted once, and all "
                f"{len(room)} devices together have {format_bytes(int(room.sum()))}. More devices or smaller numbers "
                "(--element-bytes) would help."
            )
        self._refuse_crowded()

    def _refuse_crowded(self) -> None:
        """Refuse devices that cannot even hold what is fixed on them."""
        graph = self.graph
        for p in set(self.fixed.tolist()) - {FREE}:
            held = self.fixed == p
            layers = np.unique(graph.layer_of[held])
            needed = int(graph.memory_bytes[held].sum() + graph.shared_bytes[layers].sum())
            if needed > self.devices.memory_bytes[p]:
                raise InfeasibleError(
                    f"the inputs need {format_bytes(needed)} on {self.devices.names[p]}, which has "
                    f"{format_bytes(int(self.devices.memory_bytes[p]))}; choose another --input-device, or none"
                )


def _rows(keys: Integers, values: Integers, num: int) -> tuple[Integers, ...]:
    order = np.lexsort((values, keys))
    bounds = np.searchsorted(keys[order], np.arange(1, num))
    return tuple(np.split(values[order], bounds))
