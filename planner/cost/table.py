"""All costs of a search space as vectors and matrices, built once per layer signature."""

import contextlib
import gc
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from planner.cost.edges import EdgePricer
from planner.cost.halo import NO_HALOS, Halos, may_have_halo, with_halos
from planner.cost.model import CostModel, LayerCost, Seconds
from planner.ir.graph import Layer
from planner.ir.layout import Layout
from planner.ir.split import Strategy
from planner.space.enumerate import SearchSpace

Edge = tuple[int, int, int]
"""Producer index, consumer index, position among the consumer's inputs."""


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
            priced[number] = model.layers(layer, space.splits[layer.id])
    return tuple(priced[number] for number in numbers)


def least_compute_s(space: SearchSpace, model: CostModel) -> float:
    """Return what no strategy of a space computes faster than, in seconds: every layer at its best."""
    least: dict[int, float] = {}
    numbers = layer_numbers(space, model)
    for layer, number in zip(space.graph.layers, numbers, strict=True):
        if number not in least:
            least[number] = min(t.forward_s + t.backward_s for t in model.times(layer, space.splits[layer.id]))
    return math.fsum(least[number] for number in numbers)


def price_edges(space: SearchSpace, model: CostModel, numbers: Sequence[int]) -> dict[Edge, EdgeCost]:
    """Return the matrices of every edge; edges between layers with equal numbers share them."""
    layers, pricer = space.graph.layers, EdgePricer(model.pricer)
    edges: dict[Edge, EdgeCost] = {}
    shared: dict[tuple[int, int, int], EdgeCost] = {}
    for i, j, position in space.graph.edges():
        key = numbers[i], numbers[j], position
        if key not in shared:
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
    forward = pricer.price(have, need, item_bytes)
    if model.flows[producer.id]:
        backward = pricer.price([x.gradient for x in need], [x.gradient for x in have], item_bytes)
        found = EdgeCost(
            forward.seconds[full],
            backward.seconds.T[full],
            (forward.num_bytes + backward.num_bytes.T)[full],
            backward.levels.T[full],
        )
    else:
        nothing = np.zeros((len(have_index), len(need_index)))
        found = EdgeCost(forward.seconds[full], nothing, forward.num_bytes[full], nothing.astype(np.int64))
    if not may_have_halo(consumer, position):
        return found
    splits = space.splits[producer.id], space.splits[consumer.id]
    return with_halos(model, splits, (producer, consumer), found)


def _unique(layouts: list[Layout]) -> tuple[list[Layout], NDArray[np.int64]]:
    positions: dict[Layout, int] = {}
    index = [positions.setdefault(layout, len(positions)) for layout in layouts]
    return list(positions), np.array(index, dtype=np.int64)
