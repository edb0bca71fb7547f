"""Binarised networks [BinaryNet16]: weights and activations of -1 and 1, gradients straight through [Bengio13]."""

import itertools
import math
from typing import Any, Final

import torch
from torch import nn
from torch.autograd import Function
from torch.nn import functional

_CHANNELS: Final = (128, 128, 256, 256, 512, 512)
_HIDDEN: Final = 1024


class Sign(Function):
    """The sign of every element, 1 for zero; backward it is the identity between -1 and 1, and zero beyond."""

    elementwise = True  # so that plans may split what it stands in by anything, see planner/README.md

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:  # noqa: ANN401  # torch's own context
        """Return -1 and 1."""
        ctx.save_for_backward(x)
        return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:  # noqa: ANN401  # see above
        """Return the gradient where the input was between -1 and 1."""
        x: torch.Tensor = ctx.saved_tensors[0]
        return gradients[0] * (x.abs() <= 1)


def signs(x: torch.Tensor) -> torch.Tensor:
    """Return what ``Sign`` does."""
    return Sign.apply(x)  # type: ignore[no-any-return]  # torch does not say


class BinaryActivation(nn.Module):
    """See ``Sign``."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return -1 and 1 in the shape of x."""
        return signs(x)


class BinaryConv2d(nn.Conv2d):
    """A convolution with the signs of its weights."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H', W')."""
        return functional.conv2d(x, signs(self.weight), self.bias, self.stride, self.padding)


class BinaryLinear(nn.Linear):
    """A linear layer with the signs of its weights."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (N, in_features) to (N, out_features)."""
        return functional.linear(x, signs(self.weight), self.bias)


def binary_vgg(width: float = 1.0, num_classes: int = 10, pixels: int = 32) -> nn.Sequential:
    """Return the network of [BinaryNet16, Sec. 2.1] for images of (N, 3, 32, 32).

    Six convolutions and three linear layers, batch norm behind each, the sign behind all but the last. What the
    optimizer updates are the real weights.

    **Deviations**: weights are not clipped to [-1, 1] after a step, which is the training loop's to do.

    Args:
        width: factor on all channels and hidden features.
        num_classes: of the images.
        pixels: of the images in each direction, a multiple of 8.
    """
    channels = [math.ceil(width * n) for n in _CHANNELS]
    hidden = math.ceil(width * _HIDDEN)
    layers: list[nn.Module] = []
    for k, (a, b) in enumerate(itertools.pairwise([3, *channels])):
        layers.append(BinaryConv2d(a, b, 3, padding=1, bias=False))
        if k % 2:
            layers.append(nn.MaxPool2d(2))
        layers += [nn.BatchNorm2d(b), BinaryActivation()]
    layers.append(nn.Flatten())
    sizes = [channels[-1] * (pixels // 8) ** 2, hidden, hidden, num_classes]
    for a, b in itertools.pairwise(sizes):
        layers += [BinaryLinear(a, b, bias=False), nn.BatchNorm1d(b), BinaryActivation()]
    return nn.Sequential(*layers[:-1])
