"""Times the communicator's collectives over every combination of a machine's levels; all ranks take part.

What is timed is what a plan runs: ``TorchCommunicator`` on the process groups of the job, alone and
behind computation.
"""

import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Final

import torch
import torch.distributed as dist
from torch.nn import functional

from planner.ir.mesh import Mesh, MeshAxis
from planner.measure.clock import Evictor, synchronize
from runtime.comm.communicator import Axes, TorchCommunicator, group_size
from runtime.comm.groups import ProcessGroups
from runtime.launch import Process

MESSAGE_BYTES: Final = (64, 2**10, 2**13, 2**16, 2**18, 2**20, 2**22, 2**24, 2**26)
"""Sizes that are timed; a later one is left out when an earlier one takes ``LONG_S`` or more."""
LONG_S: Final = 0.5
ENOUGH_S: Final = 0.1
"""Repeats stop once they have taken this long."""
REPEATS: Final = (3, 15)
LOADED_BYTES: Final = 2**13
"""Smaller reductions end before computation notices them."""
LOADED_REPEATS: Final = (3, 9)
LOADED_ENOUGH_S: Final = 0.5
UNIT_REPEATS: Final = 15
_ITEM_BYTES: Final = 4

Point = tuple[int, float, float, float]
"""Bytes, seconds alone, seconds behind computation, seconds that the computation loses."""


def measure_collectives(
    levels: Sequence[tuple[str, int]], process: Process, timeout_s: float = 300.0
) -> list[dict[str, object]]:
    """Return the times of every collective over every combination of levels, the same on every rank.

    Args:
        levels: names and sizes of the machine's levels, outermost first; ranks are row-major.
        process: of this rank.
        timeout_s: of each collective.

    Returns:
        ``kind``, ``levels`` and ``points`` of each, as in ``planner.devices.schema.CollectiveEntry``.
    """
    mesh = Mesh(tuple(MeshAxis(name, size) for name, size in levels if size > 1), tuple(range(process.world_size)))
    indices = range(len(mesh.axes))
    sets = [axes for count in range(1, len(mesh.axes) + 1) for axes in itertools.combinations(indices, count)]
    communicator = TorchCommunicator(mesh, ProcessGroups(mesh, sets, timeout_s))
    work = _Work(process.device)
    found: list[dict[str, object]] = []
    for axes in sets:
        for kind, call in _calls(communicator, axes, process.device).items():
            points = _points(kind, call, communicator, axes, work)
            entries = [
                {"num_bytes": n, "seconds": alone_s, "loaded_s": loaded_s, "lost_s": lost_s}
                for n, alone_s, loaded_s, lost_s in points
            ]
            found.append({"kind": kind, "levels": [mesh.axes[a].name for a in axes], "points": entries})
    return found


_Call = Callable[[int], Callable[[], object]]
"""From a number of bytes, see ``planner.devices.measured.CollectiveKind``, to the collective."""


