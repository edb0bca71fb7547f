"""How every operator kind can be split: the one declaration that space, cost and runtime share.

A rule maps a dimension to what one mesh axis then does: how it places each input, and how it places
what the operator computes. An absent dimension is illegal. Parameters follow from the dimension
alone. The layout algebra turns these placements into regions, transfers and gradients.
"""

import functools
import itertools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from types import MappingProxyType

from planner.ir.dimension import SPATIAL_DIMENSIONS, Dimension
from planner.ir.graph import Layer, LayerGraph
from planner.ir.halo import AdaptiveWindow, AnyWindow, InterpolationWindow, ScaleWindow, TransposedWindow, Window
from planner.ir.layout import BALANCED, CHUNK, Cut, CutRule, Interval, Layout, LayoutFamily, Placement, Whole, family
from planner.ir.mesh import Mesh
from planner.ir.ops import (
    AdaptivePool,
    Along,
    BatchNorm,
    Concat,
    Conv,
    ConvTranspose,
    Custom,
    Dropout,
    Elementwise,
    GroupNorm,
    Input,
    Interpolate,
    Linear,
    Loss,
    Op,
    Output,
    Permute,
    PerSample,
    PixelShuffle,
    Pool,
    Receive,
    Redistribute,
    Reduce,
    Reshape,
    Send,
    Softmax,
)  # fmt: skip
from planner.ir.split import Shares, Split
from planner.ir.tensor import TensorSpec


class InputOutput(StrEnum):
    """How a rank passes the batch and gets the output back."""

    PER_RANK = "per-rank"
    """Each rank passes its own samples and gets their outputs, as under DistributedDataParallel."""
    GLOBAL = "global"
    """Each rank passes the whole batch and gets the whole output."""
    LOCAL = "local"
    """Each rank passes its region of the inputs and gets its region of the outputs; the plan splits both, by samples
    and space."""


def default_io(batch: int, num_ranks: int) -> InputOutput:
    """Return ``per-rank`` where every rank gets a sample, else ``global``."""
    return InputOutput.PER_RANK if num_ranks <= batch else InputOutput.GLOBAL


@dataclass(frozen=True, slots=True)
class Effect:
    """What a mesh axis does to an operator.

    Attributes:
        inputs: placement of every input.
        output: placement of what the operator computes, before partial sums are resolved.
    """

    inputs: tuple[Placement, ...]
    output: Placement


@dataclass(frozen=True, slots=True)
class Rule:
    """How an operator on these tensors can be split.

    Attributes:
        effects: what each legal dimension does.
        windows: cuts of input dimensions that differ from the plain ones, by input and dimension:
            the input pieces that pieces of the output need.
        output_units: of output dimensions whose pieces are multiples of more than one element.
    """

    effects: Mapping[Dimension, Effect]
    windows: Mapping[tuple[int, int], Cut] = field(default_factory=dict)
    output_units: Mapping[int, int] = field(default_factory=dict)


Specs = tuple[TensorSpec, ...]
_LOCAL = SPATIAL_DIMENSIONS | {Dimension.SAMPLE}
_OWN_SPACE = (Dimension.DEPTH, Dimension.HEIGHT, Dimension.WIDTH, Dimension.LENGTH)


