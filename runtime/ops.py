"""Operators that must know how they are split. All others work on local pieces as they are.

Each holds its local parameters under the names of the module that it replaces, so that the
parallel module's ``state_dict`` keeps the user's names.

Shapes: N samples, C channels, ... space or nothing.
"""

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from planner.ir.mesh import Mesh
from runtime.communicator import Axes, Communicator, group_size
from runtime.exchange import Batch, Conversion, Convert, ScaleGradient

WholeProduct = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
WholeNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d


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

    def current_batch(self) -> Batch:
        """Return the batch of this step; waits for the other ranks' sizes where that is needed."""
        if self.resolve_batch is not None:
            resolve, self.resolve_batch = self.resolve_batch, None
            resolve()
        return self.batch


class Redistribution(nn.Module):
    """Turns a tensor from one layout into another, and its gradient back.

    Args:
        conversion: both layouts.
        state: of this rank.
        gradient_factor: multiplies the gradient behind the conversion; a function of the state.
    """

    def __init__(
        self,
        conversion: Conversion,
        state: StepState,
        gradient_factor: Callable[[StepState], float] | None = None,
    ) -> None:
        super().__init__()
        self._conversion, self._state, self._factor = conversion, state, gradient_factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = self._state
        if not self._conversion.is_trivial:
            forward, backward = self._conversion.compiled(state.current_batch(), state.communicator)
            x = Convert.apply(x, forward, backward)
        if self._factor is not None and x.requires_grad:
            x = ScaleGradient.apply(x, functools.partial(self._factor, state))
        return x

    def extra_repr(self) -> str:
        return self._conversion.name


class Product(nn.Module):
    """A convolution or linear layer on local parameters.

    ``weight`` and ``bias`` carry the names of the module that it replaces.

    Args:
        original: the whole module, for its attributes.
        weight, bias: local pieces.
        groups: of the local convolution.
        adds_bias: false where the result is a partial sum; then ``Bias`` adds it once it is resolved.
        gradient_factors: by which the gradients of weight and bias are multiplied.
    """

    bias: nn.Parameter | None

    def __init__(  # what a product is made of
        self,
        original: WholeProduct,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        groups: int,
        adds_bias: bool,
        gradient_factors: tuple[float, float],
    ) -> None:
        super().__init__()
        self.weight = weight
        self.register_parameter("bias", bias)
        self._adds_bias = adds_bias
        self._factors = gradient_factors
        self._call = _product(original, groups)
        self.num_spatial = weight.dim() - 2
        self._description = f"{type(original).__name__}, local weight {tuple(weight.shape)}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = _scaled(self.weight, self._factors[0])
        return self._call(x, weight, self.scaled_bias() if self._adds_bias else None)

    def scaled_bias(self) -> torch.Tensor | None:
        """Return the bias as the layer uses it."""
        found: torch.Tensor | None = _scaled(self.bias, self._factors[1])
        return found

    def extra_repr(self) -> str:
        return self._description


class Bias(nn.Module):
    """Adds the bias of a product whose partial sums have been resolved; holds no parameter itself."""

    def __init__(self, product: Product) -> None:
        super().__init__()
        self._product = (product,)  # in a tuple, so that it is no submodule with a second name

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        (product,) = self._product
        bias = product.scaled_bias()
        return y if bias is None else y + bias.to(y.dtype).view(-1, *[1] * product.num_spatial)


def _scaled(parameter: torch.Tensor | None, factor: float) -> Any:
    return parameter if parameter is None or factor == 1.0 else ScaleGradient.apply(parameter, lambda: factor)


def _product(original: WholeProduct, groups: int) -> Callable[..., torch.Tensor]:
    if isinstance(original, nn.Linear):
        return functional.linear
    spatial = original.weight.dim() - 2
    function: Callable[..., torch.Tensor] = [functional.conv1d, functional.conv2d, functional.conv3d][spatial - 1]
    stride, padding, dilation = original.stride, original.padding, original.dilation
    return lambda x, w, b: function(x, w, b, stride, padding, dilation, groups)


class BatchNorm(nn.Module):
    """Batch norm over the pieces of several ranks, equal to that of one device.

    Args:
        original: the whole module, for its attributes.
        tensors: local pieces of its parameters and buffers, by name.
        axes: mesh axes over which the statistics are sums; empty for local statistics.
        state: of this rank.
        gradient_factor: by which the gradients of weight and bias are multiplied.
    """

    weight: nn.Parameter
    bias: nn.Parameter
    running_mean: torch.Tensor
    running_var: torch.Tensor
    num_batches_tracked: torch.Tensor

    def __init__(
        self,
        original: WholeNorm,
        tensors: dict[str, torch.Tensor],
        axes: Axes,
        state: StepState,
        gradient_factor: float,
    ) -> None:
        super().__init__()
        self.register_parameter("weight", tensors["weight"])  # type: ignore[arg-type]  # a parameter
        self.register_parameter("bias", tensors["bias"])  # type: ignore[arg-type]  # a parameter
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(name, tensors[name])
        self.eps, self.momentum = original.eps, original.momentum
        self._axes, self._state, self._factor = axes, state, gradient_factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = _scaled(self.weight, self._factor), _scaled(self.bias, self._factor)
        if not self.training:
            return functional.batch_norm(x, self.running_mean, self.running_var, weight, bias, False, 0.0, self.eps)
        self.num_batches_tracked.add_(1)
        momentum = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        if not self._axes:
            return functional.batch_norm(x, self.running_mean, self.running_var, weight, bias, True, momentum, self.eps)
        y: torch.Tensor
        y, mean, variance, count = _GlobalBatchNorm.apply(
            x, weight, bias, self.eps, self._axes, self._state.communicator
        )
        with torch.no_grad():
            unbiased = variance * (count / (count - 1).clamp(min=1))
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)
        return y

    def extra_repr(self) -> str:
        return f"{self.weight.numel()} local channels, statistics over mesh axes {self._axes}"