def _calls(communicator: TorchCommunicator, axes: Axes, device: torch.device) -> dict[str, _Call]:
    size = group_size(communicator.mesh, axes)

    def elements(num_bytes: float) -> int:
        return max(math.ceil(num_bytes / _ITEM_BYTES / size), 1)  # of one member's part

    def all_reduce(num_bytes: int) -> Callable[[], object]:
        buffer = torch.zeros(elements(num_bytes) * size, device=device)
        return lambda: communicator.all_reduce(buffer, axes)

    def all_gather(num_bytes: int) -> Callable[[], object]:
        part = torch.zeros(elements(num_bytes), device=device)
        return lambda: communicator.all_gather(part, [part.numel()] * size, axes)

    def reduce_scatter(num_bytes: int) -> Callable[[], object]:
        buffer = torch.zeros(elements(num_bytes) * size, device=device)
        return lambda: communicator.reduce_scatter(buffer, [buffer.numel() // size] * size, axes)

    def all_to_all(num_bytes: int) -> Callable[[], object]:
        counts = [elements(num_bytes * size / (size - 1))] * size
        buffer = torch.zeros(sum(counts), device=device)
        return lambda: communicator.exchange(buffer, counts, counts, axes)

    return {
        "all_reduce": all_reduce, "all_gather": all_gather, "reduce_scatter": reduce_scatter, "all_to_all": all_to_all
    }  # fmt: skip


def _points(kind: str, call: _Call, communicator: TorchCommunicator, axes: Axes, work: "_Work") -> list[Point]:
    points: list[Point] = []
    for num_bytes, alone_s in _times(call, work.device):
        loaded_s, lost_s = alone_s, 0.0
        if kind == "all_reduce" and num_bytes >= LOADED_BYTES:
            buffer = torch.zeros(num_bytes // _ITEM_BYTES, device=work.device)
            loaded_s, lost_s = work.beside(functools.partial(communicator.start_all_reduce, buffer, axes), alone_s)
        points.append((num_bytes, alone_s, max(loaded_s, alone_s), max(lost_s, 0.0)))
    return points


def _times(call: _Call, device: torch.device) -> list[tuple[int, float]]:
    """Return the seconds that a message of each size adds to a step, on the average over the ranks.

    In a step, ranks compute between messages: the code of a message is no longer in the caches, and not all ranks come
    to it at the same moment. The average counts the wait for the last one. The sizes take turns, so that a slow moment
    of the machine hits all of them.
    """
    evict = Evictor(device)

    def sample(collective: Callable[[], object]) -> float:
        dist.barrier()
        evict()
        synchronize(device)
        start = time.perf_counter()
        collective()
        synchronize(device)
        return time.perf_counter() - start

    collectives, repeats = [], []
    for collective in map(call, MESSAGE_BYTES):
        sample(collective)
        (first_s,) = _averages([sample(collective)])
        collectives.append(collective)
        repeats.append(min(max(int(ENOUGH_S / first_s), REPEATS[0]), REPEATS[1]))
        if first_s >= LONG_S and len(collectives) > 1:
            break
    samples: list[list[float]] = [[] for _ in collectives]
    for index in range(max(repeats)):
        for collective, found, count in zip(collectives, samples, repeats, strict=True):
            if index < count:
                found.append(sample(collective))
    medians_s = (statistics.median(_averages(found)) for found in samples)
    return list(zip(MESSAGE_BYTES, medians_s, strict=False))


def _averages(samples_s: list[float]) -> list[float]:
    """Return every sample's average over the ranks."""
    found = torch.tensor(samples_s, dtype=torch.float64)
    dist.all_reduce(found)
    return [float(s) / dist.get_world_size() for s in found]


def _slowest(samples_s: list[float]) -> list[float]:
    """Return every sample of the slowest rank."""
    found = torch.tensor(samples_s, dtype=torch.float64)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return [float(s) for s in found]


class _Work:
    """Computation of known length, to run reductions behind."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._x = torch.ones(4, 32, 28, 28, device=device)
        self._weight = torch.ones(32, 32, 3, 3, device=device)

    def _run(self, times: int) -> float:
        start = time.perf_counter()
        for _ in range(times):
            functional.conv2d(self._x, self._weight, padding=1)
        if self.device.type == "cuda":  # not the whole device: the reduction runs on a stream of its own
            torch.cuda.current_stream(self.device).synchronize()
        return time.perf_counter() - start

    def _unit_s(self) -> float:
        dist.barrier()
        return statistics.median(self._run(1) for _ in range(UNIT_REPEATS))

    def beside(self, start_reduction: Callable[[], object], alone_s: float) -> tuple[float, float]:
        """Return seconds of a reduction behind this computation, and what the computation loses."""
        ends_s, lost_s = [], []
        repeats = min(max(int(LOADED_ENOUGH_S / alone_s), LOADED_REPEATS[0]), LOADED_REPEATS[1])
        for _ in range(repeats):
            before_s = self._unit_s()
            dist.barrier()
            start, units = time.perf_counter(), 0
            pending: dist.Work = start_reduction()  # type: ignore[assignment]  # of torch.distributed, see the class
            limit_s = 20 * alone_s + 1.0  # a reduction that never ends fails by its own timeout
            while not pending.is_completed() and time.perf_counter() - start < limit_s:
                self._run(1)
                units += 1
            pending.wait()
            ends_s.append(time.perf_counter() - start)
            lost_s.append(ends_s[-1] - units * (before_s + self._unit_s()) / 2)
        return statistics.median(_slowest(ends_s)), statistics.median(_slowest(lost_s))
