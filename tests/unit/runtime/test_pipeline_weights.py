"""Which weights a backward pass reads, operator by operator, where they changed since its forward pass."""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from runtime.pipeline.weights import Weights


class Slices(nn.Module):
    """Reads views of a weight, and one weight twice."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight[1:3]) + (x @ self.weight[2:4].t())


class Flat(nn.Module):
    """Two weights in one piece of memory."""

    def __init__(self) -> None:
        super().__init__()
        both = torch.randn(2 * 12)
        self.first, self.second = (nn.Parameter(part.view(3, 4)) for part in both.split(12))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.first) * 2 + functional.linear(x, self.second)


def channels_last() -> nn.Module:
    return nn.Conv2d(4, 3, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub


CASES: list[tuple[Callable[[], nn.Module], tuple[int, ...]]] = [
    (lambda: nn.Linear(4, 3), (5, 4)),
    (lambda: nn.Linear(4, 3), (5, 2, 4)),
    (lambda: nn.Conv2d(4, 3, 3, padding=1), (2, 4, 5, 5)),
    (channels_last, (2, 4, 5, 5)),
    (lambda: nn.Conv1d(4, 4, 3, groups=2), (2, 4, 7)),
    (lambda: nn.ConvTranspose2d(4, 3, 2), (2, 4, 3, 3)),
    (lambda: nn.BatchNorm2d(4), (3, 4, 2, 2)),
    (lambda: nn.BatchNorm2d(4).eval(), (3, 4, 2, 2)),
    (lambda: nn.GroupNorm(2, 4), (3, 4, 5)),
    (lambda: nn.LayerNorm(4), (3, 4)),
    (lambda: nn.PReLU(4), (3, 4)),
    (Slices, (5, 4)),
    (Flat, (5, 4)),
]


def gradient(net: nn.Module, x: Tensor, autocast: bool) -> Tensor:
    """Return the gradient of the input, with the weights as they are."""
    own = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
        y = net(own)
    y.backward(cotangent(y))
    assert own.grad is not None
    return own.grad


def cotangent(y: Tensor) -> Tensor:
    return torch.linspace(-1, 1, y.numel()).cos().mul(3).sin().view(y.shape).to(y.dtype)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("stash", [False, True])
@pytest.mark.parametrize("case", range(len(CASES)))
def test_backward_reads_current_or_stashed_weights_on_stored_activations(
    case: int, stash: bool, autocast: bool
) -> None:
    """These operators are linear in the input, or their slope is: their gradients depend on no weights of forward."""
    torch.manual_seed(case)
    build, shape = CASES[case]
    net, x = build(), torch.randn(shape)
    before = gradient(net, x, autocast)
    weights = Weights(net, stash)
    own = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext(), weights.saving():
        y = net(own)
    weights.before_update()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn_like(parameter))
    y.backward(cotangent(y))
    after = gradient(net, x, autocast)
    assert own.grad is not None
    torch.testing.assert_close(own.grad, before if stash else after)
    assert float((before - after).abs().max()) > 1e-3


def test_an_activation_that_is_written_in_flight_is_an_error() -> None:
    net, x = nn.Conv2d(1, 1, 1), torch.randn(2, 1, 3, 3)
    with Weights(net, stash=False).saving():
        y = net(x)
    x.zero_()
    with pytest.raises(RuntimeError, match="Give every batch tensors of its own"):
        y.sum().backward()


def test_weights_that_are_computed_are_activations() -> None:
    net = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    x: Any = torch.randn(4, 3, requires_grad=True)
    weight = net.weight.detach().clone()
    with Weights(net, stash=False).saving():
        y = net(x)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(1)
    y.sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(4, 3))
