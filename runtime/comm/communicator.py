"""The few collectives that everything else is made of, with two implementations.

All work on flat, contiguous buffers along a set of mesh axes; the group is formed by the ranks that
differ only there, in row-major order. ``TorchCommunicator`` talks through ``torch.distributed``;
``ThreadCommunicator`` joins threads of one process, so that tests run the real lowered modules of
many ranks without processes.
"""

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.distributed as dist

from planner.errors import RunError
from planner.ir.mesh import Mesh
from runtime.comm.groups import ProcessGroups
from runtime.comm.messages import is_direct, is_small, start_messages

Axes = tuple[int, ...]

# torch 2.13 renamed these and warns at the old names
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Pending(Protocol):
    """A collective under way."""

    def wait(self) -> object:
        """Block (or make the current stream wait) until it is done."""
        ...


class Communicator(Protocol):
    """Collectives along mesh axes.

    Attributes:
        mesh: the ranks.
        position: of this rank in the mesh.
    """

    mesh: Mesh
    position: int

    def all_reduce(self, buffer: torch.Tensor, axes: Axes) -> None:
        """Add the buffers of the group, in place."""
        ...

    def start_all_reduce(self, buffer: torch.Tensor, axes: Axes) -> Pending:
        """Start adding the buffers of the group in place; calls must come in one order on all ranks."""
        ...

    def start_reduce_scatter(self, buffer: torch.Tensor, own: torch.Tensor, axes: Axes) -> Pending:
        """Start adding the buffers of the group; this rank's equal part of it comes to ``own``, maybe that itself.

        Calls must come in one order on all ranks, together with those of ``start_all_gather``.
        """
        ...

    def start_all_gather(self, result: torch.Tensor, own: torch.Tensor, axes: Axes) -> Pending:
        """Start putting the equal parts of the group one after the other into ``result``, in one order on all ranks."""
        ...

    def all_gather(self, buffer: torch.Tensor, counts: Sequence[int], axes: Axes) -> torch.Tensor:
        """Return the buffers of the group one after the other; member i gives ``counts[i]`` elements."""
        ...

    def reduce_scatter(self, buffer: torch.Tensor, counts: Sequence[int], axes: Axes) -> torch.Tensor:
        """Return the sum over the group of everyone's part for this rank; member i gets ``counts[i]``."""
        ...

    def exchange(
        self,
        buffer: torch.Tensor,
        send_counts: Sequence[int],
        receive_counts: Sequence[int],
        axes: Axes,
    ) -> torch.Tensor:
        """Send consecutive parts of the buffer to the members; return theirs for this rank."""
        ...

    def start_exchange(
        self,
        buffer: torch.Tensor,
        send_counts: Sequence[int],
        receive_counts: Sequence[int],
        axes: Axes,
    ) -> Callable[[], torch.Tensor]:
        """Start an exchange; the result waits for it. No other blocking collective may start before."""
        ...

    def start_gather_ints(self, value: int) -> Callable[[], list[int]]:
        """Start collecting one number of every rank; the result waits for it."""
        ...

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Overwrite the tensor with that of mesh position 0."""
        ...


def members_of(mesh: Mesh, position: int, axes: Axes) -> tuple[int, ...]:
    """Return the mesh positions of a rank's group along these axes, in row-major order."""
    return next(group for group in mesh.groups(axes) if position in group)


