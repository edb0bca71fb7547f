"""What each rank computes on: devices of one kind, or of several kinds and speeds."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from planner.devices.graph import Cluster
from planner.ir.mesh import Mesh
from planner.profile.key import LocalLayer
from planner.profile.table import LayerTime, ProfileTable

NO_OTHERS: Final[Mapping[str, ProfileTable]] = MappingProxyType({})
"""Profiles of other kinds of devices, where there is one kind."""


@dataclass(frozen=True, eq=False)
class Worker:
    """Devices that take equally long for everything.

    Attributes:
        profile: of their kind.
        speed: relative to it.
    """

    profile: ProfileTable
    speed: float

    def time(self, local: LocalLayer) -> LayerTime:
        """Return the time of a piece of a layer."""
        found = self.profile.time(local)
        if self.speed == 1.0:
            return found
        return LayerTime(found.forward_s / self.speed, found.backward_s / self.speed, found.source)


@dataclass(frozen=True, eq=False)
class Crew:
    """The devices of a mesh.

    Attributes:
        workers: of every mesh position; equal devices are one object.
    """

    workers: tuple[Worker, ...]

    @staticmethod
    def of(machine: Cluster, mesh: Mesh, profile: ProfileTable, others: Mapping[str, ProfileTable]) -> "Crew":
        """Return the devices of a mesh.

        Args:
            machine: with the devices.
            mesh: whose ranks are positions of devices.
            profile: of every kind that is not among the others.
            others: profiles by kind.
        """
        made: dict[tuple[str, float], Worker] = {}
        for rank in mesh.ranks:
            device = machine.devices[rank]
            kind = device.kind if device.kind in others else ""
            if (kind, device.speed) not in made:
                made[kind, device.speed] = Worker(others.get(kind, profile), device.speed)
        devices = (machine.devices[rank] for rank in mesh.ranks)
        return Crew(tuple(made[d.kind if d.kind in others else "", d.speed] for d in devices))

    @functools.cached_property
    def different(self) -> tuple[Worker, ...]:
        """The devices that differ from each other, each once."""
        return tuple(dict.fromkeys(self.workers))

    def at(self, positions: int) -> "Crew":
        """Return the devices at some mesh positions, given as bits."""
        if len(self.different) == 1:
            return self
        return Crew(tuple(worker for position, worker in enumerate(self.workers) if positions >> position & 1))

    def time(self, local: LocalLayer) -> LayerTime:
        """Return the time of a piece that all devices compute, on the slowest."""
        return slowest([worker.time(local) for worker in self.different])

    def update_s(self, num_bytes: float) -> float:
        """Return the time of an optimizer step that moves these bytes of memory, on the slowest device."""
        return max(w.profile.roofline.update_s(num_bytes) / w.speed for w in self.different)

    @property
    def bandwidth_bytes_per_s(self) -> float:
        """The memory bandwidth with which the slowest device copies."""
        return min(w.profile.roofline.bandwidth_bytes_per_s * w.speed for w in self.different)


def slowest(times: Sequence[LayerTime]) -> LayerTime:
    """Return the longest forward and the longest backward pass of several ranks; the source is the slowest's."""
    if len(times) == 1:
        return times[0]
    longest = max(times, key=lambda t: t.forward_s + t.backward_s)
    return LayerTime(max(t.forward_s for t in times), max(t.backward_s for t in times), longest.source)
