"""Networks for electrocardiograms: signals of (N, leads, time)."""

import math
from typing import Final

import torch
from torch import nn
from torch.nn import functional

_STEM: Final = 64
_GROWS_EVERY: Final = 4
_KERNEL: Final = 16
_DROPPED: Final = 0.2


def ecg_cnn(width: float = 1.0, num_classes: int = 5) -> nn.Sequential:
    """Return the nine layers of [Acharya17] for single heartbeats of (N, 1, 260); 19,805 parameters.

    Args:
        width: factor on all channels and hidden features.
        num_classes: kinds of heartbeats.
    """
    conv1, conv2, conv3, hidden1, hidden2 = (math.ceil(width * n) for n in (5, 10, 20, 30, 20))
    return nn.Sequential(
        nn.Conv1d(1, conv1, 3),
        nn.LeakyReLU(),
        nn.MaxPool1d(2),
        nn.Conv1d(conv1, conv2, 4),
        nn.LeakyReLU(),
        nn.MaxPool1d(2),
        nn.Conv1d(conv2, conv3, 4),
        nn.LeakyReLU(),
        nn.MaxPool1d(2),
        nn.Flatten(),
        nn.Linear(conv3 * 30, hidden1),
        nn.LeakyReLU(),
        nn.Linear(hidden1, hidden2),
        nn.LeakyReLU(),
        nn.Linear(hidden2, num_classes),
    )


class EcgBlock(nn.Module):
    """Two convolutions behind batch norm, ReLU and dropout, beside a max pool that keeps or halves the length.

    New channels of the shortcut are zeros. The first block comes behind the stem's own batch norm and ReLU.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, *, is_first: bool) -> None:
        super().__init__()
        before = [] if is_first else [nn.BatchNorm1d(in_channels), nn.ReLU(), nn.Dropout(_DROPPED)]
        self.body = nn.Sequential(
            *before,
            nn.Conv1d(in_channels, out_channels, _KERNEL, stride, padding=_KERNEL // 2),
            nn.BatchNorm1d(out_channels),
            nn.ReLU(),
            nn.Dropout(_DROPPED),
            nn.Conv1d(out_channels, out_channels, _KERNEL, padding=_KERNEL // 2 - 1),
        )
        self.shortcut = nn.MaxPool1d(stride) if stride > 1 else nn.Identity()
        self.new_channels = out_channels - in_channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (N, in_channels, L) to (N, out_channels, L / stride)."""
        shortcut = self.shortcut(x)
        if self.new_channels:
            shortcut = functional.pad(shortcut, (0, 0, 0, self.new_channels))
        return self.body(x) + shortcut  # type: ignore[no-any-return]  # modules return Any


def ecg_resnet(width: float = 1.0, num_classes: int = 14, leads: int = 1, blocks: int = 16) -> nn.Sequential:
    """Return the 34 layers of [Rajpurkar17] for signals of (N, leads, L); a prediction for every 256 samples.

    33 convolutions of length 16, and a linear layer at each position, which is a convolution of length 1. Every fourth
    block adds 64 channels, every other one halves the length. 30 s at 200 Hz are 6,000 samples and give 23 predictions.

    **Deviations**: 16 taps cannot be padded evenly; the first convolution of a block makes the signal one longer, the
    second one shorter.

    Args:
        width: factor on all channels.
        num_classes: of each prediction; 12 arrhythmias, sinus rhythm and noise.
        leads: channels of the signal.
        blocks: residual ones, of two convolutions each.
    """
    base = math.ceil(width * _STEM)
    layers: list[nn.Module] = [
        nn.Conv1d(leads, base, _KERNEL, padding=_KERNEL // 2),
        nn.BatchNorm1d(base),
        nn.ReLU(),
    ]
    channels = base
    for k in range(blocks):
        wider = base * (1 + k // _GROWS_EVERY)
        layers.append(EcgBlock(channels, wider, 1 + k % 2, is_first=k == 0))
        channels = wider
    return nn.Sequential(*layers, nn.BatchNorm1d(channels), nn.ReLU(), nn.Conv1d(channels, num_classes, 1))
