"""`pase`: PaSE [PaSE21], its space and its cost, solved by elimination.

``pase_problem`` is its own problem: operators at its granularity, all configurations over their whole iteration
space, its costs as a ``Problem`` of numbers. ``pase_choice`` is its cost on our space.

**Deviations** of ``pase_choice``: a dimension's degree is the product of the mesh axes that split it, so every layer
uses up all devices (``replicate`` where nothing is cut); pieces may be uneven, a tile is then the fraction; height and
width may be cut; inputs and outputs lie as the plan's ``io`` says; ``in_channel_scatter``, which PaSE does not know,
is left out.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from planner.cost.table import CostTable
from planner.ir.dimension import Dimension
from planner.ir.graph import Layer
from planner.ir.layout import Layout
from planner.ir.mesh import Mesh
from planner.ir.ops import Input
from planner.ir.split import Split
from planner.search.elimination import solve_dp
from planner.search.formulate import Formulation
from planner.search.problem import Choice, Costs, Problem
from planner.search.published.pase_cost import (
    BALANCE,
    LEAST,
    WORD_BYTES,
    Degrees,
    configurations,
    edge_costs,
    input_cuts,
    node_costs,
    output_cuts,
)
from planner.search.published.pase_layers import operators_of
from planner.search.published.pase_operators import Graph, Kind, Operator


@dataclass(frozen=True, slots=True)
class PaseProblem:
    """PaSE's problem.

    Attributes:
        problem: costs in FLOP; equal operators and edges share their arrays.
        degrees: for every node its configurations.
    """

    problem: Problem
    degrees: tuple[Degrees, ...]

    @property
    def largest(self) -> int:
        """The largest number of configurations of a node."""
        return max(len(d) for d in self.degrees)


def pase_problem(graph: Graph, devices: int, *, balance: float = BALANCE, least: int = LEAST) -> PaseProblem:
    """Return PaSE's problem of a graph on so many devices.

    Args:
        graph: every node behind those that it reads.
        devices: at least 1; an operator may use fewer.
        balance: FLOP of a device per word of 8 bytes that it sends.
        least: a dimension is cut only into pieces of at least so many.

    Raises:
        ValueError: there is no device, or a node reads one that is not in front of it.
    """
    if devices < 1:
        raise ValueError(f"{devices} devices: at least one is needed")
    degrees: dict[Operator, Degrees] = {}
    nodes: dict[Operator, Costs] = {}
    edges: dict[tuple[Operator, Operator], Costs] = {}
    edge_s: dict[tuple[int, int], Costs] = {}
    for j, node in enumerate(graph):
        mine = node.operator
        if mine not in degrees:
            degrees[mine] = configurations(mine, devices, least)
            nodes[mine] = node_costs(mine, degrees[mine], balance)
        for i in node.inputs:
            if not 0 <= i < j:
                raise ValueError(f"node {node.name!r} at position {j} reads node {i}, which is not in front of it")
            theirs = graph[i].operator
            if (theirs, mine) not in edges:
                source, target = output_cuts(theirs, degrees[theirs]), input_cuts(mine, degrees[mine])
                edges[theirs, mine] = edge_costs(theirs.output, source, target, balance)
            both = edges[theirs, mine]
            edge_s[i, j] = edge_s[i, j] + both if (i, j) in edge_s else both
    problem = Problem(tuple(nodes[node.operator] for node in graph), edge_s)
    return PaseProblem(problem, tuple(degrees[node.operator] for node in graph))


def pase_choice(table: CostTable, formulation: Formulation) -> Choice:
    """Return the splits of least cost as PaSE counts it; layers that it does not know take what then costs least.

    The balance is that of the machine: the devices' rate over what each gets of a ring through all of them.

    Raises:
        UsageError: the tables would not fit in memory.
    """
    graph, splits = table.space.graph, table.space.splits
    allowed = {
        k: [p for p, split in enumerate(splits[layer.id]) if Dimension.IN_CHANNEL_SCATTER not in split.dimensions]
        for k, layer in enumerate(graph.layers)
    }
    narrowed, _ = formulation.pinned(allowed)
    solution = solve_dp(pase_costs(table, narrowed))
    assert solution.choice is not None  # there is no memory limit
    found = narrowed.layer_choice(solution.choice)
    known = {k: [found[k]] for k, layer in enumerate(graph.layers) if operators_of(layer, graph.inputs_of(layer))}
    rest, problem = narrowed.pinned(known)
    solution = solve_dp(Problem(problem.node_s, problem.edge_s))  # its memory is judged by the caller
    assert solution.choice is not None
    return rest.layer_choice(solution.choice)


def pase_costs(table: CostTable, formulation: Formulation) -> Problem:
    """Return PaSE's cost of every option of a formulation, in FLOP."""
    balance = _balance(table)
    space = table.space
    layers, variable_of, positions = space.graph.layers, formulation.variable_of, formulation.options
    nodes: dict[int, Costs] = {}
    vectors: dict[tuple[int, tuple[int, ...]], Costs] = {}  # layers that look alike have one tuple of costs
    for k, (layer, v) in enumerate(zip(layers, variable_of, strict=True)):
        alike = id(table.layers[k]), positions[k]
        if alike not in vectors:
            vectors[alike] = _layer_costs(table, layer, _chosen(table, layer, positions[k]), balance)
        nodes[v] = nodes[v] + vectors[alike] if v in nodes else vectors[alike]
    edge_s: dict[tuple[int, int], Costs] = {}
    matrices: dict[tuple[int, tuple[int, ...], tuple[int, ...]], Costs] = {}
    for (i, j, position), priced in table.edges.items():
        if isinstance(layers[i].op, Input):
            continue  # the network's input is where it is read
        key = id(priced), positions[i], positions[j]
        if key not in matrices:
            splits = _chosen(table, layers[i], positions[i]), _chosen(table, layers[j], positions[j])
            matrices[key] = _edge(table, (layers[i], layers[j], position), splits, balance)
        both, a, b = matrices[key], variable_of[i], variable_of[j]
        if a == b:
            nodes[a] = nodes[a] + np.diagonal(both)
        else:
            pair, matrix = ((a, b), both) if a < b else ((b, a), both.T)
            edge_s[pair] = edge_s[pair] + matrix if pair in edge_s else matrix
    return Problem(tuple(nodes[v] for v in range(len(nodes))), edge_s)


