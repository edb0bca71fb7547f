"""The ranks that add up numbers of one layer, such as the statistics of a norm."""

from dataclasses import dataclass
from functools import cached_property

import torch

from planner.ir.transfer import StepKind
from runtime.comm.communicator import Axes, Communicator, group_size
from runtime.comm.exchange import add_up, failure


@dataclass(frozen=True)
class Among:
    """Ranks along some mesh axes; where a collective fails, the error names the layer.

    Attributes:
        axes: along which ranks differ.
        communicator: of this rank.
        name: of the layer, for messages.
    """

    axes: Axes
    communicator: Communicator
    name: str

    @cached_property
    def size(self) -> int:
        """How many ranks they are."""
        return group_size(self.communicator.mesh, self.axes)

    def gathered(self, own: torch.Tensor) -> torch.Tensor:
        """Return a vector of every rank, one in each row: ``(ranks, elements)``."""
        try:  # not ``named``: a generator to enter in every step
            found = self.communicator.all_gather(own, [own.numel()] * self.size, self.axes)
        except RuntimeError as error:
            raise failure(error, StepKind.ALL_GATHER, self.communicator, f"the statistics of {self.name}") from error
        return found.view(self.size, -1)

    def add_up(self, gradients: torch.Tensor) -> None:
        """Add contiguous gradients of the statistics over the ranks, in place."""
        add_up(gradients, self.axes, self.communicator, f"the gradient of the statistics of {self.name}")
