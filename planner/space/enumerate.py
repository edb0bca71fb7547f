"""The search space: the legal splits of every layer on a mesh."""

import functools
import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from planner.deadline import look
from planner.errors import InfeasibleError
from planner.ir.dimension import Dimension
from planner.ir.graph import Layer, LayerGraph, is_pinned, tied_layers
from planner.ir.layout import Layout
from planner.ir.mesh import Mesh
from planner.ir.ops import Output, Redistribute
from planner.ir.rules import InputOutput, has_statistics, is_io_legal, is_legal, legal_splits, partition
from planner.ir.split import LayerId, Split
from planner.space.constraints import NO_CONSTRAINTS, Constraints, is_chosen, leaders, legal_text

ShareSets = Callable[[Layer], Sequence[Mapping[str, tuple[int, ...]]]]
"""Returns weights by mesh axis, each of them to be tried for a layer beside equal pieces."""


def equal_pieces(_: Layer) -> Sequence[Mapping[str, tuple[int, ...]]]:
    """Return no shares for any layer."""
    return ()


DEFAULT_DIMENSIONS = frozenset(
    {Dimension.SAMPLE, Dimension.OUT_CHANNEL, Dimension.IN_CHANNEL, Dimension.IN_CHANNEL_SCATTER}
)


@dataclass(frozen=True)
class SearchSpace:
    """The legal splits of every layer.

    Attributes:
        graph, mesh, io: what the space is for.
        splits: of every layer, never empty, in a fixed order.
        ties: groups of layers that the user wants to be split alike.
        narrowed_from: strategies of the space that this one is a part of; 0 where it is none.
    """

    graph: LayerGraph
    mesh: Mesh
    io: InputOutput
    splits: Mapping[LayerId, tuple[Split, ...]]
    ties: tuple[tuple[LayerId, ...], ...] = ()
    narrowed_from: float = 0.0

    @functools.cached_property
    def leaders(self) -> tuple[int, ...]:
        """For every layer the first of those that take its split: they share a parameter or a call, or are tied."""
        index = self.graph.index
        return leaders(tied_layers(self.graph), [[index[layer] for layer in group] for group in self.ties])

    @property
    def num_strategies(self) -> float:
        """How many strategies there are; inf where a float cannot hold it."""
        if self.narrowed_from:
            return self.narrowed_from
        try:
            return float(math.prod(len(s) for s in self.splits.values()))
        except OverflowError:
            return math.inf


def enumerate_splits(
    graph: LayerGraph,
    mesh: Mesh,
    io: InputOutput,
    dimensions: Collection[Dimension] = DEFAULT_DIMENSIONS,
    constraints: Constraints = NO_CONSTRAINTS,
    shares: ShareSets = equal_pieces,
    *,
    own_statistics: bool = False,
) -> SearchSpace:
    """Return the search space of a network on a mesh.

    A redistribute layer takes the layouts that its consumers ask for and the one its producer has. A rank that passes
    its own samples passes as many to every input, and gets as many from every output. With ``own_statistics`` a batch
    norm takes those of each rank's piece, which then has more than one value of each channel.

    Raises:
        InfeasibleError: the constraints leave a layer no legal split (without any, ``replicate`` is legal for all).
    """
    cache: dict[object, tuple[Split, ...]] = {}
    found: dict[LayerId, tuple[Split, ...]] = {}
    for layer in graph.layers:
        limits = constraints.limits(layer)
        behind = tuple(each.op for each in layer.absorbed) if own_statistics else ()
        key = (layer.op, behind, layer.output, graph.inputs_of(layer), tuple(p.spec for p in layer.params), limits)
        if key not in cache:
            look()
            legal = legal_splits(layer, graph, mesh, io, limits.permitted(dimensions))
            legal += _in_shares(legal, shares(layer), layer, graph, mesh, io)
            if own_statistics and not is_pinned(layer.op):
                lies = partition(layer, graph.inputs_of(layer), mesh)
                legal = tuple(s for s in legal if has_statistics(layer, lies.layouts(s).output))
            cache[key] = tuple(s for s in legal if limits.allows(s, dimensions)) if constraints else legal
        if not cache[key]:
            legal = legal_splits(layer, graph, mesh, io, frozenset(Dimension))
            raise InfeasibleError(
                f"layer {layer.id!r} ({layer.op.kind}) has no legal split left by --pin and --forbid on "
                f"{mesh.size} ranks. Legal are {legal_text(legal)}."
            )
        found[layer.id] = cache[key]
    found = _with_redistribution(graph, mesh, found)
    return SearchSpace(graph, mesh, io, found, (*constraints.tied(graph), *_tied_ends(graph, io, found)))


