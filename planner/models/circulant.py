"""Layers of circulant blocks, computed by FFT [CirCNN17]: k weights and O(k log k) work for a block of k x k.

A block with first column w maps x to their circular convolution, ``irfft(rfft(w) * rfft(x))``. Blocks that share inputs
or outputs are summed before the inverse transform, so a layer of p x q blocks has p + q transforms of its data.
"""

import math
from typing import Final

import torch
from torch import fft, nn
from torch.nn import functional

_BLOCK: Final = 8
_CHANNELS: Final = (64, 128, 256)
_HIDDEN: Final = 512


class CirculantLinear(nn.Module):
    """A linear layer whose matrix has out / block x in / block circulant blocks.

    Args:
        in_features: a multiple of the block.
        out_features: likewise.
        block: size of a block.
    """

    def __init__(self, in_features: int, out_features: int, block: int) -> None:
        super().__init__()
        self.block = block
        bound = 1 / math.sqrt(in_features)
        self.weight = nn.Parameter(torch.empty(out_features // block, in_features // block, block))
        self.bias = nn.Parameter(torch.zeros(out_features))
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (N, in_features) to (N, out_features)."""
        spectrum = fft.rfft(x.unflatten(1, (-1, self.block)))
        y = torch.einsum("nqf,pqf->npf", spectrum, fft.rfft(self.weight))
        blocks: torch.Tensor = fft.irfft(y, n=self.block)
        return blocks.flatten(1) + self.bias


class CirculantConv2d(nn.Module):
    """A convolution of 3 x 3 that keeps the size, whose channels are mixed by circulant blocks at each of its taps.

    Args:
        in_channels: a multiple of the block.
        out_channels: likewise.
        block: size of a block.
    """

    def __init__(self, in_channels: int, out_channels: int, block: int) -> None:
        super().__init__()
        self.block = block
        bound = 1 / math.sqrt(9 * in_channels)
        self.weight = nn.Parameter(torch.empty(out_channels // block, in_channels // block, block, 3, 3))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H, W)."""
        spectrum = fft.rfft(x.unflatten(1, (-1, self.block)), dim=2).transpose(1, 2)  # N, frequency, q, H, W
        kernel = fft.rfft(self.weight, dim=2).permute(2, 0, 1, 3, 4)  # frequency, p, q, 3, 3
        frequencies = self.block // 2 + 1
        y = functional.conv2d(spectrum.flatten(1, 2), kernel.flatten(0, 1), padding=1, groups=frequencies)
        y = y.unflatten(1, (frequencies, -1)).transpose(1, 2)
        blocks: torch.Tensor = fft.irfft(y, n=self.block, dim=2)
        return blocks.flatten(1, 2) + self.bias.view(-1, 1, 1)


def circulant_cnn(width: float = 1.0, num_classes: int = 10, block: int = _BLOCK, pixels: int = 32) -> nn.Sequential:
    """Return four convolutions and two linear layers for images of (N, 3, 32, 32); circulant but for the outermost.

    **Deviations**: the layers are the paper's, the network is ours.

    Args:
        width: factor on all channels and hidden features, which are rounded up to multiples of the block.
        num_classes: of the images.
        block: size of the circulant blocks.
        pixels: of the images in each direction, a multiple of 8.
    """
    conv1, conv2, conv3, hidden = (math.ceil(width * n / block) * block for n in (*_CHANNELS, _HIDDEN))
    features = (
        nn.Conv2d(3, conv1, 3, padding=1),
        nn.ReLU(),
        CirculantConv2d(conv1, conv1, block),
        nn.ReLU(),
        nn.MaxPool2d(2),
        CirculantConv2d(conv1, conv2, block),
        nn.ReLU(),
        nn.MaxPool2d(2),
        CirculantConv2d(conv2, conv3, block),
        nn.ReLU(),
        nn.MaxPool2d(2),
    )
    head = (CirculantLinear(conv3 * (pixels // 8) ** 2, hidden, block), nn.ReLU(), nn.Linear(hidden, num_classes))
    return nn.Sequential(*features, nn.Flatten(), *head)
