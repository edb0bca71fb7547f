"""A layer as one device sees it: its operators on a piece, and what its parameters do to the time."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from planner.ir.count import Shape
from planner.ir.graph import Layer, Parameter
from planner.ir.ops import (
    AdaptivePool,
    BatchNorm,
    Conv,
    ConvTranspose,
    Custom,
    Dropout,
    Elementwise,
    GroupNorm,
    Interpolate,
    Linear,
    Op,
    PerSample,
)

_DOES_NOTHING: Final = frozenset({"identity", "contiguous", "detach", "requires_grad_", "to", "type", "type_as"})
"""Element-wise functions that hand on what they get, where the element type stays."""


def local_operator(op: Op, inputs: Sequence[Shape], output: Shape) -> Op:  # noqa: PLR0911  # a table of kinds
    """Return an operator with the channels and groups of a piece, and without what does not change its time."""
    match op:
        case Conv() | ConvTranspose():
            groups = max(op.groups * output[1] // op.out_channels, 1) if op.groups > 1 else 1
            found = replace(op, in_channels=inputs[0][1], out_channels=output[1], groups=groups)
            return replace(found, computed_weight=False) if isinstance(found, Conv) else found
        case Linear():
            return Linear(inputs[0][-1], output[-1])
        case BatchNorm():
            return BatchNorm(output[1])
        case GroupNorm():
            return replace(op, groups=max(op.groups * output[1] // op.channels, 1), channels=output[1])
        case AdaptivePool() if op.output_size:
            return replace(op, output_size=tuple(output[2:]))
        case Interpolate():
            return replace(op, align_corners=False, scale=None)
        case Dropout():
            return replace(op, probability=op.probability if op.probability in {0.0, 1.0} else 0.5)
        case PerSample() | Custom():  # of the whole batch; their piece is a share by its size
            return replace(op, forward_flop=0, backward_flop=0)
        case _:
            return op


def does_nothing(op: Op) -> bool:
    """Return whether an operator hands on its input: there is nothing to time."""
    if isinstance(op, Dropout):
        return op.probability == 0
    return isinstance(op, Elementwise) and op.function in _DOES_NOTHING


def trains_operator(layer: Layer) -> bool:
    """Return whether the operator itself has a gradient to compute for parameters: of a product, for its weight."""
    return any(p.trainable for p in _own(layer))


def trains_norms(layer: Layer) -> bool:
    """Return whether absorbed norms have."""
    if _has_computed_weight(layer):
        return any(p.trainable for p in layer.params if not p.whole)
    return any(p.trainable for p in layer.params[len(_own(layer)) + has_bias(layer) :])


def has_bias(layer: Layer) -> bool:
    """Return whether a product adds a bias; parameters are in the order in which its operators read them."""
    if _has_computed_weight(layer):
        return any(p.whole and len(p.spec.shape) == 1 for p in layer.params)
    weights = [i for i, p in enumerate(layer.params) if _is_weight(p)]  # several where it is one under a mask
    place = max(weights, default=len(layer.params))
    return any(p.role == "bias" for p in layer.params[place + 1 : place + 2])


def _own(layer: Layer) -> tuple[Parameter, ...]:
    if not isinstance(layer.op, Conv | ConvTranspose | Linear):
        return layer.params
    return tuple(p for p in layer.params if (p.whole if _has_computed_weight(layer) else _is_weight(p)))


def _has_computed_weight(layer: Layer) -> bool:
    return bool(getattr(layer.op, "computed_weight", False))


def _is_weight(parameter: Parameter) -> bool:
    """Return whether a parameter is the weight of a product; that of a batch norm has one dimension."""
    return parameter.role == "weight" and len(parameter.spec.shape) > 1