def _in_shares(
    splits: tuple[Split, ...],
    sets: Sequence[Mapping[str, tuple[int, ...]]],
    layer: Layer,
    graph: LayerGraph,
    mesh: Mesh,
    io: InputOutput,
) -> tuple[Split, ...]:
    """Return splits with shares of those axes that cut, as far as they are legal."""
    found: dict[Split, None] = {}
    whole = {Dimension.REPLICATE, Dimension.BROADCAST}
    for split, weights in itertools.product(splits, sets):
        own = {axis: weights[axis] for axis, d in split.axes if d not in whole and axis in weights}
        wanted = split.with_shares(own)
        is_end = is_pinned(layer.op)
        if own and (is_io_legal(layer, mesh, io, wanted) if is_end else is_legal(layer, graph, mesh, wanted)):
            found[wanted] = None
    return tuple(found)


def _tied_ends(
    graph: LayerGraph, io: InputOutput, splits: Mapping[LayerId, tuple[Split, ...]]
) -> tuple[tuple[LayerId, ...], ...]:
    """Return the inputs and outputs whose samples a rank passes and gets, where there is a choice of shares."""
    if io is not InputOutput.PER_RANK:
        return ()
    ends = tuple(x.id for x in graph.layers if is_pinned(x.op) and len(splits[x.id]) > 1)
    return (ends,) if len(ends) > 1 else ()


def pinned_space(
    graph: LayerGraph, mesh: Mesh, io: InputOutput, splits: Mapping[LayerId, tuple[Split, ...]]
) -> SearchSpace:
    """Return the space in which layers have only these splits; redistribute layers follow, the io is kept."""
    used = {d for own in splits.values() for split in own for d in split.dimensions}
    found = {
        layer.id: splits[layer.id] if is_chosen(layer) else legal_splits(layer, graph, mesh, io, used)
        for layer in graph.layers
    }
    return SearchSpace(graph, mesh, io, _with_redistribution(graph, mesh, found))


def _with_redistribution(
    graph: LayerGraph, mesh: Mesh, splits: Mapping[LayerId, tuple[Split, ...]]
) -> dict[LayerId, tuple[Split, ...]]:
    """Return the splits with those of redistribute layers cut down to what their neighbours ask for."""
    found = dict(splits)
    readers: dict[LayerId, list[Layer]] = {layer.id: [] for layer in graph.layers}
    for layer in graph.layers:
        for producer in dict.fromkeys(layer.inputs):
            readers[producer].append(layer)
    asked: dict[tuple[Split, ...], tuple[Split, ...]] = {}  # equal tuples become one object
    for layer in graph.layers:
        if isinstance(layer.op, Redistribute):
            own = _asked(layer, graph, mesh, found, readers[layer.id])
            found[layer.id] = asked.setdefault(own, own)
    return found


def _asked(
    layer: Layer,
    graph: LayerGraph,
    mesh: Mesh,
    splits: Mapping[LayerId, tuple[Split, ...]],
    readers: list[Layer],
) -> tuple[Split, ...]:
    """Return the splits of a redistribute layer whose layout a consumer asks for or the producer has."""
    producer = graph[layer.inputs[0]]
    lies = partition(producer, graph.inputs_of(producer), mesh)
    wanted = {_lying(lies.layouts(s).output) for s in splits[producer.id]}
    for reader in readers:
        if not isinstance(reader.op, Output):
            position, lies = reader.inputs.index(layer.id), partition(reader, graph.inputs_of(reader), mesh)
            wanted |= {_lying(lies.layouts(s).inputs[position]) for s in splits[reader.id]}
    lies = partition(layer, graph.inputs_of(layer), mesh)
    return tuple(s for s in splits[layer.id] if _lying(lies.layouts(s).output) in wanted)


def _lying(layout: Layout) -> tuple[object, object]:
    return layout.placements, layout.shares
