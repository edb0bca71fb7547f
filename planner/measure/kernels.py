"""From a profile key to the operator itself, on tensors of the key's shapes.

What is called is what the runtime calls on a rank: parameters are leaves of their own, partial sums end where the
reduction begins, batch norm over several ranks and dropout are the runtime's forms.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch.nn import functional

from planner.ir import ops as ir
from planner.ir.count import Shape
from planner.measure.functions import Function, Tensors, along, elementwise, loss, reduction
from planner.profile.key import AbsorbedKey, PieceKey

GlobalNorm = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Batch norm over the pieces of several ranks, nothing sent: of x, running mean and variance, weight and bias."""

_CONVOLUTIONS: Final[Any] = (functional.conv1d, functional.conv2d, functional.conv3d)
_TRANSPOSED: Final[Any] = (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d)
_MAX_POOLS: Final[Any] = (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d)
_AVERAGE_POOLS: Final[Any] = (functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d)
_POWER_POOLS: Final[Any] = (functional.lp_pool1d, functional.lp_pool2d, functional.lp_pool3d)
_ADAPTIVE: Final[Any] = {
    "avg": (functional.adaptive_avg_pool1d, functional.adaptive_avg_pool2d, functional.adaptive_avg_pool3d),
    "max": (functional.adaptive_max_pool1d, functional.adaptive_max_pool2d, functional.adaptive_max_pool3d),
}
_LINEAR_MODES: Final = ("linear", "bilinear", "trilinear")


@dataclass(frozen=True)
class Maker:
    """Makes the tensors of a key.

    Attributes:
        device: where they are.
        dtype: of activations; parameters are fp32 beside half precision, as autocast has them.
        channels_last: of tensors with two or three dimensions of space.
        generator: of their values.
    """

    device: torch.device
    dtype: torch.dtype
    channels_last: bool
    generator: torch.Generator

    def tensor(self, shape: Shape, *, gradient: bool = False) -> torch.Tensor:
        """Return an activation of random values."""
        if not self.dtype.is_floating_point:
            return torch.ones(shape, dtype=self.dtype, device=self.device)
        return self._random(shape, self.dtype, gradient)

    def parameter(self, shape: Shape, *, gradient: bool) -> torch.Tensor:
        """Return a parameter of random values, small ones, so that products of products stay finite."""
        dtype = torch.float64 if self.dtype is torch.float64 else torch.float32
        return self._random(shape, dtype, gradient, 1 / math.sqrt(max(math.prod(shape[1:]), 1)))

    def _random(self, shape: Shape, dtype: torch.dtype, gradient: bool, scale: float = 1.0) -> torch.Tensor:
        made = torch.randn(shape, generator=self.generator, device=self.device).mul_(scale).to(dtype)
        if self.channels_last and len(shape) in {4, 5}:
            made = made.contiguous(memory_format=[torch.channels_last, torch.channels_last_3d][len(shape) - 4])
        return made.requires_grad_(gradient)


@dataclass(frozen=True)
class Kernel:
    """An operator with its tensors, ready to be called again and again.

    Attributes:
        inputs: that backward goes back to, where it does; the resolved partial sum is one.
        params: trained parameters.
        forward: computes the results; two where a partial sum ends one part and the resolved sum begins another.
    """

    inputs: list[torch.Tensor]
    params: list[torch.Tensor]
    forward: Callable[[], list[torch.Tensor]]

    @property
    def num_bytes(self) -> int:
        """Of inputs and parameters."""
        return sum(x.nbytes for x in (*self.inputs, *self.params))


