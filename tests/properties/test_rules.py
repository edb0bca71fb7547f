"""Every operator, piece by piece from exactly the regions that its rule asks for, against the whole operator."""

import math
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from planner.frontend.custom import register_module
from planner.frontend.lower import trace_layers
from planner.ir import ops
from planner.ir.dimension import SPATIAL_DIMENSIONS, Dimension
from planner.ir.graph import Layer, LayerGraph
from planner.ir.layout import Layout, Whole
from planner.ir.mesh import Mesh
from planner.ir.ops import Op
from planner.ir.region import Region
from planner.ir.rules import effects, is_legal, layouts
from planner.ir.split import Split
from runtime.lowering.pieces import Piece, on_piece
from support import layouts as some

EXAMPLES = 400 if os.environ.get("LAYERWISE_FULL") else 30

CONVS: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)  # of one to three dimensions of space
TRANSPOSED: Any = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS: Any = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
MAXIMA: Any = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
AVERAGES: Any = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
POWERS: Any = (nn.LPPool1d, nn.LPPool2d)
ADAPTIVE: Any = (
    (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    (nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
)  # fmt: skip

Tensor = torch.Tensor
Draw = st.DrawFn


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Pieces of a few elements are faster without a pool of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Of(nn.Module):
    """A module around a function of its inputs and, by name, its parameters."""

    def __init__(self, function: Callable[..., Tensor], **params: Tensor) -> None:
        super().__init__()
        self._function = function
        for name, value in params.items():
            self.register_parameter(name, nn.Parameter(value))

    def forward(self, *xs: Tensor) -> Tensor:
        return self._function(*xs, **{name: getattr(self, name) for name, _ in self.named_parameters()})


class Around(nn.Module):
    """A module that calls another one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *xs: Tensor) -> Tensor:
        found: Tensor = self.inner(*xs)
        return found


@dataclass(frozen=True)
class Case:
    """A module with one layer under test, and what it is given.

    Attributes:
        module: computes the whole.
        inputs: of the module.
        kind: that the layer's operator has to be.
        op: in place of the traced operator, which computes the same.
    """

    module: nn.Module
    inputs: tuple[Tensor, ...]
    kind: type[Op]
    op: Op | None = None

    def layer(self) -> tuple[LayerGraph, Layer]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # padding="same" of even kernels is slow, torch says
            traced = trace_layers(self.module, tuple(x.to("meta") for x in self.inputs))
        (layer,) = (x for x in traced.layers.layers if not isinstance(x.op, ops.Input | ops.Output))
        layer = replace(layer, op=self.op or layer.op)
        assert isinstance(layer.op, self.kind), layer.op
        return traced.layers, layer


# ---- what is drawn


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def steps(*shape: int) -> Tensor:
    """Return few different values, so that maxima are equal."""
    return torch.randint(-2, 3, shape).double()


def one(draw: Draw, low: int, high: int) -> int:
    return draw(st.integers(low, high))


def some_of(draw: Draw, count: int, low: int, high: int) -> tuple[int, ...]:
    return tuple(one(draw, low, high) for _ in range(count))


def image(draw: Draw, low: int = 0, high: int = 3) -> tuple[int, ...]:
    """Return a shape: samples, channels, and some dimensions of space."""
    space = one(draw, low, high)
    return (one(draw, 2, 6), one(draw, 1, 9), *some_of(draw, space, 1, (9, 9, 8, 4)[space]))


def wrapped(module: nn.Module) -> nn.Module:
    """Return a module with random parameters and statistics."""
    found = Around(module).double().eval()
    for value in (*found.parameters(), *found.buffers()):
        if value.is_floating_point():
            value.data.uniform_(0.5, 2)
    return found


@st.composite
def convs(draw: Draw) -> Case:
    space = one(draw, 1, 3)
    kernel, stride = some_of(draw, space, 1, (5, 4, 2)[space - 1]), some_of(draw, space, 1, 3)
    dilation, groups = some_of(draw, space, 1, 2), draw(st.sampled_from([1, 1, 2, 3, 4]))
    padding = some_of(draw, space, 0, 3)
    extent = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    size = [max(e - 2 * p, 1) + one(draw, 0, (12, 9, 4)[space - 1]) for e, p in zip(extent, padding, strict=True)]
    same = draw(st.integers(0, 4)) == 0
    mode = draw(st.sampled_from(["zeros"] * 5 + ["replicate", "reflect", "circular"]))
    fits = all((e // 2 if same else p) < n for e, p, n in zip(extent, padding, size, strict=True))
    mode = mode if fits else "zeros"  # others repeat positions of the tensor
    channels = (groups * one(draw, 1, 4 if groups < 3 else 2), groups * one(draw, 1, 4 if groups < 3 else 2))
    module = CONVS[space - 1](
        *channels, kernel, 1 if same else stride, "same" if same else padding, dilation, groups,
        draw(st.booleans()), mode,
    )  # fmt: skip
    return Case(wrapped(module), (noise(one(draw, 1, 5), channels[0], *size),), ops.Conv)


@st.composite
def transposed_convs(draw: Draw) -> Case:
    space = one(draw, 1, 3)
    kernel, stride = some_of(draw, space, 1, (5, 4, 2)[space - 1]), some_of(draw, space, 1, 3)
    dilation, groups = some_of(draw, space, 1, 2), draw(st.sampled_from([1, 1, 2, 3, 4]))
    padding = some_of(draw, space, 0, 2)
    more = tuple(one(draw, 0, max(s, d) - 1) for s, d in zip(stride, dilation, strict=True))
    size = some_of(draw, space, 1, (9, 7, 3)[space - 1])
    made = zip(size, kernel, stride, padding, dilation, more, strict=True)
    assume(all((n - 1) * s - 2 * p + d * (k - 1) + o + 1 >= 1 for n, k, s, p, d, o in made))
    channels = groups * one(draw, 1, 3), groups * one(draw, 1, 3)
    module = TRANSPOSED[space - 1](*channels, kernel, stride, padding, more, groups, draw(st.booleans()), dilation)
    return Case(wrapped(module), (noise(one(draw, 1, 5), channels[0], *size),), ops.ConvTranspose)


@st.composite
def linears(draw: Draw) -> Case:
    before = some_of(draw, one(draw, 0, 3), 1, 7)
    module = nn.Linear(one(draw, 1, 9), one(draw, 1, 9), draw(st.booleans()))
    return Case(wrapped(module), (noise(one(draw, 2, 6), *before, module.in_features),), ops.Linear)


def standardised(v: Tensor) -> Tensor:
    return v - v.mean((1, 2, 3), keepdim=True)


@st.composite
def standardised_convs(draw: Draw) -> Case:
    """Convolutions whose weight other operators compute."""

    def run(x: Tensor, v: Tensor) -> Tensor:
        return functional.conv2d(x, standardised(v), None, 2, 1)

    inside = one(draw, 1, 4)
    x = noise(one(draw, 2, 5), inside, *some_of(draw, 2, 2, 9))
    return Case(Of(run, v=noise(one(draw, 1, 4), inside, 3, 3)), (x,), ops.Conv)


@st.composite
def batch_norms(draw: Draw) -> Case:
    shape = image(draw)
    return Case(wrapped(NORMS[len(shape) - 2](shape[1], affine=draw(st.booleans()))), (noise(*shape),), ops.BatchNorm)


@st.composite
def group_norms(draw: Draw) -> Case:
    groups, (samples, channels, *space) = one(draw, 1, 6), image(draw, 2, 2)
    assume(math.prod(space) > 1)  # torch refuses to normalise single values
    if draw(st.booleans()):
        module: nn.Module = nn.GroupNorm(groups, groups * channels, affine=draw(st.booleans()))
        return Case(wrapped(module), (noise(samples, groups * channels, *space),), ops.GroupNorm)
    affine = draw(st.booleans())
    return Case(wrapped(nn.InstanceNorm2d(channels, affine=affine)), (noise(samples, channels, *space),), ops.GroupNorm)


@st.composite
def pools(draw: Draw) -> Case:
    space = one(draw, 1, 3)
    kernel, stride = some_of(draw, space, 1, (5, 4, 3)[space - 1]), some_of(draw, space, 1, 3)
    ceil = draw(st.booleans())
    function = draw(st.sampled_from(["max", "avg", "lp"]))
    padding = tuple(one(draw, 0, k // 2) for k in kernel)
    dilation = some_of(draw, space, 1, 2) if function == "max" else (1,) * space
    extent = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    size = [max(e - 2 * p, 1) + one(draw, 0, (12, 9, 4)[space - 1]) for e, p in zip(extent, padding, strict=True)]
    # of three dimensions, torch averages no smaller tensors; where a maximum reads padding alone, it writes anywhere
    least = kernel if function == "avg" else dilation
    size = [max(n, m) for n, m in zip(size, least, strict=True)]
    shape = (one(draw, 1, 4), one(draw, 1, 4), *size)
    if function == "max":
        return Case(
            wrapped(MAXIMA[space - 1](kernel, stride, padding, dilation, ceil_mode=ceil)), (steps(*shape),), ops.Pool
        )
    if function == "avg":
        module = AVERAGES[space - 1](kernel, stride, padding, ceil, draw(st.booleans()))
        return Case(wrapped(module), (noise(*shape),), ops.Pool)
    k, s = (kernel[0], stride[0]) if space == 1 else (kernel[:2], stride[:2])
    shape = (*shape[:2], *(n + one(draw, 0, 8) for n in kernel[:2]))
    return Case(wrapped(POWERS[min(space, 2) - 1](3, k, s, ceil)), (noise(*shape).abs() + 0.1,), ops.Pool)


@st.composite
def adaptive_pools(draw: Draw) -> Case:
    shape = image(draw, 1, 3)
    if draw(st.booleans()):
        keepdim = draw(st.booleans())
        dims = tuple(range(2, len(shape)))
        return Case(Of(lambda x: x.mean(dims, keepdim=keepdim)), (noise(*shape),), ops.AdaptivePool)
    size = draw(st.sampled_from([(1,) * (len(shape) - 2), some_of(draw, len(shape) - 2, 1, 9)]))
    kind = draw(st.sampled_from(ADAPTIVE))[len(shape) - 3]
    return Case(wrapped(kind(size)), (steps(*shape),), ops.AdaptivePool)


@st.composite
def interpolations(draw: Draw) -> Case:
    shape = image(draw, 1, 3)
    space = len(shape) - 2
    kind = draw(st.sampled_from(["nearest", "nearest-exact", "linear", "linear", "area", "cubic"]))
    assume(kind != "cubic" or space == 2)
    mode = {"linear": ("linear", "bilinear", "trilinear")[space - 1], "cubic": "bicubic"}.get(kind, kind)
    align = draw(st.booleans()) if kind in {"linear", "cubic"} else None
    if draw(st.booleans()):
        size = some_of(draw, space, 1, 11 if space < 3 else 5)
        return Case(wrapped(nn.Upsample(size, mode=mode, align_corners=align)), (noise(*shape),), ops.Interpolate)
    scale = tuple(draw(st.sampled_from([0.5, 1.0, 2.0, 3.0, 1.5, 0.7, 2.3, 1 / 3])) for _ in range(space))
    pairs = [(n, int(n * s), s) for n, s in zip(shape[2:], scale, strict=True)]
    assume(all(m >= 1 for _, m, _ in pairs))
    # where sizes are equal or double, torch's gradient of nearest takes the scale for 1 or 2, its forward does not
    assume("nearest" not in kind or not any(m in {n, 2 * n} and s not in {1.0, 2.0} for n, m, s in pairs))
    module = Of(lambda x: functional.interpolate(x, scale_factor=scale, mode=mode, align_corners=align))
    return Case(module, (noise(*shape),), ops.Interpolate)


@st.composite
def pixel_shuffles(draw: Draw) -> Case:
    factor, samples, channels, (height, width) = (
        one(draw, 2, 3),
        one(draw, 2, 5),
        one(draw, 1, 3),
        some_of(draw, 2, 1, 5),
    )
    if draw(st.booleans()):
        x = noise(samples, channels * factor**2, height, width)
        return Case(wrapped(nn.PixelShuffle(factor)), (x,), ops.PixelShuffle)
    x = noise(samples, channels, height * factor, width * factor)
    return Case(wrapped(nn.PixelUnshuffle(factor)), (x,), ops.PixelShuffle)


@st.composite
def elementwise(draw: Draw) -> Case:
    shape = image(draw)
    samples, channels, *space = shape
    ones = (1,) * len(space)
    assume(samples != channels)
    x, y, gate, row, bias = (
        noise(*of) for of in (shape, shape, (samples, channels, *ones), (samples, 1, *space), (channels, *ones))
    )
    options: list[tuple[nn.Module, tuple[Tensor, ...]]] = [
        (Of(torch.relu), (x,)),
        (Of(torch.add), (x, y)),
        (Of(torch.mul), (x, gate)),
        (Of(torch.mul), (row, x)),
        (Of(torch.add), (x, bias)),
        (Of(torch.lerp), (x, gate, y)),
        (Of(lambda x, gamma: x * gamma, gamma=bias), (x,)),
        (wrapped(nn.PReLU()), (x,)),
    ]
    module, inputs = draw(st.sampled_from(options))
    return Case(module, inputs, ops.Elementwise)


@st.composite
def dropouts(draw: Draw) -> Case:
    """In evaluation, as the identity: that the pieces are the right ones."""
    kind = draw(st.sampled_from([nn.Dropout, nn.Dropout2d]))
    return Case(wrapped(kind(0.5)), (noise(*image(draw, 2, 2)),), ops.Dropout)


@st.composite
def concats(draw: Draw) -> Case:
    shape = image(draw, 1, 3)
    dim = one(draw, 1, len(shape) - 1)
    shapes = [(*shape[:dim], one(draw, 1, 5), *shape[dim + 1 :]) for _ in range(one(draw, 2, 3))]
    return Case(Of(lambda *xs: torch.cat(xs, dim - len(shape))), tuple(noise(*s) for s in shapes), ops.Concat)


@st.composite
def reshapes(draw: Draw) -> Case:
    n, c, h, w = some_of(draw, 4, 2, 7)
    t = one(draw, 2, 3)
    options: list[tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = [
        ((n, c, h, w), lambda x: x.flatten(1)),
        ((n, c, h, w), lambda x: x.flatten(2)),
        ((n, c, 1, 1), lambda x: x.flatten(1)),
        ((n, c * h, w), lambda x: x.unflatten(1, (c, h))),
        ((n, c * h * w), lambda x: x.unflatten(1, (c, h, w))),
        ((n, c, h * t), lambda x: x.unflatten(2, (h, t))),
        ((n, t, c, h, w), lambda x: x.flatten(0, 1)),
        ((n, c, h, w), lambda x: x.unsqueeze(2)),
        ((n, t * c, h, w), lambda x: x.reshape(x.shape[0], t, c, h, w)),
        ((n, t * c, h), lambda x: x.reshape(-1, c, h)),
    ]
    shape, function = draw(st.sampled_from(options))
    return Case(Of(function), (noise(*shape),), ops.Reshape)


@st.composite
def permutes(draw: Draw) -> Case:
    shape = image(draw, 0, 3)
    order = draw(st.permutations(range(len(shape))))
    assume(list(order) != sorted(order))
    return Case(Of(lambda x: x.permute(order)), (noise(*shape),), ops.Permute)


@st.composite
def along(draw: Draw) -> Case:
    shape = _, channels, height, width = (one(draw, 2, 5), 2 * one(draw, 1, 4), one(draw, 2, 8), one(draw, 2, 8))
    low = one(draw, 1, height - 1)
    module = draw(st.sampled_from([
        Of(lambda x: x[:, :, low:]),
        Of(lambda x: x[..., ::2]),
        Of(lambda x: x.chunk(2, 2)[1]),
        Of(lambda x: functional.pad(x, (0, 0, 2, 1))),
        Of(lambda x: functional.glu(x, 1)),
        Of(lambda x: x.cumsum(2)),
        Of(lambda x: x.roll((1, 2), (2, 3))),
        Of(lambda x: x.flip((2, 3))),
        Of(lambda x: functional.normalize(x, dim=1)),
        Of(lambda x: torch.cat((x, x), 1)),
        wrapped(nn.LayerNorm(width)),
        wrapped(nn.LayerNorm((channels, height, width))),
        wrapped(nn.LocalResponseNorm(3)),
        wrapped(nn.ChannelShuffle(2)),
        wrapped(nn.PReLU(channels)),
    ]))  # fmt: skip
    return Case(module, (noise(*shape),), ops.Along)


@st.composite
def reductions(draw: Draw) -> Case:
    shape = image(draw, 1, 3)
    dims = draw(st.lists(st.integers(1, len(shape) - 1), min_size=1, max_size=2, unique=True))
    keepdim = draw(st.booleans())
    function: Any = draw(st.sampled_from([torch.sum, torch.amax, torch.logsumexp, torch.mean]))
    assume(function is not torch.mean or sorted(dims) != list(range(2, len(shape))))
    return Case(Of(lambda x: function(x, dims, keepdim)), (noise(*shape),), ops.Reduce)


@st.composite
def per_sample(draw: Draw) -> Case:
    n, length, width = one(draw, 2, 7), one(draw, 1, 5), one(draw, 1, 5)
    x, y = noise(n, length, width), noise(n, width, length)
    w = noise(width, length)
    return draw(st.sampled_from([
        Case(Of(torch.matmul), (x, y), ops.PerSample),
        Case(Of(lambda x, w: x @ w, w=w), (x,), ops.PerSample),
        Case(Of(lambda x: torch.einsum("nlk,nmk->nlm", x, x)), (x,), ops.PerSample),
    ]))  # fmt: skip


class Gate(nn.Module):
    """Each channel alone, in any way."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels))
        self.shared = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, of_sample: Tensor) -> Tensor:
        gate = of_sample if of_sample.dim() == 4 else of_sample.sum(1).view(-1, 1, 1, 1)
        return x * gate * self.scale.view(-1, 1, 1) / self.shared


@st.composite
def customs(draw: Draw) -> Case:
    register_module(Gate, dimensions=("out_channel",), channel_params={"scale": 0})
    shape = image(draw, 2, 2)
    second = draw(st.sampled_from([(*shape[:2], 1, 1), (shape[0], 3)]))
    return Case(wrapped(Gate(shape[1])), (noise(*shape), noise(*second)), ops.Custom)


@st.composite
def softmaxes(draw: Draw) -> Case:
    shape = image(draw)
    dim = one(draw, 1, len(shape) - 1)
    function = draw(st.sampled_from([torch.softmax, torch.log_softmax]))
    return Case(Of(lambda x: function(x, dim=dim)), (noise(*shape),), ops.Softmax)


@st.composite
def losses(draw: Draw) -> Case:
    shape = image(draw, 0, 2)
    reduction = draw(st.sampled_from(["mean", "sum"]))
    if draw(st.booleans()):
        return Case(
            Of(lambda x, y: functional.mse_loss(x, y, reduction=reduction)), (noise(*shape), noise(*shape)), ops.Loss
        )
    targets = torch.randint(0, shape[1], (shape[0], *shape[2:]))
    return Case(wrapped(nn.CrossEntropyLoss(reduction=reduction)), (noise(*shape), targets), ops.Loss)


@st.composite
def redistributes(draw: Draw) -> Case:
    return Case(Of(torch.clone), (noise(*image(draw)),), ops.Redistribute, ops.Redistribute())


KINDS = (
    convs, standardised_convs, transposed_convs, linears, batch_norms, group_norms, pools, adaptive_pools,
    interpolations, pixel_shuffles, elementwise, dropouts, concats, reshapes, permutes, along, reductions, per_sample,
    customs, softmaxes, losses, redistributes,
)  # fmt: skip


@st.composite
def legal_splits(draw: Draw, graph: LayerGraph, layer: Layer, mesh: Mesh) -> Split:
    """Return a split with as few idle axes as this layer allows."""
    table = effects(layer.op, graph.inputs_of(layer), layer.output)
    chosen: tuple[Dimension, ...] = ()
    for i in range(len(mesh.axes)):
        rest = (Dimension.REPLICATE,) * (len(mesh.axes) - i - 1)
        # the statistics of a group norm over pieces of space are sums over ranks: see test_runtime
        table = {d: e for d, e in table.items() if layer.op.kind != "group_norm" or d not in SPATIAL_DIMENSIONS}
        fits = [d for d in table if is_legal(layer, graph, mesh, Split.of(mesh, (*chosen, d, *rest)))]
        chosen = (*chosen, draw(st.sampled_from([d for d in fits if d is not Dimension.REPLICATE] or fits)))
    return Split.of(mesh, chosen)


# ---- the check


def indices(region: Region) -> tuple[slice, ...]:
    return tuple(slice(a, b) for a, b in zip(region.start, region.stop, strict=True))


def joined(layout: Layout, pieces: dict[int, Tensor]) -> Tensor:
    """Return the sum of all pieces at their places; of equal copies, the first counts."""
    found = torch.zeros(layout.shape, dtype=torch.float64)
    equal = layout.axes_with(Whole.EQUAL)
    for position, piece in pieces.items():
        if all(layout.mesh.coordinates(position)[axis] == 0 for axis in equal):
            found[indices(layout.region(position))] += piece
    return found


def share(layout: Layout, position: int) -> float:
    """Return a rank's part of a gradient whose copies are addends: parts of shared copies sum to one."""
    found = 1.0
    for axis in layout.axes_with(Whole.SHARED):
        size = layout.mesh.shape[axis]
        found *= (layout.mesh.coordinates(position)[axis] + 1) * 2 / (size * (size + 1))
    return found


def gradients(output: Tensor, operands: dict[str, Tensor], upstream: Tensor) -> dict[str, Tensor]:
    wanted = {name: x for name, x in operands.items() if x.requires_grad}
    found = torch.autograd.grad(output, list(wanted.values()), upstream, materialize_grads=True)
    return dict(zip(wanted, found, strict=True))


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(tensor.is_floating_point())


def close(found: Tensor, wanted: Tensor, what: object) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10, msg=lambda m: f"{what}: {m}")


