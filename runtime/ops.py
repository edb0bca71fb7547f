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

from planner.frontend.trace import write_items
from planner.ir import ops as ir
from planner.ir.mesh import Mesh
from runtime.communicator import Axes, Communicator, group_size
from runtime.exchange import Batch, Conversion, Convert, ScaleGradient

_CONVOLUTIONS: Any = (functional.conv1d, functional.conv2d, functional.conv3d)
_TRANSPOSED: Any = (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d)


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
    """A convolution, transposed convolution or linear layer on local parameters.

    ``weight`` and ``bias`` carry the names of the module that it replaces.

    Args:
        call: the operator, from input, weight and bias.
        weight, bias: local pieces.
        adds_bias: false where the result is a partial sum; then ``Bias`` adds it once it is resolved.
        gradient_factors: by which the gradients of weight and bias are multiplied.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        call: "ProductCall",
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        adds_bias: bool,
        gradient_factors: tuple[float, float],
    ) -> None:
        super().__init__()
        self.weight = weight
        self.register_parameter("bias", bias)
        self._adds_bias = adds_bias
        self._factors = gradient_factors
        self._call = call

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = scaled(self.weight, self._factors[0])
        return self._call(x, weight, self.scaled_bias() if self._adds_bias else None)

    def scaled_bias(self) -> torch.Tensor | None:
        """Return the bias as the layer uses it."""
        found: torch.Tensor | None = scaled(self.bias, self._factors[1])
        return found

    def extra_repr(self) -> str:
        return f"{self._call}, local weight {tuple(self.weight.shape)}"


class Bias(nn.Module):
    """Adds the bias of a product whose partial sums have been resolved; holds no parameter itself.

    Args:
        bias: returns it.
        num_spatial: dimensions of space behind the channels.
    """

    def __init__(self, bias: Callable[[], torch.Tensor | None], num_spatial: int) -> None:
        super().__init__()
        self._bias, self._num_spatial = bias, num_spatial

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        bias = self._bias()
        return y if bias is None else y + bias.to(y.dtype).view(-1, *[1] * self._num_spatial)


def scaled(parameter: torch.Tensor | None, factor: float) -> Any:
    """Return a parameter whose gradient is multiplied by a factor."""
    return parameter if parameter is None or factor == 1.0 else ScaleGradient.apply(parameter, lambda: factor)


class OfArguments(nn.Module):
    """An operator whose parameters are arguments, as the user's own code passes them."""

    def __init__(self, call: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self._call = call

    def forward(self, *args: Any) -> torch.Tensor:
        return self._call(*args)

    def extra_repr(self) -> str:
        return str(self._call)


@dataclass(frozen=True)
class ProductCall:
    """A convolution, transposed convolution or linear layer with the groups of this rank's piece."""

    op: ir.Conv | ir.ConvTranspose | ir.Linear
    groups: int

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        op = self.op
        if isinstance(op, ir.Linear):
            return functional.linear(x, weight, bias)
        found: torch.Tensor
        at = len(op.kernel) - 1
        if isinstance(op, ir.ConvTranspose):
            found = _TRANSPOSED[at](
                x, weight, bias, op.stride, op.padding, op.output_padding, self.groups, op.dilation
            )  # fmt: skip
        elif op.padding_mode == "zeros" and op.padding_after is None:
            found = _CONVOLUTIONS[at](x, weight, bias, op.stride, op.padding, op.dilation, self.groups)
        else:
            found = _CONVOLUTIONS[at](self._padded(op, x), weight, bias, op.stride, 0, op.dilation, self.groups)
        return found

    @staticmethod
    def _padded(op: ir.Conv, x: torch.Tensor) -> torch.Tensor:
        after = op.padding if op.padding_after is None else op.padding_after
        widths = [w for pair in zip(reversed(op.padding), reversed(after), strict=True) for w in pair]
        return functional.pad(x, widths, mode="constant" if op.padding_mode == "zeros" else op.padding_mode)

    def __str__(self) -> str:
        return f"{self.op.kind} of {self.groups} groups" if self.groups > 1 else self.op.kind


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


class CountBatches(nn.Module):
    """Counts training steps in a buffer, where a model's own batch norm does so in its ``forward``."""

    def forward(self, count: torch.Tensor) -> torch.Tensor:
        return count.add_(1) if self.training else count


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
        scale = invstd if weight is None else weight * invstd
        dx = dy - sum_dy.view(shape)
        dx = dx.sub_(centred.mul_((invstd * sum_dy_xhat).view(shape))).mul_(scale.view(shape))
        if weight is None:
            return dx.to(x.dtype), None, None, None, None, None
        return dx.to(x.dtype), d_weight.to(weight.dtype), d_bias.to(weight.dtype), None, None, None


class BatchSize(nn.Module):
    """Returns a multiple of the number of samples in the global batch."""

    def __init__(self, multiple: int, state: StepState) -> None:
        super().__init__()
        self._multiple, self._state = multiple, state

    def forward(self) -> int:
        return self._state.current_batch().size * self._multiple


class Dropout(nn.Module):
    """Dropout whose mask depends on the step, the layer and the shard: replicas agree, shards differ.

    Args:
        op: probability, and what is dropped at once: elements, channels (``nn.Dropout2d``), samples
            (stochastic depth) or everything.
        key: of layer and shard; equal on ranks that draw the same mask.
        state: of this rank.
    """

    def __init__(self, op: ir.Dropout, key: int, state: StepState) -> None:
        super().__init__()
        self._op, self._key, self._state = op, key, state

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        p = self._op.probability
        if not self.training or p == 0:
            return x
        if p == 1:
            return x * 0
        generator = torch.Generator(device=x.device)
        generator.manual_seed(self._state.seed_of(self._key))
        together = {"element": x.dim(), "channel": 2, "sample": 1, "batch": 0}[self._op.unit]
        shape = (*x.shape[:together], *[1] * (x.dim() - together))
        mask = x.new_empty(shape).bernoulli_(1 - p, generator=generator)
        return x * (mask.div_(1 - p) if self._op.rescale else mask)

    def extra_repr(self) -> str:
        return f"p={self._op.probability}, {self._op.unit}"


class Seeded(nn.Module):
    """Any call that draws random numbers, with a seed of step, layer and shard; torch's own generator is kept.

    Args:
        call: the function or module.
        key: of layer and shard; equal on ranks that need the same numbers.
        state: of this rank.
    """

    def __init__(self, call: Callable[..., Any], key: int, state: StepState) -> None:
        super().__init__()
        self.call, self._key, self._state = call, key, state

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        devices = {a.device for a in args if isinstance(a, torch.Tensor) and a.is_cuda}
        with torch.random.fork_rng(devices=sorted(d.index for d in devices)):
            torch.manual_seed(self._state.seed_of(self._key))
            return self.call(*args, **kwargs)


class WithScaledGradients:
    """Calls a module whose parameters' gradients are multiplied by factors; replaces its ``forward``.

    Args:
        module: the module.
        factors: by the parameters' names.
    """

    def __init__(self, module: nn.Module, factors: dict[str, float], pieces: dict[str, torch.Tensor]) -> None:
        self._module, self._factors, self._pieces = module, factors, pieces

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tensors = {name: scaled(piece, self._factors.get(name, 1.0)) for name, piece in self._pieces.items()}
        return torch.func.functional_call(self._module, tensors, args, kwargs)


def written_items(x: torch.Tensor, index: Any, value: Any) -> torch.Tensor:
    """Return a copy of a tensor with some elements written."""
    return write_items(x.clone(), index, value)


def reshape_piece(
    x: torch.Tensor, sizes: list[int], sample_dim: int | None, ratio: tuple[int, int, int]
) -> torch.Tensor:
    """Return a reshaped piece; the samples are counted in the piece itself.

    Args:
        x: the piece.
        sizes: of the result, but for the samples.
        sample_dim: of the result.
        ratio: dimension of the samples in x, its rows for each sample, and those of the result.
    """
    if sample_dim is None:
        return x.reshape(sizes)
    dim, rows, new_rows = ratio
    return x.reshape([*sizes[:sample_dim], x.shape[dim] // rows * new_rows, *sizes[sample_dim + 1 :]])


class LocalLoss(nn.Module):
    """A loss inside the model on this rank's samples, as its share of the mean over the batch.

    Args:
        call: the original loss.
        mean: it is a mean over the samples (else a sum).
        samples: dimension of the samples in its first input, and its rows for each sample.
        resolve: adds the shares of the ranks.
        state: of this rank.
    """

    def __init__(
        self,
        call: Callable[..., torch.Tensor],
        mean: bool,
        samples: tuple[int, int],
        resolve: Redistribution,
        state: StepState,
    ) -> None:
        super().__init__()
        self._call, self._mean, self._samples, self.resolve, self._state = call, mean, samples, resolve, state

    def forward(self, x: torch.Tensor, *others: Any, **options: Any) -> torch.Tensor:
        loss = self._call(x, *others, **options)
        if self._mean:
            dim, rows = self._samples
            loss = loss * (x.shape[dim] / (rows * self._state.current_batch().size))
        resolved: torch.Tensor = self.resolve(loss)
        return resolved


def shard_key(name: str, mesh: Mesh, position: int, axes: Axes) -> int:
    """Return a number for a layer and the piece that a rank holds of it, equal on replicas."""
    coordinates = mesh.coordinates(position)
    text = f"{name}:{[coordinates[a] for a in axes]}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
