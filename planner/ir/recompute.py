"""Halos that are computed by every rank that reads them, instead of being sent.

Where a layer is cut in space and the next one looks around, ranks read rows that their neighbours make. A layer that
*recomputes* makes, on every rank, all that its readers' pieces there need: tiles that overlap. Nothing moves between it
and its readers. Its own input has to be wider by as much, so over a run of such layers the margins add up, and what
is fetched in front of the run is one wide halo instead of one halo for each layer.

The gradient of a tile is this rank's addend, as what it computed was used by itself only. It flows back through the
run as it is; in front of it the addends of what ranks have in common are summed, in the exchange that is there anyway.
Gradients of parameters are sums over ranks as ever: each adds what went through its own tile.

What an operator pads with lies outside the whole tensor, so tiles end where the tensor does. Layers whose results are
drawn at random for each element, or depend on sums over space, cannot recompute: batch norm (in evaluation it is
element-wise), group norm, dropout of elements, reductions.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

from planner.ir.dimension import SPATIAL_DIMENSIONS
from planner.ir.graph import Layer, LayerGraph, tied_layers
from planner.ir.layout import Interval, Layout
from planner.ir.mesh import Mesh
from planner.ir.ops import (
    AdaptivePool,
    Along,
    Concat,
    Conv,
    ConvTranspose,
    Dropout,
    Elementwise,
    Interpolate,
    Op,
    PixelShuffle,
    Pool,
    Redistribute,
)
from planner.ir.rules import Partition, partition
from planner.ir.split import LayerId, Split, Strategy
from planner.ir.transfer import StepKind, change, steps

_LOCAL = (
    AdaptivePool | Along | Concat | Conv | ConvTranspose | Dropout | Elementwise | Interpolate | PixelShuffle | Pool
    | Redistribute
)  # fmt: skip
"""Operators whose every output is a function of the inputs that its window reads."""
_RANDOM = frozenset({"rrelu", "bernoulli", "alpha_dropout", "rand_like", "randn_like"})
"""Element-wise operators that draw numbers."""


def may_recompute(layer: Layer) -> bool:
    """Return whether all that a layer computes follows from what its windows read, wherever it is computed."""
    return layer.follows is None and all(_is_local(op) for op in (layer.op, *(each.op for each in layer.absorbed)))


def _is_local(op: Op) -> bool:
    match op:
        case Dropout(unit=unit):
            return unit != "element"  # ranks that cut space draw the same numbers for whole channels and samples
        case Elementwise(function=function):
            return function not in _RANDOM
        case Conv(computed_weight=computed):
            return not computed
        case _:
            return isinstance(op, _LOCAL)


def tiled(layer: Layer, lies: Partition, split: Split, needs: Sequence[Layout]) -> Split | None:
    """Return a layer's split with the tiles that its readers need, so that they need no rows of others.

    Args:
        layer: the layer.
        lies: its partition.
        split: without tiles.
        needs: its output as every reader needs it.

    Returns:
        The split as it is where readers need no rows of others; None where one is split so that ranks have to talk.
    """
    own = lies.layouts(split).output
    if any(layout.has_idle for layout in (own, *needs)):
        return None
    found: list[tuple[int, tuple[Interval, ...]]] = []
    for dim, division in enumerate(own.divisions):
        others = [need.divisions[dim] for need in needs]
        if layer.output.roles[dim] not in SPATIAL_DIMENSIONS or not division.axes:
            continue
        if any(other.axes != division.axes for other in others):
            return None
        if any(change(division, other).is_apart for other in others):
            pieces = zip(*(other.pieces for other in others), strict=True)
            found.append((dim, tuple((min(a for a, _ in each), max(b for _, b in each)) for each in pieces)))
    if not found:
        return split
    larger = replace(split, tiles=tuple(found))
    have = lies.layouts(larger).output
    return larger if all(follows(have, need) for need in needs) else None


def follows(have: Layout, need: Layout) -> bool:
    """Return whether a tensor of which ranks have tiles gets to a reader without an exchange between ranks.

    In an exchange, what several ranks have would come several times.
    """
    both = *steps(have, need), *steps(need.gradient, have.gradient)
    return all(step.kind is not StepKind.EXCHANGE for step in both)


def enlarged(
    graph: LayerGraph, mesh: Mesh, strategy: Strategy, recomputing: Collection[LayerId]
) -> dict[LayerId, Split]:
    """Return a strategy with the tiles of the layers that recompute.

    Args:
        graph: the layers.
        mesh: the ranks.
        strategy: a legal split for every layer.
        recomputing: layers whose readers get no rows of other ranks.

    Raises:
        ValueError: a layer cannot; with its name and the reason.
    """
    found = dict(strategy)
    alone = untied(graph) if recomputing else frozenset[LayerId]()
    for layer, larger in _from_the_end(graph, mesh, found) if recomputing else ():
        if layer.id not in recomputing:
            continue
        if layer.id not in alone:
            raise ValueError(f"layer {layer.id!r} shares a parameter, or a call, with another layer")
        if not may_recompute(layer):
            raise ValueError(f"layer {layer.id!r} ({layer.op.kind}) computes what depends on more than its windows")
        if larger is None:
            raise ValueError(f"a reader of layer {layer.id!r} is not split in space as it is: {strategy[layer.id]}")
        found[layer.id] = larger
    return found


def all_recomputing(graph: LayerGraph, mesh: Mesh, strategy: Strategy) -> frozenset[LayerId]:
    """Return the layers that recompute where all do that can, but for those that share a parameter or a call."""
    found = dict(strategy)
    alone = untied(graph)
    for layer, larger in _from_the_end(graph, mesh, found):
        if layer.id in alone and may_recompute(layer) and larger is not None:
            found[layer.id] = larger
    return frozenset(layer for layer, split in found.items() if split.tiles)


def untied(graph: LayerGraph) -> frozenset[LayerId]:
    """Return the layers that share neither a parameter nor a call: others take one split, tiles included."""
    leaders = tied_layers(graph)
    count = Counter(leaders)
    return frozenset(layer.id for layer, leader in zip(graph.layers, leaders, strict=True) if count[leader] == 1)


def _from_the_end(
    graph: LayerGraph, mesh: Mesh, splits: Mapping[LayerId, Split]
) -> Iterator[tuple[Layer, Split | None]]:
    """Yield layers behind their readers, with the tiles that those need under their splits at that time."""
    lies = {layer.id: partition(layer, graph.inputs_of(layer), mesh) for layer in graph.layers}
    readers = readers_of(graph)
    for layer in reversed(graph.layers):
        needs = [lies[reader].layouts(splits[reader]).inputs[k] for reader, k in readers[layer.id]]
        yield layer, tiled(layer, lies[layer.id], splits[layer.id], needs)


def readers_of(graph: LayerGraph) -> dict[LayerId, list[tuple[LayerId, int]]]:
    """Return for every layer those that read it, and at which position of their inputs."""
    found: dict[LayerId, list[tuple[LayerId, int]]] = {layer.id: [] for layer in graph.layers}
    for layer in graph.layers:
        for k, producer in enumerate(layer.inputs):
            found[producer].append((layer.id, k))
    return found
