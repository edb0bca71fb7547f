"""3D U-Net as [Oyama20] trains it, after Cicek and others 2016, arXiv:1606.06650.

Three levels, padded, with batch norm.
"""

import itertools
import math
from typing import Final

import torch
from torch import nn

_CHANNELS: Final = ((32, 64), (64, 128), (128, 256), (256, 512))


class DoubleConv3d(nn.Sequential):
    """Twice a convolution of 3 x 3 x 3 that keeps the size, with batch norm and ReLU."""

    def __init__(self, in_channels: int, between: int, out_channels: int) -> None:
        super().__init__(
            nn.Conv3d(in_channels, between, 3, padding=1, bias=False),
            nn.BatchNorm3d(between),
            nn.ReLU(inplace=True),
            nn.Conv3d(between, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm3d(out_channels),
            nn.ReLU(inplace=True),
        )


class UNet3d(nn.Module):
    """See ``unet3d``."""

    def __init__(self, channels: list[tuple[int, int]], in_channels: int, num_classes: int) -> None:
        super().__init__()
        sources = (in_channels, *(last for _, last in channels[:-1]))
        self.down = nn.ModuleList(DoubleConv3d(n, *pair) for n, pair in zip(sources, channels, strict=True))
        self.pool = nn.MaxPool3d(2)
        falling = [last for _, last in channels[::-1]]
        pairs = list(itertools.pairwise(falling))
        self.up = nn.ModuleList(nn.ConvTranspose3d(a, a, 2, stride=2) for a, _ in pairs)
        self.merge = nn.ModuleList(DoubleConv3d(a + b, b, b) for a, b in pairs)
        self.head = nn.Conv3d(falling[-1], num_classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (N, num_classes, D, H, W) for (N, in_channels, D, H, W)."""
        skips = []
        for level, block in enumerate(self.down):
            x = block(x if level == 0 else self.pool(x))
            skips.append(x)
        for up, merge, skip in zip(self.up, self.merge, skips[-2::-1], strict=True):
            x = merge(torch.cat([skip, up(x)], 1))
        return self.head(x)  # type: ignore[no-any-return]  # modules return Any


def unet3d(width: float = 1.0, num_classes: int = 3, in_channels: int = 1) -> UNet3d:
    """Return a 3D U-Net for volumes of (N, in_channels, D, H, W); D, H and W are multiples of 8.

    With three input channels and three classes it has the 19,069,955 parameters that Cicek and others state, less
    2,336 biases in front of batch norms, plus 4,672 of batch norms and 896 biases of transposed convolutions.

    Args:
        width: factor on all channels.
        num_classes: of each voxel.
        in_channels: of the volumes.
    """
    channels = [(math.ceil(width * a), math.ceil(width * b)) for a, b in _CHANNELS]
    return UNet3d(channels, in_channels, num_classes)
