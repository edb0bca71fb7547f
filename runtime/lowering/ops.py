"""Modules and functions that lowering puts into a graph, beside products, norms and what is random.

Those with parameters hold their local pieces under the names of the module that they replace, so that
the parallel module's ``state_dict`` keeps the user's names.

Shapes: N samples, C channels, ... space or nothing.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from planner.frontend.proxy import write_items
from planner.ir.transfer import StepKind
from runtime.comm.communicator import Axes, Communicator
from runtime.comm.exchange import Conversion, Factors, Steps, add_up, converted, named
from runtime.comm.packing import format_of
from runtime.graphs import uncompiled
from runtime.lowering.products import Product, scaled
from runtime.state import StepState

Factor = Callable[[StepState], float]
"""Of a gradient; asked for in the backward pass."""
BiasOf = Callable[[], tuple[torch.Tensor | None, float]]
"""Returns a bias, if there is one, and the factor of its gradient."""


class Redistribution(nn.Module):
    """Turns a tensor from one layout into another, and its gradient back.

    Args:
        conversion: both layouts.
        state: of this rank.
        source_factor, target_factor: multiply the gradient of the source and of the target; functions of the state.
    """

    def __init__(
        self,
        conversion: Conversion,
        state: StepState,
        source_factor: Factor | None = None,
        target_factor: Factor | None = None,
    ) -> None:
        super().__init__()
        self._conversion, self._state = conversion, state
        self._source_factor, self._target_factor = source_factor, target_factor

    @uncompiled
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        factors = self._factors() if x.requires_grad else None
        if factors is None and self._conversion.is_trivial:
            return x
        return converted(x, self._steps(), factors)

    def _steps(self) -> Steps:
        """Return what is to be done in this pass, forward and backward."""
        conversion, state = self._conversion, self._state
        return ((), ()) if conversion.is_trivial else conversion.compiled(state.current_batch(), state.communicator)

    def _factors(self) -> Factors | None:
        """Return what will ask for the factors of this pass, in its backward pass."""
        if self._source_factor is None and self._target_factor is None:
            return None
        return functools.partial(_factors, self._source_factor, self._target_factor, self._state.of_this_pass())

    def extra_repr(self) -> str:
        return self._conversion.name


def _factors(source: Factor | None, target: Factor | None, state: StepState) -> tuple[float, float]:
    return 1.0 if source is None else source(state), 1.0 if target is None else target(state)


class PartialSum(Redistribution):
    """Resolves the partial sums of a product and adds its bias, once; holds no parameter itself.

    Where the gradient of the sum is that of every addend, as it is, the addends become the sum in their own memory, and
    autograd need not know: nobody else reads them, unless hooks do.

    Args:
        conversion: both layouts.
        state: of this rank.
        bias: returns it, and the factor of its gradient; of a product that is a module, bound to that.
        num_spatial: dimensions of space behind the channels.
    """

    def __init__(self, conversion: Conversion, state: StepState, bias: BiasOf, num_spatial: int) -> None:
        super().__init__(conversion, state)
        self._bias, self._num_spatial = bias, num_spatial

    @property
    def product(self) -> Product | None:
        """The product, where it is a module."""
        found = getattr(self._bias, "__self__", None)
        return found if isinstance(found, Product) else None

    @product.setter
    def product(self, product: Product) -> None:
        self._bias = product.bias_and_factor

    def parameter(self) -> torch.Tensor | None:
        """Return the bias itself."""
        return self._bias()[0]

    @uncompiled
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias, factor = self._bias()
        if self._is_in_place(x):
            add_up(x.detach(), self._conversion.summed_axes, self._state.communicator, self._conversion.name)
        else:
            x = super().forward(x)
        if bias is None:
            return x
        bias = bias if factor == 1.0 else scaled(bias, factor)
        bias = bias.to(x.dtype).view(-1, *[1] * self._num_spatial)
        return x + bias if x._is_view() else x.add_(bias)

    def _is_in_place(self, x: torch.Tensor) -> bool:
        if not self._conversion.summed_axes or not x.is_contiguous() or x._is_view():  # as backward hooks make it
            return False
        product = self.product
        return product is None or not product.is_watched()


class LocalLoss(nn.Module):
    """A loss inside the model on this rank's piece, as its share of the mean over the batch.

    Args:
        call: the original loss.
        mean: it is a mean over all elements (else a sum).
        elements: of its largest input for each sample.
        resolve: adds the shares of the ranks.
        state: of this rank.
    """

    def __init__(
        self,
        call: Callable[..., torch.Tensor],
        mean: bool,
        elements: int,
        resolve: Redistribution,
        state: StepState,
    ) -> None:
        super().__init__()
        self._call, self._mean, self._elements, self.resolve, self._state = call, mean, elements, resolve, state

    def forward(self, *tensors: torch.Tensor, **options: Any) -> torch.Tensor:
        loss = self._call(*tensors, **options)
        if self._mean:
            read = (x.numel() for x in (*tensors, *options.values()) if isinstance(x, torch.Tensor))
            loss = loss * (max(read) / (self._elements * self._state.current_batch().size))
        resolved: torch.Tensor = self.resolve(loss)
        return resolved


class LocalMeanOfClasses(nn.Module):
    """The mean of a loss over the targets that count, of all ranks: which ones are ignored differs between pieces.

    Args:
        call: the loss as a sum.
        ignored: the class that does not count.
        axes: mesh axes over which the sum is split.
        name: of the layer, for messages.
        state: of this rank.
    """

    def __init__(
        self, call: Callable[..., torch.Tensor], ignored: int, axes: Axes, name: str, state: StepState
    ) -> None:
        super().__init__()
        self._call, self._ignored, self._axes, self._name, self._state = call, ignored, axes, name, state

    @uncompiled
    def forward(self, *tensors: torch.Tensor, **options: Any) -> torch.Tensor:
        total = self._call(*tensors, **options)
        target = tensors[1] if len(tensors) > 1 else options["target"]
        of_probabilities = target.is_floating_point()
        count = (
            total.new_tensor(target.numel() // target.shape[1]) if of_probabilities else (target != self._ignored).sum()
        )
        with named(StepKind.ALL_REDUCE, self._state.communicator, self._name):
            found: torch.Tensor = _Quotient.apply(total, count, self._axes, self._state.communicator)
        return found


class _Quotient(torch.autograd.Function):
    """A sum over ranks by a count over ranks, in one all-reduce; backward gives each rank its own addend's gradient."""

    @staticmethod
    def forward(
        ctx: Any, total: torch.Tensor, count: torch.Tensor, axes: Axes, communicator: Communicator
    ) -> torch.Tensor:
        wide = torch.promote_types(total.dtype, torch.float32)
        packed = torch.stack([total.to(wide), count.to(wide)])
        communicator.all_reduce(packed, axes)
        ctx.count = packed[1]
        return (packed[0] / packed[1]).to(total.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return (gradients[0] / ctx.count).to(gradients[0].dtype), None, None, None


class InTraining(nn.Module):
    """Writes into a buffer in training only; the graph was traced in training.

    Args:
        call: writes into its first argument and returns it.
    """

    def __init__(self, call: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self._call = call

    def forward(self, buffer: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self._call(buffer, *args, **kwargs) if self.training else buffer


class WithScaledGradients:
    """Calls a module whose parameters' gradients are multiplied by factors; is the ``forward`` of its stand-in.

    Args:
        stand_in: the module in the parallel module, whose mode counts.
        module: the module that is run.
        factors: by the parameters' names.
        pieces: this rank's parameters and buffers by name.
    """

    def __init__(
        self, stand_in: nn.Module, module: nn.Module, factors: dict[str, float], pieces: dict[str, torch.Tensor]
    ) -> None:
        self._stand_in, self._module, self._factors, self._pieces = stand_in, module, factors, pieces

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._module.training = self._stand_in.training
        tensors = {name: scaled(piece, self._factors.get(name, 1.0)) for name, piece in self._pieces.items()}
        return torch.func.functional_call(self._module, tensors, args, kwargs)


def steadied(y: torch.Tensor) -> torch.Tensor:
    """Return a norm's result; its gradient will lie in memory as the result does.

    On CPUs torch 2.13 computes wrong input gradients of batch norm (of one sample) and instance norm where the gradient
    comes in another order, such as that of a transpose behind the norm.
    """
    if y.requires_grad:
        y.register_hook(functools.partial(_ordered, format_of(y)))
    return y


def _ordered(memory_format: torch.memory_format, gradient: torch.Tensor) -> torch.Tensor:
    return gradient.contiguous(memory_format=memory_format)


def written_items(x: torch.Tensor, index: Any, value: Any) -> torch.Tensor:
    """Return a copy of a tensor with some elements written."""
    return write_items(x.clone(), index, value)


def reshape_piece(
    x: torch.Tensor, sizes: list[int], sample_dim: int | None, ratio: tuple[int, int, int]
) -> torch.Tensor:
    """Return a reshaped piece; the samples are counted in the piece itself.

    Args:
        x: the piece.
        sizes: of the result, but for the samples.
        sample_dim: of the result.
        ratio: dimension of the samples in x, its rows for each sample, and those of the result.
    """
    if sample_dim is None:
        return x.reshape(sizes)
    dim, rows, new_rows = ratio
    return x.reshape([*sizes[:sample_dim], x.shape[dim] // rows * new_rows, *sizes[sample_dim + 1 :]])
