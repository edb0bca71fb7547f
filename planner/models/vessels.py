"""U-Net for blood vessels of the brain, as [Livne19] trains it on patches of magnetic resonance angiograms."""

import itertools
import math
from typing import Final

import torch
from torch import nn

_CHANNELS: Final = (64, 128, 256, 512, 1024)


class Stage(nn.Sequential):
    """Two convolutions of 3 x 3 that keep the size, each with ReLU, dropout between them."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, 3, padding=1),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
            nn.ReLU(),
        )


class VesselUNet(nn.Module):
    """See ``vessel_unet``."""

    def __init__(self, channels: list[int], num_classes: int, dropout: float) -> None:
        super().__init__()
        pairs = itertools.pairwise([1, *channels])
        self.down = nn.ModuleList(Stage(a, b, dropout) for a, b in pairs)
        self.pool, self.grow = nn.MaxPool2d(2), nn.Upsample(scale_factor=2)
        falling = itertools.pairwise(channels[::-1])
        self.up = nn.ModuleList(Stage(a + b, b, dropout) for a, b in falling)
        self.head = nn.Conv2d(channels[0], num_classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (N, num_classes, H, W) for (N, 1, H, W)."""
        skips = []
        for level, stage in enumerate(self.down):
            x = stage(x if level == 0 else self.pool(x))
            skips.append(x)
        for stage, skip in zip(self.up, skips[-2::-1], strict=True):
            x = stage(torch.cat([skip, self.grow(x)], 1))
        return self.head(x)  # type: ignore[no-any-return]  # modules return Any


def vessel_unet(width: float = 1.0, num_classes: int = 2, dropout: float = 0.1) -> VesselUNet:
    """Return a U-Net that grows by repeating pixels, without batch norm; H and W are multiples of 16.

    With one class (a sigmoid's logit) it has the 31,377,793 parameters that the paper states, which tells it apart from
    variants with transposed convolutions. ``width=0.5`` is its half U-Net.

    Args:
        width: factor on all channels.
        num_classes: of each pixel.
        dropout: probability between the two convolutions of a stage.
    """
    return VesselUNet([math.ceil(width * n) for n in _CHANNELS], num_classes, dropout)