class Pieces:
    """A layer under a split, computed by every rank that does work of its own.

    Attributes:
        mine: the layer's layouts.
        whole: all that the operator reads, by name.
        layout_of: each of these.
        late: the bias, where it is added to resolved sums.
    """

    def __init__(self, case: Case, graph: LayerGraph, layer: Layer, mesh: Mesh, split: Split) -> None:
        self.case, self.layer, self.specs = case, layer, graph.inputs_of(layer)
        self.mine = layouts(layer, self.specs, mesh, split)
        self.params = [p for p in layer.params if "num_batches" not in p.name]
        self.inputs = [f"input {k}" for k in range(len(self.specs))]
        names = [*self.inputs, *(p.name for p in layer.params)]
        self.layout_of = dict(zip(names, [*self.mine.inputs, *self.mine.params], strict=True))
        state = {**dict(case.module.named_parameters()), **dict(case.module.named_buffers())}
        self.whole = {n: leaf(x) for n, x in zip(self.inputs, case.inputs, strict=True)}
        self.whole |= {p.name: leaf(state[p.name]).requires_grad_(p.trainable) for p in self.params}
        self.late = [p.name for p in self.params if p.role == "bias" and self.mine.computed.axes_with(Whole.PARTIAL)]
        idle = [axis for axis, d in enumerate(split.dimensions) if d is Dimension.REPLICATE]
        self.positions = [p for p in range(mesh.size) if all(mesh.coordinates(p)[axis] == 0 for axis in idle)]

    def call(self, *xs: Tensor, **params: Tensor) -> Tensor:
        """Return what the user's module makes of these tensors."""
        found: Tensor = torch.func.functional_call(self.case.module, params, xs)
        return found

    def local(self, position: int) -> dict[str, Tensor]:
        regions = {n: self.layout_of[n].region(position) for n in self.whole}
        return {n: leaf(x[indices(regions[n])]).requires_grad_(x.requires_grad) for n, x in self.whole.items()}

    def run(self, position: int, local: dict[str, Tensor]) -> Tensor:
        """Return what a rank computes of its pieces."""
        op = self.layer.op
        sources = tuple(layout.region(position) for layout in self.mine.inputs)
        at = Piece(self.specs, sources, self.layer.output, self.mine.computed.region(position))
        given: dict[str, Any] = {p.name: local[p.name] for p in self.params if p.name not in self.late}
        if isinstance(op, ops.Conv) and op.computed_weight:
            given = {"weight": standardised(given["v"])}
        elif isinstance(op, BY_ROLE):
            given = {p.role: given[p.name] for p in self.params if p.name in given}
        if isinstance(op, ops.Conv | ops.Linear | ops.ConvTranspose):
            given.setdefault("bias", None)
        return on_piece(op, at, self.call)(*(local[n] for n in self.inputs), **given)


