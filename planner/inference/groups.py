"""From layers to groups of neurons: what each computes, holds, sends, and whom it reads [Oliveira19, Section 4]."""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from planner.errors import UsageError
from planner.inference.problem import GroupGraph, Integers, Layer
from planner.ir import graph as ir
from planner.ir.count import multiply_adds
from planner.ir.dimension import SPATIAL_DIMENSIONS, Dimension
from planner.ir.layout import balanced_pieces
from planner.ir.ops import Input, Output, Permute, Pool, Redistribute, Reshape, describe
from planner.ir.rules import Rule, rule
from planner.ir.split import LayerId
from planner.units import format_count

MAX_GROUPS: Final = 20_000
Interval = tuple[int, int]


@dataclass(frozen=True, slots=True)
class _Cut:
    """One layer in pieces.

    Attributes:
        layer: of the layer graph.
        rule: of its operator.
        pieces: intervals of every dimension of the output that is cut, by its position.
        roles: what these dimensions hold.
        first: number of its first group.
    """

    layer: ir.Layer
    rule: Rule
    pieces: Mapping[int, tuple[Interval, ...]]
    roles: Mapping[int, Dimension]
    first: int

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(map(len, self.pieces.values()))

    @property
    def grid(self) -> tuple[tuple[str, int], ...]:
        return tuple((self.roles[d].value, len(pieces)) for d, pieces in self.pieces.items())

    def groups(self) -> Iterator[dict[int, Interval]]:
        """Yield what each group holds of every cut dimension, row-major."""
        for found in itertools.product(*self.pieces.values()):
            yield dict(zip(self.pieces, found, strict=True))


@dataclass(frozen=True, slots=True)
class _Source:
    """What a layer shows that is none here: another one, with every element in its place or not."""

    id: LayerId
    in_place: bool


def neuron_groups(
    graph: ir.LayerGraph, group: int | None, element_bytes: int = 4, exceptions: Mapping[str, int] | None = None
) -> GroupGraph:
    """Cut a network into groups of neurons, for one inference.

    Positions of an image are grouped in squares (in lines for one dimension, in cubes for three) with all their
    channels; layers without space in ``group ** 2`` neighbouring neurons. A layer whose operator cannot be cut so is
    one group. Reshapes and permutations cost nothing and are no layers here; what stands behind one reads all of what
    stands before it.

    Counted per group: multiplications and additions, one more for every element of other operators, and as many as its
    window holds for a pool; outputs and, where channels are cut, their weights. Other weights are shared: a device with
    any group of the layer holds all of them. Weights that two layers share count with both.

    Args:
        graph: of a batch of one sample, as it runs in evaluation.
        group: side of the squares; None for whole layers.
        element_bytes: of each number, activation or weight.
        exceptions: layers with another side.

    Raises:
        UsageError: the graph is for several samples, or there would be too many groups.
    """
    if graph.batch != 1:
        raise UsageError(f"an inference is of one sample, and {graph.name} was traced for {graph.batch}")
    cuts: dict[LayerId, _Cut] = {}
    source: dict[LayerId, _Source] = {}
    num = 0
    for layer in graph.layers:
        if isinstance(layer.op, Redistribute | Reshape | Permute | Output) and not layer.params:
            before = source.get(layer.inputs[0], _Source(layer.inputs[0], in_place=True))
            source[layer.id] = _Source(before.id, before.in_place and isinstance(layer.op, Redistribute))
            continue
        side = (exceptions or {}).get(layer.id, group)
        cuts[layer.id] = cut = _cut(graph, layer, side, num)
        num += math.prod(cut.shape)
        if num > MAX_GROUPS:
            raise UsageError(
                f"{graph.name} has more than {format_count(MAX_GROUPS)} groups of neurons at --group {group}; "
                "take larger groups"
            )
    parts = list(cuts.values())
    weights = [_weights(cut, element_bytes) for cut in parts]
    shared = [total - own for total, own in weights]
    sizes = [math.prod(cut.shape) for cut in parts]
    elements = np.array([_elements(cut, piece) for cut in parts for piece in cut.groups()], np.int64)
    whole = np.repeat([max(cut.layer.output.numel, 1) for cut in parts], sizes)
    own = np.repeat(np.array([own for _, own in weights], np.int64), sizes) * elements // whole
    return GroupGraph(
        graph.name,
        tuple(
            Layer(cut.layer.id, describe(cut.layer.op), cut.grid, num_shared)
            for cut, num_shared in zip(parts, shared, strict=True)
        ),
        np.repeat(np.arange(len(parts)), sizes),
        np.repeat(np.array([_flop(graph, cut.layer) for cut in parts], np.float64), sizes) * elements / whole,
        elements * element_bytes + own,
        elements * element_bytes,
        _edges(graph, cuts, source),
        np.flatnonzero(np.repeat([isinstance(cut.layer.op, Input) for cut in parts], sizes)),
    )  # fmt: skip


