"""What moves between the ranks of two pipeline stages: activations forward, their gradients backward.

A rank sends exactly the elements that another one needs, so stages may have different numbers of ranks and different
layouts. Memory for what is received is made anew for every message and freed with the last that reads it: a buffer that
is used again could still be on its way to the next stage (a relayed tensor) or belong to a graph.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import torch
import torch.distributed as dist

from runtime.comm.failures import peer_failed
from runtime.comm.staging import on_host
from runtime.pipeline.build import Copy

MANY_SENT: Final = 64
"""Messages under way, and so tensors that are kept, above which the oldest is waited for.

What was sent is read in the order in which it was sent, by a rank that needs nothing later for that, so nobody waits in
a circle. Gloo does not tell before it is waited for whether a message has gone.
"""


@dataclass
class Arrival:
    """A tensor under way to this rank."""

    tensor: torch.Tensor
    waiting: list[tuple[dist.Work | None, Callable[[], None], str]] = field(default_factory=list)

    def wait(self) -> torch.Tensor:
        """Return the tensor when all of it is there.

        Raises:
            RunError: a peer died or hangs.
        """
        for work, place, what in self.waiting:
            if work is not None:
                finish(work, what)
            place()
        self.waiting.clear()
        return self.tensor


def finish(work: dist.Work, what: str) -> None:
    """Wait for a message.

    Raises:
        RunError: its peer died, or hangs for longer than the group's timeout; with what the message was.
    """
    try:
        work.wait()
    except RuntimeError as error:  # torch's own errors of backends
        raise peer_failed(dist.get_rank(), what, error) from error


class Post:
    """Messages between this rank and the ranks of other stages; between two ranks they keep their order.

    Args:
        group: of all ranks of the pipeline.
        device: of the tensors.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self._group, self._device, self._rank = group, device, dist.get_rank()
        self._through_host = device.type == "cuda" and dist.get_backend(group) != "nccl"
        self._sent: deque[tuple[dist.Work, str]] = deque()
        self._own: deque[torch.Tensor] = deque()

    def send(self, tensor: torch.Tensor, copies: Sequence[Copy], what: str) -> None:
        """Start sending parts of a tensor; nobody may write into it before they have gone.

        Args:
            tensor: this rank's region.
            copies: of it.
            what: it is, for messages of errors.

        Raises:
            RunError: a peer died.
        """
        for copy in copies:  # elements in the order of their indices, as `receive` takes them
            peer, piece = copy.peer, tensor.detach()[copy.part].contiguous()
            if peer == self._rank:
                self._own.append(piece)
                continue
            label = f"sending {what} to rank {peer}"
            message = on_host(piece) if self._through_host else piece
            with _named(label):
                work = dist.isend(message, group=self._group, group_dst=dist.get_group_rank(self._group, peer))
            if work is not None:
                self._sent.append((work, label))
        self.flush(num_left=MANY_SENT)

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype, copies: Sequence[Copy], what: str) -> Arrival:
        """Start receiving a tensor; arguments as of ``send``. What this rank sends itself must have been sent before.

        Raises:
            RunError: a peer died.
        """
        found = Arrival(torch.empty(shape, dtype=dtype, device=self._device))
        for copy in copies:
            peer, place = copy.peer, found.tensor[copy.part]
            if peer == self._rank:
                place.copy_(self._own.popleft())
                continue
            is_direct = place.is_contiguous() and not self._through_host
            message = place if is_direct else torch.empty(place.shape, dtype=dtype, device=self._message_device)
            label = f"receiving {what} from rank {peer}"
            with _named(label):
                work = dist.irecv(message, group=self._group, group_src=dist.get_group_rank(self._group, peer))
            found.waiting.append((work, _nothing if is_direct else _copying(message, place), label))
        return found

    @property
    def _message_device(self) -> torch.device:
        return torch.device("cpu") if self._through_host else self._device

    def flush(self, num_left: int = 0) -> None:
        """Wait until all that was sent has gone, but for the latest copies of a number.

        Raises:
            RunError: a peer died or hangs.
        """
        while len(self._sent) > num_left:
            finish(*self._sent.popleft())


class _named:  # noqa: N801  # a context manager
    """Say what was to be sent or received where posting it fails."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, RuntimeError):
            raise peer_failed(dist.get_rank(), self._what, error) from error


def _nothing() -> None:
    return None


def _copying(message: torch.Tensor, place: torch.Tensor) -> Callable[[], None]:
    def copy() -> None:
        place.copy_(message)

    return copy