class TorchCommunicator:
    """Collectives of ``torch.distributed``: NCCL for CUDA tensors, gloo for CPU tensors."""

    def __init__(self, mesh: Mesh, groups: ProcessGroups) -> None:
        self.mesh, self._groups = mesh, groups
        self.position = mesh.ranks.index(dist.get_rank())

    def all_reduce(self, buffer: torch.Tensor, axes: Axes) -> None:
        group = self._groups.blocking(axes)
        if is_small(buffer, group):  # one exchange, where gloo's ring takes two rounds of the same bytes together
            buffer += self._swapped(buffer, buffer.numel(), axes)
        else:
            dist.all_reduce(buffer, group=group)

    def _swapped(self, buffer: torch.Tensor, count: int, axes: Axes) -> torch.Tensor:
        """Return what the other rank of two gives for this buffer: so many elements."""
        peer = 1 - dist.get_rank(self._groups.blocking(axes))
        sends, receives = [0, 0], [0, 0]
        sends[peer], receives[peer] = buffer.numel(), count
        return self.exchange(buffer, sends, receives, axes)

    def start_all_reduce(self, buffer: torch.Tensor, axes: Axes) -> Pending:
        work: Pending = dist.all_reduce(buffer, group=self._groups.overlapped(axes), async_op=True)
        return work

    def start_reduce_scatter(self, buffer: torch.Tensor, own: torch.Tensor, axes: Axes) -> Pending:
        group = self._groups.overlapped(axes)
        work: Pending
        if dist.get_backend(group) == "nccl":
            work = _reduce_scatter(own, buffer, group=group, async_op=True)
            return work
        # gloo emulates reduce-scatter by an all-reduce, which moves twice the bytes
        parts = torch.empty_like(buffer)
        counts = [own.numel()] * group.size()
        work = _start_exchange(parts, buffer, counts, counts, group)
        return _Addends(work, parts, own)

    def start_all_gather(self, result: torch.Tensor, own: torch.Tensor, axes: Axes) -> Pending:
        group = self._groups.overlapped(axes)
        if is_direct(own, counts := [own.numel()] * group.size()):
            return start_messages([own] * len(counts), result.split(counts), group)
        work: Pending = _all_gather(result, own, group=group, async_op=True)
        return work

    def all_gather(self, buffer: torch.Tensor, counts: Sequence[int], axes: Axes) -> torch.Tensor:
        group = self._groups.blocking(axes)
        result = buffer.new_empty(sum(counts))
        if is_direct(buffer, counts):
            start_messages([buffer] * len(counts), result.split(list(counts)), group).wait()
            return result
        if is_small(buffer, group):
            own = dist.get_rank(group)
            theirs = self._swapped(buffer, counts[1 - own], axes)
            return torch.cat([theirs, buffer] if own else [buffer, theirs])
        if min(counts) == max(counts):
            _all_gather(result, buffer, group=group)
            return result
        size = len(counts)  # no backend gathers uneven pieces: everyone sends its piece to everyone
        return self.exchange(buffer.repeat(size), [buffer.numel()] * size, counts, axes)

    def reduce_scatter(self, buffer: torch.Tensor, counts: Sequence[int], axes: Axes) -> torch.Tensor:
        group = self._groups.blocking(axes)
        own = counts[dist.get_rank(group)]
        if min(counts) == max(counts) and buffer.is_cuda:
            result = buffer.new_empty(own)
            _reduce_scatter(result, buffer, group=group)
            return result
        # gloo emulates reduce-scatter by an all-reduce, which moves twice the bytes
        parts = self.exchange(buffer, counts, [own] * len(counts), axes)
        return parts.view(len(counts), own).sum(0)

    def exchange(
        self,
        buffer: torch.Tensor,
        send_counts: Sequence[int],
        receive_counts: Sequence[int],
        axes: Axes,
    ) -> torch.Tensor:
        return self.start_exchange(buffer, send_counts, receive_counts, axes)()

    def start_exchange(
        self,
        buffer: torch.Tensor,
        send_counts: Sequence[int],
        receive_counts: Sequence[int],
        axes: Axes,
    ) -> Callable[[], torch.Tensor]:
        result = buffer.new_empty(sum(receive_counts))
        work = _start_exchange(result, buffer, receive_counts, send_counts, self._groups.blocking(axes))

        def arrived() -> torch.Tensor:
            work.wait()
            return result

        return arrived

    def start_gather_ints(self, value: int) -> Callable[[], list[int]]:
        everyone = tuple(range(len(self.mesh.axes)))
        if not everyone:
            return lambda: [value]
        found = torch.empty(self.mesh.size, dtype=torch.int64)
        mine = torch.tensor([value])
        work = _all_gather(found, mine, group=self._groups.host(), async_op=True)

        def result() -> list[int]:
            assert work is not None
            work.wait()
            return [int(v) for v in found]

        return result

    def broadcast(self, tensor: torch.Tensor) -> None:
        if self.mesh.axes:
            everyone = tuple(range(len(self.mesh.axes)))
            dist.broadcast(tensor, src=self.mesh.ranks[0], group=self._groups.blocking(everyone))


def _start_exchange(
    result: torch.Tensor,
    buffer: torch.Tensor,
    receive_counts: Sequence[int],
    send_counts: Sequence[int],
    group: dist.ProcessGroup,
) -> Pending:
    """Start sending consecutive parts of a buffer to the members of a group, and putting theirs into another."""
    receives, sends = list(receive_counts), list(send_counts)
    peers = [m for m in range(len(sends)) if m != dist.get_rank(group)]
    if len(peers) == 1 and is_direct(buffer, [sends[peers[0]], receives[peers[0]]]):
        return start_messages(buffer.split(sends), result.split(receives), group)
    work: Pending = dist.all_to_all_single(result, buffer, receives, sends, group=group, async_op=True)
    return work


@dataclass
class _Addends:
    """Addends of one sum on their way to this rank."""

    work: Pending
    parts: torch.Tensor
    own: torch.Tensor

    def wait(self) -> None:
        self.work.wait()
        torch.sum(self.parts.view(-1, self.own.numel()), 0, out=self.own)


