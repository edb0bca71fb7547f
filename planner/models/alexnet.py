"""AlexNet as a single tower, in three sizes; module names as in torchvision."""

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

from torch import nn

CLASSIC: Final = (64, 192, 384, 256, 256)
ONE_WEIRD_TRICK: Final = (64, 192, 384, 384, 256)
HYPAR: Final = (48, 128, 192, 192, 128)


def alexnet(
    filters: Sequence[int] = CLASSIC,
    hidden: int = 4096,
    width: float = 1.0,
    num_classes: int = 1000,
    dropout: float = 0.5,
) -> nn.Sequential:
    """Return a single-tower AlexNet for images of (N, 3, 224, 224).

    =========================  ==============  ==========  ====================================
    filters                    hidden          parameters  source
    =========================  ==============  ==========  ====================================
    ``CLASSIC``                4096            61,100,840  torchvision
    ``ONE_WEIRD_TRICK``        4096            61,838,248  [OWT14], the filters as printed
    ``HYPAR``                  2048            16,630,440  [HyPar19], half of the two-tower net
    =========================  ==============  ==========  ====================================

    [OWT14] says 0.2 % more parameters than the two-tower net (60,965,224), which holds for
    ``CLASSIC``; the filters that it prints have 1.4 % more. The shape of ``HYPAR`` is the one that
    reproduces the published communication (16,624,656 weights, biases aside).

    Args:
        filters: output channels of the five convolutions.
        hidden: features of the two hidden linear layers.
        width: factor on filters and hidden features.
        num_classes: size of the output.
        dropout: probability in front of the first two linear layers.
    """
    conv1, conv2, conv3, conv4, conv5 = (math.ceil(width * size) for size in filters)
    hidden = math.ceil(width * hidden)
    features = nn.Sequential(
        nn.Conv2d(3, conv1, kernel_size=11, stride=4, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(kernel_size=3, stride=2),
        nn.Conv2d(conv1, conv2, kernel_size=5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(kernel_size=3, stride=2),
        nn.Conv2d(conv2, conv3, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Conv2d(conv3, conv4, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Conv2d(conv4, conv5, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(kernel_size=3, stride=2),
    )
    classifier = nn.Sequential(
        nn.Dropout(dropout),
        nn.Linear(conv5 * 6 * 6, hidden),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Linear(hidden, num_classes),
    )
    return nn.Sequential(
        OrderedDict(
            features=features,
            avgpool=nn.AdaptiveAvgPool2d(6),
            flatten=nn.Flatten(),
            classifier=classifier,
        )
    )
