"""An operator on a piece: from local inputs to exactly a rank's region of the output.

``planner.ir.rules`` decides which regions of its inputs a piece needs. Here is what is computed from them where that
is not simply the operator on smaller tensors: windows that reach over the border of a piece, averages with counts of
their own, resizing by the coordinates of the whole, sizes that the user wrote down.

Sizes of the samples are always those of the local tensors, so that a piece is right for any batch.
Shapes: N samples, C channels, ... space or nothing.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional

from planner.ir import ops as ir
from planner.ir.halo import AdaptiveWindow, InterpolationWindow, Window
from planner.ir.region import Region
from planner.ir.rules import interpolation_step
from planner.ir.tensor import TensorSpec
from runtime.lowering.ops import reshape_piece
from runtime.lowering.products import Padding, ProductCall

Local = Callable[..., torch.Tensor]
"""From local inputs, then parameters by their role (``weight=``), to a tensor."""

Margins = list[tuple[int, int]]
"""Of every dimension of space, positions to add before and behind; negative: to leave out."""

_MAX_POOLS: Any = (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d)
_AVERAGE_POOLS: Any = (functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d)
_ADAPTIVE_MAX_POOLS: Any = (
    functional.adaptive_max_pool1d, functional.adaptive_max_pool2d, functional.adaptive_max_pool3d,
)  # fmt: skip
_ADAPTIVE_AVERAGE_POOLS: Any = (
    functional.adaptive_avg_pool1d, functional.adaptive_avg_pool2d, functional.adaptive_avg_pool3d,
)  # fmt: skip


@dataclass(frozen=True)
class Piece:
    """What one rank reads and computes of an operator.

    Attributes:
        inputs: the whole inputs.
        sources: the region of each that the rank holds.
        output: the whole output.
        region: of the output that the rank computes; of a partial sum, all that the sum has.
    """

    inputs: tuple[TensorSpec, ...]
    sources: tuple[Region, ...]
    output: TensorSpec
    region: Region

    def is_whole(self, dim: int) -> bool:
        """Return whether the rank reads and computes all of a dimension."""
        source = (self.sources[0].start[dim], self.sources[0].stop[dim]) == (0, self.inputs[0].shape[dim])
        return source and (self.region.start[dim], self.region.stop[dim]) == (0, self.output.shape[dim])

    @property
    def has_whole_space(self) -> bool:
        """Whether the rank reads and computes all positions of its samples and channels."""
        same_rank = len(self.inputs[0].shape) == len(self.output.shape)
        return same_rank and all(self.is_whole(dim) for dim in range(2, len(self.output.shape)))

    def intervals(self) -> list[tuple[int, int]]:
        """Return what the rank computes of every dimension of space."""
        return list(zip(self.region.start[2:], self.region.stop[2:], strict=True))


def on_piece(op: ir.Op, at: Piece, whole: Local) -> Local:  # noqa: C901, PLR0911, PLR0912  # a table of kinds
    """Return an operator on a piece.

    Products and normalisations take their parameters by role, as held under the layer's layouts; all others pass
    what they are given to ``whole``.

    Args:
        op: the operator.
        at: the piece.
        whole: the operator on whole tensors, as the user wrote it.
    """
    match op:
        case ir.Conv() | ir.ConvTranspose() | ir.Linear():
            return _product(op, at)
        case ir.BatchNorm(eps=eps):
            return functools.partial(functional.batch_norm, training=False, eps=eps)
        case ir.GroupNorm():
            return _group_norm(op, at)
        case ir.Pool(function="max"):
            return _max_pool(op, at)
        case ir.Reduce(function="mean" | "sum"):
            return _sum_over(op, at)
        case ir.Pool(function="avg"):
            return _average_pool(op, at)
        case ir.AdaptivePool():
            return whole if at.has_whole_space else _adaptive_pool(op, at)
        case ir.Interpolate():
            return whole if at.has_whole_space else _interpolation(op, at)
        case ir.PixelShuffle():
            return _pixel_shuffle(op, at)
        case ir.Reshape():
            return functools.partial(_reshaped, at)
        case ir.Elementwise():
            return lambda *xs, **constants: whole(
                *xs, **{k: c[broadcast_index(c.shape, at)] for k, c in constants.items()}
            )
        case ir.Loss(reduction="mean"):
            return _mean_loss(at, whole)
        case _:
            return whole


# ---- products


def _product(op: ir.Conv | ir.ConvTranspose | ir.Linear, at: Piece) -> Local:
    """Return a product with the groups of the piece; takes ``weight`` and ``bias``."""
    if isinstance(op, ir.Linear):
        return ProductCall(op, 1)
    groups = 1 if op.groups == 1 else op.groups * at.sources[0].shape[1] // op.in_channels
    if at.has_whole_space:
        return ProductCall(op, groups)
    if isinstance(op, ir.ConvTranspose):
        return _transposed(op, at, groups)
    if op.padding_mode != "zeros":
        return _padded_by_itself(op, at, groups)
    own, margins = _margins(op, at, keeps_own=op.padding_after is None)
    call = ProductCall(replace(op, padding=own, padding_after=None), groups)
    padded = Padding(margins)
    return lambda x, weight, bias=None: call(padded(x), weight, bias)


def _margins(op: ir.Conv | ir.Pool, at: Piece, *, keeps_own: bool) -> tuple[tuple[int, ...], Margins]:
    """Return the operator's own padding on the piece, and what is to be put around the piece beside.

    Args:
        op: the operator.
        at: the piece.
        keeps_own: in dimensions that are whole, the operator's own padding gives the output's size.
    """
    own, margins = [], []
    for k, (start, stop) in enumerate(at.intervals()):
        if keeps_own and at.is_whole(k + 2):
            own.append(op.padding[k])
            margins.append((0, 0))
            continue
        window = Window(at.output.shape[k + 2], op.kernel[k], op.stride[k], op.padding[k], op.dilation[k])
        first, last = window.reach(start, stop)
        own.append(0)
        margins.append((at.sources[0].start[k + 2] - first, last - at.sources[0].stop[k + 2]))
    return tuple(own), margins


def _padded_by_itself(op: ir.Conv, at: Piece, groups: int) -> Local:
    """Return a convolution that is padded with positions of its own input: they are among those that the rank holds."""
    zeros = (0,) * len(op.kernel)
    plain = replace(op, padding=zeros, padding_after=None, padding_mode="zeros")
    call = ProductCall(plain, groups)
    taken: list[tuple[int, int, Index | None]] = []
    for k, (start, stop) in enumerate(at.intervals()):
        size, held = at.inputs[0].shape[k + 2], at.sources[0].start[k + 2]
        window = Window(
            at.output.shape[k + 2], op.kernel[k], op.stride[k], op.padding[k], op.dilation[k], op.padding_mode
        )
        first, last = window.reach(start, stop)
        inside = first >= 0 and last <= size
        places = [window.position(p, size) - held for p in range(first, last)]
        taken.append((places[0], len(places), None if inside else Index(places)))

    def run(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        for dim, (first, count, index) in enumerate(taken, start=2):
            x = x.narrow(dim, first, count) if index is None else x.index_select(dim, index.on(x.device))
        return call(x, weight, bias)

    return run


class Index:
    """Positions, once on every device that asks for them."""

    def __init__(self, positions: Sequence[int]) -> None:
        self._positions, self._made = list(positions), dict[torch.device, torch.Tensor]()

    def on(self, device: torch.device) -> torch.Tensor:
        """Return the positions as a tensor on a device."""
        if device not in self._made:
            with torch.inference_mode(False):  # it is used in training too
                self._made[device] = torch.tensor(self._positions, device=device)
        return self._made[device]


def _transposed(op: ir.ConvTranspose, at: Piece, groups: int) -> Local:
    """Return a transposed convolution: all that the local input gives, cut to the region.

    Where nothing is put around that, the bias is added by the convolution itself.
    """
    zeros = (0,) * len(op.kernel)
    call = ProductCall(replace(op, padding=zeros, output_padding=zeros), groups)
    margins = []
    for k, (start, stop) in enumerate(at.intervals()):
        first = at.sources[0].start[k + 2] * op.stride[k] - op.padding[k]
        last = (at.sources[0].stop[k + 2] - 1) * op.stride[k] - op.padding[k] + op.dilation[k] * (op.kernel[k] - 1) + 1
        margins.append((first - start, stop - last))

    padded = Padding(margins)
    if not any(n > 0 for pair in margins for n in pair):
        return lambda x, weight, bias=None: padded(call(x, weight, bias))

    def run(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        y = padded(call(x, weight, None))
        return y if bias is None else y + bias.view(-1, *[1] * len(op.kernel))

    return run


# ---- normalisation


def _group_norm(op: ir.GroupNorm, at: Piece) -> Local:
    """Return group norm on whole groups; takes all of ``weight`` and ``bias``."""
    channels = slice(at.region.start[1], at.region.stop[1])
    groups = op.groups * at.region.shape[1] // op.channels

    def run(
        x: torch.Tensor, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None, eps: float = 1e-5
    ) -> torch.Tensor:
        weight, bias = (None if t is None else t[channels] for t in (weight, bias))
        return functional.group_norm(x, groups, weight, bias, eps)

    return run


# ---- pooling


def _max_pool(op: ir.Pool, at: Piece) -> Local:
    own, margins = _margins(op, at, keeps_own=not op.ceil_mode)
    pool, padded = _MAX_POOLS[len(op.kernel) - 1], Padding(margins, -math.inf)
    return lambda x: pool(padded(x), op.kernel, op.stride, own, op.dilation)


def _average_pool(op: ir.Pool, at: Piece) -> Local:
    """Return an average: of sums over the whole kernel, each divided by the count that torch takes for its window."""
    own, margins = _margins(op, at, keeps_own=not op.ceil_mode)
    pool, padded = _AVERAGE_POOLS[len(op.kernel) - 1], Padding(margins)
    factors = [
        [op.kernel[k] / _count(op, at, k, i) for i in range(start, stop)]
        for k, (start, stop) in enumerate(at.intervals())
    ]

    def run(x: torch.Tensor) -> torch.Tensor:
        y = pool(padded(x), op.kernel, op.stride, own)
        for dim, factor in enumerate(factors, start=2):
            if any(f != 1 for f in factor):
                y = y * y.new_tensor(factor).view(-1, *[1] * (y.dim() - dim - 1))
        found: torch.Tensor = y
        return found

    return run


def _count(op: ir.Pool, at: Piece, k: int, index: int) -> int:
    """Return how many positions of a dimension count in the window of an output, as torch counts them."""
    size, padding = at.inputs[0].shape[k + 2], op.padding[k]
    start = index * op.stride[k] - padding
    if op.count_include_pad:
        return min(start + op.kernel[k], size + padding) - start
    return min(start + op.kernel[k], size) - max(start, 0)


def _adaptive_pool(op: ir.AdaptivePool, at: Piece) -> Local:
    """Return an adaptive pool of windows by the coordinates of the whole; a share of the mean, where it has one."""
    spatial = len(at.inputs[0].shape) - 2
    space = tuple(range(2, spatial + 2))
    if math.prod(at.output.shape[2:]) == 1 and op.function == "avg":
        keepdim, count = len(at.output.shape) > 2, math.prod(at.inputs[0].shape[2:])
        return lambda x: x.sum(space, keepdim=keepdim) / count
    pools = _ADAPTIVE_AVERAGE_POOLS if op.function == "avg" else _ADAPTIVE_MAX_POOLS
    pool = pools[spatial - 1]
    if all(n % m == 0 for n, m in zip(at.inputs[0].shape[2:], at.output.shape[2:], strict=True)):
        return lambda x: pool(x, at.region.shape[2:])
    windows = []
    for k, (start, stop) in enumerate(at.intervals()):
        size, first = at.inputs[0].shape[k + 2], at.sources[0].start[k + 2]
        window = AdaptiveWindow(at.output.shape[k + 2])
        spans = [window.input_interval(i, i + 1, size) for i in range(start, stop)]
        windows.append([slice(a - first, b - first) for a, b in spans])

    def run(x: torch.Tensor) -> torch.Tensor:
        found = [pool(x[:, :, *each], 1).flatten(1) for each in itertools.product(*windows)]
        joined: torch.Tensor = torch.stack(found, 2).unflatten(2, at.region.shape[2:])
        return joined

    return run


def _sum_over(op: ir.Reduce, at: Piece) -> Local:
    """Return a rank's share of a sum or mean."""
    count = math.prod(at.inputs[0].shape[d] for d in op.dims) if op.function == "mean" else 1
    return lambda x: x.sum(op.dims, keepdim=op.keepdim) / count


