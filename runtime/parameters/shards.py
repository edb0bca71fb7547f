"""Parameters of which a rank keeps some rows: how they lie in the messages that ranks exchange.

A message has one equal section for each rank of the group; a section holds the rank's rows of several parameters one
after the other, and gaps where the rank has a row less than others.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from planner.errors import UsageError
from planner.ir.layout import Interval, balanced_pieces
from planner.ir.split import LayerId
from runtime.comm.communicator import Axes, Communicator
from runtime.comm.failures import peer_failed

Pair = tuple[torch.Tensor, torch.Tensor]
"""A part of a tensor and its place in a message."""


@dataclass
class Shard:
    """A parameter of which this rank keeps some rows.

    Attributes:
        name: the user's.
        layer: that counts it: the first that reads it.
        axes: mesh axes along which the ranks share it.
        ranks: how many these are.
        index: of this rank among them.
        whole: what the operators read, of the shape of this rank's piece by layout.
        rows: what the rank keeps, an optimizer updates and ``state_dict`` has.
        unreduced: what ``rows.grad`` was when a backward pass left gradients on this rank only, with its version.
    """

    name: str
    layer: LayerId
    axes: Axes
    ranks: int
    index: int
    whole: nn.Parameter
    rows: nn.Parameter = field(init=False)
    unreduced: tuple[torch.Tensor, int] | None = None

    def __post_init__(self) -> None:
        self.whole.data = _by_rows(self.whole.data)
        self.rows = nn.Parameter(self.own(self.whole.data), self.whole.requires_grad)

    @property
    def pieces(self) -> tuple[Interval, ...]:
        """The rows of every rank."""
        return balanced_pieces(self.whole.shape[0], self.ranks)

    @property
    def width(self) -> int:
        """The elements of the largest piece: its place in a section."""
        return -(-self.whole.shape[0] // self.ranks) * self.row_numel

    @property
    def row_numel(self) -> int:
        """The elements of a row."""
        return self.whole.numel() // self.whole.shape[0]

    @property
    def is_even(self) -> bool:
        """Whether all ranks have equally many rows."""
        return self.whole.shape[0] % self.ranks == 0

    def own(self, whole: torch.Tensor) -> torch.Tensor:
        """Return this rank's rows of a tensor like the parameter."""
        start, stop = self.pieces[self.index]
        return whole[start:stop]

    def empty(self) -> torch.Tensor:
        """Return new memory for the whole parameter."""
        return self.like_whole(torch.empty(self.whole.numel(), dtype=self.rows.dtype, device=self.rows.device))

    def like_whole(self, flat: torch.Tensor) -> torch.Tensor:
        """Return memory as a tensor like the parameter."""
        return flat.as_strided(self.whole.shape, self._strides())

    def pairs(self, whole: torch.Tensor, message: torch.Tensor, offset: int) -> list[Pair]:
        """Return the parts of a tensor like the parameter, each with its place in a message.

        Args:
            whole: the tensor.
            message: of all sections, flat.
            offset: of the parameter in a section.
        """
        section, strides = message.numel() // self.ranks, self._strides()
        first = message.storage_offset() + offset
        if self.is_even:
            shape = (self.ranks, whole.shape[0] // self.ranks, *whole.shape[1:])
            return [(whole.unflatten(0, shape[:2]), message.as_strided(shape, (section, *strides), first))]
        places = (
            message.as_strided((b - a, *whole.shape[1:]), strides, first + r * section)
            for r, (a, b) in enumerate(self.pieces)
        )
        return [(whole[a:b], place) for (a, b), place in zip(self.pieces, places, strict=True)]

    def in_section(self, section: torch.Tensor, offset: int) -> torch.Tensor:
        """Return the place of this rank's rows in its section of a message."""
        return section.as_strided(self.rows.shape, self._strides(), section.storage_offset() + offset)

    def _strides(self) -> tuple[int, ...]:
        """Return the strides of the whole in memory of its own; those of the rows are the same."""
        inner = self.rows.stride()[1:]
        return (self.row_numel, *inner)

    # ---- gradients that are on this rank only

    def note_unreduced(self) -> None:
        """Remember that a gradient of the whole waits for a later pass to be reduced."""
        if self.whole.grad is not None:
            if self.rows.grad is None:  # so that it can be seen whether gradients are forgotten
                self.rows.grad = torch.zeros_like(self.rows)
            self.unreduced = self.rows.grad, self.rows.grad._version

    def forget_dropped(self, _gradient: torch.Tensor | None = None) -> None:
        """Drop the gradient that waits if the user has dropped that of the rows, as ``zero_grad()`` does."""
        if self.unreduced is not None and self.rows.grad is not self.unreduced[0]:
            self.whole.grad = self.unreduced = None

    def refuse_changed(self) -> None:
        """Check that the gradient of the rows was not changed in place while some of it is not reduced yet.

        Raises:
            UsageError: it was.
        """
        self.forget_dropped()
        if self.unreduced is not None and self.unreduced[0]._version != self.unreduced[1]:
            raise UsageError(
                f"the gradient of {self.name} was changed in place behind a backward pass inside no_sync(), when only "
                "a part of it was there. Change gradients behind a pass outside of no_sync(); to forget them, call "
                "zero_grad(set_to_none=True)."
            )

    def receive(self, gradient: torch.Tensor) -> None:
        """Take the reduced gradient of the rows."""
        if self.rows.grad is not None:
            gradient += self.rows.grad
        self.rows.grad = gradient
        self.unreduced = None


class Bundle:
    """Parameters whose rows travel in one message.

    Args:
        shards: of one group of ranks, element type and device.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.shards = tuple(shards)
        self.axes, self.ranks, self.index = shards[0].axes, shards[0].ranks, shards[0].index
        self.offsets: list[int] = []
        self.section = 0
        for shard in shards:
            self.offsets.append(self.section)
            self.section += shard.width

    def message(self) -> torch.Tensor:
        """Return new memory for a message; nobody reads what is in its gaps."""
        rows = self.shards[0].rows
        return torch.empty(self.ranks * self.section, dtype=rows.dtype, device=rows.device)

    def own(self, message: torch.Tensor) -> torch.Tensor:
        """Return this rank's section of a message."""
        return message[self.index * self.section : (self.index + 1) * self.section]

    def packed(self) -> torch.Tensor:
        """Return a section with this rank's rows."""
        (first, *others), rows = self.shards, self.shards[0].rows.detach()
        if not others and first.is_even:
            return rows.as_strided((rows.numel(),), (1,))
        section = torch.empty(self.section, dtype=rows.dtype, device=rows.device)
        for shard, offset in zip(self.shards, self.offsets, strict=True):
            shard.in_section(section, offset).copy_(shard.rows.detach())
        return section

    def unpacked(self, message: torch.Tensor) -> list[torch.Tensor]:
        """Return the whole parameters of a message of all ranks' rows; a single one may lie in the message itself."""
        (first, *others) = self.shards
        if not others and first.is_even:
            return [first.like_whole(message)]
        wholes = [shard.empty() for shard in self.shards]
        self.unpack(message, wholes)
        return wholes

    def unpack(self, message: torch.Tensor, wholes: Sequence[torch.Tensor]) -> None:
        """Copy a message of all ranks' rows into tensors like the parameters."""
        for shard, offset, whole in zip(self.shards, self.offsets, wholes, strict=True):
            for part, place in shard.pairs(whole, message, offset):
                part.copy_(place)


@contextlib.contextmanager
def naming(bundle: Bundle, communicator: Communicator) -> Iterator[None]:
    """Name rank, parameters and collective where gathering a bundle fails."""
    try:
        yield
    except RuntimeError as error:
        what = f"all_gather of {bundle.shards[0].name} to {bundle.shards[-1].name}"
        raise peer_failed(communicator.mesh.ranks[communicator.position], what, error) from error


def _by_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor whose memory holds one row after the other, each without gaps: itself, or a copy."""
    row = tensor[0]
    ordered = row.permute(sorted(range(row.dim()), key=row.stride, reverse=True))
    dense = ordered.is_contiguous() and tensor.stride(0) == row.numel()
    return tensor if dense else tensor.contiguous()
