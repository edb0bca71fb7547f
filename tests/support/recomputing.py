"""Small networks whose layers look around, cut in space, for halos that are recomputed."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from planner.ir.recompute import all_recomputing
from planner.ir.split import LayerId
from planner.plan import Plan
from runtime.comm.communicator import Axes, ThreadCommunicator, ThreadWorld
from support.halos import Case, planner_for, spatial_plan


def _convs(*sizes: int, **options: Any) -> Callable[[], nn.Module]:
    """Return a network of convolutions with these kernels, one behind the other."""
    options = {"padding": "same"} | options

    def build() -> nn.Module:
        layers: list[nn.Module] = []
        for k, size in enumerate(sizes):
            layers += [nn.Conv2d(2 if k == 0 else 3, 3, size, **options), nn.Tanh()]
        return nn.Sequential(*layers)

    return build


class Residual(nn.Module):
    """Blocks whose both ways meet again; the second makes its image smaller on both."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.inner = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 5, padding=2))
        self.down = nn.Sequential(nn.Conv2d(4, 4, 3, stride=2, padding=1), nn.Sigmoid(), nn.Conv2d(4, 4, 3, padding=1))
        self.skip = nn.Conv2d(4, 4, 1, stride=2)
        self.head = nn.Conv2d(4, 2, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.stem(x))
        x = functional.relu(x + self.inner(x))
        return self.head(self.down(x) + self.skip(x))


class Hourglass(nn.Module):
    """A U-Net in small: what is made smaller comes back beside what was kept."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Conv2d(2, 3, 3, padding=1)
        self.inside = nn.Conv2d(3, 4, 3, padding=1)
        self.up = nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1, output_padding=1)
        self.behind = nn.Conv2d(6, 2, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = torch.tanh(self.before(x))
        inside = torch.tanh(self.inside(functional.avg_pool2d(kept, 2)))
        return self.behind(torch.cat([kept, self.up(inside)], 1))


class Leaving(nn.Module):
    """A tensor inside the run is an output of the network too, and one branch leaves it for all of space."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 3, 3, padding=1)
        self.second = nn.Conv2d(3, 3, 3, padding=1)
        self.third = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = torch.tanh(self.first(x))
        second = torch.tanh(self.second(first))
        gate = second.mean((2, 3), keepdim=True)
        return self.third(second) * gate + first


