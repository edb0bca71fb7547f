"""Pipelines in cycles: no micro-batches, no flush, an update in every cycle [Zhang & Abdelrahman 2021].

There are K + 1 stages on K + 1 positions. In cycle c, stage i (from 0) does the forward pass of batch c - i with its
current weights, the backward pass of batch c - (2K - i), and updates its weights with those gradients. All that it
needs was sent in cycle c - 1, so messages travel behind computing: activations behind the backward pass of their
sender, gradients behind the forward pass of their receiver. At stage i the forward pass of a batch does not see the
updates of the 2(K - i) batches in front of it; at the last stage it sees all.

Which weights a backward pass reads is the mode (``runtime.pipeline.weights``):

- ``stale``: the current ones, on the stored activations [Zhang & Abdelrahman 2021].
- ``pipedream``: those of the batch's forward pass [PipeDream, SOSP 2019]. **Deviation**: PipeDream's stages wait for
  what others compute in the same cycle, and hold K + 1 - i batches; here it is 2(K - i) + 1.

*Hybrid*: the first ``pipelined_steps`` batches are pipelined; the pipeline drains; each later batch then goes forward
and backward through all stages alone, which is training as on one device.

Running statistics of batch norm follow the order of forward passes. Random numbers are those that a stage draws in this
order. The numbers of a run do not depend on how stages are spread over processes.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from planner.errors import UsageError
from runtime.pipeline.links import Link, MemoryLink
from runtime.pipeline.weights import Weights, without_autocast
from runtime.timing import OPTIMIZER, Part, Phase, Tape, marked

Mode = Literal["stale", "pipedream"]
LossFunction = Callable[[Any, Any], Tensor]
"""From what the last stage returns and the targets to a scalar."""


@dataclass(eq=False)
class _Batch:
    """A batch on its way; only the stages that read its parts keep them."""

    inputs: tuple[Any, ...]
    targets: Any

    def forget(self, *, first: bool, last: bool) -> None:
        """Let go of what the first or the last stage has read: this object stays until the batch is through."""
        if first:
            self.inputs = ()
        if last:
            self.targets = None


@dataclass(eq=False)
class _Pass:
    """A forward pass of one stage, whose backward pass has not come yet."""

    received: tuple[Tensor, ...]
    sent: tuple[Tensor, ...]


class CycleStage:
    """One stage, and what it does in a cycle; knows nothing of where its neighbours run.

    Args:
        module: takes the inputs of the model or what it receives, and returns what it sends (a tensor or a tuple of
            them) or the output of the model. It must not begin with an operation in place.
        optimizer: of its parameters; None where it has none that train.
        stage: its number i, from 0.
        num_stages: K + 1.
        loss_fn: of the last stage: from the output and the targets to a scalar, the mean over the batch.
        links: to the previous and to the next stage; None beside the first and the last one.
        mode: ``stale`` or ``pipedream``.

    Attributes:
        tape: where forward, backward and update leave marks; None where nobody measures.

    Raises:
        UsageError: The numbers, the links or the loss function do not belong together.
    """

    tape: Tape | None = None

    def __init__(
        self,
        module: nn.Module,
        optimizer: Optimizer | None,
        *,
        stage: int,
        num_stages: int,
        loss_fn: LossFunction | None = None,
        links: tuple[Link | None, Link | None] = (None, None),
        mode: Mode = "stale",
    ) -> None:
        last = num_stages - 1
        if not 0 <= stage <= last:
            raise UsageError(f"there is no stage {stage} of {num_stages}; stages count from 0.")
        if mode not in {"stale", "pipedream"}:
            raise UsageError(f"mode {mode!r} of a pipeline in cycles is neither 'stale' nor 'pipedream'.")
        self._before, self._after = links
        if (self._before is None) != (stage == 0) or (self._after is None) != (stage == last):
            raise UsageError(f"stage {stage} of {num_stages} needs a link to each stage beside it, and no other.")
        if (loss_fn is None) == (stage == last):
            raise UsageError(f"stage {stage} of {num_stages}: the last stage, and no other, has the loss function.")
        self.module, self.optimizer, self.stage, self.num_stages = module, optimizer, stage, num_stages
        self._loss_fn = loss_fn
        self._weights = Weights(module, stash=mode == "pipedream")
        self._passes: deque[_Pass] = deque()

    @property
    def in_flight(self) -> int:
        """Batches whose forward pass is done and whose backward pass is not; at most 2(K - i) + 1 within a cycle."""
        return len(self._passes)

    def cycle(self, fed: Sequence[_Batch | None]) -> Tensor | None:
        """Do what is due in this cycle.

        Args:
            fed: by cycle, the newest first, the batch that entered the pipeline, or None; 2K + 1 of them.

        Returns:
            The loss of the batch that this stage has finished, if it is the last one; detached.
        """
        forward, backward = fed[self.stage], fed[2 * (self.num_stages - 1) - self.stage]
        self._expect(fed)
        loss = None
        if forward is not None:
            loss = self._forward(forward)
        if backward is not None:
            self._backward()
        return loss

    def _expect(self, fed: Sequence[_Batch | None]) -> None:
        """Start receiving what the neighbours send in this cycle, for the next one."""
        if self._before and fed[self.stage - 1]:
            self._before.expect()
        if self._after and fed[2 * (self.num_stages - 1) - self.stage - 1]:
            self._after.expect()

    def _forward(self, batch: _Batch) -> Tensor | None:
        received = self._before.receive() if self._before else ()
        with self._marked(Phase.FORWARD), self._weights.saving():
            output = self.module(*(received or batch.inputs))
            if self._loss_fn is not None:
                output = self._loss_fn(output, batch.targets)
        batch.forget(first=self._before is None, last=self._after is None)
        sent = output if isinstance(output, tuple) else (output,)
        self._passes.append(_Pass(received, sent))
        message = [t.detach().requires_grad_(t.requires_grad) for t in sent]
        if self._after is None:
            loss: Tensor = message[0].detach()
            return loss
        self._after.send(message)
        return None

    def _backward(self) -> None:
        done = self._passes.popleft()
        gradients = self._after.receive() if self._after else (torch.ones_like(done.sent[0]),)
        pairs = [(t, g) for t, g in zip(done.sent, gradients, strict=True) if t.requires_grad and g is not None]
        if self.optimizer is not None:
            self.optimizer.zero_grad(set_to_none=True)
        if pairs:
            with self._marked(Phase.BACKWARD), without_autocast():
                torch.autograd.backward([t for t, _ in pairs], [g for _, g in pairs])
        if self._before is not None:
            self._before.send([_gradient(t) for t in done.received])
        del done, pairs  # stashed weights live as long as a graph refers to them
        with marked(self.tape, OPTIMIZER):
            self._weights.before_update()
            if self.optimizer is not None:
                self.optimizer.step()

    def _marked(self, phase: Phase) -> AbstractContextManager[None]:
        return marked(self.tape, Part(phase, f"stage {self.stage}"))

    def evaluate(self, inputs: tuple[Any, ...]) -> Any:
        """Do a forward pass without gradients; nothing may be in flight. Return what the last stage returns."""
        if self._before is not None:
            self._before.expect()
            inputs = self._before.receive()
        with torch.no_grad():
            output = self.module(*inputs)
        if self._after is None:
            return output
        self._after.send(output if isinstance(output, tuple) else (output,))
        self._after.flush()
        return None

    def flush(self) -> None:
        """Wait until all that was sent has gone."""
        for link in (self._before, self._after):
            if link is not None:
                link.flush()


def _gradient(tensor: Tensor) -> Tensor | None:
    """Return the gradient of a received tensor: zeros where nothing depends on it, None where it has none."""
    if not tensor.requires_grad:
        return None
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


class StalePipeline:
    """This process's stages of a pipeline in cycles, as training loops use them.

    All processes of the pipeline make the same calls in the same order. The first stage reads the inputs, the last one
    the targets; others may pass anything. All batches have the same number of samples.

    Optimizers step once for each batch, with the learning rate of that moment.

    Args:
        stages: of this process, usually one; of all stages in ascending order for one process.
        pipelined_steps: n_p of a hybrid: later batches are not pipelined. None: all are.

    Raises:
        UsageError: The stages do not belong together.
    """

    def __init__(self, stages: CycleStage | Sequence[CycleStage], pipelined_steps: int | None = None) -> None:
        self.stages = (stages,) if isinstance(stages, CycleStage) else tuple(stages)
        counts = {stage.num_stages for stage in self.stages}
        if len(counts) != 1:
            raise UsageError(f"a pipeline needs stages of one number of them, not {sorted(counts)}.")
        if pipelined_steps is not None and pipelined_steps < 0:
            raise UsageError(f"pipelined_steps is {pipelined_steps}; it must be at least 0.")
        self.pipelined_steps = pipelined_steps
        self.num_steps = 0
        self._depth = 2 * (counts.pop() - 1)
        self._fed: deque[_Batch | None] = deque([None] * (self._depth + 1), maxlen=self._depth + 1)

    @classmethod
    def in_process(
        cls,
        modules: Sequence[nn.Module],
        optimizers: Sequence[Optimizer | None],
        loss_fn: LossFunction,
        mode: Mode = "stale",
        pipelined_steps: int | None = None,
    ) -> "StalePipeline":
        """Return a pipeline whose stages all run in this process, one after the other: its numbers, not its speed."""
        ends: list[tuple[Link, Link]] = [MemoryLink.pair() for _ in modules[1:]]
        last = len(modules) - 1
        return cls(
            [
                CycleStage(
                    module,
                    optimizer,
                    stage=i,
                    num_stages=len(modules),
                    loss_fn=loss_fn if i == last else None,
                    links=(ends[i - 1][1] if i else None, ends[i][0] if i < last else None),
                    mode=mode,
                )
                for i, (module, optimizer) in enumerate(zip(modules, optimizers, strict=True))
            ],
            pipelined_steps,
        )

    @property
    def is_drained(self) -> bool:
        """Whether no batch is in flight anywhere in the pipeline."""
        return not any(list(self._fed)[: self._depth])

    @property
    def in_flight(self) -> int:
        """Batches in the pipeline: fed, and not yet finished by the first stage."""
        return sum(batch is not None for batch in list(self._fed)[: self._depth])

    def step(self, inputs: Any, targets: Any = None) -> list[Tensor]:
        """Feed a batch, and run a cycle; in a hybrid's second phase all that the batch needs.

        Args:
            inputs: a tensor, or a tuple of them, for the first stage. Nobody may write into them afterwards.
            targets: for the loss function of the last stage.

        Returns:
            The losses of the batches that the last stage has finished, in order, detached; empty in processes that do
            not hold it.

        Raises:
            RunError: A neighbour died or hangs.
        """
        first, last = self.stages[0].stage == 0, self.stages[-1].stage == self.stages[-1].num_stages - 1
        batch = _Batch(inputs if isinstance(inputs, tuple) else (inputs,), targets)
        batch.forget(first=not first, last=not last)
        losses = self._cycle(batch)
        self.num_steps += 1
        if self.pipelined_steps is not None and self.num_steps >= self.pipelined_steps:
            losses += self.drain()
        return losses

    def drain(self) -> list[Tensor]:
        """Finish all batches in flight; returns the losses of those that the last stage finishes now.

        Call it before weights are read or saved, and before the process group is destroyed.

        Raises:
            RunError: A neighbour died or hangs.
        """
        losses: list[Tensor] = []
        while not self.is_drained:
            losses += self._cycle(None)
        for stage in self.stages:
            stage.flush()
        return losses

    def run(self, batches: Iterable[tuple[Any, Any]]) -> list[Tensor]:
        """Train on batches of inputs and targets, then drain; returns the losses as ``step`` does."""
        losses: list[Tensor] = []
        for inputs, targets in batches:
            losses += self.step(inputs, targets)
        return losses + self.drain()

    def evaluate(self, inputs: Any) -> Any:
        """Return the output of the model for a batch in the process of the last stage, None in others; no gradients.

        Switch modules to evaluation mode yourself.

        Raises:
            UsageError: Batches are in flight.
        """
        self.require_drained("evaluating")
        passed: Any = inputs if isinstance(inputs, tuple) else (inputs,)
        for stage in self.stages:
            passed = stage.evaluate(passed)
        return passed

    def state_dict(self) -> dict[str, int]:
        """Return what a checkpoint needs beside modules and optimizers: how many batches were fed.

        Batches in flight are not saved: drain first. A run that goes on from a checkpoint is then equal to one that
        drained at the same place and went on.

        Raises:
            UsageError: Batches are in flight.
        """
        self.require_drained("saving")
        return {"num_steps": self.num_steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from where a state was saved, in either phase of a hybrid.

        Raises:
            UsageError: Batches are in flight.
        """
        self.require_drained("loading")
        self.num_steps = state["num_steps"]

    def require_drained(self, what: str) -> None:
        """Refuse something while batches are in flight.

        Raises:
            UsageError: with their number.
        """
        if not self.is_drained:
            raise UsageError(f"{self.in_flight} batches are in flight; call drain() before {what}.")

    def _cycle(self, batch: _Batch | None) -> list[Tensor]:
        self._fed.appendleft(batch)
        fed = tuple(self._fed)
        losses = [stage.cycle(fed) for stage in self.stages]
        return [loss for loss in losses if loss is not None]
