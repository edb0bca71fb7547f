"""LeNet-5 in its modern form."""

import math
from collections import OrderedDict

from torch import nn


def lenet5(width: float = 1.0, num_classes: int = 10) -> nn.Sequential:
    """Return LeNet-5 for images of (N, 1, 32, 32); 61,706 parameters [LeNet98, Fig. 2].

    **Deviations**: ReLU instead of a scaled tanh, max pooling instead of trained subsampling, the
    second convolution sees all input channels, and a linear classifier instead of radial basis
    functions.

    Args:
        width: factor on all channel and feature counts but the classes.
        num_classes: size of the output.
    """
    conv1, conv2, fc1, fc2 = (math.ceil(width * size) for size in (6, 16, 120, 84))
    features = nn.Sequential(
        nn.Conv2d(1, conv1, kernel_size=5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(conv1, conv2, kernel_size=5),
        nn.ReLU(),
        nn.MaxPool2d(2),
    )
    classifier = nn.Sequential(
        nn.Linear(conv2 * 5 * 5, fc1),
        nn.ReLU(),
        nn.Linear(fc1, fc2),
        nn.ReLU(),
        nn.Linear(fc2, num_classes),
    )
    return nn.Sequential(OrderedDict(features=features, flatten=nn.Flatten(), classifier=classifier))
