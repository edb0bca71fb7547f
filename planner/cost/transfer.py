"""Seconds and bytes of the steps that ``planner.ir.transfer`` lists."""

import functools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.cost.collectives import (
    all_reduce_s,
    exchange_s,
    ring_all_gather_s,
    ring_reduce_scatter_s,
)
from planner.devices.route import Router
from planner.ir.layout import Layout
from planner.ir.transfer import Step, StepKind, steps


@dataclass(frozen=True, slots=True)
class Price:
    """Seconds of a transfer, and bytes that the busiest rank sends."""

    seconds: float
    num_bytes: float

    def __add__(self, other: "Price") -> "Price":
        return Price(self.seconds + other.seconds, self.num_bytes + other.num_bytes)


FREE = Price(0.0, 0.0)


@functools.lru_cache(maxsize=1 << 14)
def _intervals(layout: Layout) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return start and stop of every rank's region, int64[ranks, dims] each."""
    mesh = layout.mesh
    coordinates = np.indices(mesh.shape).reshape(len(mesh.axes), -1) if mesh.axes else np.zeros((0, 1), int)
    starts, stops = [], []
    for dim in range(len(layout.shape)):
        index = np.zeros(mesh.size, int)
        for axis in layout.axes_of(dim):
            index = index * mesh.shape[axis] + coordinates[axis]
        pieces = np.array(layout.pieces(dim))
        starts.append(pieces[index, 0])
        stops.append(pieces[index, 1])
    return np.array(starts).reshape(-1, mesh.size).T, np.array(stops).reshape(-1, mesh.size).T


def largest_received(source: Layout, target: Layout) -> int:
    """Return the most elements that a rank needs and does not hold."""
    have_start, have_stop = _intervals(source)
    need_start, need_stop = _intervals(target)
    need = np.prod(need_stop - need_start, axis=1)
    common = np.minimum(have_stop, need_stop) - np.maximum(have_start, need_start)
    held = np.prod(np.maximum(common, 0), axis=1)
    return int((need - held).max())


@dataclass(frozen=True)
class StepPricer:
    """Prices steps on the machine of a router; keeps what it priced for its lifetime."""

    router: Router
    _prices: dict[tuple[Layout, Layout, int], Price]

    def price(self, source: Layout, target: Layout, item_bytes: int) -> Price:
        """Return the price of turning one layout into another, for elements of so many bytes."""
        key = (source.value, target.value, item_bytes)
        if key not in self._prices:
            self._prices[key] = sum((self.step(s, item_bytes) for s in steps(*key[:2])), FREE)
        return self._prices[key]

    def all_reduce(self, axes: tuple[int, ...], num_bytes: int) -> Price:
        """Return the price of an all-reduce of a buffer of so many bytes on each rank."""
        size = math.prod(self.router.mesh.shape[a] for a in axes)
        return Price(all_reduce_s(self.router, axes, num_bytes), 2 * (size - 1) / size * num_bytes)

    def all_gather(self, axes: tuple[int, ...], num_bytes: int) -> Price:
        """Return the price of an all-gather whose result has so many bytes on each rank."""
        size = math.prod(self.router.mesh.shape[a] for a in axes)
        seconds = ring_all_gather_s(num_bytes, size, self.router.ring(axes))
        return Price(seconds, (size - 1) / size * num_bytes)

    def step(self, step: Step, item_bytes: int) -> Price:
        """Return the price of one step; local ones are free."""
        if not step.kind.communicates:
            return FREE
        size = math.prod(self.router.mesh.shape[a] for a in step.axes)
        share = (size - 1) / size
        held = math.prod(step.source.largest_shape()) * item_bytes
        match step.kind:
            case StepKind.ALL_REDUCE:
                return self.all_reduce(step.axes, held)
            case StepKind.REDUCE_SCATTER:
                path = self.router.ring(step.axes)
                return Price(ring_reduce_scatter_s(held, size, path), share * held)
            case StepKind.ALL_GATHER:
                return self.all_gather(step.axes, math.prod(step.target.largest_shape()) * item_bytes)
            case _:
                moved = largest_received(step.source, step.target) * item_bytes
                return Price(exchange_s(self.router, step.axes, moved), float(moved))
