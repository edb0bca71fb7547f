"""Loss scaling for fp16 over the ranks of a parallel module."""

from typing import Any

import torch

from runtime.module import ParallelModule


class GradScaler(torch.amp.GradScaler):
    """``torch.amp.GradScaler`` whose ranks agree on whether a gradient overflowed.

    Where ranks hold different pieces of a parameter, only one of them may see an infinite gradient. All must skip the
    step and lower the scale then, as one device would. Costs one number of all ranks per step.

    Used as torch's: ``scaler.scale(loss).backward()``, ``scaler.unscale_(optimizer)`` if gradients are clipped,
    ``scaler.step(optimizer)``, ``scaler.update()``; every rank makes the same calls.

    Args:
        net: the parallel module that is trained.
        options: those of ``torch.amp.GradScaler``; ``device`` is that of the module unless given.
    """

    def __init__(self, net: ParallelModule, **options: Any) -> None:
        device = next(net.parameters()).device
        super().__init__(**{"device": device.type, **options})
        self._net, self._place = net, device

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
