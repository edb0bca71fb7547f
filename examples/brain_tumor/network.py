"""The network of Habib & Qureshi (2022), Table 1, with its contradictions resolved; see README.md for the list."""

import math
from collections import OrderedDict

from torch import nn

from examples.brain_tumor.nnlu import NNLU
from planner.errors import UsageError

GROUPS = 16
"""Of Conv6: its kernel is printed as 6x6x256, its input has 4096 channels."""
BIAS = 0.1


def tumor_net(
    *, width=1.0, image=224, channels=3, num_classes=3, activation="nnlu", gap=True, alpha=0.333, dropout=0.5
):
    """Return the network.

    Args:
        width: factor on all numbers of channels but the classes; they are rounded up to multiples of 16 where groups
            need it.
        image: height and width; a multiple of 16.
        channels: of an image.
        num_classes: of the output.
        activation: ``nnlu`` or ``relu``.
        gap: Fc1 is a 1x1 convolution in front of a global average; else a linear layer on all positions.
        alpha: of NNLU.
        dropout: in front of Fc2.

    Raises:
        UsageError: the size does not divide, or the activation is unknown.
    """
    if image % 16:
        raise UsageError(f"images of {image} pixels: four pools halve them, so the size must be a multiple of 16")
    if activation not in {"nnlu", "relu"}:
        raise UsageError(f"unknown activation {activation!r}: nnlu or relu")

    def act():
        return NNLU(alpha) if activation == "nnlu" else nn.ReLU()

    c1, c2, c3 = math.ceil(64 * width), math.ceil(256 * width), GROUPS * math.ceil(4096 * width / GROUPS)
    features = nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(channels, c1, 11, padding=5), act1=act(), pool1=nn.MaxPool2d(3, 2, 1),
            conv2=nn.Conv2d(c1, c2, 5, padding=2), act2=act(), pool2=nn.MaxPool2d(3, 2, 1),
            conv3=nn.Conv2d(c2, c2, 3, padding=1), act3=act(),
            conv4=nn.Conv2d(c2, c2, 3, padding=1), act4=act(),
            pad5=nn.ZeroPad2d((2, 3, 2, 3)), conv5=nn.Conv2d(c2, c3, 6), act5=act(), pool3=nn.MaxPool2d(2),
            pad6=nn.ZeroPad2d((2, 3, 2, 3)), conv6=nn.Conv2d(c3, c3, 6, groups=GROUPS), act6=act(),
            pool4=nn.MaxPool2d(2),
        )
    )  # fmt: skip
    end = [("drop", nn.Dropout(dropout)), ("fc2", nn.Linear(c3, num_classes))]
    if gap:
        head = [("fc1", nn.Conv2d(c3, c3, 1)), ("act", act()), ("gap", nn.AdaptiveAvgPool2d(1)), ("flat", nn.Flatten())]
    else:
        head = [("flat", nn.Flatten()), ("fc1", nn.Linear(c3 * (image // 16) ** 2, c3)), ("act", act())]
    net = nn.Sequential(OrderedDict([("features", features), *head, *end]))
    for part in net.modules():
        if isinstance(part, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            nn.init.constant_(part.bias, BIAS)
    return net
