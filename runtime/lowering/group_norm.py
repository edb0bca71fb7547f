"""Group norm over the pieces of space of several ranks, equal to that of one device."""

from typing import Any

import torch
from torch import nn

from runtime.comm.among import Among
from runtime.comm.communicator import Axes
from runtime.graphs import uncompiled
from runtime.state import StepState


class GroupNormOverSpace(nn.Module):
    """Group norm whose statistics are those of all ranks that hold a part of the same samples and groups.

    Args:
        groups: that this rank holds.
        channels: that this rank holds of weight and bias.
        axes: mesh axes that cut space.
        name: of the layer, for messages.
        state: of this rank.
    """

    def __init__(self, groups: int, channels: slice, axes: Axes, name: str, state: StepState) -> None:
        super().__init__()
        self._groups, self._channels, self._axes, self._name, self._state = groups, channels, axes, name, state

    @uncompiled
    def forward(
        self, x: torch.Tensor, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None, eps: float = 1e-5
    ) -> torch.Tensor:
        weight, bias = (None if t is None else t[self._channels] for t in (weight, bias))
        among = Among(self._axes, self._state.communicator, self._name)
        found: torch.Tensor = _GlobalGroupNorm.apply(x, weight, bias, (self._groups, eps), among)
        return found

    def extra_repr(self) -> str:
        return f"{self._groups} groups, statistics over mesh axes {self._axes}"


class _GlobalGroupNorm(torch.autograd.Function):
    """Statistics by one all-gather of (mean, variance, count), joined as in [Chan79]; backward one all-reduce.

    With A and B the sums over space of dy and of dy * (x - mean), of N elements in a group:

        dx = invstd * (w * dy - sum_c(w A) / N - (x - mean) * invstd^2 * sum_c(w B) / N)

    summed over the channels c of the group and over the ranks.
    """

    @staticmethod
    def forward(  # what autograd passes
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        settings: tuple[int, float],
        among: Among,
    ) -> torch.Tensor:
        groups, eps = settings
        wide = torch.promote_types(x.dtype, torch.float32)
        samples, channels = x.shape[:2]
        variance, mean = torch.var_mean(x.to(wide).reshape(samples, groups, -1), 2, correction=0)
        local_count = x[0].numel() // groups
        packed = torch.cat([mean.view(-1), variance.view(-1), mean.new_tensor([local_count])])
        rows = among.gathered(packed)
        means, variances = rows[:, :-1].view(among.size, 2, samples, groups).unbind(1)
        counts = rows[:, -1].view(among.size, 1, 1)
        count = counts.sum()  # stays on the device: reading it would make the host wait
        mean = (means * counts).sum(0) / count
        variance = ((variances + (means - mean) ** 2) * counts).sum(0) / count
        mean, invstd = (
            t.repeat_interleave(channels // groups, 1).view(samples, channels, *[1] * (x.dim() - 2))
            for t in (mean, torch.rsqrt(variance + eps))
        )
        y = (x - mean) * invstd
        if weight is not None:
            y = y * _of_channels(weight, x)
        if bias is not None:
            y = y + _of_channels(bias, x)
        ctx.save_for_backward(x, weight, mean, invstd)
        ctx.groups, ctx.count, ctx.among = groups, count, among
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        x, weight, mean, invstd = ctx.saved_tensors
        (dy,) = gradients
        samples, channels = x.shape[:2]
        space = list(range(2, x.dim()))
        centred = x - mean
        of_dy, of_product = dy.sum(space, dtype=mean.dtype), (dy * centred).sum(space, dtype=mean.dtype)
        d_weight, d_bias = (of_product * invstd.view(samples, channels)).sum(0), of_dy.sum(0)
        if weight is not None:
            of_dy, of_product = of_dy * weight, of_product * weight
        packed = torch.stack([of_dy, of_product]).view(2, samples, ctx.groups, -1).sum(3)
        ctx.among.add_up(packed)
        sums = (packed / ctx.count).repeat_interleave(channels // ctx.groups, 2)
        of_dy, of_product = sums.view(2, *mean.shape).unbind(0)
        scaled = dy if weight is None else dy * _of_channels(weight, x)
        dx = (scaled - of_dy - centred * (invstd**2 * of_product)) * invstd
        of_params = [None if weight is None else d.to(weight.dtype) for d in (d_weight, d_bias)]
        return dx.to(x.dtype), *of_params, None, None


def _of_channels(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return values.view(-1, *[1] * (x.dim() - 2))
