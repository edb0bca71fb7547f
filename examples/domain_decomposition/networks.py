"""The CNN of the example, for images and volumes of any size.

Its channels grow with the square root of the number of pixels, so its parameters are proportional to them: a local
network on a quarter of the image has a quarter of the global one's parameters, as in the papers.
"""

import math

from torch import nn

CLASSES = 10
WIDTHS = {3: (32, 32 * 32), 4: (12, 16 * 16 * 16)}
"""Channels of the first block of an image and of a volume (by the length of the shape) of so many pixels."""
BLOCKS = 3


def small_cnn(shape: tuple[int, ...], classes: int = CLASSES) -> nn.Sequential:
    """Return three blocks of a convolution, batch norm, ReLU and a pool, then global average pool and a linear layer.

    Args:
        shape: of one sample, channels first; two or three dimensions of space.
        classes: K.
    """
    channels, pixels = WIDTHS[len(shape)]
    width = max(round(channels * math.sqrt(math.prod(shape[1:]) / pixels)), 4)
    conv, norm, pool, average = (
        (nn.Conv3d, nn.BatchNorm3d, nn.MaxPool3d, nn.AdaptiveAvgPool3d)
        if len(shape) == 4
        else (nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d)
    )
    layers, channels, side = [], shape[0], min(shape[1:])
    for block in range(BLOCKS):
        outputs = width * 2**block
        layers += [conv(channels, outputs, 3, padding=1, bias=False), norm(outputs), nn.ReLU()]
        if side >= 2:
            layers.append(pool(2))
            side //= 2
        channels = outputs
    return nn.Sequential(*layers, average(1), nn.Flatten(), nn.Linear(channels, classes))
