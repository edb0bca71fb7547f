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
from planner.ir.ops import Conv, ConvTranspose, Linear
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

    What autograd keeps of a whole layer is known from the trace (``Layer.saved_bytes``): its results
    that a backward needs, and masks, indices or statistics that its operators make. A piece keeps its
    share of that. Beside it, an input that was moved for a convolution or linear layer is kept.
    """
    weights = state = 0
    for parameter, layout in zip(layer.params, layouts.params, strict=True):
        num_bytes = _elements(layout) * parameter.spec.dtype.item_bytes
        weights += num_bytes
        state += num_bytes * (1 + STATE_COPIES[optimizer]) if parameter.trainable else 0
    item = dtype.item_bytes
    inputs = [_elements(layout) * item for layout in layouts.inputs]
    share = _elements(layouts.output) / max(layer.output.numel, 1) * item / layer.output.dtype.item_bytes
    kept = math.ceil(layer.saved_bytes * share)
    if isinstance(layer.op, Conv | ConvTranspose | Linear):
        kept += sum(b for b, layout in zip(inputs, layouts.inputs, strict=True) if _may_be_moved(layer, layout))
    transient = 2 * _elements(layouts.computed) * item + 2 * sum(inputs)
    return LayerBytes(weights, state, kept, transient)


def _elements(layout: Layout) -> int:
    return math.prod(layout.largest_shape())


def _may_be_moved(layer: Layer, layout: Layout) -> bool:
    """Return whether an input is probably a new tensor: anything but the producer's own samples."""
    samples = layer.output.sample_dim
    return any(placement != samples for placement in layout.placements)
