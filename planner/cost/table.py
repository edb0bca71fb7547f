"""All costs of a search space as vectors and matrices, built once per layer signature."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

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
        forward_s, backward_s: blocking transfer in either direction.
        num_bytes: sent by the busiest rank, both directions.
    """

    forward_s: Seconds
    backward_s: Seconds
    num_bytes: Seconds


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
        graph = space.graph
        by_signature: dict[object, tuple[LayerCost, ...]] = {}
        signatures = []
        layers = []
        for layer in graph.layers:
            needs = any(model.flows[i] for i in layer.inputs)
            signature = (
                layer.op, tuple(a.op for a in layer.absorbed), graph.inputs_of(layer), layer.output,
                tuple((p.spec, p.out_dim, p.in_dim, p.trainable) for p in layer.params),
                needs, model.flows[layer.id], space.splits[layer.id],
            )  # fmt: skip
            if signature not in by_signature:
                by_signature[signature] = tuple(model.layer(layer, s) for s in space.splits[layer.id])
            signatures.append(signature)
            layers.append(by_signature[signature])
        edges: dict[Edge, EdgeCost] = {}
        shared: dict[object, EdgeCost] = {}
        for edge in graph.edges():
            i, j, position = edge
            key = (signatures[i], signatures[j], position)
            if key not in shared:
                shared[key] = _edge_cost(model, space, graph.layers[i], graph.layers[j], position)
            edges[edge] = shared[key]
        return CostTable(space, model, tuple(layers), edges)

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


def _edge_cost(model: CostModel, space: SearchSpace, producer: Layer, consumer: Layer, position: int) -> EdgeCost:
    have, have_index = _unique([model.layouts(producer, s).output for s in space.splits[producer.id]])
    need, need_index = _unique([model.layouts(consumer, s).inputs[position] for s in space.splits[consumer.id]])
    found = np.zeros((3, len(have), len(need)))
    for a, source in enumerate(have):
        for b, target in enumerate(need):
            forward, backward = model.edge(producer, source, target)
            found[:, a, b] = (
                forward.seconds,
                backward.seconds,
                forward.num_bytes + backward.num_bytes,
            )
    full = found[:, have_index][:, :, need_index]
    return EdgeCost(full[0], full[1], full[2])


def _unique(layouts: list[Layout]) -> tuple[list[Layout], NDArray[np.int64]]:
    positions: dict[Layout, int] = {}
    index = [positions.setdefault(layout, len(positions)) for layout in layouts]
    return list(positions), np.array(index, dtype=np.int64)