# ---- resizing


def _interpolation(op: ir.Interpolate, at: Piece) -> Local:
    """Return a resizing by the coordinates of the whole, one dimension after the other."""
    resize = _linear if op.mode == "linear" else _nearest

    def run(x: torch.Tensor) -> torch.Tensor:
        for k in range(len(at.output.shape) - 2):
            x = resize(op, at, k, x)
        return x

    return run


def _nearest(op: ir.Interpolate, at: Piece, k: int, x: torch.Tensor) -> torch.Tensor:
    """Pick positions; torch itself says which, as its rounding depends on device and element type."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    positions = torch.arange(at.inputs[0].shape[k + 2], dtype=dtype, device=x.device)
    size, scale = (at.output.shape[k + 2], None) if op.scale is None else (None, op.scale[k])
    index = functional.interpolate(positions.view(1, 1, -1), size, scale, op.mode).view(-1).long()
    mine = index[at.region.start[k + 2] : at.region.stop[k + 2]] - at.sources[0].start[k + 2]
    return x.index_select(k + 2, mine)


def _linear(op: ir.Interpolate, at: Piece, k: int, x: torch.Tensor) -> torch.Tensor:
    dim, size = k + 2, at.inputs[0].shape[k + 2]
    step = interpolation_step(op, k, size, at.output.shape[dim])
    window = InterpolationWindow(at.output.shape[dim], step, op.mode, op.align_corners)
    positions = [window.position(i) for i in range(at.region.start[dim], at.region.stop[dim])]
    first = at.sources[0].start[dim]
    low = [min(math.floor(p), size - 1) for p in positions]
    weight = x.new_tensor([min(max(p - i, 0.0), 1.0) for p, i in zip(positions, low, strict=True)])
    weight = weight.view(-1, *[1] * (x.dim() - dim - 1))
    below = x.index_select(dim, torch.tensor([i - first for i in low], device=x.device))
    above = x.index_select(dim, torch.tensor([min(i + 1, size - 1) - first for i in low], device=x.device))
    return below * (1 - weight) + above * weight


def _pixel_shuffle(op: ir.PixelShuffle, at: Piece) -> Local:
    if op.unshuffle:
        return lambda x: functional.pixel_unshuffle(x, op.factor)
    starts = [start - op.factor * at.sources[0].start[k + 2] for k, (start, _) in enumerate(at.intervals())]
    part = tuple(slice(a, a + n) for a, n in zip(starts, at.region.shape[2:], strict=True))
    return lambda x: functional.pixel_shuffle(x, op.factor)[:, :, *part]


# ---- the rest


def _reshaped(at: Piece, x: torch.Tensor) -> torch.Tensor:
    source = at.inputs[0]
    ratio = (source.sample_dim or 0, source.sample_rows, at.output.sample_rows)
    return reshape_piece(x, list(at.region.shape), at.output.sample_dim, ratio)


def broadcast_index(shape: Sequence[int], at: Piece) -> tuple[slice, ...]:
    """Return which part of a whole tensor is broadcast with the piece; samples as they are."""
    index = [slice(None)] * len(shape)
    for own, size in enumerate(shape):
        dim = own - len(shape) + len(at.output.shape)
        whole = (at.region.start[dim], at.region.stop[dim]) == (0, at.output.shape[dim])
        if size > 1 and dim != at.output.sample_dim and not whole:
            index[own] = slice(at.region.start[dim], at.region.stop[dim])
    return tuple(index)


def _mean_loss(at: Piece, whole: Local) -> Local:
    """Return a rank's share of a mean over all that the tensors hold."""
    share = at.sources[0].volume / math.prod(at.inputs[0].shape)
    return lambda *xs: whole(*xs) * share
