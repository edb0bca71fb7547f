"""Two small networks for scikit-learn's digits, images of (N, 1, 8, 8) in 10 classes.

They have no dropout, so that the losses of several devices can be held against those of one.
"""

import math
from collections import OrderedDict

from torch import nn


def digits_cnn(width: float = 1.0, num_classes: int = 10) -> nn.Sequential:
    """Return three convolutions with batch norm and one linear layer; 66,154 parameters.

    Args:
        width: factor on all channel counts.
        num_classes: size of the output.
    """
    conv1, conv2 = (math.ceil(width * size) for size in (32, 64))
    features = nn.Sequential(
        nn.Conv2d(1, conv1, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(conv1),
        nn.ReLU(),
        nn.Conv2d(conv1, conv2, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(conv2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(conv2, conv2, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(conv2),
        nn.ReLU(),
    )
    classifier = nn.Linear(conv2 * 4 * 4, num_classes)
    return nn.Sequential(OrderedDict(features=features, flatten=nn.Flatten(), classifier=classifier))


def digits_alexnet(width: float = 1.0, num_classes: int = 10) -> nn.Sequential:
    """Return two convolutions and three linear layers; 6,334,858 parameters, 99.7 % in the latter.

    AlexNet's imbalance at a size that a laptop trains in seconds.

    Args:
        width: factor on all channel and feature counts but the classes.
        num_classes: size of the output.
    """
    conv1, conv2, hidden = (math.ceil(width * size) for size in (32, 64, 2048))
    features = nn.Sequential(
        nn.Conv2d(1, conv1, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Conv2d(conv1, conv2, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
    )
    classifier = nn.Sequential(
        nn.Linear(conv2 * 4 * 4, hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Linear(hidden, num_classes),
    )
    return nn.Sequential(OrderedDict(features=features, flatten=nn.Flatten(), classifier=classifier))
