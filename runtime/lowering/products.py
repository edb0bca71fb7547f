"""Convolutions, transposed convolutions and linear layers on this rank's pieces of weight and bias."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.modules.module import _has_any_global_hook as has_any_global_hook

from planner.ir import ops as ir
from runtime.comm.exchange import ScaleGradients
from runtime.comm.packing import new_like

_CONVOLUTIONS: Any = (functional.conv1d, functional.conv2d, functional.conv3d)
_TRANSPOSED: Any = (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d)


class Padding:
    """Adds positions around the last dimensions of a tensor, or leaves some out.

    Args:
        margins: of each of the last dimensions, how many positions in front and behind; negative: left out.
        value: of the new positions, in mode "constant".
        mode: of ``torch.nn.functional.pad``.
    """

    def __init__(self, margins: Sequence[tuple[int, int]], value: float = 0.0, mode: str = "constant") -> None:
        self._widths = [width for pair in reversed(margins) for width in pair]
        self._value, self._mode = value, mode
        wide = [k - len(margins) for k, pair in enumerate(margins) if any(pair)]
        self._is_any = bool(wide)
        is_joined = len(wide) == 1 and min(self._widths) == 0 and mode == "constant"
        self._sides = (wide[0], margins[wide[0]]) if is_joined else None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return the padded tensor."""
        if self._sides is not None:  # the gradient of a concatenation is a view, that of ``pad`` a copy
            dim, (before, behind) = self._sides
            parts = [self._side(x, dim, before), x] if before else [x]
            return torch.cat([*parts, self._side(x, dim, behind)] if behind else parts, dim)
        return functional.pad(x, self._widths, self._mode, self._value) if self._is_any else x

    def _side(self, x: torch.Tensor, dim: int, width: int) -> torch.Tensor:
        shape = list(x.shape)
        shape[dim] = width
        return x.new_full(shape, self._value) if x.is_contiguous() else new_like(x, shape).fill_(self._value)


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
            found = _CONVOLUTIONS[at](self._padding(x), weight, bias, op.stride, 0, op.dilation, self.groups)
        return found

    @functools.cached_property
    def _padding(self) -> Padding:
        assert isinstance(self.op, ir.Conv)
        after = self.op.padding if self.op.padding_after is None else self.op.padding_after
        mode = "constant" if self.op.padding_mode == "zeros" else self.op.padding_mode
        return Padding(list(zip(self.op.padding, after, strict=True)), mode=mode)

    def __str__(self) -> str:
        return f"{self.op.kind} of {self.groups} groups" if self.groups > 1 else self.op.kind


class Product(nn.Module):
    """A convolution, transposed convolution or linear layer on local parameters.

    ``weight`` and ``bias`` carry the names of the module that it replaces.

    Args:
        call: the operator, from input, weight and bias.
        weight, bias: local pieces.
        adds_bias: false where the result is a partial sum; then ``PartialSum`` adds it once that is resolved.
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

    def is_watched(self) -> bool:
        """Return whether hooks see the result: then nobody may write into it."""
        return bool(self._forward_hooks) or has_any_global_hook()

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
