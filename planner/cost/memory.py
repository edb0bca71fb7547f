"""Bytes that a layer needs on the busiest device.

Resident bytes stay for the whole step and add up over the layers: parameters, gradients, optimizer
state, activations kept for backward. Transient bytes are needed while the layer runs; only the
largest counts. sum(resident) + max(transient) is a safe bound of the peak, and additive, which is
what solvers need; ``planner.cost.peak`` walks through the step and finds the peak itself.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

from planner.cost.sharding import ParameterSharding, shard_bytes
from planner.ir.graph import Layer
from planner.ir.layout import Layout, Whole
from planner.ir.ops import Conv, ConvTranspose, Linear
from planner.ir.rows import row_axes
from planner.ir.rules import LayerLayouts
from planner.ir.tensor import DType
from planner.ir.transfer import is_halo, steps

_SPACE: Final = 2
"""The first dimension of space."""


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
    """Bytes of one layer on the busiest device; a parameter of several layers is the first one's.

    Attributes:
        parameters: of parameters and buffers.
        gradients: of the parameters' gradients.
        reduced: those of ``gradients`` that are summed over ranks: they live in the reducer's buckets, also
            between the steps.
        state: of the optimizer.
        activations: kept for backward.
        computed: of the operator's result, before partial sums are resolved; its gradient has as many.
        inputs: of the piece of the inputs that it reads; their gradients have as many.
        updated: of the parameters that this device updates; fewer than ``gradients`` where only the optimizer is
            sharded.
        gathered: of the parameters that are held in pieces, whole; their gradients have as many.
        other_gathered: no less than ``gathered`` of any other layer: of the one that is gathered meanwhile.
        framed: of the input of a convolution with the neighbours' rows around it, which backward puts together again.
            No more than ``inputs``.
        reordered: by a kernel for itself: oneDNN copies operands of a convolution into an order of its own.
        held: of other micro-batches or batches than the one at work (``planner.cost.stages``): their activations,
            gradients that wait for their sum, earlier versions of the parameters.
    """

    parameters: int
    gradients: int
    reduced: int
    state: int
    activations: int
    computed: int
    inputs: int
    updated: int = 0
    gathered: int = 0
    other_gathered: int = 0
    framed: int = 0
    reordered: int = 0
    held: int = 0

    @property
    def resident(self) -> int:
        """Bytes held for the whole step."""
        return self.parameters + self.gradients + self.state + self.activations + self.held

    @property
    def transient(self) -> int:
        """Bytes needed while the layer runs.

        Inputs, result and the gradients of both, where the frame of a halo takes the place of one of them; a
        gradient that is summed over ranks is made beside its place in the bucket. With sharded parameters, parameters
        and gradients of this layer, the parameters of the next one and the gradients of the one before.
        """
        whole = 2 * self.gathered + 2 * self.other_gathered
        return 2 * self.computed + 2 * self.inputs + self.reduced + whole + self.workspace

    @property
    def workspace(self) -> int:
        """Bytes that the kernel needs for a while in backward, beyond what the layer kept and backward has freed.

        When the gradient of a convolution is computed, those of the operators that it absorbed have been, and their
        saved tensors are gone.
        """
        return max(self.reordered - self.activations, 0)


def layer_bytes(
    layer: Layer,
    layouts: LayerLayouts,
    dtype: DType,
    optimizer: Optimizer,
    carried: Sequence[bool],
    sharding: ParameterSharding = ParameterSharding.NONE,
    *,
    reorders: bool = False,
) -> LayerBytes:
    """Return the bytes of a layer; activations have element type ``dtype``, parameters their own.

    What autograd keeps of a whole layer is known from the trace (``Layer.saved_bytes``): its results
    that a backward needs, and masks, indices or statistics that its operators make. A piece keeps its
    share of that; weights that were computed from weights (``Layer.saved_constant_bytes``) every rank keeps
    whole. Beside it, an input that was moved for a convolution or linear layer is kept.

    Args:
        layer: the layer.
        layouts: of its tensors.
        dtype: element type of activations.
        optimizer: decides the state.
        carried: for every parameter whether its bytes count here, or with an earlier layer.
        sharding: of the parameters whose gradients are summed over ranks; ``other_gathered`` is left 0.
        reorders: whether convolutions copy their input or its gradient into an order of their own, as oneDNN's do on
            processors: seen in the allocations of ``aten::convolution_backward`` (``planner.measure.allocated``).
    """
    weights = gradients = reduced = updated = gathered = 0
    for parameter, layout, counts in zip(layer.params, layouts.params, carried, strict=True):
        if not counts:
            continue
        held = num_bytes = _elements(layout) * parameter.spec.dtype.item_bytes
        if parameter.trainable:
            is_cut = sharding is not ParameterSharding.NONE and bool(row_axes(layout))
            piece = shard_bytes(layout, parameter.spec.dtype.item_bytes) if is_cut else num_bytes
            updated += piece
            if is_cut and sharding is ParameterSharding.FULL:
                gathered, held = gathered + num_bytes, piece
            elif layout.axes_with(Whole.SHARED):
                reduced += num_bytes
        weights += held
        gradients += held if parameter.trainable else 0
    item = dtype.item_bytes
    inputs = [_elements(layout) * item for layout in layouts.inputs]
    share = _elements(layouts.output) / max(layer.output.numel, 1) * item / layer.output.dtype.item_bytes
    kept = math.ceil((layer.saved_bytes - layer.saved_constant_bytes) * share) + layer.saved_constant_bytes
    if isinstance(layer.op, Conv | ConvTranspose | Linear):
        kept += sum(b for b, layout in zip(inputs, layouts.inputs, strict=True) if _may_be_moved(layer, layout))
    return LayerBytes(
        weights, gradients, reduced, updated * STATE_COPIES[optimizer], kept,
        _elements(layouts.computed) * item, sum(inputs), updated, gathered,
        reordered=inputs[0] if reorders and isinstance(layer.op, Conv | ConvTranspose) else 0,
    )  # fmt: skip


def with_halo(
    found: LayerBytes, layer: Layer, have: Layout, need: Layout, dtype: DType, *, has_frame: bool
) -> LayerBytes:
    """Return the bytes of a layer that reads what a producer keeps.

    ``layer_bytes`` counts an input of a convolution or linear layer as moved, as a split alone does not tell. Where
    space is cut, a piece often stays where it is; of a halo only the neighbours' rows are new, and the whole frame is
    there only while backward needs it (``runtime.lowering.halo``).

    Args:
        found: of the layer.
        layer: the layer.
        have: of its input, as the producer makes it.
        need: of its input, as it is read.
        dtype: element type of the input.
        has_frame: see ``planner.cost.halo.HaloPair``.
    """
    products = isinstance(layer.op, Conv | ConvTranspose | Linear)
    if not products or not any(isinstance(p, int) and p >= _SPACE for p in need.placements):
        return found
    needed = _elements(need) * dtype.item_bytes
    if not steps(have, need):
        return replace(found, activations=max(found.activations - needed, 0))
    if not isinstance(layer.op, Conv) or not is_halo(have, need):
        return found
    kept = min(_elements(have) * dtype.item_bytes, needed)
    return replace(found, activations=max(found.activations - kept, 0), framed=needed if has_frame else 0)


def _elements(layout: Layout) -> int:
    return math.prod(layout.largest_shape())


def _may_be_moved(layer: Layer, layout: Layout) -> bool:
    """Return whether an input is probably a new tensor: anything but the producer's own samples."""
    samples = layer.output.sample_dim
    return any(placement != samples for placement in layout.placements)
