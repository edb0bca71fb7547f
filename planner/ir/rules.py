"""How every operator kind can be split: the one declaration that space, cost and runtime share.

A rule maps a dimension to what one mesh axis then does: how it places each input, and how it places
what the operator computes. An absent dimension is illegal. Parameters follow from the dimension
alone. The layout algebra turns these placements into regions, transfers and gradients.
"""

import functools
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from planner.ir.graph import Layer, LayerGraph, Parameter
from planner.ir.layout import BALANCED, CHUNK, Cut, CutRule, Layout, Placement, Whole
from planner.ir.mesh import Mesh
from planner.ir.ops import (
    AdaptivePool,
    BatchNorm,
    Concat,
    Conv,
    Dropout,
    Elementwise,
    Flatten,
    Input,
    Linear,
    Loss,
    Op,
    Output,
    Pool,
    Redistribute,
    Softmax,
)
from planner.ir.split import SPATIAL_DIMENSIONS, Dimension, Split
from planner.ir.tensor import TensorSpec


class InputOutput(StrEnum):
    """How a rank passes the batch and gets the output back."""

    PER_RANK = "per-rank"
    """Each rank passes its own samples and gets their outputs, as under DistributedDataParallel."""
    GLOBAL = "global"
    """Each rank passes the whole batch and gets the whole output."""


@dataclass(frozen=True, slots=True)
class Effect:
    """What a mesh axis does to an operator.

    Attributes:
        inputs: placement of every input (one entry serves all inputs).
        output: placement of what the operator computes, before partial sums are resolved.
    """

    inputs: Placement
    output: Placement


def channel_dim(op: Op, shape: tuple[int, ...]) -> int:
    """Return the dimension of a tensor of this operator that holds the channels."""
    return len(shape) - 1 if isinstance(op, Linear) else min(1, len(shape) - 1)


_SAMPLE = Effect(0, 0)
_REPLICATE = Effect(Whole.EQUAL, Whole.EQUAL)


def effects(op: Op, shape: tuple[int, ...]) -> Mapping[Dimension, Effect]:  # noqa: PLR0911  # a table of kinds
    """Return what each legal dimension does to an operator whose output has this shape."""
    channel = channel_dim(op, shape)
    pointwise = {
        Dimension.SAMPLE: _SAMPLE,
        Dimension.OUT_CHANNEL: Effect(channel, channel),
        Dimension.REPLICATE: _REPLICATE,
    }
    match op:
        case Conv(groups=1) | Linear():
            return {
                Dimension.SAMPLE: _SAMPLE,
                Dimension.OUT_CHANNEL: Effect(Whole.SHARED, channel),
                Dimension.IN_CHANNEL: Effect(channel, Whole.PARTIAL),
                Dimension.IN_CHANNEL_SCATTER: Effect(channel, Whole.PARTIAL),
                Dimension.REPLICATE: _REPLICATE,
            }
        case Conv() | BatchNorm() | Pool() | AdaptivePool() | Flatten():
            return pointwise
        case Elementwise() | Dropout():
            return pointwise if len(shape) > 1 else _rowwise()
        case Redistribute():
            shared = {Dimension.BROADCAST: Effect(Whole.SHARED, Whole.SHARED)}
            return (pointwise if len(shape) > 1 else _rowwise()) | shared
        case Concat(dim=dim) | Softmax(dim=dim):
            return {d: e for d, e in pointwise.items() if e.output != dim}
        case Loss():
            return {Dimension.SAMPLE: Effect(0, Whole.PARTIAL), Dimension.REPLICATE: _REPLICATE}
        case Input() | Output():
            return _rowwise()


def _rowwise() -> dict[Dimension, Effect]:
    return {Dimension.SAMPLE: _SAMPLE, Dimension.REPLICATE: _REPLICATE}


def activation_cuts(op: Op, spec: TensorSpec, unit: int = 1) -> tuple[Cut, ...]:
    """Return how the dimensions of an activation are cut: channels by chunk, all else balanced."""
    channel = channel_dim(op, spec.shape)
    chunk = CHUNK if unit == 1 else Cut(CutRule.CHUNK, unit)
    return tuple(chunk if d == channel and d > 0 else BALANCED for d in range(len(spec.shape)))


@dataclass(frozen=True, slots=True)
class LayerLayouts:
    """Every layout of a layer under a split.

    Attributes:
        inputs: what the operator needs, in the operator's order.
        computed: what it computes; partial over ``in_channel`` axes.
        output: what its consumers see; never partial.
        params: of every parameter and buffer. Over the axes where one is SHARED its gradient is an
            addend and has to be synchronised.
    """

    inputs: tuple[Layout, ...]
    computed: Layout
    output: Layout
    params: tuple[Layout, ...]


def _param_placement(parameter: Parameter, dimension: Dimension) -> Placement:
    match dimension:
        case Dimension.REPLICATE | Dimension.BROADCAST:
            return Whole.EQUAL
        case Dimension.OUT_CHANNEL:
            return Whole.SHARED if parameter.out_dim is None else parameter.out_dim
        case Dimension.IN_CHANNEL if parameter.in_dim is None:
            return Whole.EQUAL
        case Dimension.IN_CHANNEL_SCATTER if parameter.in_dim is None:
            return Whole.SHARED if parameter.out_dim is None else parameter.out_dim
        case Dimension.IN_CHANNEL | Dimension.IN_CHANNEL_SCATTER:
            assert parameter.in_dim is not None
            return parameter.in_dim
        case _:
            return Whole.SHARED