class OtherInEvaluation(nn.Module):
    """Another graph in evaluation, on the same layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 3, 3, padding=1)
        self.second = nn.Conv2d(3, 3, 3, padding=1)
        self.third = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(torch.tanh(self.first(x)))
        return self.third(torch.tanh(x)) if self.training else functional.max_pool2d(self.third(x), 3, 1, 1)


def _pooled() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(3, 3, 3, padding=2, dilation=2),
        nn.AvgPool2d(3, 1, 1, count_include_pad=False), nn.Conv2d(3, 4, 5, stride=2, padding=2, groups=1), nn.Tanh(),
    )  # fmt: skip


def _resized() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.PixelShuffle(2), nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(),
        nn.Upsample(scale_factor=1.5, mode="bilinear"), nn.Conv2d(3, 2, 3, padding=1), nn.PReLU(),
        nn.AdaptiveAvgPool2d((7, 5)), nn.Conv2d(2, 2, 3, padding=1),
    )  # fmt: skip


def _with_norm() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1), nn.Dropout2d(0.0), nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4),
        nn.Conv2d(4, 2, 3, padding=1),
    )  # fmt: skip


def _of_dims(dims: int) -> Callable[[], nn.Module]:
    conv: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    pool: Any = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[dims - 1]
    return lambda: nn.Sequential(conv(2, 3, 3, padding=1), nn.Tanh(), pool(2), conv(3, 3, 3, padding=1), nn.ReLU(),
                                 conv(3, 2, 3))  # fmt: skip


CASES: dict[str, Case] = {
    "two ranks": Case((2, 2, 9, 7), "gpu=2", ("height",), network=_convs(3, 3, 3)),
    "margins reach past the neighbour": Case((2, 2, 11, 5), "gpu=4", ("height",), network=_convs(3, 5, 3, 5)),
    "corners": Case((2, 2, 9, 11), "gpu=2x2", ("height", "width"), network=_convs(3, 3, 3)),
    "both axes cut the height": Case((1, 2, 13, 6), "gpu=2x2", ("height", "height"), network=_convs(3, 3, 3)),
    "strides, pools, dilation": Case((2, 2, 37, 9), "gpu=3", ("height",), network=_pooled),
    "strides, pools, corners": Case((1, 2, 38, 33), "gpu=2x2", ("height", "width"), network=_pooled),
    "no padding": Case((2, 2, 23, 12), "gpu=3", ("height",), network=_convs(3, 5, 3, padding=0)),
    "padding on one side more": Case((1, 2, 15, 8), "gpu=2", ("height",), network=_convs(4, 2, 4)),
    "reflected": Case(
        (2, 2, 13, 9), "gpu=2x2", ("height", "width"), network=_convs(3, 5, 3, padding_mode="reflect"),
    ),
    "replicated": Case((2, 2, 13, 9), "gpu=3", ("height",), network=_convs(3, 5, 3, padding_mode="replicate")),
    "circular": Case((2, 2, 13, 9), "gpu=3", ("height",), network=_convs(3, 5, 3, padding_mode="circular")),
    "residual": Case((2, 2, 22, 9), "gpu=3", ("height",), network=Residual),
    "residual, corners": Case((1, 2, 14, 18), "gpu=2x2", ("height", "width"), network=Residual),
    "hourglass": Case((2, 2, 20, 8), "gpu=3", ("height",), network=Hourglass),
    "resized": Case((1, 2, 13, 8), "gpu=2", ("height",), network=_resized),
    "another graph in evaluation": Case((2, 2, 13, 8), "gpu=3", ("height",), network=OtherInEvaluation),
    "leaving": Case((2, 2, 13, 8), "gpu=3", ("height",), network=Leaving),
    "norms end runs": Case((2, 2, 17, 6), "gpu=3", ("height",), network=_with_norm, tolerance=1e-9),
    "samples beside rows": Case((4, 2, 11, 6), "gpu=2x2", ("sample", "height"), network=_convs(3, 3, 3)),
    "channels beside rows": Case((2, 2, 11, 6), "gpu=2x2", ("out_channel", "height"), network=_convs(3, 3, 3)),
    "input channels beside rows": Case((2, 2, 11, 6), "gpu=2x2", ("in_channel", "height"), network=_convs(3, 3, 3)),
    "rows of one dimension": Case((2, 2, 29), "gpu=4", ("length",), network=_of_dims(1)),
    "volumes": Case((1, 2, 14, 15, 13), "gpu=2x2", ("depth", "height"), network=_of_dims(3)),
}  # fmt: skip


def plans(case: Case, count: int) -> list[Plan]:
    """Return the plan with halos recomputed wherever that can be, and some in which a part of these layers does."""
    planner = planner_for(case)
    plain = spatial_plan(planner, case.cut, overlapped=False)
    every = all_recomputing(planner.traced.layers, plain.mesh, plain.strategy)
    rng = np.random.default_rng(0)
    some = [frozenset(layer for layer in sorted(every) if rng.random() < 0.5) for _ in range(count)]
    return [plain.with_recomputing(layers) for layers in (every, *some)]


def recomputing(plan: Plan) -> frozenset[LayerId]:
    """Return the layers of a plan that recompute."""
    return plan.only_stage.recomputing()


class Counting(ThreadCommunicator):
    """Counts exchanges of all ranks."""

    count = 0

    def __init__(self, world: ThreadWorld, position: int) -> None:
        super().__init__(world, position)

    def exchange(
        self, buffer: torch.Tensor, send_counts: Sequence[int], receive_counts: Sequence[int], axes: Axes
    ) -> torch.Tensor:
        Counting.count += 1
        return super().exchange(buffer, send_counts, receive_counts, axes)
