"""CUDA tensors over gloo: several ranks share a GPU, which NCCL refuses.

gloo adds and broadcasts CUDA tensors itself, with streams and events of its own. All else goes through pinned memory
of the host here. `layerwise doctor` uses it to run several ranks on a machine with one GPU; it is not made for speed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from planner.ir.mesh import Mesh
from runtime.comm.communicator import Axes, Pending, TorchCommunicator
from runtime.comm.groups import ProcessGroups


class StagedCommunicator(TorchCommunicator):
    """``torch.distributed`` where the group is gloo, for tensors on the host or on a GPU."""

    def all_gather(self, buffer: torch.Tensor, counts: Sequence[int], axes: Axes) -> torch.Tensor:
        """See ``Communicator``."""
        return super().all_gather(on_host(buffer), counts, axes).to(buffer.device)

    def reduce_scatter(self, buffer: torch.Tensor, counts: Sequence[int], axes: Axes) -> torch.Tensor:
        """See ``Communicator``."""
        return super().reduce_scatter(on_host(buffer), counts, axes).to(buffer.device)

    def start_reduce_scatter(self, buffer: torch.Tensor, own: torch.Tensor, axes: Axes) -> Pending:
        """See ``Communicator``."""
        staged = on_host(own)
        return _Staged(super().start_reduce_scatter(on_host(buffer), staged, axes), staged, own)

    def start_all_gather(self, result: torch.Tensor, own: torch.Tensor, axes: Axes) -> Pending:
        """See ``Communicator``."""
        staged = on_host(result)
        return _Staged(super().start_all_gather(staged, on_host(own), axes), staged, result)

    def exchange(
        self,
        buffer: torch.Tensor,
        send_counts: Sequence[int],
        receive_counts: Sequence[int],
        axes: Axes,
    ) -> torch.Tensor:
        """See ``Communicator``."""
        return super().exchange(on_host(buffer), send_counts, receive_counts, axes).to(buffer.device)

    def start_exchange(
        self,
        buffer: torch.Tensor,
        send_counts: Sequence[int],
        receive_counts: Sequence[int],
        axes: Axes,
    ) -> Callable[[], torch.Tensor]:
        """See ``Communicator``."""
        wait = super().start_exchange(on_host(buffer), send_counts, receive_counts, axes)
        return lambda: wait().to(buffer.device)


@dataclass
class _Staged:
    """A collective under way on the host, whose result goes to a GPU."""

    work: Pending
    staged: torch.Tensor
    result: torch.Tensor

    def wait(self) -> None:
        self.work.wait()
        if self.staged is not self.result:
            self.result.copy_(self.staged)


def communicator_of(mesh: Mesh, groups: ProcessGroups) -> TorchCommunicator:
    """Return how this rank talks to the others, whatever device its tensors are on."""
    only_gloo = torch.cuda.is_available() and dist.get_backend() == dist.Backend.GLOO
    return StagedCommunicator(mesh, groups) if only_gloo else TorchCommunicator(mesh, groups)


def on_host(buffer: torch.Tensor) -> torch.Tensor:
    """Return a copy in pinned memory, taken behind what the current stream has to do; a buffer on the host as it is."""
    if not buffer.is_cuda:
        return buffer
    copy = torch.empty_like(buffer, device="cpu", pin_memory=True)
    with torch.cuda.device(buffer.device):
        copy.copy_(buffer, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
    copied.synchronize()  # gloo reads it from the host, outside all streams
    return copy
