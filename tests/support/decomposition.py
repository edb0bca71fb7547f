"""A small factory of local networks, and samples for them, for tests of domain decomposition."""

import torch
from torch import nn

from runtime.decomposition import Samples

CLASSES = 3


def tiny_cnn(shape: tuple[int, ...]) -> nn.Sequential:
    """Return a CNN with batch norm and dropout for images or volumes."""
    conv, norm, average = (
        (nn.Conv3d, nn.BatchNorm3d, nn.AdaptiveAvgPool3d)
        if len(shape) == 4
        else (nn.Conv2d, nn.BatchNorm2d, nn.AdaptiveAvgPool2d)
    )
    head = [average(2), nn.Flatten(), nn.Dropout(0.2), nn.Linear(4 * 2 ** (len(shape) - 1), CLASSES)]
    return nn.Sequential(conv(shape[0], 4, 3, padding=1), norm(4), nn.ReLU(), *head)


def tiny_samples(shape: tuple[int, ...] = (1, 8, 8), count: int = 33) -> Samples:
    """Return noise whose brightest third of the image says the class."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    inputs = torch.rand(count, *shape, generator=generator)
    bands = inputs.unflatten(2, (-1, shape[1])).squeeze(2)
    for label in range(CLASSES):
        bands[labels == label, :, label * shape[1] // CLASSES] += 1.5
    return Samples(inputs, labels)