class _GlobalBatchNorm(torch.autograd.Function):
    """Statistics by one all-gather of (mean, squared deviations, count), joined as in [Chan79]."""

    @staticmethod
    def forward(  # what autograd passes
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        eps: float,
        axes: Axes,
        communicator: Communicator,
    ) -> Any:
        dims = [d for d in range(x.dim()) if d != 1]
        channels = x.shape[1]
        local_count = x.numel() // channels
        wide = torch.promote_types(x.dtype, torch.float32)
        variance, mean = torch.var_mean(x.to(wide), dims, correction=0)
        packed = torch.cat([mean.to(wide), variance.to(wide), mean.new_tensor([local_count], dtype=wide)])
        size = group_size(communicator.mesh, axes)
        rows = communicator.all_gather(packed, [packed.numel()] * size, axes).view(size, -1)
        means, variances, counts = rows[:, :channels], rows[:, channels:-1], rows[:, -1:]
        count = counts.sum()  # stays on the device: reading it would make the host wait
        mean = (means * counts).sum(0) / count
        variance = ((variances + (means - mean) ** 2) * counts).sum(0) / count
        invstd = torch.rsqrt(variance + eps)
        y = functional.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps)
        ctx.save_for_backward(x, weight, mean, invstd)
        ctx.count, ctx.axes, ctx.communicator, ctx.eps = count, axes, communicator, eps
        ctx.mark_non_differentiable(mean, variance, count)
        return y, mean, variance, count

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        x, weight, mean, invstd = ctx.saved_tensors
        dy = gradients[0]
        dims = [d for d in range(x.dim()) if d != 1]
        shape = [1, -1, *[1] * (x.dim() - 2)]
        centred = x.to(mean.dtype) - mean.view(shape)
        d_bias = dy.sum(dims, dtype=mean.dtype)
        d_weight = (dy * centred).sum(dims) * invstd
        packed = torch.cat([d_bias, d_weight])
        ctx.communicator.all_reduce(packed, ctx.axes)
        sum_dy, sum_dy_xhat = (packed / ctx.count).chunk(2)
        scale = weight * invstd
        dx = dy - sum_dy.view(shape)
        dx = dx.sub_(centred.mul_((invstd * sum_dy_xhat).view(shape))).mul_(scale.view(shape))
        return dx.to(x.dtype), d_weight.to(weight.dtype), d_bias.to(weight.dtype), None, None, None


class Dropout(nn.Module):
    """Dropout whose mask depends on the step, the layer and the shard: replicas agree, shards differ.

    Args:
        probability: of an element (or a whole channel) to become zero.
        whole_channels: as ``nn.Dropout2d``.
        key: of layer and shard; equal on ranks that hold the same piece.
        state: of this rank.
    """

    def __init__(self, probability: float, whole_channels: bool, key: int, state: StepState) -> None:
        super().__init__()
        self.p, self._whole, self._key, self._state = probability, whole_channels, key, state

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.p == 0:
            return x
        if self.p == 1:
            return x * 0
        generator = torch.Generator(device=x.device)
        generator.manual_seed((self._state.seed * 1_000_003 + self._state.step * 7_919 + self._key) % 2**63)
        shape = (*x.shape[:2], *[1] * (x.dim() - 2)) if self._whole else x.shape
        mask = x.new_empty(shape).bernoulli_(1 - self.p, generator=generator).div_(1 - self.p)
        return x * mask

    def extra_repr(self) -> str:
        return f"p={self.p}"


class LocalLoss(nn.Module):
    """A loss inside the model on this rank's samples, as its share of the mean over the batch.

    Args:
        call: the original loss.
        mean: it is a mean over the samples (else a sum).
        resolve: adds the shares of the ranks.
        state: of this rank.
    """

    def __init__(
        self,
        call: Callable[..., torch.Tensor],
        mean: bool,
        resolve: Redistribution,
        state: StepState,
    ) -> None:
        super().__init__()
        self._call, self._mean, self.resolve, self._state = call, mean, resolve, state

    def forward(self, x: torch.Tensor, *others: Any, **options: Any) -> torch.Tensor:
        loss = self._call(x, *others, **options)
        if self._mean:
            loss = loss * (x.shape[0] / self._state.current_batch().size)
        resolved: torch.Tensor = self.resolve(loss)
        return resolved


def shard_key(name: str, mesh: Mesh, position: int, axes: Axes) -> int:
    """Return a number for a layer and the piece that a rank holds of it, equal on replicas."""
    coordinates = mesh.coordinates(position)
    text = f"{name}:{[coordinates[a] for a in axes]}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
