"""All costs of a search space as vectors and matrices, built once per layer signature."""

import contextlib
import functools
import gc
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from planner.cost.edges import EdgePricer, Matrices
from planner.cost.halo import NO_HALOS, Halos, may_have_halo, with_halos
from planner.cost.model import CostModel, LayerCost, Seconds
from planner.deadline import look
from planner.ir.graph import Layer
from planner.ir.layout import Cut, Layout
from planner.ir.recompute import follows
from planner.ir.split import Strategy
from planner.profile.key import PieceKey
from planner.space.enumerate import SearchSpace

Edge = tuple[int, int, int]
"""Producer index, consumer index, position among the consumer's inputs."""
NEVER_S: Final = 1e9
"""Of a transfer that cannot be made: no step is as long."""


@dataclass(frozen=True, slots=True)
class EdgeCost:
    """An edge under every pair of splits, float64[splits of producer, splits of consumer] each.

    Attributes:
        forward_s, backward_s: what a step waits for in either direction.
        num_bytes: sent by the busiest rank, both directions.
        backward_levels: int64, levels of the machine that the transfer backward uses (``StepPricer.levels``).
        halos: of the pairs whose transfer is a halo exchange, what is hidden of it.
    """

    forward_s: Seconds
    backward_s: Seconds
    num_bytes: Seconds
    backward_levels: NDArray[np.int64]
    halos: Halos = field(default_factory=lambda: NO_HALOS)


@dataclass(frozen=True)
class CostTable:
    """Costs of every layer and edge, in the order of the layer graph.

    Attributes:
        space: the legal splits.
        model: what priced them.
        layers: for every layer the cost under each of its splits.
        edges: for every edge the matrices.
    """

    space: SearchSpace
    model: CostModel
    layers: tuple[tuple[LayerCost, ...], ...]
    edges: Mapping[Edge, EdgeCost]

    @staticmethod
    def of(space: SearchSpace, model: CostModel) -> "CostTable":
        """Price every layer and edge; layers and edges that look alike share their arrays."""
        numbers = layer_numbers(space, model)
        with collector_paused():
            return CostTable(space, model, price_layers(space, model, numbers), price_edges(space, model, numbers))

    @functools.cached_property
    def has_idle(self) -> bool:
        """Whether some split of the space leaves ranks idle."""
        return any(
            own is not None and 0 in own
            for splits in {*self.space.splits.values()}
            for s in splits
            for own in s.weights
        )

    def choice(self, strategy: Strategy) -> tuple[int, ...]:
        """Return the position of each layer's split in the space.

        Raises:
            ValueError: a split is not in the space.
        """
        splits = self.space.splits
        found = []
        for layer in self.space.graph.layers:
            if strategy[layer.id] not in splits[layer.id]:
                raise ValueError(f"layer {layer.id!r} cannot be split as {strategy[layer.id]} in this search space")
            found.append(splits[layer.id].index(strategy[layer.id]))
        return tuple(found)

    def strategy(self, choice: tuple[int, ...]) -> Strategy:
        """Return the strategy at these positions of the space."""
        layers = self.space.graph.layers
        return {layer.id: self.space.splits[layer.id][c] for layer, c in zip(layers, choice, strict=True)}


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Keep Python's collector of cycles from running.

    Pricing makes many objects that stay and no cycles; with torch imported, each of the collector's full runs
    looks at some 200,000 objects, which takes as long as the pricing of an edge.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def layer_numbers(space: SearchSpace, model: CostModel) -> tuple[int, ...]:
    """Return a number for every layer: layers with equal numbers cost the same under each split."""
    graph = space.graph
    numbers: dict[object, int] = {}
    found = []
    for layer in graph.layers:
        signature = (
            layer.op, tuple(a.op for a in layer.absorbed), graph.inputs_of(layer), layer.output,
            tuple((p.spec, p.out_dim, p.in_dim, p.trainable, p.role, p.whole) for p in layer.params),
            model.carried(layer), layer.saved_bytes, layer.saved_constant_bytes,
            any(model.flows[i] for i in layer.inputs), model.flows[layer.id], space.splits[layer.id],
        )  # fmt: skip
        found.append(numbers.setdefault(signature, len(numbers)))
    return tuple(found)


def price_layers(space: SearchSpace, model: CostModel, numbers: Sequence[int]) -> tuple[tuple[LayerCost, ...], ...]:
    """Return for every layer the cost under each of its splits; layers with equal numbers share it."""
    priced: dict[int, tuple[LayerCost, ...]] = {}
    for layer, number in zip(space.graph.layers, numbers, strict=True):
        if number not in priced:
            look()
            priced[number] = model.layers(layer, space.splits[layer.id])
    return tuple(priced[number] for number in numbers)


