"""Stages of a plan, one behind the other, equal one device: outputs, every gradient, buffers, in float64."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional

from planner.models.resnet import cifar_resnet
from planner.models.unet import unet
from runtime.pipeline.build import output_regions
from support.equality import relative
from support.pipelines import Stages, staged_plan

BATCH, CLASSES = 4, 10
TOLERANCE = 1e-9
NOISE = 1e-5
"""Of the largest gradient: what is smaller is zero in theory (a bias in front of a batch norm)."""


class Dense(nn.Module):
    """Concatenations that read all earlier tensors, as a DenseNet has them, and a pooled gate."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(4 + 4 * i, 4, 3, padding=1) for i in range(4))
        self.norm = nn.BatchNorm2d(20)
        self.head = nn.Linear(20, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = [self.stem(x)]
        for conv in self.convs:
            found.append(conv(torch.cat(found, 1)).relu())
        y = self.norm(torch.cat(found, 1))
        y = y * y.mean((2, 3), keepdim=True).sigmoid()
        out: torch.Tensor = self.head(y.mean((2, 3)))
        return out


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet8": (lambda: cifar_resnet(8, width=0.5), (3, 8, 8)),
    "unet": (lambda: unet(width=0.0625, num_classes=CLASSES), (1, 16, 16)),
    "dense": (Dense, (3, 6, 6)),
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return NETS[name][0]().double()


def loss_of(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(output.flatten(2).mean(2) if output.dim() > 2 else output, target)


@pytest.mark.parametrize(
    ("name", "meshes"),
    [
        ("resnet8", [(2,), (1,)]),
        ("resnet8", [(1,), (2,), (2,)]),
        ("unet", [(1,), (2,), (1,)]),
        ("unet", [(2, 2), (2,)]),
        ("dense", [(1,), (1,), (2,)]),
        ("dense", [(3,), (2,)]),
    ],
)
@pytest.mark.parametrize("seed", range(2))
def test_stages_one_behind_the_other_equal_one_device(name: str, meshes: list[tuple[int, ...]], seed: int) -> None:
    shape = NETS[name][1]
    stages = Stages(lambda: build(name), staged_plan(build(name), shape, BATCH, 1, len(meshes), meshes, seed=seed))
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(BATCH, *shape, generator=generator, dtype=torch.float64)
    target = torch.randint(0, CLASSES, (BATCH,), generator=generator)
    whole = build(name)
    expected = whole(x)
    loss_of(expected, target).backward()

    outputs = stages.forward(x)
    last = stages.parts[-1]

    def finish(position: int) -> None:
        (region,) = output_regions(last, last.plan.mesh.ranks[position], BATCH)
        rows = slice(region.start[0], region.stop[0])
        assert relative(outputs[position].detach(), expected[rows].detach(), 1.0) < TOLERANCE
        loss_of(outputs[position], target[rows]).backward()

    stages.backward(BATCH, finish)
    wanted = {**{n: p.grad for n, p in whole.named_parameters()}, **dict(whole.named_buffers())}
    scale = max(float(p.grad.abs().max()) for p in whole.parameters() if p.grad is not None)
    seen = set()
    for module in (m for modules in stages.modules for m in modules):
        found = {**{n: p.grad for n, p in module.named_parameters()}, **dict(module.named_buffers())}
        for tensor in wanted.keys() & found.keys():
            mine, all_of_it, region = found[tensor], wanted[tensor], module.held[tensor].region
            assert mine is not None
            assert all_of_it is not None
            own = all_of_it[tuple(slice(a, b) for a, b in zip(region.start, region.stop, strict=True))]
            floor = NOISE * scale if tensor in dict(whole.named_parameters()) else 1.0
            assert relative(mine, own, floor) < TOLERANCE, tensor
            seen.add(tensor)
    assert seen == set(whole.state_dict())


class Tied(nn.Module):
    """Two convolutions of a later stage with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.two.weight = self.one.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.two(self.one(self.stem(x)))
        return out


def test_every_name_of_a_tied_weight_is_in_its_stage_only() -> None:
    stages = Stages(Tied, staged_plan(Tied(), (4, 6, 6), 2, 1, ["one"], [(1,), (1,)], seed=None))
    names = [sorted(module.state_dict()) for (module,) in stages.modules]
    assert names == [["stem.bias", "stem.weight"], ["one.bias", "one.weight", "two.bias", "two.weight"]]