@functools.lru_cache(maxsize=1 << 16)
def rule(op: Op, inputs: Specs, output: TensorSpec) -> Rule:  # noqa: C901, PLR0911, PLR0912  # a table of kinds
    """Return the rule of an operator that turns these tensors into that one."""
    match op:
        case Conv() | ConvTranspose() | Linear():
            return _product(op, inputs, output)
        case Pool():
            return _windowed(_pointwise(inputs, output), inputs, output, _pool_windows(op, output))
        case AdaptivePool():
            return _adaptive(op, inputs, output)
        case Interpolate():
            windows = _interpolation_windows(op, inputs[0], output)
            return _windowed(_pointwise(inputs, output), inputs, output, windows)
        case PixelShuffle(factor=factor, unshuffle=back):
            return _windowed(
                _of_dims(inputs, output, {0: 0}), inputs, output,
                [ScaleWindow(n, 1, factor) if back else ScaleWindow(n, factor, 1) for n in output.shape[2:]],
            )  # fmt: skip
        case Receive(is_shared=True):
            return Rule({Dimension.BROADCAST: Effect((), Whole.SHARED)})
        case BatchNorm() | Elementwise() | Dropout() | Input() | Output() | Receive() | Send():
            return _pointwise(inputs, output)
        case GroupNorm():  # statistics are sums over the ranks that hold parts of space
            return _pointwise(inputs, output, {d for d in range(2, len(output.shape)) if not _is_space(output, d)})
        case Redistribute():
            return _redistribute(inputs, output)
        case Concat(dim=dim) | Softmax(dim=dim):
            return _pointwise(inputs, output, {dim})
        case Along(dims=dims):
            return _pointwise(inputs, output, dims)
        case Permute(order=order):
            return _of_dims(inputs, output, dict(enumerate(order)))
        case Reshape(groups=groups):
            return _reshape(groups, inputs, output)
        case Reduce():
            return _reduce(op, inputs, output)
        case PerSample():
            return Rule(_by_sample(inputs, output))
        case Custom(dimensions=dimensions):
            plain = _pointwise(inputs, output)
            named = {d: e for d, e in plain.effects.items() if d in dimensions}
            return Rule({**_by_sample(inputs, output), **named})
        case Loss():
            return _loss(op, inputs, output)


def effects(op: Op, inputs: Specs, output: TensorSpec) -> Mapping[Dimension, Effect]:
    """Return what each legal dimension does to an operator on these tensors."""
    return rule(op, inputs, output).effects


def _replicate(inputs: Specs) -> dict[Dimension, Effect]:
    return {Dimension.REPLICATE: Effect((Whole.EQUAL,) * len(inputs), Whole.EQUAL)}


def _by_sample(inputs: Specs, output: TensorSpec, placed: Placement | None = None) -> dict[Dimension, Effect]:
    """Return the effects of an operator that treats each sample alone; ``placed`` where the output has no samples."""
    found = _replicate(inputs)
    target = output.sample_dim if placed is None else placed
    sources = tuple(Whole.SHARED if s.sample_dim is None else s.sample_dim for s in inputs)
    if target is not None and any(isinstance(s, int) for s in sources) and not any(_is_mixed(s) for s in inputs):
        found[Dimension.SAMPLE] = Effect(sources, target)
    return found


def _is_mixed(spec: TensorSpec) -> bool:
    """Return whether a tensor grows with the batch, but not by whole samples along one dimension."""
    return spec.sample_rows == 0


def _of_dims(inputs: Specs, output: TensorSpec, source: Mapping[int, int]) -> Rule:
    """Return the rule of an operator whose output dimensions are dimensions of its only input, as they are."""
    found = _replicate(inputs)
    for dim, role in enumerate(output.roles):
        if role is not None and dim in source and _same_rows(role, inputs[0], source[dim], output):
            found[role] = Effect((source[dim],) * len(inputs), dim)
    return Rule(found)


def _same_rows(role: Dimension, spec: TensorSpec, dim: int, output: TensorSpec) -> bool:
    if (role is Dimension.SAMPLE) != (spec.roles[dim] is Dimension.SAMPLE):
        return False
    return role is not Dimension.SAMPLE or spec.sample_rows == output.sample_rows


def _pointwise(inputs: Specs, output: TensorSpec, blocked: Collection[int] = ()) -> Rule:
    """Return the rule of an operator that treats every index of a dimension alone, but for the blocked ones.

    Inputs are aligned from the last dimension on, as broadcasting does.
    """
    found = _replicate(inputs)
    for dim, role in enumerate(output.roles):
        if role is None or dim in blocked:
            continue
        placements = [_aligned(spec, output, dim, role) for spec in inputs]
        if any(isinstance(p, int) for p in placements) or not inputs:
            found[role] = Effect(tuple(p for p in placements if p is not None), dim)
        if None in placements:
            found.pop(role, None)
    return Rule(found)


