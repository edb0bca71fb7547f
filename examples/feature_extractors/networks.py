"""Two networks side by side on one image, without their classifiers: VGG-16 has 512 features, ResNet-152 2,048."""

import torch
from torch import nn

from planner.errors import UsageError
from planner.models.alexnet import alexnet
from planner.models.resnet import Bottleneck, imagenet_resnet
from planner.models.vgg import vgg


class SideBySide(nn.Module):
    """Two frozen networks on one image; returns their features one behind the other."""

    input_shape = (3, 96, 96)

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.first(x), self.second(x)], 1)


def _pooled(features: nn.Module) -> nn.Module:
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def _resnet152() -> nn.Module:
    network = imagenet_resnet(Bottleneck, (3, 8, 36, 3))
    network.fc = nn.Identity()
    return network


NETWORKS = {
    "alexnet": lambda: _pooled(alexnet().features),
    "vgg16": lambda: _pooled(vgg("d").features),
    "resnet152": _resnet152,
}


def build_model(first: str = "vgg16", second: str = "resnet152") -> SideBySide:
    """Return two of these with weights from a fixed seed; `layerwise plan` and every rank call it.

    Raises:
        UsageError: there is no such network.
    """
    unknown = [name for name in (first, second) if name not in NETWORKS]
    if unknown:
        raise UsageError(f"no network {unknown[0]!r} here; there are {', '.join(NETWORKS)}")
    torch.manual_seed(0)
    return SideBySide(NETWORKS[first](), NETWORKS[second]())
