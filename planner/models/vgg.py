"""VGG [VGG15, Table 1], with and without batch norm; module names as in torchvision."""

import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Final

from torch import nn

_CHANNELS: Final = (64, 128, 256, 512, 512)
_KERNELS: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {  # per block, one digit a convolution
        "a": ("3", "3", "33", "33", "33"),
        "b": ("33", "33", "33", "33", "33"),
        "c": ("33", "33", "331", "331", "331"),
        "d": ("33", "33", "333", "333", "333"),
        "e": ("33", "33", "3333", "3333", "3333"),
    }
)


def vgg(
    configuration: str,
    batch_norm: bool = False,
    hidden: int = 4096,
    width: float = 1.0,
    num_classes: int = 1000,
    dropout: float = 0.5,
) -> nn.Sequential:
    """Return a VGG for images of (N, 3, 224, 224).

    Args:
        configuration: column of [VGG15, Table 1], ``a`` to ``e``; VGG-16 is ``d``.
        batch_norm: a batch norm behind every convolution.
        hidden: features of the two hidden linear layers.
        width: factor on channels and hidden features.
        num_classes: size of the output.
        dropout: probability behind the hidden linear layers.
    """
    hidden = math.ceil(width * hidden)
    classifier = nn.Sequential(
        nn.Linear(math.ceil(width * _CHANNELS[-1]) * 7 * 7, hidden),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(hidden, num_classes),
    )
    model = nn.Sequential(
        OrderedDict(
            features=nn.Sequential(*_features(_KERNELS[configuration], batch_norm, width)),
            avgpool=nn.AdaptiveAvgPool2d(7),
            flatten=nn.Flatten(),
            classifier=classifier,
        )
    )
    model.apply(_initialise)
    return model


def _features(kernels: tuple[str, ...], batch_norm: bool, width: float) -> Iterator[nn.Module]:
    """Yield the modules of the five blocks, a max pool at the end of each."""
    in_channels = 3
    for channels, block in zip(_CHANNELS, kernels, strict=True):
        out_channels = math.ceil(width * channels)
        for kernel in map(int, block):
            yield nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2)
            if batch_norm:
                yield nn.BatchNorm2d(out_channels)
            yield nn.ReLU()
            in_channels = out_channels
        yield nn.MaxPool2d(2)


def _initialise(module: nn.Module) -> None:
    """Draw the weights as torchvision does; torch's defaults are too small to train 16 layers."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.01)
    if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
