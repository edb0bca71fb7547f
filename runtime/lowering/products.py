"""Convolutions, transposed convolutions and linear layers on this rank's pieces of weight and bias."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from planner.ir import ops as ir
from runtime.comm.exchange import ScaleGradients

_CONVOLUTIONS: Any = (functional.conv1d, functional.conv2d, functional.conv3d)
_TRANSPOSED: Any = (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d)


def padded(
    x: torch.Tensor, margins: Sequence[tuple[int, int]], value: float = 0.0, mode: str = "constant"
) -> torch.Tensor:
    """Return a tensor with positions added or left out around its last dimensions."""
    widths = [width for pair in reversed(margins) for width in pair]
    return functional.pad(x, widths, mode, value if mode == "constant" else None) if any(widths) else x


@dataclass(frozen=True)
class ProductCall:
    """A convolution, transposed convolution or linear layer with the groups of this rank's piece."""

    op: ir.Conv | ir.ConvTranspose | ir.Linear
    groups: int

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        op = self.op
        if isinstance(op, ir.Linear):
            return functional.linear(x, weight, bias)
        found: torch.Tensor
        at = len(op.kernel) - 1
        if isinstance(op, ir.ConvTranspose):
            found = _TRANSPOSED[at](
                x, weight, bias, op.stride, op.padding, op.output_padding, self.groups, op.dilation
            )  # fmt: skip
        elif op.padding_mode == "zeros" and op.padding_after is None:
            found = _CONVOLUTIONS[at](x, weight, bias, op.stride, op.padding, op.dilation, self.groups)
        else:
            found = _CONVOLUTIONS[at](self._padded(op, x), weight, bias, op.stride, 0, op.dilation, self.groups)
        return found

    @staticmethod
    def _padded(op: ir.Conv, x: torch.Tensor) -> torch.Tensor:
        after = op.padding if op.padding_after is None else op.padding_after
        mode = "constant" if op.padding_mode == "zeros" else op.padding_mode
        return padded(x, list(zip(op.padding, after, strict=True)), mode=mode)

    def __str__(self) -> str:
        return f"{self.op.kind} of {self.groups} groups" if self.groups > 1 else self.op.kind


class Product(nn.Module):
    """A convolution, transposed convolution or linear layer on local parameters.

    ``weight`` and ``bias`` carry the names of the module that it replaces.

    Args:
        call: the operator, from input, weight and bias.
        weight, bias: local pieces.
        adds_bias: false where the result is a partial sum; then ``Bias`` adds it once it is resolved.
        gradient_factors: by which the gradients of weight and bias are multiplied.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        call: Callable[..., torch.Tensor],
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        adds_bias: bool,
        gradient_factors: tuple[float, float],
    ) -> None:
        super().__init__()
        self.weight = weight
        self.register_parameter("bias", bias)
        self._adds_bias = adds_bias
        self._factors = gradient_factors
        self._calls = [call]

    def with_call(self, call: Callable[..., torch.Tensor]) -> int:
        """Add the operator on an input of other sizes; return which one ``forward`` is to be asked for."""
        self._calls.append(call)
        return len(self._calls) - 1

    def forward(self, x: torch.Tensor, call: int = 0) -> torch.Tensor:
        bias = self.bias if self._adds_bias else None
        return self._calls[call](x, *both_scaled(self.weight, bias, self._factors))

    def bias_and_factor(self) -> tuple[torch.Tensor | None, float]:
        """Return the bias and the factor of its gradient."""
        return self.bias, self._factors[1]

    def extra_repr(self) -> str:
        return f"{self._calls[0]}, local weight {tuple(self.weight.shape)}"


class OfArguments(nn.Module):
    """An operator whose parameters are arguments, as the user's own code passes them."""

    def __init__(self, call: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self._call = call

    def forward(self, *args: Any) -> torch.Tensor:
        return self._call(*args)

    def extra_repr(self) -> str:
        return str(self._call)


def scaled(parameter: torch.Tensor | None, factor: float) -> Any:
    """Return a parameter whose gradient is multiplied by a factor."""
    return parameter if parameter is None or factor == 1.0 else ScaleGradients.apply((factor,), parameter)


def both_scaled(
    weight: torch.Tensor | None, bias: torch.Tensor | None, factors: tuple[float, float]
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return two parameters whose gradients are multiplied by factors: by one node of autograd, where that can be."""
    of_weight, of_bias = factors
    if of_weight == 1.0 and of_bias == 1.0:
        return weight, bias
    if weight is None or bias is None or not (weight.requires_grad and bias.requires_grad):
        return scaled(weight, of_weight), scaled(bias, of_bias)
    found: tuple[torch.Tensor, torch.Tensor] = ScaleGradients.apply(factors, weight, bias)
    return found


def paired(parameter: torch.Tensor | None, factor: float) -> tuple[torch.Tensor | None, float]:
    """Return a bias and its factor, as ``Product.bias_and_factor``."""
    return parameter, factor
