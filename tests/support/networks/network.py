"""What a network of the collection is: how to build it, and the sizes of one sample of each input."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

CLASSES = 5
"""Of every classifier here."""


@dataclass(frozen=True)
class Input:
    """One sample of an input: its sizes behind the batch, and for class numbers how many there are."""

    shape: tuple[int, ...] = ()
    num_classes: int = 0

    def sample(self, batch: int, generator: torch.Generator) -> torch.Tensor:
        """Return a random batch."""
        sizes = (batch, *self.shape)
        if self.num_classes:
            return torch.randint(0, self.num_classes, sizes, generator=generator)
        return torch.randn(sizes, generator=generator)


@dataclass(frozen=True)
class Network:
    """A network and what it takes.

    Attributes:
        build: returns the module; seed torch before to get fixed weights.
        inputs: its positional inputs.
        keywords: its inputs by name.
        batches: the batch size to trace with, and another one that the traced graph must take too.
    """

    build: Callable[[], nn.Module]
    inputs: tuple[Input, ...]
    keywords: Mapping[str, Input] = field(default_factory=dict)
    batches: tuple[int, int] = (4, 3)

    def module(self, *, training: bool = True) -> nn.Module:
        """Return the module with fixed weights; for evaluation with buffers that have seen a batch."""
        torch.manual_seed(0)
        module = self.build()
        if not training:
            arguments, keywords = self.example(self.batches[0], seed=2)
            with torch.no_grad():
                module(*arguments, **keywords)
        return module.train(training)

    def example(self, batch: int, seed: int = 1) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
        """Return a random batch: the positional inputs and those by name."""
        generator = torch.Generator().manual_seed(seed)
        arguments = tuple(x.sample(batch, generator) for x in self.inputs)
        return arguments, {name: x.sample(batch, generator) for name, x in self.keywords.items()}


def image(build: Callable[[], nn.Module], *shape: int) -> Network:
    """Return a network that takes one image, of 3 x 16 x 16 if nothing is said."""
    return Network(build, (Input(shape or (3, 16, 16)),))


def block(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    """Return convolution, batch norm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


def classifier(channels: int) -> nn.Sequential:
    """Return global pooling and a linear layer."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES))
