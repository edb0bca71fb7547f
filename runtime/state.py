"""What the modules of one rank share during a step."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import nn

from runtime.comm.communicator import Communicator
from runtime.comm.exchange import Batch

_KEPT: Final = 64
"""Forward passes whose numbers are kept, for when they are computed again."""

Key = tuple[tuple[int, torch.Size], ...]
"""Of the inputs of a pass: where they are in memory, and their shapes."""


class Passes:
    """Numbers of forward passes: a new one each, or the old one where ``torch.utils.checkpoint`` computes one again.

    A pass that is computed again draws the random numbers that it drew: its gradients are those of what was returned.
    Such a pass runs inside of a backward pass, on the same memory. Of several on the same memory, the latest comes
    first, as autograd goes backward.
    """

    def __init__(self) -> None:
        self._kept: deque[tuple[Key, int]] = deque(maxlen=_KEPT)
        self._task, self._again = -1, set[int]()
        self._resumed: int | None = None

    def keep(self, count: int) -> None:
        """Keep the numbers of at least so many passes: those whose backward pass may be to come."""
        self._kept = deque(self._kept, maxlen=max(_KEPT, count))

    def begin(self, latest: int, inputs: Sequence[torch.Tensor]) -> int:
        """Return the number of a pass.

        Args:
            latest: number of the latest one.
            inputs: of the pass.
        """
        key = tuple((x.data_ptr(), x.shape) for x in inputs)
        if is_in_backward():
            task = torch._C._current_graph_task_id()
            if task != self._task:
                self._task, self._again = task, set()
            for kept, number in reversed(self._kept):
                if kept == key and number not in self._again:
                    self._again.add(number)
                    self._resumed = latest
                    return number
        self._kept.append((key, latest + 1))
        return latest + 1

    def end(self, number: int) -> int:
        """Return the number of the latest pass, behind a pass of the given number."""
        latest, self._resumed = number if self._resumed is None else self._resumed, None
        return latest


def is_in_backward() -> bool:
    """Return whether a backward pass runs in this thread."""
    return torch._C._current_graph_task_id() >= 0


@dataclass
class StepState:
    """What the modules of one rank share during a step.

    Attributes:
        communicator: of this rank.
        batch: of the running step; set before the forward pass.
        rank_samples: samples of the user's batch on this rank.
        step: forward passes so far in which anything was in training mode; part of every dropout's seed.
        seed: equal on all ranks.
        gradient_scale: by which every gradient inside the network is larger than that of the mean
            loss over the global batch (see ``runtime.parallelize``).
        resolve_batch: waits for the other ranks' sizes, where those of the running step are not known yet; may be
            called again.
        passes: that were made.
        dtype: of the parameters.
    """

    communicator: Communicator
    batch: Batch = field(default_factory=lambda: Batch(1))
    rank_samples: int = 1
    step: int = 0
    seed: int = 0
    gradient_scale: float = 1.0
    resolve_batch: Callable[[], Batch] | None = None
    passes: Passes = field(default_factory=Passes)
    dtype: torch.dtype = torch.float32

    def seed_of(self, key: int) -> int:
        """Return the seed of something random in this step."""
        return (self.seed * 1_000_003 + self.step * 7_919 + key) % 2**63

    def current_batch(self) -> Batch:
        """Return the batch of this step; waits for the other ranks' sizes where that is needed."""
        if self.resolve_batch is not None:
            resolve, self.resolve_batch = self.resolve_batch, None
            self.batch = resolve()
        return self.batch

    def of_this_pass(self) -> "StepState":
        """Return the state as it is in this pass, for its backward pass: others may run before that."""
        found = object.__new__(StepState)  # as copy.copy, without its detours: this is in every step
        vars(found).update(vars(self))
        return found


class BatchSize(nn.Module):
    """Returns a multiple of the number of samples in the global batch."""

    def __init__(self, multiple: int, state: StepState) -> None:
        super().__init__()
        self._multiple, self._state = multiple, state

    def forward(self) -> int:
        return self._state.current_batch().size * self._multiple
