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
from runtime.comm.communicator import Axes, TorchCommunicator, group_size
from runtime.comm.groups import ProcessGroups
from runtime.launch import Process

MESSAGE_BYTES: Final = (64, 2**10, 2**13, 2**16, 2**18, 2**20, 2**22, 2**24, 2**26)
"""Sizes that are timed; a later one is left out when an earlier one takes ``LONG_S`` or more."""
LONG_S: Final = 0.5
ENOUGH_S: Final = 0.1
"""Repeats stop once they have taken this long."""
REPEATS: Final = (2, 15)
LOADED_BYTES: Final = 2**13
"""Smaller reductions end before computation notices them."""
LOADED_REPEATS: Final = (2, 9)
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
    for num_bytes in MESSAGE_BYTES:
        alone_s = _alone_s(call(num_bytes), work.device)
        loaded_s, lost_s = alone_s, 0.0
        if kind == "all_reduce" and num_bytes >= LOADED_BYTES:
            buffer = torch.zeros(num_bytes // _ITEM_BYTES, device=work.device)
            loaded_s, lost_s = work.beside(functools.partial(communicator.start_all_reduce, buffer, axes), alone_s)
        points.append((num_bytes, alone_s, max(loaded_s, alone_s), max(lost_s, 0.0)))
        if alone_s >= LONG_S and len(points) > 1:
            break
    return points


def _alone_s(collective: Callable[[], object], device: torch.device) -> float:
    collective()
    first_s = _slowest([_seconds(collective, device)])[0]
    repeats = min(max(int(ENOUGH_S / max(first_s, 1e-6)), REPEATS[0]), REPEATS[1])
    return statistics.median(_slowest([_seconds(collective, device) for _ in range(repeats)]))


def _seconds(collective: Callable[[], object], device: torch.device) -> float:
    dist.barrier()
    start = time.perf_counter()
    collective()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


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
