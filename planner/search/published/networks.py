"""A network as the papers on weights and feature maps see it, and its layers' splits axis by axis.

[HyPar19] and [SoyBean18] speak of chains of layers with weights; pools and activations belong to the layer in front.
``network_of`` makes that of any layer graph. What joins several tensors (a sum, a concatenation) becomes a node without
weights, so that the graph is as narrow as the layer graph.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from planner.cost.table import CostTable
from planner.ir.dimension import Dimension
from planner.ir.graph import Layer, LayerGraph, is_boundary
from planner.ir.ops import Concat
from planner.ir.split import Split
from planner.search.elimination import solve_dp
from planner.search.formulate import Formulation
from planner.search.problem import Choice, Costs, Problem


@dataclass(frozen=True, slots=True)
class Node:
    """A layer with weights, or a join.

    Attributes:
        name: for messages.
        weights: elements of its matrices and kernels, biases and norms aside; 0 for a join.
        outputs: elements of its result behind its pools, of the whole batch.
        sizes: (samples, input channels, output channels) where what cannot be divided is not to be cut; None where
            everything divides.
    """

    name: str
    weights: float
    outputs: float
    sizes: tuple[int, int, int] | None = None

    @property
    def is_join(self) -> bool:
        """Whether it has no weights."""
        return not self.weights


@dataclass(frozen=True, slots=True)
class Network:
    """Nodes in topological order.

    Attributes:
        nodes: of which only joins read more than one other.
        edges: (producer, consumer, elements that the consumer reads of it, of the whole batch).
    """

    nodes: tuple[Node, ...]
    edges: tuple[tuple[int, int, float], ...]


def chain(layers: Sequence[tuple[float, float]]) -> Network:
    """Return a chain of layers given as (weights, outputs of the whole batch) in elements."""
    nodes = tuple(Node(str(i), weights, outputs) for i, (weights, outputs) in enumerate(layers))
    return Network(nodes, tuple((i, i + 1, nodes[i].outputs) for i in range(len(nodes) - 1)))


def network_of(graph: LayerGraph) -> tuple[Network, tuple[int, ...]]:
    """Return the network of a layer graph, and for every node the position of its layer.

    A join in front of a layer with weights has that layer's position.
    """
    return _Collector(graph).network()


def weights_of(layer: Layer) -> int:
    """Return the elements of a layer's trainable matrices and kernels; biases and norms are no such."""
    return sum(p.spec.numel for p in layer.params if p.trainable and len(p.spec.shape) > 1)


class _Collector:
    """Follows every tensor from node to node through the layers that belong to the one in front."""

    def __init__(self, graph: LayerGraph) -> None:
        self._graph = graph
        self._nodes: list[tuple[Layer, int]] = []  # with its weights
        self._edges: list[tuple[int, int, float]] = []
        self._carried: list[tuple[int, float] | None] = []  # by layer: the node its tensor is of, and its elements

    def network(self) -> tuple[Network, tuple[int, ...]]:
        for layer in self._graph.layers:
            self._carried.append(self._node_behind(layer))
        outputs: dict[int, float] = {}
        for i, _, elements in self._edges:
            outputs[i] = max(outputs.get(i, 0.0), elements)
        nodes = tuple(
            Node(layer.id, weights, outputs.get(i, layer.output.numel), self._sizes(layer))
            for i, (layer, weights) in enumerate(self._nodes)
        )
        return Network(nodes, tuple(self._edges)), tuple(self._graph.index[layer.id] for layer, _ in self._nodes)

    def _node_behind(self, layer: Layer) -> tuple[int, float] | None:
        weights, size = weights_of(layer), float(layer.output.numel)
        read: dict[int, float] = {}
        for i in layer.inputs:
            if found := self._carried[self._graph.index[i]]:
                read[found[0]] = max(read.get(found[0], 0.0), found[1])
        if len(read) > 1:
            join = self._add(layer, 0, read)
            if not weights:
                return join, size
            read = {join: sum(read.values()) if isinstance(layer.op, Concat) else max(read.values())}
        if weights:
            return self._add(layer, weights, read), size
        return next(((i, size) for i in read), None)

    def _add(self, layer: Layer, weights: int, read: dict[int, float]) -> int:
        self._nodes.append((layer, weights))
        self._edges += [(i, len(self._nodes) - 1, elements) for i, elements in read.items()]
        return len(self._nodes) - 1

    def _sizes(self, layer: Layer) -> tuple[int, int, int] | None:
        output, inputs = layer.output, self._graph.inputs_of(layer)
        where = [spec.dim_of(Dimension.OUT_CHANNEL) for spec in (*inputs[:1], output)]
        if len(where) < 2 or where[0] is None or where[1] is None or output.sample_dim is None:
            return None
        return output.shape[output.sample_dim], inputs[0].shape[where[0]], output.shape[where[1]]


