"""What moves between ranks that work on a batch in turns: everyone's samples of a turn, and their gradients back."""

from collections.abc import Callable, Sequence

import torch

from planner.ir.transfer import StepKind
from runtime.comm.communicator import Communicator
from runtime.comm.exchange import named

Arriving = Callable[[], torch.Tensor]
"""Waits for a tensor under way."""


class Turns:
    """Moves samples between all ranks; what was started runs behind computation, on process groups of its own.

    Ranks start the same moves in the same order.

    Args:
        communicator: of all ranks on one axis; nobody else uses it.
    """

    def __init__(self, communicator: Communicator) -> None:
        self._communicator = communicator
        self._axes = tuple(range(len(communicator.mesh.axes)))
        self.rank = communicator.position

    def start_counting(self, samples: int) -> Callable[[], list[int]]:
        """Start telling each other how many samples each rank has."""
        arriving = self._communicator.start_gather_ints(samples)

        def arrived() -> list[int]:
            with named(StepKind.ALL_GATHER, self._communicator, "the numbers of samples"):
                return arriving()

        return arrived

    def start_gathering(self, own: torch.Tensor, counts: Sequence[int], what: str) -> Arriving:
        """Start putting the samples of all ranks together, in the order of the ranks.

        Args:
            own: samples of this rank, in the first dimension; maybe none.
            counts: of every rank.
            what: they are, for messages of errors.
        """
        if len(counts) == 1:
            return lambda: own
        shape, width = (sum(counts), *own.shape[1:]), own.shape[1:].numel()
        sizes, flat = [n * width for n in counts], own.contiguous().view(-1)
        return self._named(StepKind.ALL_GATHER, what, shape, lambda: self._start_gathering(flat, sizes))

    def start_returning(self, addends: torch.Tensor, counts: Sequence[int], what: str) -> Arriving:
        """Start adding gradients of everyone's samples; what arrives is that of this rank's. Arguments as above."""
        if len(counts) == 1:
            return lambda: addends
        shape, width = (counts[self.rank], *addends.shape[1:]), addends.shape[1:].numel()
        sizes, flat = [n * width for n in counts], addends.contiguous().view(-1)
        return self._named(StepKind.REDUCE_SCATTER, what, shape, lambda: self._start_returning(flat, sizes))

    def _start_gathering(self, own: torch.Tensor, sizes: Sequence[int]) -> Arriving:
        count, own_size = len(sizes), own.numel()
        if min(sizes) != max(sizes):  # no backend gathers uneven pieces: everyone sends its piece to everyone
            return self._communicator.start_exchange(own.repeat(count), [own_size] * count, sizes, self._axes)
        result = own.new_empty(count * own_size)
        pending = self._communicator.start_all_gather(result, own, self._axes)

        def arrived() -> torch.Tensor:
            pending.wait()
            return result

        return arrived

    def _start_returning(self, addends: torch.Tensor, sizes: Sequence[int]) -> Arriving:
        count, own_size = len(sizes), sizes[self.rank]
        if min(sizes) != max(sizes):
            arriving = self._communicator.start_exchange(addends, sizes, [own_size] * count, self._axes)
            return lambda: arriving().view(count, own_size).sum(0)
        result = addends.new_empty(own_size)
        pending = self._communicator.start_reduce_scatter(addends, result, self._axes)

        def arrived() -> torch.Tensor:
            pending.wait()
            return result

        return arrived

    def _named(self, kind: StepKind, what: str, shape: Sequence[int], start: Callable[[], Arriving]) -> Arriving:
        """Start a move, and name it where it fails, now or later; what arrives gets a shape."""
        with named(kind, self._communicator, what):
            arriving = start()

        def arrived() -> torch.Tensor:
            with named(kind, self._communicator, what):
                return arriving().view(shape)

        return arrived
