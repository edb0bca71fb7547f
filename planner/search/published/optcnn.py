r"""`optcnn`: OptCNN [OptCNN18], its space and its cost, solved by its node and edge elimination.

A layer is cut in equal parts along the dimensions of its **output**: samples, channels, and those of space; it may use
fewer devices than there are. The cost of a strategy is (its equation 1)

.. math:: \sum_l \left[t_C(l, c_l) + t_S(l, c_l)\right] + \sum_{e = (i, j)} t_X(e, c_i, c_j)

with nothing overlapped and no latencies: a message takes its bytes / the bandwidth that it gets. Here

- t_C is forward and backward of the cost table;
- t_S: each device that shares a parameter piece of m bytes sends its gradient to a server and fetches the piece. The
  server is spread over the p devices, so that no link carries more than another: each device sends (p - 1) / p m and
  receives as much, twice. The volume is 2 p m, as in the paper, whose figures count the server's own device;
- t_X: what each device needs of a tensor and does not hold, forward, and as much of the gradient, backward. What its
  neighbours along the innermost mesh axis hold comes from them, what is left from those along the next axis, and so on;
  the device with most waits longest. An axis has the bandwidth at which all devices exchange along it at once.

A mesh axis that a layer does not cut holds devices that are idle for this layer: they hold nothing and need nothing.
Variable elimination (``planner.search.elimination``) does what node and edge elimination do, on any graph.

**Deviations**: t_C from the table, the paper measured it; the degree of a dimension is the product of the mesh axes
that cut it; pieces may be uneven, the largest counts; the paper does not say where its servers are. Batch norm
statistics are left out, as there.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from planner.cost.model import LayerCost
from planner.cost.table import CostTable
from planner.ir.dimension import SPATIAL_DIMENSIONS, Dimension
from planner.ir.graph import Layer, LayerGraph, is_boundary
from planner.ir.layout import Layout
from planner.ir.ops import Redistribute
from planner.ir.split import Split
from planner.search.elimination import solve_dp
from planner.search.formulate import Formulation
from planner.search.problem import Choice, Costs, Problem

OUTPUT_DIMENSIONS: Final = SPATIAL_DIMENSIONS | {Dimension.SAMPLE, Dimension.OUT_CHANNEL}
"""What OptCNN cuts."""

Boxes = NDArray[np.int64]
"""int64[depths, ranks, 2, dimensions]: start and stop of what the group of a rank holds. A group of depth d has equal
coordinates on the d outermost axes; depth 0 is everyone, the last depth is the rank alone. Empty for idle ranks."""


@dataclass(frozen=True, slots=True)
class OptcnnProblem:
    """OptCNN's problem on a table of ours.

    Attributes:
        problem: its costs. Variables that it does not know (redistribute layers) cost nothing.
        formulation: options of the variables: those of its space.
        node_bytes: float64[n_i] of every variable, to and from parameter servers, over all devices.
        edge_bytes: float64[n_i, n_j], transfers between layers, both directions, over all devices.
        graph: of the layers.
    """

    problem: Problem
    formulation: Formulation
    node_bytes: tuple[Costs, ...]
    edge_bytes: Mapping[tuple[int, int], Costs]
    graph: LayerGraph

    def has_costs(self, layer: int) -> bool:
        """Return whether OptCNN knows a layer, given by its position in the graph."""
        return _has_costs(self.graph.layers[layer])

    def solve(self) -> Choice:
        """Return the option of every variable at the least cost."""
        choice = solve_dp(self.problem).choice
        assert choice is not None  # there is no limit
        return choice

    def volume_bytes(self, choice: Sequence[int]) -> float:
        """Return the communication of a step as the paper counts it, for options of the variables."""
        nodes = math.fsum(float(found[c]) for found, c in zip(self.node_bytes, choice, strict=True))
        return nodes + math.fsum(float(found[choice[i], choice[j]]) for (i, j), found in self.edge_bytes.items())


def optcnn_choice(table: CostTable, formulation: Formulation) -> Choice:
    """Return OptCNN's strategy: the position of every layer's split.

    Redistribute layers, which it does not know, take what costs least by the additive cost.
    """
    found = optcnn_problem(table, formulation)
    return with_redistribution(table, found, found.solve())


def with_redistribution(table: CostTable, found: OptcnnProblem, options: Choice) -> Choice:
    """Return the position of every layer's split for options of OptCNN's variables."""
    chosen = found.formulation.layer_choice(options)
    pins = {
        j: [chosen[j]] for j, layer in enumerate(table.space.graph.layers) if not isinstance(layer.op, Redistribute)
    }
    formulation, problem = found.formulation.pinned(pins)
    best = solve_dp(Problem(problem.node_s, problem.edge_s)).choice
    assert best is not None
    return formulation.layer_choice(best)


def optcnn_problem(table: CostTable, formulation: Formulation) -> OptcnnProblem:
    """Return OptCNN's problem on the splits of a table that cut outputs only."""
    graph = table.space.graph
    allowed = {
        j: _of_outputs(table.space.splits[layer.id]) for j, layer in enumerate(graph.layers) if _has_costs(layer)
    }
    small, restricted = formulation.pinned(allowed)
    node_s = [np.zeros(len(costs)) for costs in restricted.node_s]
    node_bytes = [np.zeros(len(costs)) for costs in restricted.node_s]
    edge_s: dict[tuple[int, int], Costs] = {}
    edge_bytes: dict[tuple[int, int], Costs] = {}
    pricer = _Pricer(table)
    for j, layer in enumerate(graph.layers):
        if not _has_costs(layer):
            continue
        v, options = small.variable_of[j], list(small.options[j])
        seconds, num_bytes = pricer.node(j)
        node_s[v] += seconds[options]
        node_bytes[v] += num_bytes[options]
        for position, name in enumerate(layer.inputs):
            i = _maker(table, graph.index[name])
            if not _has_costs(graph.layers[i]):
                continue
            u, theirs = small.variable_of[i], list(small.options[i])
            for total, nodes, part in zip(
                (edge_s, edge_bytes), (node_s, node_bytes), pricer.edge(i, j, position), strict=True
            ):
                matrix = part[np.ix_(theirs, options)]
                if u == v:
                    nodes[v] += np.diagonal(matrix)
                else:
                    key, own = ((u, v), matrix) if u < v else ((v, u), matrix.T)
                    total[key] = total[key] + own if key in total else own
    return OptcnnProblem(Problem(tuple(node_s), edge_s), small, tuple(node_bytes), edge_bytes, graph)


