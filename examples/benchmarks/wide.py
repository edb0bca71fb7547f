"""A CNN whose weights are nearly all in wide fully connected layers, for the benchmarks."""

import torch
from torch import nn


class WideCNN(nn.Module):
    """Two convolutions on 32 x 32 images, then fully connected layers of 4096 features: 34 million parameters."""

    def __init__(self, hidden: int = 4096, num_classes: int = 100) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.classifier = nn.Sequential(
            nn.Linear(64 * 8 * 8, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, num_classes),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x).flatten(1))


def wide_cnn() -> WideCNN:
    """Return the network."""
    return WideCNN()
