"""A small network in stages and its training in cycles, on one process or on gloo."""

import contextlib
import gc
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, Optimizer

from support.stale_oracle import DECAY, LR, MOMENTUM

BATCH, CLASSES = 6, 5


def net(num_stages: int) -> list[nn.Sequential]:
    """Return the stages of a network with every kind of layer, with fixed weights in float64."""
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(6 * 4, 9), nn.ReLU(), nn.Linear(9, CLASSES),
    ]  # fmt: skip
    cuts: list[int] = {1: [], 2: [6], 3: [3, 8], 4: [2, 4, 10]}[num_stages]
    bounds = [0, *cuts, len(layers)]
    return [nn.Sequential(*layers[a:b]).double() for a, b in pairwise(bounds)]


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    """Return batches of images and classes."""
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(BATCH, 2, 8, 8, generator=generator, dtype=torch.float64),
            torch.randint(CLASSES, (BATCH,), generator=generator),
        )
        for _ in range(count)
    ]


def live_bytes() -> int:
    """Return the bytes of all tensors in memory; those without any, which tracing leaves behind, do not count."""
    gc.collect()
    total = 0
    for found in gc.get_objects():
        if type(found) is Tensor or type(found) is nn.Parameter:
            with contextlib.suppress(RuntimeError):  # its sizes are symbols
                total += found.nbytes if found.device.type != "meta" else 0
    return total


def sgd(module: nn.Module) -> SGD | None:
    parameters = list(module.parameters())
    return SGD(parameters, LR, MOMENTUM, weight_decay=DECAY) if parameters else None


def loss_fn(output: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(output, target)


class Log:
    """The weights of a stage after each of its updates."""

    def __init__(self, module: nn.Module, optimizer: Optimizer | None) -> None:
        self.weights: list[list[Tensor]] = []
        if optimizer is not None:
            optimizer.register_step_post_hook(
                lambda *_: self.weights.append([p.detach().clone() for p in module.parameters()])
            )


def running(stage: nn.Module) -> list[Tensor]:
    """Return running means and variances, in order."""
    return [b for n, b in stage.named_buffers() if "running" in n]


def furthest(found: Sequence[Sequence[Tensor]], expected: Sequence[Sequence[Tensor]]) -> float:
    """Return the largest difference of any weight after any update; infinite where their numbers differ."""
    if len(found) != len(expected):
        return float("inf")
    return max((float((a - b).abs().max()) for a, b in pairs(found, expected)), default=0.0)


def pairs(found: Sequence[Sequence[Tensor]], expected: Sequence[Sequence[Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    for mine, theirs in zip(found, expected, strict=True):
        yield from zip(mine, theirs, strict=True)
