"""A 3D classifier of chest CT scans [Zunair20]: volumes of (N, 1, D, H, W)."""

import itertools
import math
from typing import Final

from torch import nn

_CHANNELS: Final = (64, 64, 128, 256)
_HIDDEN: Final = 512


def ct_classifier(width: float = 1.0, num_classes: int = 2, dropout: float = 0.3) -> nn.Sequential:
    """Return four convolutions of 3 x 3 x 3, each with ReLU, max pool and batch norm, and two linear layers.

    With one class (a sigmoid's logit) it has 1,351,873 trainable parameters, as the authors' published code reports.

    Args:
        width: factor on all channels and hidden features.
        num_classes: findings.
        dropout: probability behind the hidden linear layer.
    """
    channels = [math.ceil(width * n) for n in _CHANNELS]
    hidden = math.ceil(width * _HIDDEN)
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise([1, *channels]):
        layers += [nn.Conv3d(a, b, 3), nn.ReLU(), nn.MaxPool3d(2), nn.BatchNorm3d(b)]
    head = (nn.Linear(channels[-1], hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, num_classes))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool3d(1), nn.Flatten(), *head)