@dataclass
class ThreadWorld:
    """What the threads of one simulated job share."""

    mesh: Mesh
    timeout_s: float = 60.0
    barriers: dict[tuple[int, ...], threading.Barrier] = field(default_factory=dict)
    slots: dict[tuple[int, ...], list[object]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def meet(self, members: tuple[int, ...], position: int, value: object) -> list[object]:
        """Return what every member brought, in order; all members must call it in one order."""
        with self.lock:
            barrier = self.barriers.setdefault(members, threading.Barrier(len(members)))
            slot = self.slots.setdefault(members, [None] * len(members))
        slot[members.index(position)] = value
        try:
            barrier.wait(self.timeout_s)
            found = list(slot)
            barrier.wait(self.timeout_s)
        except threading.BrokenBarrierError:
            raise RunError(f"rank {position}: another rank of {members} died or hangs") from None
        return found

    def abort(self) -> None:
        """Let every waiting thread fail: one of them died."""
        with self.lock:
            for barrier in self.barriers.values():
                barrier.abort()


class ThreadCommunicator:
    """Ranks as threads of one process."""

    def __init__(self, world: ThreadWorld, position: int) -> None:
        self._world, self.mesh, self.position = world, world.mesh, position

    def _meet(self, value: object, axes: Axes) -> list[object]:
        return self._world.meet(members_of(self.mesh, self.position, axes), self.position, value)

    def _tensors(self, buffer: torch.Tensor, axes: Axes) -> list[torch.Tensor]:
        found = self._meet(_sent(buffer), axes)
        assert all(isinstance(b, torch.Tensor) for b in found)
        return found  # type: ignore[return-value]  # checked on the line above

    def all_reduce(self, buffer: torch.Tensor, axes: Axes) -> None:
        buffer.copy_(torch.stack(self._tensors(buffer, axes)).sum(0))

    def start_all_reduce(self, buffer: torch.Tensor, axes: Axes) -> Pending:
        self.all_reduce(buffer, axes)
        return _Done()

    def start_reduce_scatter(self, buffer: torch.Tensor, own: torch.Tensor, axes: Axes) -> Pending:
        index = members_of(self.mesh, self.position, axes).index(self.position)
        found = torch.stack(self._tensors(buffer, axes)).sum(0)
        own.copy_(found.view(-1, own.numel())[index])
        return _Done()

    def start_all_gather(self, result: torch.Tensor, own: torch.Tensor, axes: Axes) -> Pending:
        result.copy_(torch.cat(self._tensors(own, axes)))
        return _Done()

    def all_gather(self, buffer: torch.Tensor, counts: Sequence[int], axes: Axes) -> torch.Tensor:
        found = self._tensors(buffer, axes)
        assert [b.numel() for b in found] == list(counts)
        return torch.cat(found)

    def reduce_scatter(self, buffer: torch.Tensor, counts: Sequence[int], axes: Axes) -> torch.Tensor:
        index = members_of(self.mesh, self.position, axes).index(self.position)
        found = torch.stack(self._tensors(buffer, axes)).sum(0)
        part: torch.Tensor = found.split(list(counts))[index].clone()
        return part

    def exchange(
        self,
        buffer: torch.Tensor,
        send_counts: Sequence[int],
        receive_counts: Sequence[int],
        axes: Axes,
    ) -> torch.Tensor:
        index = members_of(self.mesh, self.position, axes).index(self.position)
        everyone = self._meet(_sent(buffer).split(list(send_counts)), axes)
        parts = [parts[index] for parts in everyone]  # type: ignore[index]  # tuples of tensors, as put in above
        assert [p.numel() for p in parts] == list(receive_counts)
        return torch.cat(parts)

    def start_exchange(
        self,
        buffer: torch.Tensor,
        send_counts: Sequence[int],
        receive_counts: Sequence[int],
        axes: Axes,
    ) -> Callable[[], torch.Tensor]:
        found = self.exchange(buffer, send_counts, receive_counts, axes)
        return lambda: found

    def start_gather_ints(self, value: int) -> Callable[[], list[int]]:
        found = self._meet(value, tuple(range(len(self.mesh.axes))))
        return lambda: [int(v) for v in found]  # type: ignore[call-overload]  # everyone brought an int

    def broadcast(self, tensor: torch.Tensor) -> None:
        tensor.data.copy_(self._tensors(tensor, tuple(range(len(self.mesh.axes))))[0])


def _sent(buffer: torch.Tensor) -> torch.Tensor:
    """Return a copy of what a rank sends; the buffer may be used again at once."""
    assert buffer.is_contiguous(), "real collectives take contiguous buffers only"
    return buffer.clone()


class _Done:
    def wait(self) -> None:
        return None


def group_size(mesh: Mesh, axes: Axes) -> int:
    """Return the number of ranks in each group along these axes."""
    return math.prod(mesh.shape[a] for a in axes)
