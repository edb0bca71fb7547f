"""Gradients that are reduced in one message: whole ones, or rows of parameters that are sharded."""

import functools
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import nn

from runtime.comm.communicator import Axes, Communicator, Pending
from runtime.parameters.shards import Bundle


class Bucket(Protocol):
    """Gradients that are reduced in one message.

    Attributes:
        parameters: in the order in which backward makes their gradients ready.
        ready: positions of those whose gradients are in the buffer.
        pending: the message, while it is under way.
        is_kept: whether the buffer lives on behind the step.
        collective: that reduces them.
    """

    collective: str
    parameters: list[nn.Parameter]
    ready: set[int]
    pending: Pending | None
    is_kept: bool

    def collect(self, k: int) -> None:
        """Put a gradient / g into its place in the buffer, in one pass; what came in no pass is zero."""
        ...

    def start(self, communicator: Communicator) -> None:
        """Send what was collected."""
        ...

    def finish(self) -> None:
        """Wait for what comes, give gradients that came to their parameters, and be empty."""
        ...

    def forget(self) -> None:
        """Be empty; of what is under way nothing is taken."""
        ...


@dataclass
class WholeBucket:
    """Gradients that every rank of a group gets whole; the gradients are views of the buffer.

    Behind them the buffer has a number for each: how many ranks a gradient came on. So a parameter that a pass does not
    use on this rank gets the gradient of the others (a replica that stays behind is another model), and one that no
    rank uses gets none.
    """

    axes: Axes
    ranks: int
    parameters: list[nn.Parameter]
    ready: set[int] = field(default_factory=set)
    pending: Pending | None = None
    is_kept: bool = True
    collective: str = "all_reduce"
    _missing: set[int] = field(default_factory=set)

    @functools.cached_property
    def buffer(self) -> torch.Tensor:
        """All gradients and their counts; made when the first arrives, so that evaluation needs none."""
        first, size = self.parameters[0], sum(p.numel() for p in self.parameters)
        return torch.zeros(size + len(self.parameters), dtype=first.dtype, device=first.device)

    @functools.cached_property
    def views(self) -> list[torch.Tensor]:
        """The places of the gradients in the buffer, each in the memory format of its parameter."""
        *pieces, _ = self.buffer.split([*(p.numel() for p in self.parameters), len(self.parameters)])
        return [_view_like(piece, p) for piece, p in zip(pieces, self.parameters, strict=True)]

    def collect(self, k: int) -> None:
        """See ``Bucket``."""
        parameter, view = self.parameters[k], self.views[k]
        gradient = parameter.grad
        if gradient is None:
            view.zero_()
            self._missing.add(k)
            return
        torch.div(gradient, self.ranks, out=view)
        if gradient.data_ptr() != view.data_ptr():
            parameter.grad = view

    def start(self, communicator: Communicator) -> None:
        """See ``Bucket``."""
        counts = self._counts()
        counts.fill_(1)
        for k in self._missing:
            counts[k] = 0
        self.pending = communicator.start_all_reduce(self.buffer, self.axes)

    def finish(self) -> None:
        """See ``Bucket``."""
        if self.pending is not None:
            self.pending.wait()
            counts = self._counts().tolist() if self._missing else []  # reading it makes the host wait
            for k in self._missing:
                if counts[k]:
                    self.parameters[k].grad = self.views[k]
        self.forget()

    def forget(self) -> None:
        """See ``Bucket``."""
        self.pending = None
        self._missing.clear()
        self.ready.clear()

    def _counts(self) -> torch.Tensor:
        return self.buffer[-len(self.parameters) :]


class RowBucket:
    """Gradients of which every rank gets its rows.

    Args:
        bundle: the parameters.
        is_kept: keep the buffer, and the reduced gradients in it; else its memory is only there during backward.
    """

    def __init__(self, bundle: Bundle, is_kept: bool) -> None:
        self._bundle, self.is_kept, self.collective = bundle, is_kept, "reduce_scatter"
        self.parameters = [shard.whole for shard in bundle.shards]
        self.ready: set[int] = set()
        self.pending: Pending | None = None
        self._came: set[int] = set()
        self._buffer: torch.Tensor | None = None
        self._own: torch.Tensor | None = None

    def collect(self, k: int) -> None:
        """See ``Bucket``."""
        if self._buffer is None:
            self._buffer = self._bundle.message()
        buffer, shard, offset = self._buffer, self._bundle.shards[k], self._bundle.offsets[k]
        kept, gradient = shard.rows.grad, shard.whole.grad
        if kept is not None and kept.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr():
            shard.rows.grad = kept.clone()  # of an earlier pass, whose place is needed
        if gradient is None:
            for _, place in shard.pairs(shard.whole.detach(), buffer, offset):
                place.zero_()
            return
        for part, place in shard.pairs(gradient, buffer, offset):
            torch.div(part, shard.ranks, out=place)
        shard.whole.grad = None
        self._came.add(k)

    def start(self, communicator: Communicator) -> None:
        """See ``Bucket``."""
        assert self._buffer is not None
        self._own = self._bundle.own(self._buffer) if self.is_kept else self._buffer.new_empty(self._bundle.section)
        self.pending = communicator.start_reduce_scatter(self._buffer, self._own, self._bundle.axes)

    def finish(self) -> None:
        """See ``Bucket``."""
        if self.pending is not None:
            self.pending.wait()
            assert self._own is not None
            for k, shard in enumerate(self._bundle.shards):
                rows = shard.in_section(self._own, self._bundle.offsets[k])
                if k in self._came or rows.any():  # a pass may use a parameter on other ranks only
                    shard.receive(rows)
        self.forget()

    def forget(self) -> None:
        """See ``Bucket``."""
        self.pending = self._own = None
        self._came.clear()
        self.ready.clear()
        if not self.is_kept:
            self._buffer = None


def _view_like(piece: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
    """Return a flat piece of memory as a tensor of a parameter's shape and, where it has no gaps, its strides."""
    order = sorted(range(parameter.dim()), key=parameter.stride, reverse=True)
    dense = parameter.permute(order)
    if not dense.is_contiguous():
        return piece.view_as(parameter)
    return piece.view(dense.shape).permute([order.index(d) for d in range(parameter.dim())])