def kernel_of(key: PieceKey, make: Maker, global_norm: GlobalNorm) -> Kernel | None:
    """Return the operator of a key with its absorbed ones, or None where it has none of its own.

    Args:
        key: of the piece.
        make: its tensors.
        global_norm: what stands for batch norms whose statistics are those of several ranks.
    """
    params: list[torch.Tensor] = []
    main = _operator(key, make, params, global_norm)
    behind = key.output if key.resolved is None else key.resolved
    calls = [_of_absorbed(a, behind, key, make, params, global_norm) for a in key.absorbed]
    if main is None or any(call is None for call in calls):
        return None
    inputs = [make.tensor(shape, gradient=key.input_gradient and make.dtype.is_floating_point) for shape in key.inputs]
    tail = [call for call in calls if call is not None]
    if key.resolved is None:
        trained = [p for p in params if p.requires_grad]
        return Kernel(inputs, trained, lambda: [_chain(tail, main(inputs))])
    resolved = make.tensor(key.resolved, gradient=True)
    if key.bias:
        bias = make.parameter((key.resolved[1] if key.op.kind != "linear" else key.resolved[-1],),
                              gradient=key.weight_gradient)  # fmt: skip
        params.append(bias)
        num_spatial = 0 if key.op.kind == "linear" else len(key.resolved) - 2
        tail.insert(0, lambda xs: xs[0] + bias.to(xs[0].dtype).view(-1, *[1] * num_spatial))
    trained = [p for p in params if p.requires_grad]
    return Kernel([*inputs, resolved], trained, lambda: [main(inputs), _chain(tail, resolved)])


def _chain(calls: Sequence[Function], y: torch.Tensor) -> torch.Tensor:
    for call in calls:
        y = call([y])
    return y


def _of_absorbed(
    absorbed: AbsorbedKey, shape: Shape, key: PieceKey, make: Maker, params: list[torch.Tensor], norm: GlobalNorm
) -> Function | None:
    if isinstance(absorbed.op, ir.BatchNorm):
        return _batch_norm(shape[1], make, params, norm if key.synchronised else None, absorbed.weight_gradient)
    if isinstance(absorbed.op, ir.Dropout):
        return _dropout(absorbed.op, make)
    return elementwise(absorbed.op.function, 1) if isinstance(absorbed.op, ir.Elementwise) else None


def _operator(  # noqa: C901, PLR0911, PLR0912  # a table of kinds
    key: PieceKey, make: Maker, params: list[torch.Tensor], norm: GlobalNorm
) -> Function | None:
    """Return the operator of a key; its parameters are appended to ``params``."""
    op, trains = key.op, key.weight_gradient
    match op:
        case ir.Conv() | ir.ConvTranspose() | ir.Linear():
            return _product(op, key, make, params)
        case ir.BatchNorm():
            return _batch_norm(key.output[1], make, params, norm if key.synchronised else None, trains)
        case ir.GroupNorm():
            weight, bias = _pair(make, params, (key.output[1],), trains)
            return lambda xs: functional.group_norm(xs[0], op.groups, weight, bias)
        case ir.Pool():
            return _pool(op, key)
        case ir.AdaptivePool() if not op.output_size:
            return lambda xs: (torch.mean if op.function == "avg" else torch.amax)(xs[0], tuple(range(2, xs[0].dim())))
        case ir.AdaptivePool():
            adaptive = _ADAPTIVE[op.function][len(key.output) - 3]
            return lambda xs: adaptive(xs[0], key.output[2:])
        case ir.Interpolate():
            return _interpolation(op, key)
        case ir.PixelShuffle():
            shuffle = functional.pixel_unshuffle if op.unshuffle else functional.pixel_shuffle
            part = tuple(slice(0, n) for n in key.output[2:])
            return lambda xs: shuffle(xs[0], op.factor)[:, :, *part]
        case ir.Elementwise() if not key.absorbed or elementwise(op.function, len(key.inputs)):
            return elementwise(op.function, len(key.inputs))
        case ir.Dropout():
            return _dropout(op, make)
        case ir.Concat():
            return lambda xs: torch.cat(list(xs), op.dim)
        case ir.Softmax():
            return lambda xs: (functional.log_softmax if op.log else functional.softmax)(xs[0], op.dim)
        case ir.Reduce():
            return reduction(op)
        case ir.Along():
            pair = _pair(make, params, tuple(key.inputs[0][d] for d in op.dims), trains) if trains else ()
            call = along(op, key.inputs[0])
            return None if call is None else lambda xs: call([xs[0], *pair])
        case ir.Permute():
            return lambda xs: xs[0].permute(op.order).contiguous()
        case ir.Reshape() if key.absorbed and math.prod(key.inputs[0]) == math.prod(key.output):
            return lambda xs: xs[0].reshape(key.output)
        case ir.Elementwise() if key.absorbed:
            return lambda xs: xs[0]
        case ir.Loss():
            return loss(op, key.inputs)
        case _:
            return None


