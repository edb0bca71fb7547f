"""Halo exchanges: which edges are some, and what of them computation hides.

``runtime.lowering.halo`` runs a convolution together with the exchange of its borders. Blocking, a step waits for the
whole exchange, and the neighbours' rows are put beside the own piece, forward and again backward: only the rows are
kept (of pieces of a few thousand elements, what was put together). Overlapped,

- forward, the exchange runs beside the outputs that need only own rows; the others come behind it, in strips, and all
  are joined;
- backward, the gradient's exchange runs beside the gradient of the weight.

Where outputs lie as inputs do, what the neighbours' rows add is computed beside all that the own piece gives, forward
and backward, and nothing is joined: the exchanges run beside all of that.

What that saves and costs is known for each pair of splits before anything is searched. So the matrices of an edge hold
the smaller of both, no solver needs to know, and what a choice overlaps follows from it.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING

from planner.cost.exchange import exchanged
from planner.devices.measured import CollectiveKind
from planner.ir.dimension import SPATIAL_DIMENSIONS
from planner.ir.graph import Layer
from planner.ir.halo import Window, is_sum
from planner.ir.layout import Layout, Placement
from planner.ir.ops import Conv
from planner.ir.split import Split
from planner.ir.transfer import is_halo, steps
from planner.profile.key import LocalLayer

if TYPE_CHECKING:
    from planner.cost.model import CostModel
    from planner.cost.table import EdgeCost

Shape = tuple[int, ...]

_SPACE = 2
"""The first dimension of space."""
COPY_PASSES = 2
"""How often a piece is read or written when it is put beside the neighbours' rows, or outputs are joined."""
_BORDER_PASSES = 4, 5
"""How often rows are read or written that are sent, or come: forward they are copied into the message and out of it,
backward they are added to what is there."""


class HaloOverlap(StrEnum):
    """Which halo exchanges run beside computation."""

    AUTO = "auto"
    """Those where that is predicted to be faster."""
    ALWAYS = "always"
    NEVER = "never"


@dataclass(frozen=True, slots=True)
class HaloPair:
    """A halo exchange between one pair of splits, in seconds.

    Attributes:
        whole_s: both transfers, hidden or not.
        forward_s, backward_s: what a step takes longer for them: what is not hidden, and copies; if overlapped, also
            what cutting the computation costs.
        hidden_s: the part of the transfer backward that runs beside computation.
        is_overlapped: computation goes on meanwhile.
        has_frame: backward puts the piece and the neighbours' rows into one tensor.
    """

    whole_s: float
    forward_s: float
    backward_s: float
    hidden_s: float
    is_overlapped: bool
    has_frame: bool


Halos = Mapping[tuple[int, int], HaloPair]
"""By the positions of producer's and consumer's splits."""
NO_HALOS: Halos = {}


@dataclass(frozen=True, slots=True)
class Cutting:
    """A convolution in parts, in seconds: what the exchanges can hide behind, and what that costs.

    Attributes:
        ahead_s: of forward, what needs no neighbour; 0 where there is no such thing.
        ahead_back_s: of backward, what no neighbour needs.
        extra_s, extra_back_s: by how much all parts take longer than the whole, put together.
        frame_s: putting rows beside the own piece, for the whole.
        is_sum: outputs are sums of what the own piece and the neighbours' rows give, each by itself.
    """

    ahead_s: float
    ahead_back_s: float
    extra_s: float
    extra_back_s: float
    frame_s: float
    is_sum: bool = False


def may_have_halo(consumer: Layer, position: int) -> bool:
    """Return whether the runtime may run an input's exchange together with a layer's operator."""
    op = consumer.op
    return isinstance(op, Conv) and not op.computed_weight and op.padding_mode == "zeros" and position == 0


def with_halos(
    model: "CostModel", splits: tuple[Sequence[Split], Sequence[Split]], layers: tuple[Layer, Layer], edge: "EdgeCost"
) -> "EdgeCost":
    """Return an edge from a producer to a convolution with the halos among its pairs of splits.

    Args:
        model: prices the pieces.
        splits: of producer and consumer.
        layers: producer and consumer.
        edge: with every transfer blocking.
    """
    halos = dict(_halos(model, splits, layers, edge))
    if not halos:
        return edge
    forward_s, backward_s = edge.forward_s.copy(), edge.backward_s.copy()
    for pair, halo in halos.items():
        forward_s[pair], backward_s[pair] = halo.forward_s, halo.backward_s
    return replace(edge, forward_s=forward_s, backward_s=backward_s, halos=halos)