@functools.lru_cache(maxsize=1 << 16)
def _layouts(
    op: Op, inputs: tuple[TensorSpec, ...], output: TensorSpec, params: tuple[Parameter, ...], mesh: Mesh, split: Split
) -> LayerLayouts:  # fmt: skip
    table = effects(op, output.shape)
    chosen = [table[d] for d in split.dimensions]
    unit = inputs[0].numel // (inputs[0].shape[0] * inputs[0].shape[1]) if isinstance(op, Flatten) else 1
    computed = Layout(output.shape, mesh, tuple(e.output for e in chosen), activation_cuts(op, output, unit))
    resolved = tuple(
        _resolved(dimension, placement, channel_dim(op, output.shape))
        for dimension, placement in zip(split.dimensions, computed.placements, strict=True)
    )
    return LayerLayouts(
        inputs=tuple(
            Layout(spec.shape, mesh, tuple(e.inputs for e in chosen), activation_cuts(op, spec))
            for spec in inputs
        ),
        computed=computed,
        output=computed.with_placements(resolved),
        params=tuple(
            Layout(
                p.spec.shape, mesh,
                tuple(_param_placement(p, d) for d in split.dimensions),
                (CHUNK,) * len(p.spec.shape),
            )
            for p in params
        ),
    )  # fmt: skip


def _resolved(dimension: Dimension, placement: Placement, channel: int) -> Placement:
    if placement is not Whole.PARTIAL:
        return placement
    return channel if dimension is Dimension.IN_CHANNEL_SCATTER else Whole.EQUAL


def layouts(layer: Layer, inputs: tuple[TensorSpec, ...], mesh: Mesh, split: Split) -> LayerLayouts:
    """Return every layout of a layer under a split.

    Raises:
        KeyError: the split uses a dimension that is illegal for the operator.
    """
    return _layouts(layer.op, inputs, layer.output, layer.params, mesh, split)


def reduced_axes(split: Split) -> tuple[int, ...]:
    """Return the mesh axes over which batch norm statistics and losses are sums: samples and space."""
    return tuple(i for i, d in enumerate(split.dimensions) if d is Dimension.SAMPLE or d in SPATIAL_DIMENSIONS)


def is_legal(layer: Layer, graph: LayerGraph, mesh: Mesh, split: Split) -> bool:
    """Return whether a layer may be split so: known dimensions, no empty piece, whole groups, real samples."""
    inputs = graph.inputs_of(layer)
    table = effects(layer.op, layer.output.shape)
    if any(dimension not in table for dimension in split.dimensions):
        return False
    if Dimension.SAMPLE in split.dimensions and any(s.shape[:1] != (graph.batch,) for s in inputs):
        return False
    found = layouts(layer, inputs, mesh, split)
    if any(layout.has_empty_piece() for layout in (*found.inputs, found.output, *found.params)):
        return False
    if isinstance(layer.op, Conv) and layer.op.groups > 1:
        groups = layer.op.groups
        return _on_borders(found.output, layer.op.out_channels // groups, groups) and _on_borders(
            found.inputs[0], layer.op.in_channels // groups, groups
        )
    return True


def _on_borders(layout: Layout, unit: int, groups: int) -> bool:
    """Return whether the channel pieces consist of whole groups, as many on input as on output."""
    expected = Layout((groups,), layout.mesh,
                      tuple(0 if p == 1 else Whole.EQUAL for p in layout.placements), (CHUNK,))  # fmt: skip
    return layout.pieces(1) == tuple((a * unit, b * unit) for a, b in expected.pieces(0))


def io_split(op: Op, spec: TensorSpec, batch: int, mesh: Mesh, io: InputOutput) -> Split:
    """Return the split that the plan's io pins an input or output of the model to."""
    has_samples = bool(spec.shape) and spec.shape[0] == batch
    sample = io is InputOutput.PER_RANK and has_samples
    assert isinstance(op, Input | Output)
    return Split.of(mesh, (Dimension.SAMPLE if sample else Dimension.REPLICATE,) * len(mesh.axes))


def legal_splits(
    layer: Layer, graph: LayerGraph, mesh: Mesh, io: InputOutput, allowed: Iterable[Dimension]
) -> tuple[Split, ...]:
    """Return the legal splits of a layer, in a fixed order; ``replicate`` is always allowed."""
    if isinstance(layer.op, Input | Output):
        return (io_split(layer.op, layer.output, graph.batch, mesh, io),)
    permitted = {*allowed, Dimension.REPLICATE, Dimension.BROADCAST}
    dims = [d for d in Dimension if d in permitted and d in effects(layer.op, layer.output.shape)]
    candidates = (Split.of(mesh, choice) for choice in itertools.product(dims, repeat=len(mesh.axes)))
    return tuple(split for split in candidates if is_legal(layer, graph, mesh, split))
