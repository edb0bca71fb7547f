"""FLOPs and bytes of a layer, from the shapes of its tensors; whole or local shapes alike."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from planner.ir.graph import Layer, LayerGraph, Parameter, is_boundary
from planner.ir.ops import (
    BatchNorm,
    Conv,
    ConvTranspose,
    Custom,
    Elementwise,
    GroupNorm,
    Linear,
    Op,
    Permute,
    PerSample,
    Receive,
    Reshape,
)
from planner.ir.split import LayerId
from planner.ir.tensor import DType

Shape = tuple[int, ...]


def real_products(op: Op, dtype: DType) -> int:
    """Return how many products of real tensors make one of this type; torch convolves complex ones by three."""
    if dtype not in {DType.COMPLEX64, DType.COMPLEX128}:
        return 1
    return 4 if isinstance(op, Linear) else 3


def multiply_adds(op: Op, inputs: Sequence[Shape], output: Shape) -> int:
    """Return the multiply-adds of a forward pass; one counts as 2 FLOP.

    Only matrix products and convolutions count, as in ``torch.utils.flop_counter.FlopCounterMode``;
    biases do not.
    """
    match op:
        case Conv(kernel=kernel, groups=1):
            return math.prod(output) * inputs[0][1] * math.prod(kernel)
        case Conv(in_channels=channels, kernel=kernel, groups=groups):
            return math.prod(output) * (channels // groups) * math.prod(kernel)
        case ConvTranspose(out_channels=whole, kernel=kernel, groups=groups):
            per_group = output[1] // max(groups * output[1] // whole, 1)
            return math.prod(inputs[0]) * per_group * math.prod(kernel)
        case Linear():
            return math.prod(output) * inputs[0][-1]
        case _:
            return 0


@dataclass(frozen=True, slots=True)
class Work:
    """What one layer computes on one device in one step.

    Attributes:
        forward_flop: of the forward pass.
        input_gradient_flop: of the gradient of the inputs; 0 where none is needed.
        weight_gradient_flop: of the gradient of the parameters.
        forward_elements, backward_elements: tensor elements read or written in memory.
        kernels: operators started in the forward pass.
    """

    forward_flop: int
    input_gradient_flop: int
    weight_gradient_flop: int
    forward_elements: int
    backward_elements: int
    kernels: int

    @property
    def backward_flop(self) -> int:
        """FLOP of the whole backward pass."""
        return self.input_gradient_flop + self.weight_gradient_flop


def work(
    layer: Layer,
    inputs: Sequence[Shape],
    output: Shape,
    params: Sequence[Shape],
    *,
    input_gradient: bool,
) -> Work:
    """Return the work of a layer on these shapes.

    ``FlopCounterMode`` forgets to divide by the groups in its backward of grouped convolutions;
    this count does not. An element-wise operator reads and writes its output once, a batch norm
    reads it twice.
    """
    moved_in, moved_out = sum(map(math.prod, inputs)), math.prod(output)
    trained = [(p, math.prod(s)) for s, p in zip(params, layer.params, strict=True) if p.trainable]
    weights = sum(size for _, size in trained)
    flop, input_flop, weight_flop = _flop(layer, inputs, output, input_gradient=input_gradient)
    passes = sum(_memory_passes(absorbed.op) for absorbed in layer.absorbed)
    own = moved_in + moved_out + weights if _computes(layer.op) else 0
    extra = 1 if isinstance(layer.op, BatchNorm | GroupNorm) else 0
    return Work(
        forward_flop=flop,
        input_gradient_flop=input_flop,
        weight_gradient_flop=weight_flop,
        forward_elements=own + (passes + extra) * moved_out,
        backward_elements=(2 if flop else 1) * own + (passes + extra) * moved_out + weights,
        kernels=(1 if own else 0) + sum(_computes(absorbed.op) for absorbed in layer.absorbed),
    )


def _flop(layer: Layer, inputs: Sequence[Shape], output: Shape, *, input_gradient: bool) -> tuple[int, int, int]:
    """Return the FLOP of forward, of the inputs' gradient and of the parameters' gradient."""
    trains = not _ends_gradient(layer)
    if isinstance(layer.op, PerSample | Custom):
        share = math.prod(output) / max(layer.output.numel, 1)  # its pieces are pieces of the batch
        forward, backward = round(layer.op.forward_flop * share), round(layer.op.backward_flop * share)
        backward = backward if trains else 0
        return (forward, backward, 0) if input_gradient else (forward, 0, backward)
    flop = 2 * multiply_adds(layer.op, inputs, output) * real_products(layer.op, layer.output.dtype)
    trained = any(p.trainable and _is_in_weight(p, layer.op) for p in layer.params)
    return flop, flop if input_gradient and trains else 0, flop if trained and trains else 0


def _is_in_weight(parameter: Parameter, op: Op) -> bool:
    """Return whether a product's weight is this parameter, or computed from it; that of a batch norm has one size."""
    if getattr(op, "computed_weight", False):
        return parameter.whole
    return parameter.role == "weight" and len(parameter.spec.shape) > 1


def _computes(op: Op) -> bool:
    """Return whether an operator reads and writes memory; views do not."""
    views = isinstance(op, Reshape | Permute) or is_boundary(op) or op.kind == "redistribute"
    return not views and not (op.kind == "elementwise" and getattr(op, "function", "") == "identity")


def _memory_passes(op: Op) -> int:
    if isinstance(op, BatchNorm):
        return 3
    return 2 if _computes(op) else 0


def gradient_flow(graph: LayerGraph) -> dict[LayerId, bool]:
    """Return for each layer whether its output carries a gradient in training: not behind ``detach``."""
    flows: dict[LayerId, bool] = {}
    for layer in graph.layers:
        own = any(p.trainable for p in layer.params) or (isinstance(layer.op, Receive) and layer.op.has_gradient)
        before = layer.op != _DETACH and any(flows[i] for i in layer.inputs)
        flows[layer.id] = layer.output.dtype.is_floating and (own or before) and not _ends_gradient(layer)
    return flows


_DETACH = Elementwise("detach")


def _ends_gradient(layer: Layer) -> bool:
    return any(absorbed.op == _DETACH for absorbed in layer.absorbed)


def total_flop(graph: LayerGraph) -> tuple[int, int]:
    """Return the FLOP of the whole network's forward and backward pass for the global batch."""
    found = _whole_work(graph)
    return sum(work.forward_flop for work in found), sum(work.backward_flop for work in found)


def layer_flop(graph: LayerGraph) -> tuple[int, ...]:
    """Return the FLOP of every layer, forward and backward together, for the global batch."""
    return tuple(work.forward_flop + work.backward_flop for work in _whole_work(graph))


def _whole_work(graph: LayerGraph) -> list[Work]:
    flows = gradient_flow(graph)
    return [
        work(
            layer, [s.shape for s in graph.inputs_of(layer)], layer.output.shape,
            [p.spec.shape for p in layer.params], input_gradient=any(flows[i] for i in layer.inputs),
        )
        for layer in graph.layers
    ]  # fmt: skip
