"""Batch norm over the pieces of several ranks, equal to that of one device."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from planner.ir import ops as ir
from runtime.comm.among import Among
from runtime.comm.communicator import Axes
from runtime.comm.exchange import refuse_second_derivative
from runtime.comm.packing import format_of
from runtime.graphs import uncompiled
from runtime.lowering.products import both_scaled
from runtime.state import StepState


class Normalise(nn.Module):
    """Batch norm over the pieces of several ranks, equal to that of one device; parameters are arguments.

    Args:
        op: the operator.
        axes: mesh axes over which the statistics are sums; empty for local statistics.
        state: of this rank.
        name: of the layer, for messages.
    """

    def __init__(self, op: ir.BatchNorm, axes: Axes, state: StepState, name: str) -> None:
        super().__init__()
        self._op, self._axes, self._state, self._name = op, axes, state, name
        self._among: Among | None = None

    def forward(
        self,
        x: torch.Tensor,
        running_mean: torch.Tensor | None = None,
        running_var: torch.Tensor | None = None,
        weight: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self.normalised(x, running_mean, running_var, weight, bias, self._op.momentum or 0.0)

    def normalised(
        self,
        x: torch.Tensor,
        running_mean: torch.Tensor | None,
        running_var: torch.Tensor | None,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        momentum: float,
    ) -> torch.Tensor:
        """Return the normalised tensor and update the running statistics."""
        eps = self._op.eps
        by_batch = self.training or running_mean is None
        if not by_batch or not self._axes:
            return functional.batch_norm(x, running_mean, running_var, weight, bias, by_batch, momentum, eps)
        return self._by_all(x, running_mean, running_var, weight, bias, momentum)

    @uncompiled
    def _by_all(
        self,
        x: torch.Tensor,
        running_mean: torch.Tensor | None,
        running_var: torch.Tensor | None,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        momentum: float,
    ) -> torch.Tensor:
        """Normalise by the statistics of all ranks; arguments as of ``normalised``."""
        running = None
        if running_mean is not None and running_var is not None and self.training:
            running = running_mean, running_var, momentum
        among = self._among
        if among is None:
            among = self._among = Among(self._axes, self._state.communicator, self._name)
        y: torch.Tensor = _GlobalBatchNorm.apply(x, weight, bias, self._op.eps, running, among)
        return y

    def extra_repr(self) -> str:
        return f"statistics over mesh axes {self._axes}"


class BatchNorm(Normalise):
    """Batch norm that holds its local parameters and buffers under the names of the module that it replaces.

    Args:
        op: the operator.
        tensors: local pieces of parameters and buffers, by name.
        axes: mesh axes over which the statistics are sums; empty for local statistics.
        state: of this rank.
        name: of the layer, for messages.
        gradient_factor: by which the gradients of weight and bias are multiplied.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    running_mean: torch.Tensor | None
    running_var: torch.Tensor | None
    num_batches_tracked: torch.Tensor | None

    def __init__(
        self,
        op: ir.BatchNorm,
        tensors: dict[str, torch.Tensor],
        axes: Axes,
        state: StepState,
        name: str,
        gradient_factor: float,
    ) -> None:
        super().__init__(op, axes, state, name)
        self.register_parameter("weight", tensors.get("weight"))  # type: ignore[arg-type]  # a parameter
        self.register_parameter("bias", tensors.get("bias"))  # type: ignore[arg-type]  # a parameter
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(name, tensors.get(name))
        self._factor = gradient_factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]  # its own parameters
        momentum = self._op.momentum
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            momentum = 1.0 / float(self.num_batches_tracked) if momentum is None else momentum
        weight, bias = both_scaled(self.weight, self.bias, (self._factor, self._factor))
        return self.normalised(x, self.running_mean, self.running_var, weight, bias, momentum or 0.0)


class _GlobalBatchNorm(torch.autograd.Function):
    """Statistics by one all-gather of (mean, squared deviations, count), joined as in [Chan79].

    With the sums S over the batch of all ranks, and n its elements in a channel:

        dx = weight * invstd * (dy - S(dy) / n - (x - mean) * invstd * S(dy * xhat) / n)
    """

    @staticmethod
    def forward(  # what autograd passes
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        eps: float,
        running: tuple[torch.Tensor, torch.Tensor, float] | None,
        among: Among,
    ) -> torch.Tensor:
        channels = x.shape[1]
        wide = torch.promote_types(x.dtype, torch.float32)
        # the kernel of torch's own batch norm: a quarter of the time of torch.var_mean on a CPU
        mean, variance = torch.batch_norm_update_stats(x.to(wide), None, None, 0.0)
        packed = torch.cat([mean, variance, mean.new_full((1,), x.numel() // channels)])
        means, variances, counts = among.gathered(packed).split([channels, channels, 1], 1)
        count = counts.sum()  # stays on the device: reading it would make the host wait
        shares = counts / count
        mean = (means * shares).sum(0)
        apart = means - mean
        variance = (torch.addcmul(variances, apart, apart) * shares).sum(0)
        y = torch.batch_norm(x, weight, bias, mean, variance, False, 0.0, eps, torch.backends.cudnn.enabled)
        if running is not None:
            running_mean, running_var, momentum = running
            unbiased = variance * (count / (count - 1).clamp_(min=1))
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_(unbiased.to(running_var.dtype), momentum)
        ctx.save_for_backward(x, weight, mean, variance)
        ctx.count, ctx.among, ctx.eps = count, among, eps
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        refuse_second_derivative()
        x, weight, mean, variance = ctx.saved_tensors
        wide, narrow = mean.dtype, x.dtype
        x = x.to(wide)
        dy = gradients[0].to(wide).contiguous(memory_format=format_of(x))  # see runtime.lowering.ops.steadied
        scale = torch.ones_like(mean) if weight is None else weight.to(wide)
        # with the statistics as constants, in one pass: what is missing is what flows through them
        dx, d_weight, d_bias = torch.ops.aten.native_batch_norm_backward.default(
            dy, x, scale, mean, variance, None, None, False, ctx.eps, [True, True, True]
        )
        packed = torch.cat([d_bias, d_weight])
        ctx.among.add_up(packed)
        invstd = (variance + ctx.eps).rsqrt_()
        mean_dy, mean_dy_xhat = (packed.view(2, -1) * (scale * invstd / ctx.count)).unbind()
        slope = mean_dy_xhat.mul_(invstd)
        shape = [1, -1, *[1] * (x.dim() - 2)]
        dx.addcmul_(x, slope.view(shape), value=-1).sub_(mean_dy.addcmul_(slope, mean, value=-1).view(shape))
        if weight is None:
            return dx.to(narrow), None, None, None, None, None
        return dx.to(narrow), d_weight.to(weight.dtype), d_bias.to(weight.dtype), None, None, None
