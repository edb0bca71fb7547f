"""Networks for golf swings [Jiao18]: signals of eight sensors, (N, 8, time).

Two strain gauges, an accelerometer and a gyroscope of three axes each. The paper has four kinds of networks: plain,
stacked convolutions (VGG), parallel ones of several lengths (Inception), residual ones. **Deviations**: the numbers of
layers and channels are ours, because those of the paper are not known to us.
"""

import math
from collections.abc import Iterator
from typing import Final

import torch
from torch import nn
from torch.nn import functional

SENSORS: Final = 8
_CHANNELS: Final = (32, 64, 128)
_LENGTHS: Final = (1, 3, 5)


def golf_cnn(width: float = 1.0, num_classes: int = 4) -> nn.Sequential:
    """Return a convolution of each size with a pool behind it, and a hidden linear layer.

    Args:
        width: factor on all channels.
        num_classes: kinds of swings.
    """
    channels = [math.ceil(width * n) for n in _CHANNELS]
    return nn.Sequential(*_stacks(channels, depth=1), *_head(channels[-1], num_classes))


def golf_vgg(width: float = 1.0, num_classes: int = 4) -> nn.Sequential:
    """Return two convolutions of each size with a pool behind them; arguments as of ``golf_cnn``."""
    channels = [math.ceil(width * n) for n in _CHANNELS]
    return nn.Sequential(*_stacks(channels, depth=2), *_head(channels[-1], num_classes))


def golf_inception(width: float = 1.0, num_classes: int = 4) -> nn.Sequential:
    """Return modules of four parallel branches with a pool behind each; arguments as of ``golf_cnn``."""
    layers: list[nn.Module] = []
    before = SENSORS
    for size in _CHANNELS:
        branch = math.ceil(width * size / 4)
        layers += [Inception(before, branch), nn.MaxPool1d(2)]
        before = 4 * branch
    return nn.Sequential(*layers, *_head(before, num_classes))


def golf_resnet(width: float = 1.0, num_classes: int = 4) -> nn.Sequential:
    """Return residual blocks that halve the length; arguments as of ``golf_cnn``."""
    layers: list[nn.Module] = []
    before = SENSORS
    for size in _CHANNELS:
        after = math.ceil(width * size)
        layers.append(Residual(before, after))
        before = after
    return nn.Sequential(*layers, *_head(before, num_classes))


class Inception(nn.Module):
    """Convolutions of lengths 1, 3 and 5 and a pool beside each other, the longer ones behind a narrow one."""

    def __init__(self, in_channels: int, branch: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Sequential(*_branch(in_channels, branch, n)) for n in _LENGTHS)
        self.pooled = nn.Sequential(nn.MaxPool1d(3, 1, padding=1), *_unit(in_channels, branch, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (N, in_channels, L) to (N, 4 branch, L)."""
        return torch.cat([*(branch(x) for branch in self.branches), self.pooled(x)], 1)


class Residual(nn.Module):
    """Two convolutions of length 3 around a projection; the first one halves the length."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_unit(in_channels, out_channels, 3, stride=2),
            nn.Conv1d(out_channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm1d(out_channels),
        )
        self.shortcut = nn.Conv1d(in_channels, out_channels, 1, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (N, in_channels, L) to (N, out_channels, L / 2)."""
        return functional.relu(self.body(x) + self.shortcut(x))


def _unit(in_channels: int, out_channels: int, length: int, stride: int = 1) -> Iterator[nn.Module]:
    """Yield a convolution that keeps or divides the length, batch norm and ReLU."""
    yield nn.Conv1d(in_channels, out_channels, length, stride, padding=length // 2, bias=False)
    yield nn.BatchNorm1d(out_channels)
    yield nn.ReLU()


def _branch(in_channels: int, out_channels: int, length: int) -> Iterator[nn.Module]:
    """Yield a convolution of some length, behind a narrow one where it is longer than 1."""
    yield from _unit(in_channels, out_channels, 1)
    if length > 1:
        yield from _unit(out_channels, out_channels, length)


def _stacks(channels: list[int], depth: int) -> Iterator[nn.Module]:
    before = SENSORS
    for after in channels:
        for _ in range(depth):
            yield from _unit(before, after, 3)
            before = after
        yield nn.MaxPool1d(2)


def _head(channels: int, num_classes: int) -> Iterator[nn.Module]:
    """Yield the mean over time and two linear layers."""
    yield nn.AdaptiveAvgPool1d(1)
    yield nn.Flatten()
    yield nn.Linear(channels, channels)
    yield nn.ReLU()
    yield nn.Linear(channels, num_classes)
