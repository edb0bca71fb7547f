"""FLOPs and bytes of a layer, from the shapes of its tensors; whole or local shapes alike."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from planner.ir.graph import Layer, LayerGraph
from planner.ir.ops import (
    AdaptivePool,
    BatchNorm,
    Conv,
    Dropout,
    Elementwise,
    Flatten,
    Linear,
    Loss,
    Op,
    Pool,
    Softmax,
)
from planner.ir.split import LayerId

Shape = tuple[int, ...]


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
    flop = 2 * multiply_adds(layer.op, inputs, output)
    moved_in, moved_out = sum(map(math.prod, inputs)), math.prod(output)
    weights = sum(math.prod(s) for s, p in zip(params, layer.params, strict=True) if p.trainable)
    passes = sum(_memory_passes(absorbed.op) for absorbed in layer.absorbed)
    own = 0 if isinstance(layer.op, Flatten) or not _computes(layer.op) else moved_in + moved_out + weights
    extra = 1 if isinstance(layer.op, BatchNorm) else 0
    return Work(
        forward_flop=flop,
        input_gradient_flop=flop if input_gradient else 0,
        weight_gradient_flop=flop if any(p.trainable and p.in_dim is not None for p in layer.params) else 0,
        forward_elements=own + (passes + extra) * moved_out,
        backward_elements=(2 if flop else 1) * own + (passes + extra) * moved_out + weights,
        kernels=(1 if own else 0) + len(layer.absorbed),
    )


def _computes(op: Op) -> bool:
    return isinstance(op, Conv | Linear | BatchNorm | Pool | AdaptivePool | Elementwise | Dropout | Softmax | Loss) or (
        op.kind == "concat"
    )


def _memory_passes(op: Op) -> int:
    return 3 if isinstance(op, BatchNorm) else 2


def gradient_flow(graph: LayerGraph) -> dict[LayerId, bool]:
    """Return for each layer whether its output carries a gradient in training."""
    flows: dict[LayerId, bool] = {}
    for layer in graph.layers:
        own = any(p.trainable for p in layer.params)
        flows[layer.id] = layer.output.dtype.is_floating and (own or any(flows[i] for i in layer.inputs))
    return flows


def total_flop(graph: LayerGraph) -> tuple[int, int]:
    """Return the FLOP of the whole network's forward and backward pass for the global batch."""
    flows = gradient_flow(graph)
    forward = backward = 0
    for layer in graph.layers:
        found = work(
            layer, [s.shape for s in graph.inputs_of(layer)], layer.output.shape,
            [p.spec.shape for p in layer.params], input_gradient=any(flows[i] for i in layer.inputs),
        )  # fmt: skip
        forward += found.forward_flop
        backward += found.backward_flop
    return forward, backward
