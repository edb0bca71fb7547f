"""What the ranks of a decomposition say to each other, once, when their local networks are trained."""

import io
import time
from typing import Any

import torch

from planner.ir.mesh import Mesh
from runtime.comm.groups import ProcessGroups
from runtime.comm.staging import communicator_of
from runtime.launch import initialize

_ALL = (0,)
"""The only axis of the ranks."""


class Link:
    """Joins the ranks of the job; every rank makes one, and calls its methods in the same order.

    Args:
        num_ranks: of the job, at least 2.
        timeout_s: for the last rank to come.
    """

    def __init__(self, num_ranks: int, timeout_s: float) -> None:
        initialize(timeout_s=timeout_s)
        mesh = Mesh.of(rank=num_ranks)
        self._communicator = communicator_of(mesh, ProcessGroups(mesh, [_ALL], timeout_s))

    def gathered(self, own: Any) -> tuple[list[Any], float]:
        """Return what every rank gives, in rank order, and the seconds that it took once all were there.

        Args:
            own: tensors, numbers and texts in lists and dicts.
        """
        buffer = _packed(own)
        counts = self._communicator.start_gather_ints(buffer.numel())()
        start = time.perf_counter()
        found = self._communicator.all_gather(buffer, counts, _ALL)
        return [_unpacked(part) for part in found.split(counts)], time.perf_counter() - start

    def of_first(self, own: Any) -> Any:
        """Return what rank 0 gives."""
        buffer = _packed(own)
        count = self._communicator.start_gather_ints(buffer.numel())()[0]
        if self._communicator.position:
            buffer = torch.empty(count, dtype=torch.uint8)
        self._communicator.broadcast(buffer)
        return _unpacked(buffer)


def _packed(value: Any) -> torch.Tensor:
    stream = io.BytesIO()
    torch.save(value, stream)
    return torch.frombuffer(bytearray(stream.getvalue()), dtype=torch.uint8)


def _unpacked(buffer: torch.Tensor) -> Any:
    return torch.load(io.BytesIO(buffer.numpy().tobytes()), weights_only=True)