def _halos(
    model: "CostModel", splits: tuple[Sequence[Split], Sequence[Split]], layers: tuple[Layer, Layer], edge: "EdgeCost"
) -> Iterator[tuple[tuple[int, int], HaloPair]]:
    if not any(d in SPATIAL_DIMENSIONS for split in splits[1] for d in split.dimensions):
        return
    producer, consumer = layers
    makes, reads = model.partition(producer), model.partition(consumer)
    producers: dict[tuple[Placement, ...], list[int]] = defaultdict(list)
    haves = [makes.layouts(split).output for split in splits[0]]
    for i, have in enumerate(haves):
        producers[have.placements].append(i)
    for j, split in enumerate(splits[1]):
        need = reads.layouts(split).inputs[0]
        if not any(isinstance(p, int) and p >= _SPACE for p in need.placements):
            continue
        found = [i for i in producers.get(need.placements, ()) if is_halo(haves[i], need)]
        item_bytes = model.settings.activation_dtype(producer.output.dtype).item_bytes
        for have in dict.fromkeys(haves[i] for i in found):
            cutting = _cutting(model, consumer, split, have, need)
            axes = steps(have, need)[0].axes
            there_s, back_s = _borders_s(model, have, need, item_bytes)
            times = there_s, back_s if model.flows[producer.id] else 0.0
            for i in (i for i in found if haves[i] == have):
                yield (i, j), _pair(model, times, _slowed(model, axes, float(edge.num_bytes[i, j]) / 2), cutting)


def _borders_s(model: "CostModel", have: Layout, need: Layout, item_bytes: int) -> tuple[float, float]:
    """Return what the exchange of rows takes, and that of their gradients.

    Nothing but what is sent is copied: the own piece is put into the frame by itself (``Cutting.frame_s``), and its
    gradient stays where it is.
    """
    found = []
    for passes, (source, target) in zip(_BORDER_PASSES, ((have, need), (need.gradient, have.gradient)), strict=True):
        (step,) = steps(source, target)
        num_bytes = exchanged(source, target, step.axes).moved * item_bytes
        found.append(model.pricer.move(step.kind, step.axes, num_bytes, passes * num_bytes).seconds)
    return found[0], found[1]


def _pair(model: "CostModel", times: tuple[float, float], slowed: float, cutting: Cutting) -> HaloPair:
    """Return the better of a blocking and an overlapped exchange.

    Args:
        model: with the user's wish.
        times: of the transfers forward and backward.
        slowed: seconds that computation loses for each second that a transfer runs beside it.
        cutting: of the convolution.
    """
    there_s, back_s = times
    frame_s = cutting.frame_s
    blocking = HaloPair(there_s + back_s, there_s + frame_s, back_s + frame_s, 0.0, is_overlapped=False, has_frame=True)
    hidden_s, hidden_back_s = min(there_s, cutting.ahead_s), min(back_s, cutting.ahead_back_s)
    overlapped = HaloPair(
        there_s + back_s,
        there_s - hidden_s + cutting.extra_s + slowed * hidden_s,
        back_s - hidden_back_s + cutting.extra_back_s + slowed * hidden_back_s,
        hidden_back_s, is_overlapped=True, has_frame=not cutting.is_sum,
    )  # fmt: skip
    wish = model.settings.halo_overlap
    if wish is HaloOverlap.NEVER or not cutting.ahead_s:
        return blocking
    gain_s = blocking.forward_s + blocking.backward_s - overlapped.forward_s - overlapped.backward_s
    return overlapped if wish is HaloOverlap.ALWAYS or gain_s > 0 else blocking


def _slowed(model: "CostModel", axes: tuple[int, ...], num_bytes: float) -> float:
    """Return how much of its time a transfer takes from computation beside it: as measured of all-reduces."""
    behind = model.pricer.reduction(axes, max(int(num_bytes), 1), CollectiveKind.ALL_REDUCE)
    return min(behind.lost_s / behind.loaded_s, 1.0) if behind.loaded_s else 0.0


