"""Loss scaling for fp16 over the ranks of a parallel module."""

from typing import Any

import torch

from runtime.module import ParallelModule
from runtime.pipeline.holding import HeldStages, PipelinedStages


class _Nothing:
    """Stands for the optimizer of a rank that has no parameters."""

    def __init__(self) -> None:
        self.param_groups: list[dict[str, Any]] = []

    def step(self) -> None:
        """Update nothing."""


class _InTurn:
    """Stands for an optimizer in one of the turns of a batch."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.param_groups, self.step = optimizer.param_groups, optimizer.step


class GradScaler(torch.amp.GradScaler):
    """``torch.amp.GradScaler`` whose ranks agree on whether a gradient overflowed.

    Where ranks hold different pieces of a parameter, only one of them may see an infinite gradient. All must skip the
    step and lower the scale then, as one device would. Costs one number of all ranks per step.

    Used as torch's: ``scaler.scale(loss).backward()``, ``scaler.unscale_(optimizer)`` if gradients are clipped,
    ``scaler.step(optimizer)``, ``scaler.update()``; every rank makes the same calls.

    Args:
        net: the parallel module that is trained, or the pipeline: ``net.step(..., scale=scaler.scale)``; or the
            variable batch: ``net.step(..., scaler=scaler)``. On a rank whose stages have no parameters, and so no
            optimizer, ``step`` and ``unscale_`` get None.
        options: those of ``torch.amp.GradScaler``; ``device`` is that of the module unless given.
    """

    def __init__(self, net: ParallelModule | HeldStages, **options: Any) -> None:
        device = net.device if isinstance(net, PipelinedStages) else next(net.parameters()).device
        super().__init__(**{"device": device.type, **options})
        self._net, self._place = net, device
        self._nothing: Any = _Nothing()
        self._turns: list[_InTurn] = []

    def step_in_turn(self, optimizer: torch.optim.Optimizer) -> None:
        """Step on the gradients that there are, as ``step``, but any number of times between two calls of ``update``.

        A step whose gradients overflowed is left out, the others are made; the scale follows from all of them.
        """
        turn: Any = _InTurn(optimizer)
        self._turns.append(turn)  # torch's notes are by identity, which has to last until `update`
        super().step(turn)

    def update(self, new_scale: float | torch.Tensor | None = None) -> None:
        """Update the scale; as of torch's."""
        super().update(new_scale)
        self._turns.clear()

    def step(self, optimizer: torch.optim.Optimizer | None, *args: Any, **kwargs: Any) -> float | None:
        """Step, unless a gradient of any rank overflowed; as of torch's."""
        return super().step(self._nothing if optimizer is None else optimizer, *args, **kwargs)

    def unscale_(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Divide gradients by the scale; as of torch's."""
        super().unscale_(self._nothing if optimizer is None else optimizer)

    def _unscale_grads_(
        self, optimizer: torch.optim.Optimizer, inv_scale: torch.Tensor, found_inf: torch.Tensor, allow_fp16: bool
    ) -> dict[torch.device, torch.Tensor]:
        found = super()._unscale_grads_(optimizer, inv_scale, found_inf, allow_fp16)
        mine = torch.zeros(1, device=self._place)
        for flag in found.values():
            mine += flag.to(self._place)
        self._net.add_over_ranks(mine)
        overflow = mine[0].clamp(max=1.0)  # fused optimizers compare with 1
        for flag in found.values():
            flag.copy_(overflow)
        return found or {self._place: overflow}  # a rank whose pieces have no gradient skips with the others
