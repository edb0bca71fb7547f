"""What the modules of one rank share during a step."""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

from runtime.communicator import Communicator
from runtime.exchange import Batch


@dataclass
class StepState:
    """What the modules of one rank share during a step.

    Attributes:
        communicator: of this rank.
        batch: of the running step; set before the forward pass.
        rank_samples: samples of the user's batch on this rank.
        step: forward passes in training so far; part of every dropout's seed.
        seed: equal on all ranks.
        gradient_scale: by which every gradient inside the network is larger than that of the mean
            loss over the global batch (see ``runtime.parallelize``).
    """

    communicator: Communicator
    batch: Batch = field(default_factory=lambda: Batch(1))
    rank_samples: int = 1
    step: int = 0
    seed: int = 0
    gradient_scale: float = 1.0
    resolve_batch: Callable[[], None] | None = None

    def seed_of(self, key: int) -> int:
        """Return the seed of something random in this step."""
        return (self.seed * 1_000_003 + self.step * 7_919 + key) % 2**63

    def current_batch(self) -> Batch:
        """Return the batch of this step; waits for the other ranks' sizes where that is needed."""
        if self.resolve_batch is not None:
            resolve, self.resolve_batch = self.resolve_batch, None
            resolve()
        return self.batch


class BatchSize(nn.Module):
    """Returns a multiple of the number of samples in the global batch."""

    def __init__(self, multiple: int, state: StepState) -> None:
        super().__init__()
        self._multiple, self._state = multiple, state

    def forward(self) -> int:
        return self._state.current_batch().size * self._multiple