def _cutting(model: "CostModel", layer: Layer, split: Split, have: Layout, need: Layout) -> Cutting:
    """Return what a convolution under a split takes in parts; on the largest piece, with neighbours on both sides."""
    assert isinstance(layer.op, Conv)
    bare = replace(layer, absorbed=())
    local = model.local(bare, split)
    whole = model.crew.time(local)
    bandwidth_s = local.dtype.item_bytes * COPY_PASSES / model.crew.bandwidth_bytes_per_s
    join_s, frame_s = bandwidth_s * math.prod(local.output), bandwidth_s * math.prod(local.inputs[0])
    in_one = model.profile.estimate(local)  # parts are estimated, and are off as the whole is
    forward, backward = _ratio(whole.forward_s, in_one.forward_s), _ratio(whole.backward_s, in_one.backward_s)
    if is_sum(layer.op, have, model.partition(layer).layouts(split).computed):
        shares = [(n, model.profile.estimate(share)) for n, share in _shares(layer.op, have, need, local)]
        extra_s = forward * sum(n * share.forward_s for n, share in shares)
        extra_back_s = backward * sum(n * share.backward_s for n, share in shares)
        return Cutting(whole.forward_s, whole.backward_s, extra_s, extra_back_s, frame_s, is_sum=True)
    parts = _parts(layer, have, need, local.output)
    if not parts:
        return Cutting(0.0, 0.0, 0.0, 0.0, frame_s)
    forward_s = [forward * model.profile.estimate(_with_output(local, part)).forward_s for part in parts]
    weight = model.crew.time(replace(local, input_gradient=False))
    extra_s = max(sum(forward_s) - whole.forward_s, 0.0) + join_s
    return Cutting(forward_s[0], min(weight.backward_s, whole.backward_s), extra_s, frame_s, frame_s)


def _ratio(a: float, b: float) -> float:
    return a / b if b else 0.0


def _shares(op: Conv, have: Layout, need: Layout, local: LocalLayer) -> Iterator[tuple[int, LocalLayer]]:
    """Yield pieces that neighbours' rows and corners are convolved in, with how many there are of each size."""
    own, whole = have.largest_shape(), need.shape
    neighbours = []
    for dim, padding in enumerate(op.padding, start=_SPACE):
        is_cut = dim in need.placements and own[dim] < whole[dim] and padding
        neighbours.append(0 if not is_cut else 1 if 2 * own[dim] >= whole[dim] else 2)
    for beyond in itertools.product(*((False, True) if n else (False,) for n in neighbours)):
        if any(beyond):
            count = math.prod(n for n, is_beyond in zip(neighbours, beyond, strict=True) if is_beyond)
            yield count, _share(op, local, beyond)


def _share(op: Conv, local: LocalLayer, beyond: Sequence[bool]) -> LocalLayer:
    """Return the piece that rows of a neighbour are convolved in, with as much of the kernel as reaches them.

    Args:
        op: the convolution.
        local: the own piece.
        beyond: whether the neighbour lies beside the own piece, of each dimension of space.
    """
    x, output, kernel, padding = (list(shape) for shape in (local.inputs[0], local.output, op.kernel, op.padding))
    for k, is_beyond in enumerate(beyond):
        if is_beyond:
            rows, window = op.padding[k], Window(output[k + _SPACE], kernel[k], 1, op.padding[k], op.dilation[k])
            found = window.reached((0, output[k + _SPACE]), (-rows, 0))
            assert found is not None
            kernel[k], padding[k], output[k + _SPACE] = found.num_taps, 0, found.stop - found.start
            x[k + _SPACE] = output[k + _SPACE] + op.dilation[k] * (kernel[k] - 1)
    params = tuple((*p[:_SPACE], *kernel) if len(p) == len(x) else p for p in local.params)
    layer = replace(local.layer, op=replace(op, kernel=tuple(kernel), padding=tuple(padding)))
    return replace(local, layer=layer, inputs=(tuple(x),), output=tuple(output), params=params)


def _parts(layer: Layer, have: Layout, need: Layout, output: Shape) -> list[Shape]:
    """Return the output shapes of the interior and of the strips around it; none where all outputs need neighbours."""
    op = layer.op
    assert isinstance(op, Conv)
    own, whole = have.largest_shape(), need.shape
    interior = list(output)
    for k in range(len(op.kernel)):
        dim = k + _SPACE
        if dim in need.placements and own[dim] < whole[dim]:
            fit = (own[dim] - 1 - op.dilation[k] * (op.kernel[k] - 1)) // op.stride[k] + 1
            interior[dim] = min(fit, output[dim])
            if interior[dim] <= 0:
                return []
    parts = [tuple(interior)]
    for dim in range(_SPACE, len(output)):
        rest = output[dim] - interior[dim]
        sides = [rows for rows in (rest - rest // 2, rest // 2) if rows]
        parts += [(*interior[:dim], rows, *output[dim + 1 :]) for rows in sides]
    return parts


def _with_output(local: LocalLayer, output: Shape) -> LocalLayer:
    """Return a piece with fewer outputs, and the rows that they read."""
    op = local.layer.op
    assert isinstance(op, Conv)
    (x,) = local.inputs
    read = list(x)
    for k, (rows, all_rows) in enumerate(zip(output[_SPACE:], local.output[_SPACE:], strict=True)):
        if rows < all_rows:
            read[k + _SPACE] = min((rows - 1) * op.stride[k] + op.dilation[k] * (op.kernel[k] - 1) + 1, x[k + _SPACE])
    return replace(local, inputs=(tuple(read),), output=output)
