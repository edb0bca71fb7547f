"""A classifier with two inputs: a degraded image and how degraded it is [Endo20]."""

import math
from typing import Final

import torch
from torch import nn

_CHANNELS: Final = (64, 128, 256)
_HIDDEN: Final = 64


class DegradedClassifier(nn.Module):
    """See ``degraded_classifier``."""

    def __init__(self, channels: list[int], hidden: int, num_classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for after in channels:
            for _ in range(2):
                layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
                before = after
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers[:-1], nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.adjust = nn.Sequential(nn.Linear(1, hidden), nn.ReLU(), nn.Linear(hidden, before), nn.Sigmoid())
        self.classifier = nn.Linear(before, num_classes)

    def forward(self, image: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        """Return (N, num_classes) for images of (N, 3, H, W) and levels of degradation of (N, 1)."""
        return self.classifier(self.features(image) * self.adjust(level))  # type: ignore[no-any-return]  # of modules


def degraded_classifier(width: float = 1.0, num_classes: int = 10) -> DegradedClassifier:
    """Return a classifier whose features are adjusted by a parameter of the image, such as the quality of its JPEG.

    **Deviations**: the paper's idea, a second input that adjusts the features, in six convolutions of ours; its own
    numbers of layers are not known to us.

    Args:
        width: factor on all channels and hidden features.
        num_classes: of the images.
    """
    channels = [math.ceil(width * n) for n in _CHANNELS]
    return DegradedClassifier(channels, math.ceil(width * _HIDDEN), num_classes)
