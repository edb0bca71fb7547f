"""Our layers as PaSE's operators: a batch norm is one of its own, further element-wise operators count where they are.

An activation counts with the product or addition that it directly follows, elsewhere not at all, as in the published
graphs. What the paper has no operator for counts as element-wise; what only renames or hands on elements is nothing.
All dimensions of space but the width are one, the height.
"""

import math

from planner.ir.dimension import SPATIAL_DIMENSIONS, Dimension
from planner.ir.graph import Layer, LayerGraph
from planner.ir.ops import (
    AdaptivePool,
    BatchNorm,
    Concat,
    Conv,
    ConvTranspose,
    Dropout,
    Elementwise,
    GroupNorm,
    Input,
    Linear,
    Loss,
    Output,
    Permute,
    Pool,
    Redistribute,
    Reduce,
    Reshape,
)
from planner.ir.tensor import TensorSpec
from planner.search.published.pase_operators import Graph, Kind, Node, Operator, Shape

_NORMS = BatchNorm | GroupNorm


def folded(spec: TensorSpec) -> Shape:
    """Return a tensor's samples, channels, height and width; what is none of them counts as height."""
    b, c, w = (_size(spec, d) for d in (Dimension.SAMPLE, Dimension.OUT_CHANNEL, Dimension.WIDTH))
    return b, c, spec.numel // max(b * c * w, 1), w


def _size(spec: TensorSpec, role: Dimension) -> int:
    dim = spec.dim_of(role)
    return 1 if dim is None else spec.shape[dim]


def operators_of(layer: Layer, inputs: tuple[TensorSpec, ...]) -> tuple[Operator, ...]:
    """Return the operators that a layer is for PaSE, each behind the other; none where it computes nothing."""
    main = _main(layer, inputs)
    output = folded(layer.output)
    norm = Operator(Kind.NORM, (*output, 1, 1, 1), output, output)
    return (*main, *(norm for a in layer.absorbed if isinstance(a.op, _NORMS)))


def _main(layer: Layer, inputs: tuple[TensorSpec, ...]) -> tuple[Operator, ...]:  # noqa: PLR0911  # a table of kinds
    op, output = layer.op, folded(layer.output)
    reads = folded(inputs[0]) if inputs else output
    same = (*output, 1, 1, 1)
    match op:
        case Conv() | ConvTranspose() | Linear():
            return (_product(op, output, reads, _activations(layer)),)
        case Concat():
            return (Operator(Kind.CONCAT, same, output, reads),)
        case Pool(kernel=kernel):
            return (Operator(Kind.POOL, same, output, reads, window=_window(kernel)),)
        case _ if isinstance(op, _NORMS):
            return (Operator(Kind.NORM, same, output, reads),)
        case AdaptivePool() | Reduce() if _is_mean(layer, inputs):
            return (Operator(Kind.MEAN, (*reads, 1, 1, 1), output, reads),)
        case Output() | Loss():
            return (Operator(Kind.LOSS, (*reads, 1, 1, 1), output, reads),)
        case Reshape() if reads[2] * reads[3] > 1 and output[2] * output[3] == 1:
            flat: Shape = (math.prod(reads), 1, 1, 1)
            to_flat = Operator(Kind.FLATTEN, (*reads, 1, 1, 1), flat, reads)
            return to_flat, Operator(Kind.UNFLATTEN, same, output, flat)
        case Input() | Redistribute() | Dropout() | Permute() | Reshape():
            return ()
        case AdaptivePool() if output == reads:
            return ()
        case _:
            pointwise = _activations(layer) if isinstance(op, Elementwise) else 0
            return (Operator(Kind.ELEMENTWISE, same, output, reads, pointwise),)


def _product(op: Conv | ConvTranspose | Linear, output: Shape, reads: Shape, pointwise: int) -> Operator:
    groups = 1 if isinstance(op, Linear) else op.groups
    match op:
        case Linear():
            kernel = 1, 1
        case Conv():
            kernel = _window(op.kernel)
        case ConvTranspose():  # of its kernel, each output position meets one in so many
            kernel = _window(tuple(max(k // s, 1) for k, s in zip(op.kernel, op.stride, strict=True)))
    b, n, h, w = output
    return Operator(Kind.PRODUCT, (b, reads[1], h, w, *kernel, n), output, reads, pointwise, groups=groups)


def _window(kernel: tuple[int, ...]) -> tuple[int, int]:
    return (kernel[0], 1) if len(kernel) == 1 else (math.prod(kernel[:-1]), kernel[-1])


def _is_mean(layer: Layer, inputs: tuple[TensorSpec, ...]) -> bool:
    """Return whether all of space, and nothing else, becomes one."""
    reads, output = folded(inputs[0]), folded(layer.output)
    has_space = any(role in SPATIAL_DIMENSIONS for role in inputs[0].roles)
    return has_space and reads[:2] == output[:2] and output[2:] == (1, 1) != reads[2:]


def _activations(layer: Layer) -> int:
    """Return the element-wise operators in front of the first batch norm."""
    count = 0
    for absorbed in layer.absorbed:
        if isinstance(absorbed.op, _NORMS):
            break
        count += isinstance(absorbed.op, Elementwise)
    return count


def pase_graph(graph: LayerGraph) -> Graph:
    """Return a network in PaSE's granularity; its outputs are followed by the loss."""
    nodes: list[Node] = []
    made_by: dict[str, int] = {}  # the node that makes a layer's output, -1 for the network's input
    for layer in graph.layers:
        reads = tuple(made_by[i] for i in layer.inputs)
        for number, operator in enumerate(operators_of(layer, graph.inputs_of(layer))):
            name = f"{layer.id}:{operator.kind}" if number else str(layer.id)
            nodes.append(Node(name, operator, tuple(i for i in reads if i >= 0)))
            reads = (len(nodes) - 1,)
        made_by[layer.id] = reads[0] if reads else -1
    return tuple(nodes)
