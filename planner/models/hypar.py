"""The four small networks of HyPar [HyPar19]; its AlexNet and VGGs have modules of their own.

The paper's table of shapes was not to be had. These shapes reproduce its communication per step (Fig. 8) and its plans
(Fig. 5); where the pools of ``sconv`` are changes neither, so their places are a guess.

=============  =========  ===================  ==========
network        image      weights, no biases   parameters
=============  =========  ===================  ==========
``sfc``        1, 28, 28  140,722,176          140,746,762
``sconv``      1, 28, 28  100,500              100,630
``lenet_c``    1, 28, 28  430,500              431,080
``cifar_c``    3, 32, 32  145,376              145,578
=============  =========  ===================  ==========

Every function takes ``width``, a factor on all channel and feature counts but the classes, and ``num_classes``, the
size of the output.
"""

import math
from collections import OrderedDict

from torch import nn


def sfc(width: float = 1.0, num_classes: int = 10) -> nn.Sequential:
    """Return four linear layers and nothing else: 784 - 8192 - 8192 - 8192 - 10."""
    hidden = math.ceil(width * 8192)
    classifier = nn.Sequential(
        nn.Linear(28 * 28, hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Linear(hidden, num_classes),
    )
    return nn.Sequential(OrderedDict(flatten=nn.Flatten(), classifier=classifier))


def sconv(width: float = 1.0, num_classes: int = 10) -> nn.Sequential:
    """Return four 5 x 5 convolutions and nothing else; the last one's channels are the classes."""
    conv1, conv2, conv3 = (math.ceil(width * size) for size in (20, 50, 50))
    features = nn.Sequential(
        nn.Conv2d(1, conv1, kernel_size=5),
        nn.ReLU(),
        nn.Conv2d(conv1, conv2, kernel_size=5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(conv2, conv3, kernel_size=5),
        nn.ReLU(),
        nn.Conv2d(conv3, num_classes, kernel_size=5),
        nn.MaxPool2d(2),
    )
    return nn.Sequential(OrderedDict(features=features, flatten=nn.Flatten()))


def lenet_c(width: float = 1.0, num_classes: int = 10) -> nn.Sequential:
    """Return two convolutions and two linear layers, LeNet as Caffe ships it."""
    conv1, conv2, hidden = (math.ceil(width * size) for size in (20, 50, 500))
    features = nn.Sequential(
        nn.Conv2d(1, conv1, kernel_size=5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(conv1, conv2, kernel_size=5),
        nn.ReLU(),
        nn.MaxPool2d(2),
    )
    classifier = nn.Sequential(nn.Linear(conv2 * 4 * 4, hidden), nn.ReLU(), nn.Linear(hidden, num_classes))
    return nn.Sequential(OrderedDict(features=features, flatten=nn.Flatten(), classifier=classifier))


def cifar_c(width: float = 1.0, num_classes: int = 10) -> nn.Sequential:
    """Return three convolutions and two linear layers, Caffe's network for CIFAR-10 with a hidden linear layer."""
    conv1, conv2, conv3, hidden = (math.ceil(width * size) for size in (32, 32, 64, 64))
    features = nn.Sequential(
        nn.Conv2d(3, conv1, kernel_size=5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(conv1, conv2, kernel_size=5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(conv2, conv3, kernel_size=5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
    )
    classifier = nn.Sequential(nn.Linear(conv3 * 4 * 4, hidden), nn.ReLU(), nn.Linear(hidden, num_classes))
    return nn.Sequential(OrderedDict(features=features, flatten=nn.Flatten(), classifier=classifier))
