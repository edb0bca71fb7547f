"""Batch norm over the pieces of several ranks, equal to that of one device."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from planner.ir import ops as ir
from runtime.comm.communicator import Axes, Communicator, group_size
from runtime.comm.packing import format_of
from runtime.graphs import uncompiled
from runtime.lowering.products import scaled
from runtime.state import StepState


class Normalise(nn.Module):
    """Batch norm over the pieces of several ranks, equal to that of one device; parameters are arguments.

    Args:
        op: the operator.
        axes: mesh axes over which the statistics are sums; empty for local statistics.
        state: of this rank.
    """

    def __init__(self, op: ir.BatchNorm, axes: Axes, state: StepState) -> None:
        super().__init__()
        self._op, self._axes, self._state = op, axes, state

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
        eps = self._op.eps
        y: torch.Tensor
        y, mean, variance, count = _GlobalBatchNorm.apply(x, weight, bias, eps, self._axes, self._state.communicator)
        if running_mean is not None and running_var is not None and self.training:
            with torch.no_grad():
                unbiased = variance * (count / (count - 1).clamp(min=1))
                running_mean.lerp_(mean.to(running_mean.dtype), momentum)
                running_var.lerp_(unbiased.to(running_var.dtype), momentum)
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
        gradient_factor: by which the gradients of weight and bias are multiplied.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    running_mean: torch.Tensor | None
    running_var: torch.Tensor | None
    num_batches_tracked: torch.Tensor | None

    def __init__(
        self, op: ir.BatchNorm, tensors: dict[str, torch.Tensor], axes: Axes, state: StepState, gradient_factor: float
    ) -> None:
        super().__init__(op, axes, state)
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
        weight, bias = scaled(self.weight, self._factor), scaled(self.bias, self._factor)
        return self.normalised(x, self.running_mean, self.running_var, weight, bias, momentum or 0.0)


class _GlobalBatchNorm(torch.autograd.Function):
    """Statistics by one all-gather of (mean, squared deviations, count), joined as in [Chan79]."""

    @staticmethod
    def forward(  # what autograd passes
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        eps: float,
        axes: Axes,
        communicator: Communicator,
    ) -> Any:
        channels = x.shape[1]
        wide = torch.promote_types(x.dtype, torch.float32)
        # the kernel of torch's own batch norm: a quarter of the time of torch.var_mean on a CPU
        mean, variance = torch.batch_norm_update_stats(x.to(wide), None, None, 0.0)
        packed = torch.cat([mean, variance, mean.new_full((1,), x.numel() // channels)])
        size = group_size(communicator.mesh, axes)
        rows = communicator.all_gather(packed, [packed.numel()] * size, axes).view(size, -1)
        means, variances, counts = rows[:, :channels], rows[:, channels:-1], rows[:, -1:]
        count = counts.sum()  # stays on the device: reading it would make the host wait
        mean = (means * counts).sum(0) / count
        variance = ((variances + (means - mean) ** 2) * counts).sum(0) / count
        y = functional.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps)
        ctx.save_for_backward(x, weight, mean, variance)
        ctx.count, ctx.axes, ctx.communicator, ctx.eps, ctx.dtype = count, axes, communicator, eps, x.dtype
        ctx.mark_non_differentiable(mean, variance, count)
        return y, mean, variance, count

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        x, weight, mean, variance = ctx.saved_tensors
        wide = mean.dtype
        x = x.to(wide)
        dy = gradients[0].to(wide).contiguous(memory_format=format_of(x))  # see runtime.lowering.ops.steadied
        scale = torch.ones_like(mean) if weight is None else weight.to(wide)
        # with the statistics as constants, in one pass: what is missing is what flows through them
        dx, d_weight, d_bias = torch.ops.aten.native_batch_norm_backward(
            dy, x, scale, mean, variance, None, None, False, ctx.eps, [True, True, True]
        )
        packed = torch.cat([d_bias, d_weight])
        ctx.communicator.all_reduce(packed, ctx.axes)
        mean_dy, mean_dy_xhat = (packed / ctx.count).chunk(2)
        invstd = torch.rsqrt(variance + ctx.eps)
        scale = scale * invstd
        slope = scale * invstd * mean_dy_xhat
        shape = [1, -1, *[1] * (x.dim() - 2)]
        dx.addcmul_(x, slope.neg().view(shape)).sub_((scale * mean_dy - slope * mean).view(shape))
        if weight is None:
            return dx.to(ctx.dtype), None, None, None, None, None
        return dx.to(ctx.dtype), d_weight.to(weight.dtype), d_bias.to(weight.dtype), None, None, None
