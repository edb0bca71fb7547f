"""Residual networks [ResNet16] for ImageNet and CIFAR; module names as in torchvision."""

import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut."""

    expansion: ClassVar[int] = 1

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = _shortcut(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, channels, H / stride, W / stride)."""
        out = functional.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        shortcut = x if self.downsample is None else self.downsample(x)
        return functional.relu(out + shortcut)


class Bottleneck(nn.Module):
    """A 3x3 convolution between two 1x1 ones, around a shortcut.

    **Deviations**: the 3x3 convolution strides, as in torchvision, not the first 1x1.
    """

    expansion: ClassVar[int] = 4

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        out_channels = channels * self.expansion
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample = _shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, 4 channels, H / stride, W / stride)."""
        out = functional.relu(self.bn1(self.conv1(x)))
        out = functional.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        shortcut = x if self.downsample is None else self.downsample(x)
        return functional.relu(out + shortcut)


def imagenet_resnet(
    block: type[BasicBlock | Bottleneck],
    depths: Sequence[int],
    width: float = 1.0,
    num_classes: int = 1000,
) -> nn.Sequential:
    """Return a ResNet for images of (N, 3, 224, 224) [ResNet16, Table 1].

    Args:
        block: kind of residual block.
        depths: blocks in each of the stages; the first has 64 channels, each later one twice more.
        width: factor on all channel counts.
        num_classes: size of the output.
    """
    stem_channels = math.ceil(width * 64)
    stem = OrderedDict[str, nn.Module](
        conv1=nn.Conv2d(3, stem_channels, kernel_size=7, stride=2, padding=3, bias=False),
        bn1=nn.BatchNorm2d(stem_channels),
        relu=nn.ReLU(),
        maxpool=nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
    )
    return _resnet(stem, stem_channels, block, depths, num_classes)


def cifar_resnet(depth: int, width: float = 1.0, num_classes: int = 10) -> nn.Sequential:
    """Return a ResNet for images of (N, 3, 32, 32) [ResNet16, Sec. 4.2].

    **Deviations**: the two shortcuts that change the size are projections with batch norm (option
    B), where the paper's networks pad with zeros (option A), so that every operator is an ordinary
    layer. That is 2,752 parameters more: 272,474 in ResNet-20, 855,770 in ResNet-56, 1,730,714 in
    ResNet-110.

    Args:
        depth: layers with weights on the main path, 6 n + 2.
        width: factor on all channel counts.
        num_classes: size of the output.
    """
    stem_channels = math.ceil(width * 16)
    stem = OrderedDict[str, nn.Module](
        conv1=nn.Conv2d(3, stem_channels, kernel_size=3, padding=1, bias=False),
        bn1=nn.BatchNorm2d(stem_channels),
        relu=nn.ReLU(),
    )
    return _resnet(stem, stem_channels, BasicBlock, 3 * [(depth - 2) // 6], num_classes)


def _resnet(
    stem: OrderedDict[str, nn.Module],
    stem_channels: int,
    block: type[BasicBlock | Bottleneck],
    depths: Sequence[int],
    num_classes: int,
) -> nn.Sequential:
    """Return stem, stages of doubling channels and halving size, global average and classifier."""
    model = nn.Sequential(stem)
    in_channels = stem_channels
    for stage, depth in enumerate(depths):
        channels, stride = stem_channels * 2**stage, 1 if stage == 0 else 2
        blocks = _blocks(block, in_channels, channels, stride, depth)
        model.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        in_channels = channels * block.expansion
    model.add_module("avgpool", nn.AdaptiveAvgPool2d(1))
    model.add_module("flatten", nn.Flatten())
    model.add_module("fc", nn.Linear(in_channels, num_classes))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


def _blocks(
    block: type[BasicBlock | Bottleneck], in_channels: int, channels: int, stride: int, depth: int
) -> Iterator[nn.Module]:
    """Yield the blocks of one stage; the first one changes channels and size."""
    yield block(in_channels, channels, stride)
    for _ in range(depth - 1):
        yield block(channels * block.expansion, channels, stride=1)


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    """Return the projection of a shortcut, or None where the identity fits."""
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))
