"""U-Net [UNet15, Figure 1], padded and with batch norm, as it is mostly trained today."""

import itertools
import math
from typing import Final

import torch
from torch import nn

_CHANNELS: Final = (64, 128, 256, 512, 1024)


class DoubleConv(nn.Sequential):
    """Twice a convolution of 3 x 3 that keeps height and width, with batch norm and ReLU."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )


class UNet(nn.Module):
    """See ``unet``."""

    def __init__(self, channels: tuple[int, ...], in_channels: int, num_classes: int) -> None:
        super().__init__()
        sources = (in_channels, *channels[:-1])
        self.down = nn.ModuleList(DoubleConv(a, b) for a, b in zip(sources, channels, strict=True))
        self.pool = nn.MaxPool2d(2)
        falling = channels[::-1]
        pairs = list(itertools.pairwise(falling))
        self.up = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, stride=2) for a, b in pairs)
        self.merge = nn.ModuleList(DoubleConv(2 * b, b) for _, b in pairs)
        self.head = nn.Conv2d(channels[0], num_classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (N, num_classes, H, W) for (N, in_channels, H, W)."""
        skips = []
        for level, block in enumerate(self.down):
            x = block(x if level == 0 else self.pool(x))
            skips.append(x)
        for up, merge, skip in zip(self.up, self.merge, skips[-2::-1], strict=True):
            x = merge(torch.cat([skip, up(x)], 1))
        return self.head(x)  # type: ignore[no-any-return]  # modules return Any


def unet(width: float = 1.0, num_classes: int = 2, in_channels: int = 1) -> UNet:
    """Return a U-Net for images of (N, in_channels, H, W); H and W are multiples of 16.

    The paper's convolutions have no padding, so that its output is smaller than its input, and no
    batch norm. With one input channel and two classes, as in the paper, it has 31,036,546 parameters.

    Args:
        width: factor on all channels.
        num_classes: of each pixel.
        in_channels: of the images.
    """
    return UNet(tuple(math.ceil(width * size) for size in _CHANNELS), in_channels, num_classes)
