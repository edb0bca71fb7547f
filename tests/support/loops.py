"""A small network with what training loops meet, its plans, and a rank's tensors against one device's."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from planner.api import plan_model
from planner.plan import Plan
from runtime.data import own_samples
from runtime.module import ParallelModule

BATCH = 8
CLASSES = 5


class Net(nn.Module):
    """Convolutions (one grouped), batch norm, a skip connection, linear layers; odd sizes give uneven pieces."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 7, 3, padding=1)
        self.bn = nn.BatchNorm2d(7)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(7, 7, 3, padding=1, bias=False)
        self.conv3 = nn.Conv2d(7, 8, 3, padding=1)
        self.conv4 = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.drop = nn.Dropout(dropout)
        self.fc1 = nn.Linear(8 * 3 * 3, 11)
        self.fc2 = nn.Linear(11, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.bn(self.conv1(x)))
        x = x + self.conv2(x)
        x = functional.max_pool2d(functional.relu(self.conv4(self.conv3(x))), 2)
        return self.fc2(functional.relu(self.fc1(self.drop(x).flatten(1))))


def build() -> Net:
    """Return the network with fixed weights in float64."""
    torch.manual_seed(0)
    return Net().double()


def images(count: int = BATCH) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a batch with its classes."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, 3, 6, 6, generator=generator, dtype=torch.float64), torch.arange(count) % CLASSES


def planned(solver: str = "data", devices: int = 2, build_net: Callable[[], nn.Module] = build, **options: Any) -> Plan:
    """Return a plan of the network that uses all devices."""
    x = images()[0].to(next(build_net().parameters()).dtype)
    return plan_model(build_net(), (x,), devices=devices, solver=solver, all_devices=True, **options)


def loss_of(net: nn.Module, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the loss of a batch."""
    return functional.cross_entropy(net(x), target)


def own(net: ParallelModule, position: int, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """Return the samples of a rank."""
    part = own_samples(net.plan, net.plan.mesh.ranks[position], len(tensors[0]))
    return [t[part] for t in tensors]


def piece(net: ParallelModule, name: str, whole: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a whole parameter, buffer or gradient."""
    region = net.held[name].region
    return whole[tuple(slice(a, b) for a, b in zip(region.start, region.stop, strict=True))]


def gradient(model: nn.Module, name: str) -> torch.Tensor:
    """Return the gradient of a parameter, to write into."""
    found = model.get_parameter(name).grad
    assert found is not None
    return found


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return copies of all gradients."""
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_pieces(
    net: ParallelModule,
    found: Mapping[str, torch.Tensor],
    expected: Mapping[str, torch.Tensor],
    tolerance: float = 1e-9,
) -> None:
    """Check that a rank's tensors are its parts of whole ones."""
    assert set(found) == set(expected)
    for name, tensor in found.items():
        want = piece(net, name, expected[name])
        floor = tolerance * max(float(want.abs().max()) if want.numel() else 0.0, 1e-3)
        torch.testing.assert_close(tensor, want, rtol=tolerance, atol=floor, msg=(name + ": {}").format)


def assert_equal(net: ParallelModule, model: nn.Module, tolerance: float = 1e-9) -> None:
    """Check that a rank's parameters, gradients and buffers are its parts of those of one device."""
    assert_pieces(net, gradients(net), gradients(model), tolerance)
    mine = {n: t.detach() for n, t in net.state_dict().items()}
    assert_pieces(net, mine, {n: t.detach() for n, t in model.state_dict().items()}, tolerance)