class Axes:
    """What is left to each layer with weights while the axes of a mesh are decided one after the other.

    Layers that share a parameter are decided together.
    """

    def __init__(self, table: CostTable, formulation: Formulation) -> None:
        self._table, self._formulation = table, formulation
        network, layer_of = network_of(table.space.graph)
        self.network = network
        """The nodes that are decided."""
        self._layer_of = layer_of
        self.variable_of = tuple(
            -1 - n if node.is_join else formulation.variable_of[layer_of[n]] for n, node in enumerate(network.nodes)
        )
        """For every node what it shares with those that must be decided alike."""
        self._left: dict[int, list[Split]] = {}
        for n, node in enumerate(network.nodes):
            if not node.is_join:
                splits = table.space.splits[table.space.graph.layers[layer_of[n]].id]
                self._left.setdefault(self.variable_of[n], [splits[o] for o in formulation.options[layer_of[n]]])

    def allows(self, node: int, axis: int, dimensions: Collection[Dimension]) -> bool:
        """Return whether some split that is left has one of these dimensions on an axis; joins allow all."""
        left = self._left.get(self.variable_of[node])
        return left is None or any(s.dimensions[axis] in dimensions for s in left)

    def decide(self, node: int, axis: int, dimensions: Collection[Dimension]) -> None:
        """Keep the splits with one of these dimensions on an axis; where none is left, those that replicate."""
        left = self._left.get(self.variable_of[node], [])
        for wanted in (dimensions, (Dimension.REPLICATE,)):
            if kept := [s for s in left if s.dimensions[axis] in wanted]:
                self._left[self.variable_of[node]] = kept
                return

    def choice(self) -> Choice:
        """Return the strategy: of what is left, and for all other layers, what costs least."""
        graph, pins = self._table.space.graph, {}
        for n, node in enumerate(self.network.nodes):
            layer = graph.layers[self._layer_of[n]]
            if not node.is_join and not is_boundary(layer.op):
                splits = self._table.space.splits[layer.id]
                pins[self._layer_of[n]] = [splits.index(s) for s in self._left[self.variable_of[n]]]
        smaller, problem = self._formulation.pinned(pins)
        solution = solve_dp(Problem(problem.node_s, problem.edge_s))  # its memory is judged by the caller
        assert solution.choice is not None
        return smaller.layer_choice(solution.choice)


def solve_decisions(
    problem: Problem, variable_of: Sequence[int], allowed: Sequence[Sequence[int]]
) -> tuple[tuple[int, ...], float]:
    """Return the cheapest option of every node and the cost, where some nodes must choose alike.

    Args:
        problem: of nodes that all have the same options.
        variable_of: for every node a number; nodes with the same number take the same option.
        allowed: of every node; nodes of one number allow the same.
    """
    number: dict[int, int] = {}
    place = [number.setdefault(v, len(number)) for v in variable_of]
    node_s = [problem.node_s[0] * 0.0 for _ in number]
    options: list[list[int]] = [[] for _ in number]
    edge_s: dict[tuple[int, int], Costs] = {}
    for n, costs in enumerate(problem.node_s):
        node_s[place[n]] = node_s[place[n]] + costs
        options[place[n]] = list(allowed[n])
    for (i, j), costs in problem.edge_s.items():
        a, b = place[i], place[j]
        if a == b:
            node_s[a] = node_s[a] + np.diagonal(costs)
            continue
        key, matrix = ((a, b), costs) if a < b else ((b, a), costs.T)
        edge_s[key] = edge_s[key] + matrix if key in edge_s else matrix
    kept = Problem(
        tuple(costs[o] for costs, o in zip(node_s, options, strict=True)),
        {(a, b): costs[np.ix_(options[a], options[b])] for (a, b), costs in edge_s.items()},
    )
    solution = solve_dp(kept)
    assert solution.choice is not None
    found = [options[v][c] for v, c in enumerate(solution.choice)]
    return tuple(found[v] for v in place), solution.cost_s