def _aligned(spec: TensorSpec, output: TensorSpec, dim: int, role: Dimension) -> Placement | None:
    """Return the placement of an input where the output is cut along a dimension; None where that is impossible."""
    own = dim - len(output.shape) + len(spec.shape)
    if own < 0:
        return None if spec.sample_dim is not None and role is Dimension.SAMPLE else Whole.SHARED
    if role is Dimension.SAMPLE and spec.roles[own] is Dimension.SAMPLE:
        return own if spec.sample_rows == output.sample_rows else None
    if spec.shape[own] == 1 and output.shape[dim] > 1:
        return None if role is Dimension.SAMPLE and spec.sample_dim is not None else Whole.SHARED
    if role is Dimension.SAMPLE or spec.roles[own] is Dimension.SAMPLE:
        return None
    return own if spec.shape[own] == output.shape[dim] else None


def _product(op: Conv | ConvTranspose | Linear, inputs: Specs, output: TensorSpec) -> Rule:
    """Return the rule of a convolution or linear layer: the channels of its input are a reduction."""
    channel = len(output.shape) - 1 if isinstance(op, Linear) else 1
    found = dict(_pointwise(inputs, output, {channel}).effects)
    grouped = not isinstance(op, Linear) and op.groups > 1
    own = channel if not isinstance(op, Linear) else len(inputs[0].shape) - 1
    computed = isinstance(op, Conv | Linear) and op.computed_weight
    if grouped and not computed:
        found[Dimension.OUT_CHANNEL] = Effect((own,), channel)
    elif not computed:
        found[Dimension.OUT_CHANNEL] = Effect((Whole.SHARED,), channel)
        found[Dimension.IN_CHANNEL] = Effect((own,), Whole.PARTIAL)
        found[Dimension.IN_CHANNEL_SCATTER] = Effect((own,), Whole.PARTIAL)
    if isinstance(op, Linear):
        return Rule(found)
    windows: list[AnyWindow] = []
    for k, size in enumerate(output.shape[2:]):
        shape = size, op.kernel[k], op.stride[k], op.padding[k], op.dilation[k]
        windows.append(Window(*shape, op.padding_mode) if isinstance(op, Conv) else TransposedWindow(*shape))
    return _windowed(Rule(found), inputs, output, windows)


def _windowed(plain: Rule, inputs: Specs, output: TensorSpec, windows: Sequence[AnyWindow | None]) -> Rule:
    """Return a rule whose output is also cut in space, where each dimension of space looks through its window."""
    found = {d: e for d, e in plain.effects.items() if d not in _OWN_SPACE}
    cuts = {}
    for dim, window in enumerate(windows, start=2):
        role = output.roles[dim]
        if role is not None and role in _OWN_SPACE and window is not None:
            found[role] = Effect((dim,) * len(inputs), dim)
            if window != Window(output.shape[dim], 1) or inputs[0].shape[dim] != output.shape[dim]:
                cuts[0, dim] = Cut(window=window)  # else each row reads its own, as in any pointwise operator
    return Rule(found, cuts, plain.output_units)


def _pool_windows(op: Pool, output: TensorSpec) -> list[AnyWindow]:
    shape = zip(output.shape[2:], op.kernel, op.stride, op.padding, op.dilation, strict=True)
    return [Window(*each) for each in shape]


def _adaptive(op: AdaptivePool, inputs: Specs, output: TensorSpec) -> Rule:
    """Return the rule of an adaptive pool; a mean over all of space is a sum of the pieces' shares."""
    if len(output.shape) > 2 and any(size > 1 for size in output.shape[2:]):
        windows = [AdaptiveWindow(n) for n in output.shape[2:]]
        return _windowed(_of_dims(inputs, output, {0: 0, 1: 1}), inputs, output, windows)
    found = dict(_of_dims(inputs, output, {0: 0, 1: 1}).effects)
    if op.function == "avg":
        for dim, role in enumerate(inputs[0].roles):
            if role in _OWN_SPACE and inputs[0].shape[dim] > 1:
                found[role] = Effect((dim,), Whole.PARTIAL)
    return Rule(found)