def _of_outputs(splits: Sequence[Split]) -> list[int]:
    """Return the positions of splits that cut outputs only; all, where the user pins a layer to another one."""
    return [o for o, split in enumerate(splits) if _is_of_outputs(split)] or [*range(len(splits))]


def _is_of_outputs(split: Split) -> bool:
    return set(split.dimensions) <= OUTPUT_DIMENSIONS | {Dimension.REPLICATE}


def _has_costs(layer: Layer) -> bool:
    """Return whether OptCNN knows a layer: data is loaded where it is needed, tensors go from layer to layer."""
    return not is_boundary(layer.op) and not isinstance(layer.op, Redistribute)


def _maker(table: CostTable, i: int) -> int:
    """Return the layer that made what a layer hands on."""
    graph = table.space.graph
    while isinstance(graph.layers[i].op, Redistribute):
        i = graph.index[graph.layers[i].inputs[0]]
    return i


class _Pricer:
    """Costs of nodes and edges, in seconds and in bytes over all devices; equal ones are computed once."""

    def __init__(self, table: CostTable) -> None:
        self._table, self._mesh = table, table.model.mesh
        self._router = table.model.pricer.router
        self._coordinates = np.array([self._mesh.coordinates(p) for p in range(self._mesh.size)], dtype=np.int64)
        self._coordinates = self._coordinates.reshape(self._mesh.size, len(self._mesh.axes))
        self._s_per_byte = np.array([self._router.alltoall((axis,))[1] for axis in range(len(self._mesh.axes))])
        self._boxes: dict[tuple[Layout, tuple[bool, ...]], Boxes] = {}
        self._nodes: dict[tuple[int, tuple[Split, ...]], tuple[Costs, Costs]] = {}
        self._edges: dict[tuple[tuple[tuple[Layout, tuple[bool, ...]], ...], ...], tuple[Costs, Costs]] = {}

    def node(self, j: int) -> tuple[Costs, Costs]:
        """Return t_C + t_S of a layer under each of its splits, and the bytes of the latter."""
        costs, splits = self._table.layers[j], self._table.space.splits[self._table.space.graph.layers[j].id]
        key = id(costs), splits
        if key not in self._nodes:
            found = [self._sync(cost, split) for cost, split in zip(costs, splits, strict=True)]
            seconds = [c.forward_s + c.backward_s + sync_s for c, (sync_s, _) in zip(costs, found, strict=True)]
            self._nodes[key] = np.array(seconds), np.array([num_bytes for _, num_bytes in found])
        return self._nodes[key]

    def _sync(self, cost: LayerCost, split: Split) -> tuple[float, float]:
        """Return seconds and bytes of pushing a layer's gradients and fetching its parameters."""
        seconds, active = 0.0, int(self._is_active(split).sum())
        for axes, num_bytes in cost.sync.items():
            size = math.prod(self._mesh.shape[a] for a in axes)
            seconds += 2 * (size - 1) / size * num_bytes * self._router.alltoall(axes)[1]
        return seconds, 2.0 * active * sum(cost.sync.values())

    def _is_active(self, split: Split) -> NDArray[np.bool_]:
        """Return for every rank whether it works on a layer: one of those along an axis that is not cut."""
        whole = [axis for axis, dim in enumerate(split.dimensions) if dim is Dimension.REPLICATE]
        return np.asarray((self._coordinates[:, whole] == 0).all(axis=1))

    def edge(self, i: int, j: int, position: int) -> tuple[Costs, Costs]:
        """Return t_X of an edge under every pair of splits, and its bytes."""
        model, graph = self._table.model, self._table.space.graph
        producer, consumer = graph.layers[i], graph.layers[j]
        makes, reads = model.partition(producer), model.partition(consumer)
        have = tuple(_piece(makes.layouts(s).output.value, s) for s in self._table.space.splits[producer.id])
        need = tuple(_piece(reads.layouts(s).inputs[position].value, s) for s in self._table.space.splits[consumer.id])
        if (have, need) not in self._edges:
            self._edges[have, need] = self._missing(have, need)
        ways = model.settings.activation_dtype(producer.output.dtype).item_bytes * (
            2 if model.flows[producer.id] else 1
        )
        seconds, elements = self._edges[have, need]
        return seconds * ways, elements * ways

    def _missing(self, have: Sequence["_Piece"], need: Sequence["_Piece"]) -> tuple[Costs, Costs]:
        """Return the seconds per byte of an element of what the busiest rank lacks, and what all of them lack."""
        held = np.stack([self._held(piece) for piece in have])  # [have, depths, ranks, 2, dimensions]
        seconds, elements = [], []
        for piece in need:
            wanted = self._held(piece)[-1]  # [ranks, 2, dimensions]
            stop = np.minimum(held[..., 1, :], wanted[:, 1])
            start = np.maximum(held[..., 0, :], wanted[:, 0])
            common = np.maximum(stop - start, 0).prod(axis=-1)  # [have, depths, ranks]
            lacks = np.maximum(wanted[:, 1] - wanted[:, 0], 0).prod(axis=-1) - common
            over_axis = lacks[:, 1:] - lacks[:, :-1]  # what the group has that the rank and its nearer neighbours lack
            waits = (over_axis * self._s_per_byte[:, None]).sum(axis=1)  # [have, ranks]
            seconds.append(waits.max(axis=-1))
            elements.append(lacks[:, -1].sum(axis=-1).astype(np.float64))
        return np.stack(seconds, axis=1), np.stack(elements, axis=1)

    def _held(self, piece: "_Piece") -> Boxes:
        if piece not in self._boxes:
            self._boxes[piece] = self._boxes_of(*piece)
        return self._boxes[piece]

    def _boxes_of(self, layout: Layout, idle: tuple[bool, ...]) -> Boxes:
        """Return what the group of every rank holds at every depth; pieces of outer axes are boxes of inner ones."""
        shape, dims = self._mesh.shape, len(layout.shape)
        regions = [layout.region(position) for position in range(self._mesh.size)]
        pieces = np.array([(region.start, region.stop) for region in regions], dtype=np.int64)
        grid = pieces.reshape(*shape, 2, dims)
        found = []
        for depth in range(len(shape) + 1):
            inner = tuple(range(depth, len(shape)))
            box = np.stack(
                (grid[..., 0, :].min(axis=inner, keepdims=True), grid[..., 1, :].max(axis=inner, keepdims=True)),
                axis=-2,
            )
            box = np.broadcast_to(box, grid.shape).reshape(self._mesh.size, 2, dims).copy()
            whole = [axis for axis in range(depth) if idle[axis]]
            box[(self._coordinates[:, whole] != 0).any(axis=1)] = 0
            found.append(box)
        return np.stack(found)


_Piece = tuple[Layout, tuple[bool, ...]]
"""How a tensor lies, and along which axes only the first device works."""


def _piece(layout: Layout, split: Split) -> _Piece:
    return layout, tuple(dim is Dimension.REPLICATE for dim in split.dimensions)
