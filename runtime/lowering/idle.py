"""A layer that this rank has no part in: other ranks run it."""

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import nn

from planner.ir import ops as ir
from planner.ir.graph import Layer
from runtime.comm.exchange import refuse_second_derivative
from runtime.state import StepState
from runtime.types import Casting

COUNTER: Final = "num_batches_tracked"
"""The buffer of a batch norm that counts forward passes in training, on every rank."""


class Idle(nn.Module):
    """Stands for a layer on a rank that is idle meanwhile: makes the rank's part of the result, which is empty.

    The part carries a gradient wherever the layer's result does on the ranks that run it, because backward passes too
    exchange gradients among all ranks of a group.

    Args:
        shape: of the part.
        layer: the layer.
        num_inputs: that it reads.
        num_parameters: of the layer, of which this rank has empty parts; they stand behind the inputs.
        counters: names of the layer's buffers that count passes in training; they stand behind the parameters.
        casting: what autocast does to the model's tensors: messages have the type in which the result is computed.
        state: of the step; knows the type of the parameters.
    """

    def __init__(
        self, shape: tuple[int, ...], layer: Layer, num_inputs: int, num_parameters: int,
        counters: Sequence[str], casting: Casting, state: StepState,
    ) -> None:  # fmt: skip
        super().__init__()
        self._shape, self._count, self._num_parameters = shape, num_inputs, num_parameters
        self._id, self._output = layer.id, layer.output
        self._counters: tuple[str, ...] = tuple(counters)
        self._counting: tuple[nn.Module, ...] = ()
        self._casting, self._state = casting, state
        operators = [layer.op, *(part.op for part in layer.absorbed)]
        self._ends_gradient = any(isinstance(op, ir.Elementwise) and op.function == "detach" for op in operators)

    def count_in(self, model: nn.Module) -> None:
        """Count passes only where what has the counter is in training itself: a batch norm may be frozen."""
        self._counting = tuple(model.get_submodule(name.rpartition(".")[0]) for name in self._counters)

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        behind = self._count + self._num_parameters
        for owner, counter in zip(self._counting, tensors[behind:], strict=False):  # evaluation has no owners
            if owner.training:
                counter.add_(1)
        types = self._casting.types(tensors[0].device.type, self._state.dtype)
        dtype = types.of(self._id, self._output)
        if self._ends_gradient or not dtype.is_floating_point:
            return torch.empty(self._shape, dtype=dtype, device=tensors[0].device)
        found: torch.Tensor = _Nothing.apply(self._shape, dtype, *tensors[:behind])
        return found

    def extra_repr(self) -> str:
        return "run by other ranks"


class _Nothing(torch.autograd.Function):
    """Makes an empty tensor from empty inputs and parameters; backward gives each an empty gradient.

    Parameters too: an optimizer then keeps as much of them on every rank, such as the number of steps.
    """

    @staticmethod
    def forward(ctx: Any, shape: tuple[int, ...], dtype: torch.dtype, *tensors: torch.Tensor) -> torch.Tensor:
        ctx.gradients = [torch.zeros_like(x) if x.is_floating_point() else None for x in tensors]
        return tensors[0].new_empty(shape, dtype=dtype)

    @staticmethod
    def backward(ctx: Any, *_gradients: torch.Tensor) -> Any:
        refuse_second_derivative()
        return None, None, *ctx.gradients
