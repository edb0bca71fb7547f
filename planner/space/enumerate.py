"""The search space: the legal splits of every layer on a mesh."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from planner.errors import InfeasibleError
from planner.ir.dimension import Dimension
from planner.ir.graph import Layer, LayerGraph
from planner.ir.mesh import Mesh
from planner.ir.ops import Output, Redistribute
from planner.ir.rules import InputOutput, legal_splits, partition
from planner.ir.split import LayerId, Split

DEFAULT_DIMENSIONS = frozenset(
    {Dimension.SAMPLE, Dimension.OUT_CHANNEL, Dimension.IN_CHANNEL, Dimension.IN_CHANNEL_SCATTER}
)


@dataclass(frozen=True, slots=True)
class SearchSpace:
    """The legal splits of every layer.

    Attributes:
        graph, mesh, io: what the space is for.
        splits: of every layer, never empty, in a fixed order.
    """

    graph: LayerGraph
    mesh: Mesh
    io: InputOutput
    splits: Mapping[LayerId, tuple[Split, ...]]

    @property
    def num_strategies(self) -> float:
        """How many strategies there are; inf where a float cannot hold it."""
        try:
            return float(math.prod(len(s) for s in self.splits.values()))
        except OverflowError:
            return math.inf


def default_io(batch: int, num_ranks: int) -> InputOutput:
    """Return ``per-rank`` where every rank gets a sample, else ``global``."""
    return InputOutput.PER_RANK if num_ranks <= batch else InputOutput.GLOBAL


def enumerate_splits(
    graph: LayerGraph,
    mesh: Mesh,
    io: InputOutput,
    dimensions: Collection[Dimension] = DEFAULT_DIMENSIONS,
) -> SearchSpace:
    """Return the search space of a network on a mesh.

    A redistribute layer takes the layouts that its consumers ask for and the one its producer has.

    Raises:
        InfeasibleError: a layer has no legal split (never, as ``replicate`` is legal for all).
    """
    cache: dict[object, tuple[Split, ...]] = {}
    found: dict[LayerId, tuple[Split, ...]] = {}
    for layer in graph.layers:
        key = (layer.op, layer.output, graph.inputs_of(layer), tuple(p.spec for p in layer.params))
        if key not in cache:
            cache[key] = legal_splits(layer, graph, mesh, io, dimensions)
        if not cache[key]:
            raise InfeasibleError(f"layer {layer.id!r} ({layer.op.kind}) has no legal split on {mesh.axes}")
        found[layer.id] = cache[key]
    readers: dict[LayerId, list[Layer]] = {layer.id: [] for layer in graph.layers}
    for layer in graph.layers:
        for producer in dict.fromkeys(layer.inputs):
            readers[producer].append(layer)
    asked: dict[tuple[Split, ...], tuple[Split, ...]] = {}  # equal tuples become one object
    for layer in graph.layers:
        if isinstance(layer.op, Redistribute):
            splits = _asked(layer, graph, mesh, found, readers[layer.id])
            found[layer.id] = asked.setdefault(splits, splits)
    return SearchSpace(graph, mesh, io, found)


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
    wanted = {lies.layouts(s).output.placements for s in splits[producer.id]}
    for reader in readers:
        if not isinstance(reader.op, Output):
            position, lies = reader.inputs.index(layer.id), partition(reader, graph.inputs_of(reader), mesh)
            wanted |= {lies.layouts(s).inputs[position].placements for s in splits[reader.id]}
    lies = partition(layer, graph.inputs_of(layer), mesh)
    return tuple(s for s in splits[layer.id] if lies.layouts(s).output.placements in wanted)
