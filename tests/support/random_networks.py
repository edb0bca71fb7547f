"""Random small CNNs from short recipes: a list of operators, each with a number that its options are drawn from.

Any part of a recipe's list is a recipe too, because an operator that does not fit the tensor at hand is left out.
So hypothesis can shrink a failing network to the few operators that matter, and a printed recipe rebuilds it.

Shapes: tensors are (N, C, *space) with one to three dimensions of space, of float64.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import nn
from torch.nn import functional

Shape = tuple[int, ...]
"""Channels and space: a tensor's sizes without the samples."""
Made = Callable[[np.random.Generator, Shape], nn.Module | None]
"""From random numbers and the shape at hand to a block; None where none fits."""

MAX_ELEMENTS: Final = 3000
"""Of a sample between two operators; what would make more is left out."""
CLASSES: Final = 5
HEADS: Final = ("pooled", "flat", "dense", "mean")
LOSSES: Final = ("cross_entropy", "smoothed", "probabilities", "bce", "mse")


@dataclass(frozen=True)
class Recipe:
    """What a random network is made of.

    Attributes:
        shape: of the input: samples, channels, space.
        blocks: names of operators, each with the number that its options are drawn from.
        head: how the network ends, one of ``HEADS``; only ``dense`` keeps space.
        loss: one of ``LOSSES``.
        inside: the loss is the network's output; else the user's own.
        seed: of the weights and the data.
    """

    shape: Shape
    blocks: tuple[tuple[str, int], ...]
    head: str = "pooled"
    loss: str = "cross_entropy"
    inside: bool = False
    seed: int = 0

    def to_json(self) -> str:
        """Return the recipe as text."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "Recipe":
        """Read what ``to_json`` wrote."""
        found = json.loads(text)
        found |= {"shape": tuple(found["shape"]), "blocks": tuple((name, n) for name, n in found["blocks"])}
        return Recipe(**found)


# ---- blocks that are more than a module of torch


class Of(nn.Module):
    """A function of the tensor at hand and of modules."""

    def __init__(self, text: str, function: Callable[..., torch.Tensor], *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self._text, self._function = text, function

    def forward(self, *xs: torch.Tensor) -> torch.Tensor:
        return self._function(*xs, *self.parts)

    def extra_repr(self) -> str:
        return self._text


class DropPath(nn.Module):
    """Stochastic depth, under the name by which the tracer knows it."""

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Functional(nn.Module):
    """A convolution as a function, on a weight of the module's own."""

    def __init__(self, inner: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> None:
        super().__init__()
        self.weight, self.bias = inner.weight, inner.bias
        self._call: Any = (functional.conv1d, functional.conv2d, functional.conv3d)[inner.weight.dim() - 3]
        self._rest = (inner.stride, inner.padding, inner.dilation, inner.groups)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self._call(x, self.weight, self.bias, *self._rest)
        return found


_CONVS: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED: Any = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_BATCH_NORMS: Any = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_INSTANCE_NORMS: Any = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_MAX_POOLS: Any = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
_AVERAGE_POOLS: Any = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
_ADAPTIVE_AVERAGE: Any = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
_ADAPTIVE_MAX: Any = (nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)
_CHANNEL_DROPOUTS: Any = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


def _one(rng: np.random.Generator, *options: Any) -> Any:
    return options[int(rng.integers(len(options)))]


def _each(rng: np.random.Generator, shape: Shape, *options: int) -> tuple[int, ...]:
    return tuple(int(_one(rng, *options)) for _ in shape[1:])


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


# ---- convolutions


def _conv(rng: np.random.Generator, shape: Shape) -> nn.Module | None:
    kernel, dilation = _each(rng, shape, 1, 2, 3, 3, 4, 5), _each(rng, shape, 1, 1, 2)
    stride, padding = _each(rng, shape, 1, 1, 2, 3), _each(rng, shape, 0, 1, 1, 2)
    groups = int(_one(rng, 1, 1, *_divisors(shape[0])))
    mode = str(_one(rng, "zeros", "zeros", "zeros", "reflect", "replicate", "circular"))
    extent = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    same = bool(rng.integers(4) == 0)
    if same:
        stride, padding = (1,) * len(stride), tuple(e // 2 for e in extent)  # the larger of both sides
    if mode != "zeros" and any(p >= n for p, n in zip(padding, shape[1:], strict=True)):
        mode = "zeros"
    if not same and any(n + 2 * p < e for n, p, e in zip(shape[1:], padding, extent, strict=True)):
        return None
    out_channels = groups * int(rng.integers(1, 1 + max(1, 9 // groups)))
    made = _CONVS[len(stride) - 1](
        shape[0], out_channels, kernel, stride, "same" if same else padding, dilation, groups,
        bool(rng.integers(2)), mode,
    )  # fmt: skip
    return Functional(made) if mode == "zeros" and rng.integers(4) == 0 else made


def _depthwise(rng: np.random.Generator, shape: Shape) -> nn.Module | None:
    kernel = (3,) * (len(shape) - 1)
    stride = _each(rng, shape, 1, 2)
    more = int(_one(rng, 1, 1, 2))
    return _CONVS[len(stride) - 1](shape[0], shape[0] * more, kernel, stride, 1, groups=shape[0])


def _transposed(rng: np.random.Generator, shape: Shape) -> nn.Module | None:
    kernel, dilation = _each(rng, shape, 1, 2, 3, 4), _each(rng, shape, 1, 1, 2)
    stride, padding = _each(rng, shape, 1, 2, 2, 3), _each(rng, shape, 0, 1)
    more = tuple(int(rng.integers(max(s, d))) for s, d in zip(stride, dilation, strict=True))
    made = zip(shape[1:], kernel, stride, padding, dilation, more, strict=True)
    if any((n - 1) * s - 2 * p + d * (k - 1) + o + 1 < 1 for n, k, s, p, d, o in made):
        return None
    groups = int(_one(rng, 1, 1, *_divisors(shape[0])))
    out_channels = groups * int(rng.integers(1, 1 + max(1, 6 // groups)))
    return _TRANSPOSED[len(stride) - 1](
        shape[0], out_channels, kernel, stride, padding, more, groups, bool(rng.integers(2)), dilation
    )


# ---- pools


def _pool(rng: np.random.Generator, shape: Shape) -> nn.Module | None:
    space = len(shape) - 1
    kernel, stride = _each(rng, shape, 1, 2, 3), _each(rng, shape, 1, 2, 2, 3)
    padding = tuple(int(rng.integers(k // 2 + 1)) for k in kernel)
    ceil, function = bool(rng.integers(2)), _one(rng, "max", "avg", "lp")
    dilation = _each(rng, shape, 1, 1, 2) if function == "max" else (1,) * space
    extent = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    # windows of padding alone are undefined in torch, as is an average of less than a kernel of three dimensions
    if any(n < e for n, e in zip(shape[1:], extent, strict=True)):
        return None
    if function == "max":
        return _MAX_POOLS[space - 1](kernel, stride, padding, dilation, ceil_mode=ceil)
    if function == "avg":
        return _AVERAGE_POOLS[space - 1](kernel, stride, padding, ceil, bool(rng.integers(2)))
    if space > 2:
        return None
    made = nn.LPPool1d(2, kernel[0], stride[0], ceil) if space == 1 else nn.LPPool2d(2, kernel, stride, ceil)
    return nn.Sequential(nn.Softplus(), made)  # its gradient is infinite at zero


def _adaptive(rng: np.random.Generator, shape: Shape) -> nn.Module:
    kinds = _ADAPTIVE_MAX if rng.integers(3) == 0 else _ADAPTIVE_AVERAGE
    size: list[int | None] = [int(rng.integers(1, n + 2)) for n in shape[1:]]
    if len(size) > 1 and rng.integers(3) == 0:
        size[int(rng.integers(len(size)))] = None
    return kinds[len(size) - 1](tuple(size) if len(size) > 1 else size[0])


# ---- normalisation


def _batch_norm(rng: np.random.Generator, shape: Shape) -> nn.Module:
    momentum = _one(rng, 0.1, 0.1, None)
    return _BATCH_NORMS[len(shape) - 2](shape[0], 1e-5, momentum, bool(rng.integers(4)))


def _group_norm(rng: np.random.Generator, shape: Shape) -> nn.Module | None:
    groups = int(_one(rng, *_divisors(shape[0])))
    if math.prod(shape) // groups < 4:
        return None
    return nn.GroupNorm(groups, shape[0], affine=bool(rng.integers(2)))


def _instance_norm(rng: np.random.Generator, shape: Shape) -> nn.Module | None:
    if math.prod(shape[1:]) < 4:
        return None
    return _INSTANCE_NORMS[len(shape) - 2](shape[0], affine=bool(rng.integers(2)))


def _layer_norm(rng: np.random.Generator, shape: Shape) -> nn.Module | None:
    kind = int(rng.integers(3))
    if kind == 0 and math.prod(shape) >= 4:
        return nn.LayerNorm(shape)
    if kind == 1 and shape[-1] >= 4:
        return nn.LayerNorm(shape[-1])
    if shape[0] < 4:
        return None
    back = len(shape)
    return Of(
        "layer norm over the channels", lambda x, norm: norm(x.movedim(1, -1)).movedim(back, 1), nn.LayerNorm(shape[0])
    )


def _response_norm(rng: np.random.Generator, _: Shape) -> nn.Module:
    return nn.LocalResponseNorm(int(_one(rng, 2, 3, 5)), alpha=0.1)


# ---- element by element


def _activation(rng: np.random.Generator, shape: Shape) -> nn.Module:
    return _one(
        rng, nn.ReLU(), nn.ReLU(inplace=True), nn.GELU(), nn.Sigmoid(), nn.SiLU(inplace=True), nn.PReLU(),
        nn.PReLU(shape[0]), nn.Hardswish(), nn.LeakyReLU(0.1), Of("relu", lambda x: functional.relu(x * 1.5)),
    )  # fmt: skip


def _scale(rng: np.random.Generator, shape: Shape) -> nn.Module:
    """Constants and parameters that are broadcast with the tensor."""
    channels, columns = nn.Linear(1, shape[0]), nn.Linear(1, shape[-1])  # holders of vectors
    wide = (-1, *[1] * (len(shape) - 1))
    return _one(
        rng,
        Of("layer scale", lambda x, b: x * b.bias.view(wide), channels),
        Of("times a table", lambda x, b: x * b.bias, columns),
        Of("plus a number", lambda x: (x + 0.5) / 2 - 0.1),
    )


def _dropout(rng: np.random.Generator, shape: Shape) -> nn.Module:
    return _one(rng, nn.Dropout(0.0), _CHANNEL_DROPOUTS[len(shape) - 2](0.0), DropPath())


def _softmax(rng: np.random.Generator, shape: Shape) -> nn.Module:
    dim = int(rng.integers(1, len(shape) + 1))
    return _one(rng, nn.Softmax(dim), Of("log softmax", lambda x: functional.log_softmax(x, dim)))


# ---- other sizes


def _resize(rng: np.random.Generator, shape: Shape) -> nn.Module | None:
    space = len(shape) - 1
    kind = _one(rng, "nearest", "nearest-exact", "linear", "linear")
    align = bool(rng.integers(2)) if kind == "linear" else None
    mode = ("linear", "bilinear", "trilinear")[space - 1] if kind == "linear" else kind
    if rng.integers(2):
        size = tuple(int(rng.integers(max(1, n // 2), 2 * n + 2)) for n in shape[1:])
        return Of(f"{mode} to {size}", lambda x: functional.interpolate(x, size, mode=mode, align_corners=align))
    # torch's own gradient of nearest is that of the sizes where they are equal or double, see test_rules
    scale = float(_one(rng, 2, 2, 3, 0.5) if kind != "linear" else _one(rng, 2, 0.5, 1.5, 0.7))
    if any(int(n * scale) < 1 for n in shape[1:]):
        return None
    if kind != "linear" and any(int(n * scale) in {n, 2 * n} and scale not in {1.0, 2.0} for n in shape[1:]):
        return None
    return nn.Upsample(scale_factor=scale, mode=mode, align_corners=align)


def _shuffle_pixels(_: np.random.Generator, shape: Shape) -> nn.Module | None:
    if len(shape) != 3:
        return None
    if shape[0] % 4 == 0:
        return nn.PixelShuffle(2)
    return nn.PixelUnshuffle(2) if shape[1] % 2 == 0 and shape[2] % 2 == 0 else None


def _pad(rng: np.random.Generator, shape: Shape) -> nn.Module | None:
    before, behind = int(rng.integers(3)), int(rng.integers(3))
    mode = _one(rng, "constant", "constant", "replicate", "reflect", "circular")
    if mode != "constant" and max(before, behind) >= min(shape[1:]):
        return None
    widths = [before, behind] * (1 if mode == "constant" else len(shape) - 1)
    return Of(f"pad {widths}", lambda x: functional.pad(x, widths, mode))


def _slice(rng: np.random.Generator, shape: Shape) -> nn.Module | None:
    if shape[-1] < 3:
        return None
    return _one(
        rng,
        Of("cut", lambda x: x[..., 1:]),
        Of("every second row", lambda x: x[:, :, ::2]),
        Of("rolled", lambda x: x.roll(1, -1)),
        Of("turned", lambda x: x.flip(2)),
    )


# ---- channels and views


def _shuffle_channels(rng: np.random.Generator, shape: Shape) -> nn.Module | None:
    groups = int(_one(rng, *_divisors(shape[0])))
    if rng.integers(3) == 0:
        return nn.ChannelShuffle(groups)

    def run(x: torch.Tensor) -> torch.Tensor:
        n, c, *space = x.shape
        return x.view(n, groups, c // groups, *space).transpose(1, 2).reshape(n, c, *space)

    return Of(f"channel shuffle of {groups}", run)


def _pointwise(rng: np.random.Generator, shape: Shape) -> nn.Module:
    """A linear layer over the channels, between two permutations."""
    rank = len(shape) + 1
    there, back = (0, *range(2, rank), 1), (0, rank - 1, *range(1, rank - 1))
    fc = nn.Linear(shape[0], int(rng.integers(1, 9)))
    return Of("linear over the channels", lambda x, fc: fc(x.permute(there)).permute(back), fc)


def _blocks_to_channels(_: np.random.Generator, shape: Shape) -> nn.Module | None:
    """Space to depth by views along one dimension."""
    if shape[-1] % 2:
        return None

    def run(x: torch.Tensor) -> torch.Tensor:
        n, c, *space, last = x.shape
        y = x.view(n, c, *space, last // 2, 2)
        return y.movedim(-1, 2).reshape(n, 2 * c, *space, last // 2)

    return Of("space to depth", run)


def _halves(rng: np.random.Generator, shape: Shape) -> nn.Module | None:
    """Parts of the channels, treated differently and joined again."""
    channels = shape[0]
    if channels < 2:
        return None
    cut = int(rng.integers(1, channels))
    first = _CONVS[len(shape) - 2](cut, int(rng.integers(1, 5)), 3, padding=1)
    if rng.integers(2) and channels % 2 == 0:
        return Of("gated half", lambda x: functional.glu(x, 1))

    def run(x: torch.Tensor, conv: nn.Module) -> torch.Tensor:
        a, b = x.split((cut, channels - cut), 1)
        return torch.cat((conv(a), b), 1)

    return Of(f"split at {cut}", run, first)


# ---- branches


def _gate(rng: np.random.Generator, shape: Shape) -> nn.Module:
    """Squeeze and excitation, with convolutions or linear layers on the mean over space."""
    channels, hidden, space = shape[0], int(rng.integers(1, 4)), tuple(range(2, len(shape) + 1))
    if rng.integers(2):
        squeeze = nn.Sequential(
            _ADAPTIVE_AVERAGE[len(shape) - 2](1),
            _CONVS[len(shape) - 2](channels, hidden, 1),
            nn.ReLU(),
            _CONVS[len(shape) - 2](hidden, channels, 1),
        )
        return Of("gate", lambda x, inner: x * inner(x).sigmoid(), squeeze)
    fc = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels), nn.Sigmoid())
    ones = (1,) * len(space)
    return Of("linear gate", lambda x, fc: x * fc(x.mean(space)).view(-1, channels, *ones), fc)


def _spatial_gate(_: np.random.Generator, shape: Shape) -> nn.Module:
    conv = _CONVS[len(shape) - 2](2, 1, 3, padding=1)

    def run(x: torch.Tensor, conv: nn.Module) -> torch.Tensor:
        seen = torch.cat((x.mean(1, keepdim=True), x.amax(1, keepdim=True)), 1)
        return x * torch.sigmoid(conv(seen))

    return Of("spatial gate", run, conv)


def _mean_along(rng: np.random.Generator, shape: Shape) -> nn.Module:
    dim = int(rng.integers(2, len(shape) + 1))
    return _one(
        rng,
        Of("minus its mean", lambda x: x - x.mean(dim, keepdim=True)),
        Of("plus its sum", lambda x: x + 0.1 * x.sum(dim, keepdim=True)),
        Of("minus its maximum", lambda x: x - x.amax(dim, keepdim=True)),
        Of("minus the mean of the sample", lambda x: x - x.mean(tuple(range(1, len(shape) + 1)), keepdim=True)),
    )


def _residual(rng: np.random.Generator, shape: Shape) -> nn.Module:
    space = len(shape) - 2
    inner = nn.Sequential(
        _CONVS[space](shape[0], 4, 3, padding=1, bias=False), _BATCH_NORMS[space](4), nn.ReLU(inplace=True),
        _CONVS[space](4, shape[0], 3, padding=1),
    )  # fmt: skip
    return _one(
        rng,
        Of("residual", lambda x, inner: functional.relu(x + inner(x)), inner),
        Of("product", lambda x, inner: x * torch.tanh(inner(x)), inner),
        Of("difference", lambda x, inner: inner(x) - 0.5 * x, inner),
    )


def _inception(rng: np.random.Generator, shape: Shape) -> nn.Module:
    space = len(shape) - 2
    parts = [
        _CONVS[space](shape[0], 3, 1),
        _CONVS[space](shape[0], 2, 3, padding=1),
        nn.Sequential(_MAX_POOLS[space](3, 1, 1), _CONVS[space](shape[0], 2, 1)),
    ]
    chosen = [parts[i] for i in sorted(rng.permutation(3)[: int(rng.integers(2, 4))])]
    return Of("inception", lambda x, *inner: torch.cat([part(x) for part in inner], 1), *chosen)


def _attention(rng: np.random.Generator, shape: Shape) -> nn.Module | None:
    """Attention over positions, by hand, fused, or a module of torch."""
    channels, space = shape[0], shape[1:]
    if math.prod(space) > 64:
        return None
    if rng.integers(2) and channels % 2 == 0:
        module = nn.MultiheadAttention(channels, 2, batch_first=True)

        def torchs(x: torch.Tensor, module: nn.Module) -> torch.Tensor:
            tokens = x.flatten(2).transpose(1, 2)
            y, _ = module(tokens, tokens, tokens, need_weights=False)
            return x + y.transpose(1, 2).reshape(x.shape)

        return Of("multi-head attention", torchs, module)
    qkv = nn.Linear(channels, 3 * channels)
    fused = bool(rng.integers(2))

    def own(x: torch.Tensor, qkv: nn.Module) -> torch.Tensor:
        q, k, v = qkv(x.flatten(2).transpose(1, 2)).chunk(3, -1)
        if fused:
            y = functional.scaled_dot_product_attention(q, k, v)
        else:
            y = torch.softmax(q @ k.transpose(1, 2) / channels**0.5, -1) @ v
        return x + y.transpose(1, 2).reshape(x.shape)

    return Of("attention", own, qkv)


class Join(nn.Module):
    """Joins an earlier tensor to the one at hand, resized to it."""

    def __init__(self, rng: np.random.Generator, shape: Shape, saved: Shape) -> None:
        super().__init__()
        space = len(shape) - 2
        self._how = _one(rng, "cat", "cat", "add", "mul")
        self._resizes = shape[1:] != saved[1:]
        self._mode = _one(rng, "nearest", ("linear", "bilinear", "trilinear")[space])
        fits = shape[0] == saved[0] or self._how == "cat"
        self.match = nn.Identity() if fits else _CONVS[space](saved[0], shape[0], 1)

    def forward(self, x: torch.Tensor, saved: torch.Tensor) -> torch.Tensor:
        saved = self.match(saved)
        if self._resizes:
            saved = functional.interpolate(saved, x.shape[2:], mode=self._mode)
        if self._how == "cat":
            return torch.cat((x, saved), 1)
        return x + saved if self._how == "add" else x * saved


BLOCKS: Final[dict[str, Made]] = {
    "conv": _conv, "depthwise": _depthwise, "transposed": _transposed, "pool": _pool, "adaptive": _adaptive,
    "batch_norm": _batch_norm, "group_norm": _group_norm, "instance_norm": _instance_norm, "layer_norm": _layer_norm,
    "response_norm": _response_norm, "activation": _activation, "scale": _scale, "dropout": _dropout,
    "softmax": _softmax, "resize": _resize, "shuffle_pixels": _shuffle_pixels, "pad": _pad, "slice": _slice,
    "shuffle_channels": _shuffle_channels, "pointwise": _pointwise, "blocks_to_channels": _blocks_to_channels,
    "halves": _halves, "gate": _gate, "spatial_gate": _spatial_gate, "mean_along": _mean_along,
    "residual": _residual, "inception": _inception, "attention": _attention,
}  # fmt: skip
"""Every operator by the name that recipes use; beside them ``save`` and ``join`` make long branches."""


_KEEP_NOTHING: Final = frozenset({"conv", "depthwise", "transposed", "batch_norm"})
"""Blocks whose result may be written to: backward does not read it."""


class Network(nn.Module):
    """What a recipe describes; returns what the head makes, or the loss."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.blocks = nn.ModuleList()
        self._program: list[str] = []
        shape, saved = tuple(recipe.shape[1:]), list[Shape]()
        for name, seed in recipe.blocks:
            rng = np.random.default_rng(seed)
            if name == "save":
                saved.append(shape)
                self._add(name, nn.Identity())
                continue
            block: Any = Join(rng, shape, saved[-1]) if name == "join" and saved else None
            block = BLOCKS[name](rng, shape) if name in BLOCKS else block
            if getattr(block, "inplace", False) and (not self._program or self._program[-1] not in _KEEP_NOTHING):
                block.inplace = False  # what was there before has saved its result for backward
            if block is None:
                continue
            made = self._shape(block, shape, *([saved[-1]] if name == "join" else []))
            if math.prod(made) > MAX_ELEMENTS:
                continue
            if name == "join":
                saved.pop()
            shape = made
            self._add(name, block)
        self.head = _head(recipe, shape)

    def _add(self, name: str, block: nn.Module) -> None:
        self._program.append(name)
        self.blocks.append(block)

    @staticmethod
    def _shape(block: nn.Module, *shapes: Shape) -> Shape:
        block.double().eval()
        with torch.no_grad():
            made = block(*(torch.zeros(2, *shape, dtype=torch.float64) for shape in shapes))
        block.train()
        return tuple(made.shape[1:])

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the head makes of the blocks."""
        saved = []
        for name, block in zip(self._program, self.blocks, strict=True):
            if name == "save":
                saved.append(x)
            else:
                x = block(x, saved.pop()) if name == "join" else block(x)
        found: torch.Tensor = self.head(x)
        return found

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.features(x)


class WithLoss(Network):
    """A network that computes its loss itself."""

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:  # type: ignore[override]  # two inputs
        return loss_of(self.recipe, self.features(x), target)


def _head(recipe: Recipe, shape: Shape) -> nn.Module:
    channels, space = shape[0], tuple(range(2, len(shape) + 1))
    match recipe.head:
        case "flat":
            hidden = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 8), nn.ReLU(), nn.Linear(8, CLASSES))
            return hidden.double()
        case "dense":
            made: nn.Module = _CONVS[len(shape) - 2](channels, CLASSES, 1).double()
            return made
        case "mean":
            return Of("mean and linear", lambda x, fc: fc(x.mean(space)), nn.Linear(channels, CLASSES)).double()
        case _:
            pool = _ADAPTIVE_AVERAGE[len(shape) - 2](1)
            return nn.Sequential(pool, nn.Flatten(), nn.Linear(channels, CLASSES)).double()


def loss_of(recipe: Recipe, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the loss, a mean over all that the tensors hold."""
    match recipe.loss:
        case "cross_entropy" | "probabilities":
            return functional.cross_entropy(output, target)
        case "smoothed":
            return functional.cross_entropy(output, target, label_smoothing=0.1, ignore_index=1)
        case "bce":
            return functional.binary_cross_entropy_with_logits(output, target)
        case _:
            return functional.mse_loss(output, target)


def build(recipe: Recipe) -> Network:
    """Return the network with its weights."""
    torch.manual_seed(recipe.seed)
    net = (WithLoss if recipe.inside else Network)(recipe).double()
    return net.train()


def data(recipe: Recipe) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the global batch: inputs and targets."""
    generator = torch.Generator().manual_seed(recipe.seed + 1)
    x = torch.randn(recipe.shape, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        made = Network(recipe).eval().features(x).shape
    if recipe.loss in {"cross_entropy", "smoothed"}:
        target = torch.randint(0, made[1], (made[0], *made[2:]), generator=generator)
        if not recipe.inside:  # a rank's own mean counts its own targets, as under DistributedDataParallel
            return x, torch.where(target == 1, 0, target)
        ignored = torch.rand(target.shape, generator=generator) < 0.3
        ignored.view(-1)[0], target.view(-1)[0] = False, 0  # a mean over none would not be a number
        return x, torch.where(ignored, 1 if recipe.loss == "smoothed" else -100, target)
    return x, torch.rand(made, generator=generator, dtype=torch.float64)


def random_recipe(seed: int) -> Recipe:
    """Return a recipe of a few to a dozen operators."""
    rng = np.random.default_rng(seed)
    space = int(_one(rng, 1, 2, 2, 2, 3))
    high = (14, 9, 5)[space - 1]
    shape = (int(rng.integers(2, 9)), int(rng.integers(1, 7)), *(int(rng.integers(3, high + 1)) for _ in range(space)))
    names = [*BLOCKS, "conv", "conv", "batch_norm", "activation", "pool", "save", "join", "join"]
    blocks = tuple((str(_one(rng, *names)), int(rng.integers(2**16))) for _ in range(int(rng.integers(2, 11))))
    return Recipe(
        shape, blocks, str(_one(rng, *HEADS, "dense")), str(_one(rng, *LOSSES)), bool(rng.integers(3) == 0),
        int(rng.integers(2**16)),
    )  # fmt: skip
