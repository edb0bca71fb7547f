"""Gradient buckets: filled by backward, reduced behind it, launched in one order on every rank.

The only file that uses autograd's private ``queue_callback`` (as DistributedDataParallel does): it
runs when a backward pass has ended.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import nn
from torch.autograd import Variable

from planner.errors import RunError
from planner.ir.bucket import fill_buckets
from runtime.communicator import Axes, Communicator, Pending, group_size

T = TypeVar("T")


@dataclass
class _Bucket:
    """Gradients that are reduced in one flat buffer.

    Attributes:
        parameters: in the order in which backward makes their gradients ready.
        views: their places in the buffer.
    """

    axes: Axes
    buffer: torch.Tensor
    parameters: list[nn.Parameter]
    views: list[torch.Tensor]
    ready: set[int] = field(default_factory=set)
    pending: Pending | None = None


class Reducer:
    """Sums the gradients of parameters that several ranks hold.

    A gradient arrives as g times this rank's addend, where g ranks hold the parameter; the reducer
    adds over the g ranks and divides by g. Gradients that are equal on all ranks (of a penalty on
    the parameters in the loss; of an earlier, already reduced pass) therefore stay what they are.

    Args:
        parameters: name, parameter and the mesh axes to reduce over, in the order in which backward
            makes the gradients ready.
        communicator: of this rank.
        bucket_bytes: that close a bucket.
    """

    def __init__(
        self,
        parameters: Sequence[tuple[str, nn.Parameter, Axes]],
        communicator: Communicator,
        bucket_bytes: int,
    ) -> None:
        self._communicator = communicator
        self.enabled = True
        self._names = {id(p): name for name, p, _ in parameters}
        self._buckets: list[_Bucket] = []
        self._place: dict[int, tuple[int, int]] = {}
        keyed = [((axes, p.dtype, p.device), p.numel() * p.element_size()) for _, p, axes in parameters]
        for bucket in fill_buckets(keyed, bucket_bytes):
            members = [parameters[i][1] for i in bucket.items]
            self._buckets.append(_allocate(bucket.key[0], members))
            for k, parameter in enumerate(members):
                self._place[id(parameter)] = (len(self._buckets) - 1, k)
        for _, parameter, _ in parameters:
            parameter.register_post_accumulate_grad_hook(self._on_gradient)
        self._next = 0
        self._running = False

    def reset(self) -> None:
        """Forget a backward pass that did not end."""
        self._running = False
        for bucket in self._buckets:
            bucket.ready.clear()

    def reduces(self, parameter: torch.Tensor) -> bool:
        """Return whether a parameter's gradient goes through a bucket."""
        return id(parameter) in self._place

    def _on_gradient(self, parameter: torch.Tensor) -> None:
        if not self.enabled:
            return
        if not self._running:
            self._running, self._next = True, 0
            Variable._execution_engine.queue_callback(self._finish)
        index, k = self._place[id(parameter)]
        bucket = self._buckets[index]
        self._collect(bucket, k)
        bucket.ready.add(k)
        while self._next < len(self._buckets) and len(self._buckets[self._next].ready) == len(
            self._buckets[self._next].parameters
        ):
            self._launch(self._buckets[self._next])

    def _collect(self, bucket: _Bucket, k: int) -> None:
        """Put a gradient / g into its place in the buffer, in one pass; what came in no pass is zero."""
        parameter, view = bucket.parameters[k], bucket.views[k]
        gradient = parameter.grad
        if gradient is None:
            view.zero_()
            return
        torch.div(gradient, group_size(self._communicator.mesh, bucket.axes), out=view)
        if gradient.data_ptr() != view.data_ptr():
            parameter.grad = view

    def _launch(self, bucket: _Bucket) -> None:
        self._next += 1
        for k in range(len(bucket.parameters)):
            if k not in bucket.ready:
                self._collect(bucket, k)
        bucket.pending = self._guard(bucket, lambda: self._communicator.start_all_reduce(bucket.buffer, bucket.axes))

    def _finish(self) -> None:
        """Launch what is left, wait for everything, let gradients that did not come stay away."""
        while self._next < len(self._buckets):
            self._launch(self._buckets[self._next])
        for bucket in self._buckets:
            pending = bucket.pending
            assert pending is not None
            self._guard(bucket, pending.wait)
            bucket.pending = None
            bucket.ready.clear()
        self._running = False

    def _guard(self, bucket: _Bucket, call: Callable[[], T]) -> T:
        try:
            return call()
        except RuntimeError as error:
            first, last = (self._names[id(p)] for p in (bucket.parameters[0], bucket.parameters[-1]))
            mesh = self._communicator.mesh
            raise RunError(
                f"rank {mesh.ranks[self._communicator.position]}: all_reduce of the gradients of {first} to {last} "
                f"failed: {error}. A peer died or hangs; see its own message."
            ) from error


def _allocate(axes: Axes, parameters: list[nn.Parameter]) -> _Bucket:
    first = parameters[0]
    buffer = torch.zeros(sum(p.numel() for p in parameters), dtype=first.dtype, device=first.device)
    views = [
        piece.view_as(p) for piece, p in zip(buffer.split([p.numel() for p in parameters]), parameters, strict=True)
    ]
    return _Bucket(axes, buffer, parameters, views)