# ---- products


def _product(
    op: ir.Conv | ir.ConvTranspose | ir.Linear, key: PieceKey, make: Maker, params: list[torch.Tensor]
) -> Function:
    trains, channels = key.weight_gradient, key.output[-1 if isinstance(op, ir.Linear) else 1]
    inside = key.inputs[0][-1 if isinstance(op, ir.Linear) else 1]
    match op:
        case ir.Linear():
            shape: Shape = (channels, inside)
        case ir.Conv():
            shape = (channels, inside // op.groups, *op.kernel)
        case ir.ConvTranspose():
            shape = (inside, channels // op.groups, *op.kernel)
    weight = make.parameter(shape, gradient=trains)
    adds_bias = key.bias and key.resolved is None
    bias = make.parameter((channels,), gradient=trains) if adds_bias else None
    params += [weight] if bias is None else [weight, bias]
    match op:
        case ir.Linear():
            return lambda xs: functional.linear(xs[0], weight, bias)
        case ir.ConvTranspose():
            return _transposed(op, key, weight, bias)
        case ir.Conv():
            return _conv(op, key, weight, bias)


def _conv(op: ir.Conv, key: PieceKey, weight: torch.Tensor, bias: torch.Tensor | None) -> Function:
    """Return a convolution; on a piece by space, of the rows that it has and the padding that they lack."""
    convolve = _CONVOLUTIONS[len(op.kernel) - 1]
    spans = [d * (k - 1) + 1 for k, d in zip(op.kernel, op.dilation, strict=True)]
    margins, own = _margins(op.padding, op.padding_after or op.padding, spans, op.stride, key)
    mode = "constant" if op.padding_mode == "zeros" else op.padding_mode
    if mode != "constant":  # a piece repeats rows that it has, wherever they are: as much work as zeros
        mode = "constant" if any(any(pair) for pair in margins) else mode
        margins = tuple((a + p, b + p) for (a, b), p in zip(margins, own, strict=True))
        own = (0,) * len(own)
    widths = [width for pair in reversed(margins) for width in pair]
    if not any(widths):
        return lambda xs: convolve(xs[0], weight, bias, op.stride, own, op.dilation, op.groups)
    return lambda xs: convolve(
        functional.pad(xs[0], widths, mode), weight, bias, op.stride, own, op.dilation, op.groups
    )


def _margins(
    before: Shape, after: Shape, spans: Sequence[int], stride: Shape, key: PieceKey
) -> tuple[tuple[tuple[int, int], ...], Shape]:
    """Return what is to be put around the input, and the operator's own padding, so that the output fits the key.

    Args:
        before: padding of the whole operator in front of each dimension of space.
        after: behind it.
        spans: positions that one window covers.
        stride: of the windows.
        key: of the piece.
    """
    margins, own = [], []
    for k, (size, wanted) in enumerate(zip(key.inputs[0][2:], key.output[2:], strict=True)):
        if before[k] == after[k] and (size + 2 * before[k] - spans[k]) // stride[k] + 1 == wanted:
            margins.append((0, 0))
            own.append(before[k])
            continue
        lacks = (wanted - 1) * stride[k] + spans[k] - size
        first = min(before[k], max(lacks, 0))
        margins.append((first, lacks - first))
        own.append(0)
    return tuple(margins), tuple(own)


def _transposed(op: ir.ConvTranspose, key: PieceKey, weight: torch.Tensor, bias: torch.Tensor | None) -> Function:
    call = _TRANSPOSED[len(op.kernel) - 1]
    part = tuple(slice(0, n) for n in key.output[2:])
    return lambda xs: call(
        xs[0], weight, bias, op.stride, op.padding, op.output_padding, op.groups, op.dilation
    )[:, :, *part]  # fmt: skip


# ---- the rest


def _pair(make: Maker, params: list[torch.Tensor], shape: Shape, trains: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weight and bias of a normalisation."""
    weight, bias = make.parameter(shape, gradient=trains), make.parameter(shape, gradient=trains)
    params += [weight, bias]
    return weight, bias


def _batch_norm(
    channels: int, make: Maker, params: list[torch.Tensor], norm: GlobalNorm | None, trains: bool
) -> Function:
    weight, bias = _pair(make, params, (channels,), trains)
    mean, variance = torch.zeros_like(weight.detach()), torch.ones_like(weight.detach())
    if norm is not None:
        return lambda xs: norm(xs[0], mean, variance, weight, bias)

    def normalise(xs: Tensors) -> torch.Tensor:
        several = xs[0].numel() > channels  # of one value there are no statistics: such a layer is in eval mode
        return functional.batch_norm(xs[0], mean, variance, weight, bias, training=several)

    return normalise


def _dropout(op: ir.Dropout, make: Maker) -> Function:
    """Return dropout as the runtime computes it: by a mask of its own generator."""

    def drop(xs: Tensors) -> torch.Tensor:
        x = xs[0]
        if op.probability >= 1:
            return x * 0
        together = {"element": x.dim(), "channel": 2, "sample": 1, "batch": 0}[op.unit]
        mask = x.new_empty((*x.shape[:together], *[1] * (x.dim() - together)))
        mask = mask.bernoulli_(1 - op.probability, generator=make.generator)
        return x * (mask.div_(1 - op.probability) if op.rescale else mask)

    return drop


def _pool(op: ir.Pool, key: PieceKey) -> Function:
    """Return a pool; on a piece by space, of the rows that it has and the padding that they lack."""
    at = len(op.kernel) - 1
    if op.function == "lp":
        return lambda xs: _POWER_POOLS[at](xs[0], 2.0, op.kernel, op.stride, op.ceil_mode)

    def call(x: torch.Tensor, padding: Shape, *, ceil_mode: bool) -> torch.Tensor:
        found: torch.Tensor
        if op.function == "avg":
            found = _AVERAGE_POOLS[at](x, op.kernel, op.stride, padding, ceil_mode, op.count_include_pad)
        else:
            found = _MAX_POOLS[at](x, op.kernel, op.stride, padding, op.dilation, ceil_mode)
        return found

    whole = call(torch.empty(key.inputs[0], device="meta"), op.padding, ceil_mode=op.ceil_mode)
    if tuple(whole.shape) == key.output:
        return lambda xs: call(xs[0], op.padding, ceil_mode=op.ceil_mode)
    dilation = op.dilation if op.function == "max" else (1,) * len(op.kernel)
    spans = [d * (k - 1) + 1 for k, d in zip(op.kernel, dilation, strict=True)]
    margins, own = _margins(op.padding, op.padding, spans, op.stride, key)
    widths = [width for pair in reversed(margins) for width in pair]
    fill = 0.0 if op.function == "avg" else -math.inf
    return lambda xs: call(functional.pad(xs[0], widths, value=fill), own, ceil_mode=False)


def _interpolation(op: ir.Interpolate, key: PieceKey) -> Function:
    spatial = len(key.output) - 2
    mode = {"linear": _LINEAR_MODES[spatial - 1], "cubic": "bicubic"}.get(op.mode, op.mode)
    return lambda xs: functional.interpolate(xs[0], key.output[2:], mode=mode)