def _chosen(table: CostTable, layer: Layer, positions: Sequence[int]) -> list[Split]:
    splits = table.space.splits[layer.id]
    return [splits[p] for p in positions]


def _layer_costs(table: CostTable, layer: Layer, splits: Sequence[Split], balance: float) -> Costs:
    operators = operators_of(layer, table.space.graph.inputs_of(layer))
    vectors = [node_costs(o, _degrees(o, splits, table.space.mesh), balance) for o in operators]
    return sum(vectors, np.zeros(len(splits)))


def _balance(table: CostTable) -> float:
    """Return the FLOP of a device while it sends a word; 0 on a single device."""
    rates = table.model.profile.roofline.flop_per_s
    ring = table.model.pricer.router.ring(range(len(table.space.mesh.axes)))
    return rates.get("conv", rates[""]) * WORD_BYTES / ring.bandwidth_bytes_per_s


def _degrees(operator: Operator, splits: Sequence[Split], mesh: Mesh) -> Degrees:
    """Return into how many pieces each split cuts each of PaSE's dimensions."""
    reduced = operator.kind is Kind.PRODUCT
    columns = (
        (Dimension.SAMPLE,),
        (Dimension.IN_CHANNEL,) if reduced else (Dimension.OUT_CHANNEL,),
        (Dimension.HEIGHT, Dimension.DEPTH, Dimension.LENGTH),
        (Dimension.WIDTH,),
        (),
        (),
        (Dimension.OUT_CHANNEL,) if reduced else (),
    )
    sizes = [axis.size for axis in mesh.axes]
    return np.array([
        [math.prod(n for n, d in zip(sizes, split.dimensions, strict=True) if d in column) for column in columns]
        for split in splits
    ], dtype=np.int64)  # fmt: skip


def _edge(
    table: CostTable, edge: tuple[Layer, Layer, int], splits: tuple[Sequence[Split], Sequence[Split]], balance: float
) -> Costs:
    producer, consumer, position = edge
    makes, reads = table.model.partition(producer), table.model.partition(consumer)
    source = np.array([_cuts(makes.layouts(s).output) for s in splits[0]], dtype=np.int64)
    target = np.array([_cuts(reads.layouts(s).inputs[position]) for s in splits[1]], dtype=np.int64)
    return edge_costs(producer.output.shape, source, target, balance)


def _cuts(layout: Layout) -> list[int]:
    """Return into how many pieces a layout cuts every dimension of its tensor."""
    cuts = [1] * len(layout.shape)
    for axis, placement in zip(layout.mesh.axes, layout.placements, strict=True):
        if isinstance(placement, int):
            cuts[placement] *= axis.size
    return cuts
