"""AlexNet and VGG-16 for images of 32 x 32, of the sizes that Zhang & Abdelrahman 2021 print in table 9."""

from collections.abc import Iterator

from torch import nn

from planner.models.vgg import vgg

SHAPE = (3, 32, 32)


def alexnet() -> nn.Sequential:
    """Return AlexNet with convolutions of 3 x 3 and two hidden layers of 4096: 23.3 million parameters (88.87 MiB)."""
    layers: list[nn.Module] = []
    for before, after, stride, pooled in (
        (3, 64, 2, True), (64, 192, 1, True), (192, 384, 1, False), (384, 256, 1, False), (256, 256, 1, True),
    ):  # fmt: skip
        layers += [nn.Conv2d(before, after, 3, stride, 1), nn.ReLU()] + [nn.MaxPool2d(2)] * pooled
    net = nn.Sequential(*layers, nn.Flatten(), *_fully_connected(256 * 2 * 2, 4096, 4096, 10))
    net.input_shape = SHAPE  # type: ignore[assignment]  # read by load_model
    return net


def vgg16() -> nn.Sequential:
    """Return VGG-16 with two hidden layers of 512 features: 15.2 million parameters (58.16 MiB)."""
    net = nn.Sequential(vgg("d").features, nn.Flatten(), *_fully_connected(512, 512, 512, 10))
    net.input_shape = SHAPE  # type: ignore[assignment]  # read by load_model
    return net


def _fully_connected(*features: int) -> Iterator[nn.Module]:
    for i in range(len(features) - 1):
        yield nn.Linear(features[i], features[i + 1])
        if i < len(features) - 2:
            yield nn.ReLU()
