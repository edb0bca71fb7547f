"""Bytes that a layer needs on the busiest device.

Resident bytes stay for the whole step and add up over the layers: parameters, gradients, optimizer
state, activations kept for backward. Transient bytes are needed while the layer runs; only the
largest counts. sum(resident) + max(transient) is a safe bound of the peak.
"""

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from planner.ir.graph import Layer
from planner.ir.layout import Layout
from planner.ir.ops import (
    BatchNorm,
    Concat,
    Conv,
    Dropout,
    Elementwise,
    Linear,
    Loss,
    Pool,
    Redistribute,
    Softmax,
)
from planner.ir.rules import LayerLayouts
from planner.ir.tensor import DType


class Optimizer(StrEnum):
    """Optimizers with a known state and update traffic."""

    SGD = "sgd"
    MOMENTUM = "momentum"
    ADAM = "adam"


STATE_COPIES: Final = {Optimizer.SGD: 0, Optimizer.MOMENTUM: 1, Optimizer.ADAM: 2}
"""Tensors of the parameters' size that an optimizer keeps."""


def update_passes(optimizer: Optimizer) -> int:
    """Return how often an update reads or writes the parameters' bytes: p twice, g once, each state twice."""
    return 3 + 2 * STATE_COPIES[optimizer]


@dataclass(frozen=True, slots=True)
class LayerBytes:
    """Bytes of one layer on the busiest device.

    Attributes:
        parameters: of parameters and buffers.
        gradients: of gradients and optimizer state.
        activations: kept for backward.
        transient: needed while the layer runs.
    """

    parameters: int
    gradients: int
    activations: int
    transient: int

    @property
    def resident(self) -> int:
        """Bytes held for the whole step."""
        return self.parameters + self.gradients + self.activations


def layer_bytes(layer: Layer, layouts: LayerLayouts, dtype: DType, optimizer: Optimizer) -> LayerBytes:
    """Return the bytes of a layer; activations have element type ``dtype``, parameters their own.

    Every output is kept once, by the operator that made it or the one that reads it. What is kept
    beside it: the input of an absorbed batch norm or of an activation that needs it, the mask of a
    dropout, the indices of a max pool, and an input that was moved for a convolution or linear layer.
    """
    weights = state = 0
    for parameter, layout in zip(layer.params, layouts.params, strict=True):
        num_bytes = _elements(layout) * parameter.spec.dtype.item_bytes
        weights += num_bytes
        state += num_bytes * (1 + STATE_COPIES[optimizer]) if parameter.trainable else 0
    item = dtype.item_bytes
    output = _elements(layouts.output) * item
    inputs = [_elements(layout) * item for layout in layouts.inputs]
    kept = output * _keeps_output(layer)
    kept += sum(_kept_by(absorbed.op, output, item) for absorbed in layer.absorbed)
    if isinstance(layer.op, Pool) and layer.op.function == "max":
        kept += output // item * DType.INT64.item_bytes
    if isinstance(layer.op, Conv | Linear):
        kept += sum(b for b, layout in zip(inputs, layouts.inputs, strict=True) if _may_be_moved(layout))
    transient = 2 * _elements(layouts.computed) * item + 2 * sum(inputs)
    return LayerBytes(weights, state, kept, transient)


_KEEPS_ITS_RESULT: Final = frozenset({
    "relu", "relu6", "leaky_relu", "leakyrelu", "hardtanh", "sigmoid", "tanh", "exp", "sqrt",
    "add", "sub", "neg", "identity", "contiguous", "clone",
})  # fmt: skip
"""Element-wise functions whose backward needs their result or nothing; all others keep their input as well."""


def _elements(layout: Layout) -> int:
    return math.prod(layout.largest_shape())


def _keeps_output(layer: Layer) -> bool:
    kinds = Conv | Linear | BatchNorm | Pool | Elementwise | Dropout | Concat | Softmax | Loss
    return isinstance(layer.op, kinds) and not isinstance(layer.op, Redistribute)


def _kept_by(op: object, output: int, item_bytes: int) -> int:
    match op:
        case BatchNorm():
            return output
        case Dropout():
            return output // item_bytes + output
        case Elementwise(function=function) if function not in _KEEPS_ITS_RESULT:
            return output
        case _:
            return 0


def _may_be_moved(layout: Layout) -> bool:
    """Return whether an input is probably a new tensor: anything but the producer's own samples."""
    return any(placement != 0 for placement in layout.placements)