def _cut(graph: ir.LayerGraph, layer: ir.Layer, side: int | None, first: int) -> _Cut:
    """Return a layer in pieces: by space where it has any, else by channels."""
    found = rule(layer.op, graph.inputs_of(layer), layer.output)
    legal = {e.output: d for d, e in found.effects.items() if isinstance(e.output, int) and d is not Dimension.SAMPLE}
    space = {d: r for d, r in legal.items() if r in SPATIAL_DIMENSIONS and layer.output.shape[d] > 1}
    channels = {d: r for d, r in legal.items() if r is Dimension.OUT_CHANNEL and d not in found.output_units}
    roles = dict(sorted((space or channels).items())) if side is not None and layer.follows is None else {}
    width = 1 if side is None else side if space else side**2
    pieces = {d: balanced_pieces(n, max(n // width, 1)) for d in roles for n in (layer.output.shape[d],)}
    return _Cut(layer, found, pieces, roles, first)


def _elements(cut: _Cut, piece: Mapping[int, Interval]) -> int:
    sizes = list(cut.layer.output.shape)
    for d, (start, stop) in piece.items():
        sizes[d] = stop - start
    return math.prod(sizes)


def _flop(graph: ir.LayerGraph, layer: ir.Layer) -> float:
    shapes = [spec.shape for spec in graph.inputs_of(layer)]
    product = 2 * multiply_adds(layer.op, shapes, layer.output.shape) or getattr(layer.op, "forward_flop", 0)
    each = sum(_per_element(absorbed.op) for absorbed in layer.absorbed)
    if product:
        each += any(p.role == "bias" for p in layer.params)
    else:
        each += _per_element(layer.op)
    return float(product + each * layer.output.numel)


def _per_element(op: object) -> int:
    match op:
        case Input() | Output() | Reshape() | Permute():
            return 0
        case Pool(kernel=kernel):
            return math.prod(kernel)
        case _:
            return 1


def _weights(cut: _Cut, element_bytes: int) -> tuple[int, int]:
    """Return the bytes of all weights of a layer, and of those that its groups have for themselves, together."""
    by_channel = Dimension.OUT_CHANNEL in cut.roles.values()
    sizes = [
        (p.spec.numel * element_bytes, by_channel and p.out_dim is not None and not p.whole) for p in cut.layer.params
    ]
    return sum(size for size, _ in sizes), sum(size for size, is_own in sizes if is_own)


def _edges(graph: ir.LayerGraph, cuts: Mapping[LayerId, _Cut], source: Mapping[LayerId, _Source]) -> Integers:
    """Return (producer, reader) for every pair of which one reads an element of the other."""
    found = [np.empty((0, 2), np.int64)]
    for cut in cuts.values():
        for position, producer_id in enumerate(cut.layer.inputs):
            shown = source.get(producer_id, _Source(producer_id, in_place=True))
            producer = cuts[shown.id]
            members = np.arange(math.prod(producer.shape)).reshape(producer.shape) + producer.first
            for reader, piece in enumerate(cut.groups(), start=cut.first):
                region = _region(graph, cut, position, piece) if shown.in_place else {}
                read = members[tuple(_touched(p, region.get(d)) for d, p in producer.pieces.items())].ravel()
                found.append(np.stack([read, np.full_like(read, reader)], axis=1))
    return np.unique(np.concatenate(found), axis=0)


def _region(graph: ir.LayerGraph, cut: _Cut, position: int, piece: Mapping[int, Interval]) -> dict[int, Interval]:
    """Return which interval of each dimension of an input a group reads; dimensions that are missing, whole."""
    spec = graph.inputs_of(cut.layer)[position]
    found = {}
    for out_dim, (start, stop) in piece.items():
        dim = cut.rule.effects[cut.roles[out_dim]].inputs[position]
        if not isinstance(dim, int):
            continue
        window = cut.rule.windows.get((position, dim))
        if window is None:
            found[dim] = start, stop
        elif window.window is not None:
            found[dim] = window.window.input_interval(start, stop, spec.shape[dim])
    return found


def _touched(pieces: tuple[Interval, ...], wanted: Interval | None) -> slice:
    """Return the pieces that an interval meets."""
    if wanted is None:
        return slice(None)
    met = [i for i, (start, stop) in enumerate(pieces) if start < wanted[1] and wanted[0] < stop]
    return slice(met[0], met[-1] + 1) if met else slice(0, 0)