def _reduce(op: Reduce, inputs: Specs, output: TensorSpec) -> Rule:
    """Return the rule of a reduction; a mean or sum over space is a sum of the pieces' shares."""
    (source,) = inputs
    kept = [d for d in range(len(source.shape)) if op.keepdim or d not in op.dims]
    found = dict(_of_dims(inputs, output, {o: d for o, d in enumerate(kept) if d not in op.dims}).effects)
    if op.function in {"mean", "sum"} and source.sample_dim not in op.dims and source.dtype == output.dtype:
        for dim in op.dims:
            role = source.roles[dim]
            if role is not None and role in _OWN_SPACE:
                found[role] = Effect((dim,), Whole.PARTIAL)
    return Rule(found)


def _loss(op: Loss, inputs: Specs, output: TensorSpec) -> Rule:
    """Return the rule of a loss: a sum of the pieces' shares, by samples, by space, and by channels but for classes."""
    first = inputs[0]
    found = _by_sample(inputs, output, Whole.PARTIAL)
    if Dimension.SAMPLE not in found or op.whole_samples:
        return Rule(found)
    cuts: dict[tuple[int, int], Cut] = {}
    for dim, role in enumerate(first.roles):
        if role is None or role not in {*_OWN_SPACE, Dimension.OUT_CHANNEL} or (op.of_classes and dim == 1):
            continue
        without = 1 if op.of_classes and dim > 1 else 0  # targets that are numbers of classes lack that dimension
        places = [dim if spec.shape == first.shape else dim - without for spec in inputs]
        whole = {first.shape, (*first.shape[:1], *first.shape[2:])} if op.of_classes else {first.shape}
        if all(spec.shape in whole for spec in inputs):
            found[role] = Effect(tuple(places), Whole.PARTIAL)
            cut = CHUNK if role is Dimension.OUT_CHANNEL else BALANCED
            cuts |= dict.fromkeys(enumerate(places), cut)  # roles of the targets do not matter
    return Rule(found, cuts)


def _interpolation_windows(op: Interpolate, source: TensorSpec, output: TensorSpec) -> list[AnyWindow | None]:
    if op.mode in {"cubic", "area"}:
        return [None] * (len(output.shape) - 2)
    return [
        InterpolationWindow(m, interpolation_step(op, k, n, m), op.mode, op.align_corners)
        for k, (n, m) in enumerate(zip(source.shape[2:], output.shape[2:], strict=True))
    ]


def interpolation_step(op: Interpolate, k: int, in_size: int, out_size: int) -> float:
    """Return the input positions per output position of dimension k of space, as torch computes it."""
    if op.align_corners:
        return (in_size - 1) / (out_size - 1) if out_size > 1 else 0.0
    return 1.0 / op.scale[k] if op.scale is not None else in_size / out_size


def _redistribute(inputs: Specs, output: TensorSpec) -> Rule:
    shared = {Dimension.BROADCAST: Effect((Whole.SHARED,), Whole.SHARED)}
    return Rule({**_pointwise(inputs, output).effects, **shared})