BY_ROLE = ops.Conv | ops.ConvTranspose | ops.Linear | ops.BatchNorm | ops.GroupNorm


def check(case: Case, graph: LayerGraph, layer: Layer, mesh: Mesh, split: Split) -> None:
    """Assert that the pieces of all ranks give the whole, and their gradients the gradients."""
    it = Pieces(case, graph, layer, mesh, split)
    computed, output = it.mine.computed, it.mine.output
    expected = it.call(*(it.whole[n] for n in it.inputs), **{p.name: it.whole[p.name] for p in it.params})
    upstream = torch.randn(expected.shape, dtype=torch.float64)
    wanted = gradients(expected, it.whole, upstream)
    made: dict[int, Tensor] = {}
    found: dict[str, dict[int, Tensor]] = {name: {} for name in wanted}
    for p in it.positions:
        local, region = it.local(p), computed.region(p)
        y = it.run(p, local)
        assert y.shape == region.shape, (layer.op, split, region)
        made[p] = y.detach()
        for name, gradient in gradients(y, local, upstream[indices(region)] * share(computed, p)).items():
            found[name][p] = gradient
    result = joined(computed.value, made)
    assert not output.axes_with(Whole.PARTIAL)
    for name in it.late:
        channel = -1 if isinstance(layer.op, ops.Linear) else 1
        for p in it.positions:
            at, bias = indices(output.region(p)), it.local(p)[name].detach()
            made[p] = result[at] + bias.view(-1, *[1] * (0 if channel == -1 else expected.dim() - 2))
            found[name][p] = upstream[at].movedim(channel, 0).flatten(1).sum(1)
        result = joined(output, made)
    close(result, expected.detach(), (layer.op, split))
    for name, pieces in found.items():
        close(joined(it.layout_of[name], pieces), wanted[name], (name, layer.op, split))


@pytest.mark.parametrize("cases", KINDS, ids=lambda cases: cases.__name__)
@settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_the_pieces_of_an_operator_give_the_whole(
    cases: Callable[[], st.SearchStrategy[Case]], data: st.DataObject
) -> None:
    torch.manual_seed(data.draw(st.integers(0, 9)))
    case = data.draw(cases())
    graph, layer = case.layer()
    mesh = data.draw(some.meshes())
    check(case, graph, layer, mesh, data.draw(legal_splits(graph, layer, mesh)))
