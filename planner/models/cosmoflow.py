"""CosmoFlow as [Oyama20] trains it: cosmological parameters from volumes of dark matter."""

import itertools
import math
from collections.abc import Iterator
from typing import Final

from torch import nn

_CHANNELS: Final = (16, 32, 64, 128, 256, 256, 256)
_STRIDES: Final = (1, 1, 1, 2, 1, 1, 1)
_HIDDEN: Final = (2048, 256)
_ALWAYS_POOLED: Final = 5
_BIAS: Final = 0.1
_DROPPED: Final = 0.2


def cosmoflow(width: float = 1.0, num_classes: int = 4, size: int = 128, in_channels: int = 4) -> nn.Sequential:
    """Return CosmoFlow for volumes of (N, in_channels, size, size, size).

    Convolutions of 3 x 3 x 3 without bias, each with a leaky ReLU; average pools of 3 x 3 x 3 behind the first five,
    behind the sixth for volumes of 256 or more, behind the seventh for 512 or more. The last tensor has 2 x 2 x 2
    positions for 64, 128, 256 and 512. With 128, four channels and four parameters it has 9,437,636 parameters.

    Args:
        width: factor on all channels.
        num_classes: parameters to predict.
        size: of a volume, in each dimension.
        in_channels: of a volume.
    """
    channels = [math.ceil(width * n) for n in _CHANNELS]
    pooled = min(_ALWAYS_POOLED + (size >= 256) + (size >= 512), len(channels))  # as the paper does
    layers: list[nn.Module] = []
    for k, (a, b) in enumerate(itertools.pairwise([in_channels, *channels])):
        layers += [nn.Conv3d(a, b, 3, _STRIDES[k], 1, bias=False), nn.LeakyReLU()]
        size = (size - 1) // _STRIDES[k] + 1
        if k < pooled and size > 2:  # torch has no average pool of three positions on two
            layers.append(nn.AvgPool3d(3, 2, 1))
            size = (size - 1) // 2 + 1
    sizes = [channels[-1] * size**3, *(math.ceil(width * n) for n in _HIDDEN), num_classes]
    return nn.Sequential(*layers, nn.Flatten(), *_head(sizes))


def _head(sizes: list[int]) -> Iterator[nn.Module]:
    """Yield linear layers between these sizes, each behind dropout, with leaky ReLUs between them."""
    for k, (a, b) in enumerate(itertools.pairwise(sizes)):
        if k:
            yield nn.LeakyReLU()
        yield nn.Dropout(_DROPPED)
        linear = nn.Linear(a, b)
        nn.init.constant_(linear.bias, _BIAS)
        yield linear