def least_compute_s(space: SearchSpace, model: CostModel) -> float:
    """Return what no strategy of a space computes faster than, in seconds: every layer at its best."""
    least: dict[int, float] = {}
    numbers = layer_numbers(space, model)
    for layer, number in zip(space.graph.layers, numbers, strict=True):
        if number not in least:
            look()
            least[number] = min(t.forward_s + t.backward_s for t in model.times(layer, space.splits[layer.id]))
    return math.fsum(least[number] for number in numbers)


def layer_pieces(
    space: SearchSpace, model: CostModel, memory_format: Literal["contiguous", "channels_last"] = "contiguous"
) -> Iterator[PieceKey]:
    """Yield the pieces of every layer under every split that compute anything, some of them several times."""
    for layer in space.graph.layers:
        for split in space.splits[layer.id]:
            locals_of = (replace(local, memory_format=memory_format) for local in model.locals(layer, split))
            yield from (local.piece for local in locals_of if local.has_kernel)


def price_edges(space: SearchSpace, model: CostModel, numbers: Sequence[int]) -> dict[Edge, EdgeCost]:
    """Return the matrices of every edge; edges between layers with equal numbers share them."""
    layers, pricer = space.graph.layers, EdgePricer(model.pricer)
    edges: dict[Edge, EdgeCost] = {}
    shared: dict[tuple[int, int, int], EdgeCost] = {}
    for i, j, position in space.graph.edges():
        key = numbers[i], numbers[j], position
        if key not in shared:
            look()
            shared[key] = _edge_cost(pricer, model, space, (layers[i], layers[j], position))
        edges[i, j, position] = shared[key]
    return edges


def _edge_cost(pricer: EdgePricer, model: CostModel, space: SearchSpace, edge: tuple[Layer, Layer, int]) -> EdgeCost:
    producer, consumer, position = edge
    makes, reads = model.partition(producer), model.partition(consumer)
    have, have_index = _unique([makes.layouts(s).output for s in space.splits[producer.id]])
    need, need_index = _unique([reads.layouts(s).inputs[position] for s in space.splits[consumer.id]])
    item_bytes = model.settings.activation_dtype(producer.output.dtype).item_bytes
    full = np.ix_(have_index, need_index)
    forward = _priced(pricer, have, need, item_bytes)
    if model.flows[producer.id]:
        backward = _priced(pricer, [x.gradient for x in need], [x.gradient for x in have], item_bytes)
        found = EdgeCost(
            forward.seconds[full],
            backward.seconds.T[full],
            (forward.num_bytes + backward.num_bytes.T)[full],
            backward.levels.T[full],
        )
    else:
        nothing = np.zeros((len(have_index), len(need_index)))
        found = EdgeCost(forward.seconds[full], nothing, forward.num_bytes[full], nothing.astype(np.int64))
    if may_have_halo(consumer, position):
        splits = space.splits[producer.id], space.splits[consumer.id]
        found = with_halos(model, splits, (producer, consumer), found)
    never = _impossible(have, need)
    return replace(found, forward_s=np.where(never[full], NEVER_S, found.forward_s)) if never.any() else found


def _priced(pricer: EdgePricer, sources: Sequence[Layout], targets: Sequence[Layout], item_bytes: int) -> Matrices:
    """Return the prices of every pair; those whose tensors are cut by the same rules are priced together."""
    before, after = _by_cuts(sources), _by_cuts(targets)
    if len(before) == len(after) == 1:
        return pricer.price(sources, targets, item_bytes)
    shape = len(sources), len(targets)
    found = Matrices(np.zeros(shape), np.zeros(shape), np.zeros(shape, dtype=np.int64))
    for rows, columns in itertools.product(before, after):
        part = pricer.price([sources[i] for i in rows], [targets[j] for j in columns], item_bytes)
        here = np.ix_(rows, columns)
        found.seconds[here], found.num_bytes[here], found.levels[here] = part.seconds, part.num_bytes, part.levels
    return found


def _by_cuts(layouts: Sequence[Layout]) -> list[list[int]]:
    """Return the positions of layouts that differ in their placements only, together."""
    found: dict[tuple[Cut, ...], list[int]] = {}
    for i, layout in enumerate(layouts):
        found.setdefault(layout.cuts, []).append(i)
    return list(found.values())


def _impossible(have: Sequence[Layout], need: Sequence[Layout]) -> NDArray[np.bool_]:
    """Return between which pairs tiles would have to be exchanged, bool[have, need]."""
    found = np.zeros((len(have), len(need)), dtype=bool)
    for i, layout in enumerate(have):
        if any(cut.tiles is not None for cut in layout.cuts):
            found[i] = [not follows(layout, other) for other in need]
    return found


def _unique(layouts: list[Layout]) -> tuple[list[Layout], NDArray[np.int64]]:
    positions: dict[Layout, int] = {}
    index = [positions.setdefault(layout, len(positions)) for layout in layouts]
    return list(positions), np.array(index, dtype=np.int64)