def _reshape(groups: tuple[tuple[int, int, int, int], ...], inputs: Specs, output: TensorSpec) -> Rule:
    """Return the rule of a reshape: the outermost dimension of each group can be cut on both sides."""
    (source,) = inputs
    found = _replicate(inputs)
    windows: dict[tuple[int, int], Cut] = {}
    units: dict[int, int] = {}
    for first, _, out, _ in groups:
        role = output.roles[out] if out < len(output.shape) else None
        if role is None or first >= len(source.shape):
            continue
        if role is Dimension.SAMPLE:
            if source.roles[first] is Dimension.SAMPLE:
                found[role] = Effect((first,), out)
            continue
        n, m = source.shape[first], output.shape[out]
        if source.roles[first] is Dimension.SAMPLE or (n % m and m % n):
            continue
        found[role] = Effect((first,), out)
        rule_of_cut = CutRule.CHUNK if role is Dimension.OUT_CHANNEL else CutRule.BALANCED
        if n > m:
            windows[0, first] = Cut(rule_of_cut, n // m)
        elif m > n:
            units[out] = m // n
    return Rule(found, windows, units)


def activation_cuts(spec: TensorSpec, units: Mapping[int, int] = MappingProxyType({})) -> tuple[Cut, ...]:
    """Return how the dimensions of an activation are cut: channels by chunk, all else balanced."""
    found = []
    for dim, role in enumerate(spec.roles):
        if role is Dimension.SAMPLE:
            found.append(BALANCED if spec.sample_rows == 1 else Cut(unit=spec.sample_rows))
        elif role is Dimension.OUT_CHANNEL:
            found.append(CHUNK if dim not in units else Cut(CutRule.CHUNK, units[dim]))
        else:
            found.append(BALANCED if dim not in units else Cut(unit=units[dim]))
    return tuple(found)


def _input_cuts(rule_: Rule, position: int, spec: TensorSpec, op: Op, output: tuple[Cut, ...]) -> tuple[Cut, ...]:
    """Return how an operator cuts an input: as the output dimension that it follows, reductions and windows apart."""
    cuts = list(activation_cuts(spec))
    for role, effect in rule_.effects.items():
        dim = effect.inputs[position]
        if isinstance(dim, int) and isinstance(effect.output, int) and role is not Dimension.SAMPLE:
            cuts[dim] = Cut(output[effect.output].rule)
    if isinstance(op, Conv | ConvTranspose | Linear):
        cuts[channel_dim(op, spec)] = CHUNK
    for (k, dim), cut in rule_.windows.items():
        if k == position:
            cuts[dim] = cut
    return tuple(cuts)


def channel_dim(op: Op, spec: TensorSpec) -> int:
    """Return the dimension of a tensor that this operator takes for the channels."""
    if isinstance(op, Linear):
        return len(spec.shape) - 1
    if isinstance(op, Conv | ConvTranspose):
        return 1
    found = spec.dim_of(Dimension.OUT_CHANNEL)
    return min(1, len(spec.shape) - 1) if found is None else found


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


@dataclass(frozen=True, slots=True)
class _Held:
    """What the layouts of a parameter depend on; attributes as of ``Parameter``."""

    shape: tuple[int, ...]
    out_dim: int | None
    in_dim: int | None
    whole: bool
    trainable: bool


def _param_placement(parameter: _Held, dimension: Dimension, computed: Placement) -> Placement:
    """Return how a mesh axis holds a parameter.

    Where the axis leaves partial sums, only what is multiplied before they are resolved is cut. All else works
    behind that: on equal copies, or on the channels of its rank.
    """
    if dimension in {Dimension.REPLICATE, Dimension.BROADCAST}:
        return Whole.EQUAL
    if computed is Whole.PARTIAL and parameter.in_dim is not None:
        return parameter.in_dim
    if computed is Whole.PARTIAL and dimension is not Dimension.IN_CHANNEL_SCATTER:
        return Whole.EQUAL
    by_channel = dimension in {Dimension.OUT_CHANNEL, Dimension.IN_CHANNEL_SCATTER}
    return parameter.out_dim if by_channel and parameter.out_dim is not None and not parameter.whole else Whole.SHARED


@dataclass(frozen=True, slots=True)
class _Tensors:
    """The layouts of a layer's tensors, by placements."""

    inputs: tuple[LayoutFamily, ...]
    output: LayoutFamily
    params: tuple[LayoutFamily, ...]

    def with_shares(self, shares: tuple[Shares, ...]) -> "_Tensors":
        """Return them with shares of the mesh axes."""
        if not shares:
            return self
        inputs, output, params = (
            [family(t.shape, t.mesh, t.cuts, shares) for t in each]
            for each in (self.inputs, (self.output,), self.params)
        )
        return _Tensors(tuple(inputs), output[0], tuple(params))


@dataclass(frozen=True)
class Partition:
    """How a layer's tensors lie on a mesh under any split; each split is worked out once.

    Attributes:
        op, inputs, output: the operator with the tensors that it reads and makes.
        params: of the layer.
        mesh: the ranks.
    """

    op: Op
    inputs: Specs
    output: TensorSpec
    params: tuple[_Held, ...]
    mesh: Mesh
    _found: dict[Split, LayerLayouts] = field(default_factory=dict, compare=False, repr=False)

    @functools.cached_property
    def effects(self) -> Mapping[Dimension, Effect]:
        """What each legal dimension does."""
        return self._rule.effects

    @functools.cached_property
    def _rule(self) -> Rule:
        return rule(self.op, self.inputs, self.output)

    @functools.cached_property
    def _tensors(self) -> _Tensors:
        op, output, found = self.op, self.output, self._rule
        cuts = list(activation_cuts(output, found.output_units))
        if isinstance(op, Conv | ConvTranspose | Linear):
            cuts[channel_dim(op, output)] = CHUNK
        output_cuts = tuple(cuts)
        return _Tensors(
            inputs=tuple(
                family(spec.shape, self.mesh, _input_cuts(found, k, spec, op, output_cuts))
                for k, spec in enumerate(self.inputs)
            ),
            output=family(output.shape, self.mesh, output_cuts),
            params=tuple(family(p.shape, self.mesh, (CHUNK,) * len(p.shape)) for p in self.params),
        )

    @functools.cached_property
    def _held(self) -> Mapping[_Held, Mapping[Dimension, Placement]]:
        """How an axis that splits a dimension holds each parameter; those that lie alike are one entry."""
        return {p: {d: _param_placement(p, d, e.output) for d, e in self.effects.items()} for p in self.params}

    def layouts(self, split: Split) -> LayerLayouts:
        """Return every layout under a split.

        Raises:
            KeyError: the split uses a dimension that is illegal for the operator.
        """
        found = self._found.get(split)
        if found is None:
            tensors = self._enlarged(dict(split.tiles)) if split.tiles else self._tensors
            found = self._found[split] = self._layouts(tensors.with_shares(split.weights), split.dimensions)
        return found

    def _enlarged(self, tiles: Mapping[int, tuple[Interval, ...]]) -> _Tensors:
        """Return the tensors where ranks compute these intervals of output dimensions, and read what they need."""
        plain = self._tensors
        cuts = [list(x.cuts) for x in plain.inputs]
        for effect in self.effects.values():
            for own, dim in zip(cuts, effect.inputs, strict=True):
                if isinstance(dim, int) and isinstance(effect.output, int) and effect.output in tiles:
                    own[dim] = replace(own[dim], tiles=tiles[effect.output])
        output = tuple(replace(c, tiles=tiles[d]) if d in tiles else c for d, c in enumerate(plain.output.cuts))
        return _Tensors(
            tuple(family(x.shape, self.mesh, tuple(own)) for x, own in zip(plain.inputs, cuts, strict=True)),
            family(plain.output.shape, self.mesh, output),
            plain.params,
        )

    def _layouts(self, tensors: _Tensors, dimensions: tuple[Dimension, ...]) -> LayerLayouts:
        chosen = [self.effects[d] for d in dimensions]
        computed = tensors.output.at(tuple(e.output for e in chosen))
        channel = channel_dim(self.op, self.output)
        resolved = tuple(_resolved(d, e.output, channel) for d, e in zip(dimensions, chosen, strict=True))
        held = {p: tuple(self._held[p][d] for d in dimensions) for p in self._held}
        return LayerLayouts(
            inputs=tuple(t.at(tuple(e.inputs[k] for e in chosen)) for k, t in enumerate(tensors.inputs)),
            computed=computed,
            output=tensors.output.at(resolved),
            params=tuple(t.at(held[p]) for t, p in zip(tensors.params, self.params, strict=True)),
        )

    def is_legal(self, split: Split) -> bool:
        """Return whether the layer may be split so: known dimensions, no empty piece, whole groups, real samples."""
        if any(dimension not in self.effects for dimension in split.dimensions) or not self._allows_shares(split):
            return False
        found = self.layouts(split)
        if any(layout.has_empty_piece() for layout in (*found.inputs, found.output, *found.params)):
            return False
        match self.op:
            case Conv(groups=groups) | ConvTranspose(groups=groups) if groups > 1:
                return _on_borders(found.output, self.op.out_channels // groups, groups) and _on_borders(
                    found.inputs[0], self.op.in_channels // groups, groups
                )
            case GroupNorm(groups=groups, channels=channels):
                return _on_borders(found.output, channels // groups, groups)
            case _:
                return True

    def _allows_shares(self, split: Split) -> bool:
        """Return whether shares have a meaning, and a rank that is idle can hold nothing.

        What is cut has no weight of 0; what is not cut has one weight that is not 0. A number has no part that could
        be empty, and constants of the model are computed by every rank from whole parameters.
        """
        given = dict(split.shares)
        sizes = {axis.name: axis.size for axis in self.mesh.axes}
        for axis, dimension in split.axes:
            own = given.get(axis)
            if own is None:
                continue
            is_cut = dimension not in {Dimension.REPLICATE, Dimension.BROADCAST}
            if len(own) != sizes[axis] or (0 in own) == is_cut or dimension is Dimension.BROADCAST:
                return False
            if not is_cut and (own.count(0) != len(own) - 1 or not self._may_be_idle):
                return False
        return True

    @functools.cached_property
    def _may_be_idle(self) -> bool:
        """Whether a rank can hold nothing of the layer."""
        shapes = [spec.shape for spec in (*self.inputs, self.output)]
        trained = [held.shape for held in self.params if held.trainable]
        return all((*shapes, *trained)) and not any(held.whole for held in self.params)


_partition = functools.lru_cache(maxsize=1 << 12)(Partition)


def partition(layer: Layer, inputs: Specs, mesh: Mesh) -> Partition:
    """Return how the tensors of a layer lie on a mesh; layers that look alike share it.

    Args:
        layer: the layer.
        inputs: the tensors that it reads.
        mesh: the ranks.
    """
    params = tuple(_Held(p.spec.shape, p.out_dim, p.in_dim, p.whole, p.trainable) for p in layer.params)
    return _partition(layer.op, inputs, layer.output, params, mesh)


def _resolved(dimension: Dimension, placement: Placement, channel: int) -> Placement:
    if placement is not Whole.PARTIAL:
        return placement
    return channel if dimension is Dimension.IN_CHANNEL_SCATTER else Whole.EQUAL


def layouts(layer: Layer, inputs: tuple[TensorSpec, ...], mesh: Mesh, split: Split) -> LayerLayouts:
    """Return every layout of a layer under a split.

    Raises:
        KeyError: the split uses a dimension that is illegal for the operator.
    """
    return partition(layer, inputs, mesh).layouts(split)


def reduced_axes(output: TensorSpec, layout: Layout) -> tuple[int, ...]:
    """Return the mesh axes over which batch norm statistics are sums: those that cut samples or space."""
    channel = output.dim_of(Dimension.OUT_CHANNEL)
    return tuple(i for i, p in enumerate(layout.placements) if isinstance(p, int) and p != channel)


def has_statistics(layer: Layer, layout: Layout) -> bool:
    """Return whether batch norms of a layer see more than one value of each channel in every rank's piece, or none.

    Of one value there are no statistics: torch refuses to train with it. A batch norm that gets no more in one piece
    either is in eval mode and needs none: planning refuses others.
    """
    if not any(isinstance(op, BatchNorm) for op in (layer.op, *(each.op for each in layer.absorbed))):
        return True
    channel = layer.output.dim_of(Dimension.OUT_CHANNEL)
    others = [dim for dim in range(len(layout.shape)) if dim != channel]
    whole = math.prod(layout.shape[dim] for dim in others)
    return whole <= 1 or math.prod(min(b - a for a, b in layout.pieces(dim) if a < b) for dim in others) > 1


def spatial_axes(output: TensorSpec, layout: Layout) -> tuple[int, ...]:
    """Return the mesh axes over which group norm statistics are sums: those that cut space."""
    return tuple(i for i, p in enumerate(layout.placements) if isinstance(p, int) and _is_space(output, p))


def _is_space(spec: TensorSpec, dim: int) -> bool:
    return spec.roles[dim] in _OWN_SPACE


def is_legal(layer: Layer, graph: LayerGraph, mesh: Mesh, split: Split) -> bool:
    """Return whether a layer may be split so, as ``Partition.is_legal``."""
    return partition(layer, graph.inputs_of(layer), mesh).is_legal(split)


def _on_borders(layout: Layout, unit: int, groups: int) -> bool:
    """Return whether the channel pieces consist of whole groups, as many on input as on output."""
    placements = tuple(0 if p == 1 else Whole.EQUAL for p in layout.placements)
    shares = tuple(own if p == 1 else None for p, own in zip(layout.placements, layout.shares, strict=False))
    expected = family((groups,), layout.mesh, (CHUNK,), shares).at(placements)
    return layout.pieces(1) == tuple((a * unit, b * unit) for a, b in expected.pieces(0))


def io_splits(layer: Layer, mesh: Mesh, io: InputOutput, allowed: Collection[Dimension]) -> tuple[Split, ...]:
    """Return the splits that an input or output of the model may take: one, but where ranks pass regions."""
    spec = layer.output
    if io is not InputOutput.LOCAL:
        sample = io is InputOutput.PER_RANK and spec.sample_dim is not None
        return (Split.of(mesh, (Dimension.SAMPLE if sample else Dimension.REPLICATE,) * len(mesh.axes)),)
    dims = [d for d in Dimension if d is Dimension.REPLICATE or (d in _LOCAL and d in allowed)]
    return _legal(_partition(Input(), (), spec, (), mesh), dims, mesh)


def is_io_legal(layer: Layer, mesh: Mesh, io: InputOutput, split: Split) -> bool:
    """Return whether an input or output of the model may be split so; where it is cut, in any shares but 0."""
    if Split(split.axes) not in io_splits(layer, mesh, io, frozenset(Dimension)):
        return False
    is_busy = not any(0 in weights for _, weights in split.shares)
    return is_busy and _partition(Input(), (), layer.output, (), mesh).is_legal(split)


def io_layout(spec: TensorSpec, mesh: Mesh, split: Split) -> Layout:
    """Return which region of an input or output of the model, or of what is received, each rank passes or gets."""
    regions = tuple(Dimension.REPLICATE if d is Dimension.BROADCAST else d for d in split.dimensions)
    kept = Split.of(mesh, regions).with_shares(dict(split.shares))
    return _partition(Input(), (), spec, (), mesh).layouts(kept).output


def legal_splits(
    layer: Layer, graph: LayerGraph, mesh: Mesh, io: InputOutput, allowed: Iterable[Dimension]
) -> tuple[Split, ...]:
    """Return the legal splits of a layer, in a fixed order; ``replicate`` is always allowed, io apart."""
    if isinstance(layer.op, Input | Output):
        return io_splits(layer, mesh, io, frozenset(allowed))
    permitted = {*allowed, Dimension.REPLICATE, Dimension.BROADCAST}
    found = partition(layer, graph.inputs_of(layer), mesh)
    return _legal(found, [d for d in Dimension if d in permitted and d in found.effects], mesh)


def _legal(found: Partition, dims: Sequence[Dimension], mesh: Mesh) -> tuple[Split, ...]:
    """Return the legal splits over some dimensions, in a fixed order."""
    candidates = (Split.of(mesh, choice) for choice in itertools.product(dims, repeat=len(mesh.axes)))
    return tuple(split for split in candidates if found.is_legal(split))
