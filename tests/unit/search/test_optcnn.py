"""OptCNN's eliminations against ours, and its cost with the arithmetic spelled out."""

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.cost.accounting import received_elements
from planner.cost.table import CostTable
from planner.ir.dimension import Dimension
from planner.search.elimination import solve_dp
from planner.search.exhaustive import solve_exhaustively
from planner.search.formulate import formulate
from planner.search.order import elimination_order
from planner.search.problem import Choice, Costs, Problem
from planner.search.published.optcnn import OptcnnProblem, optcnn_choice, optcnn_problem
from support.tables import BATCH, lenet_table, linear_table, residual_table

SAMPLE, CHANNEL, WHOLE = Dimension.SAMPLE, Dimension.OUT_CHANNEL, Dimension.REPLICATE

# --- its algorithm, as printed, on graphs that it reduces to two nodes


@dataclass(frozen=True)
class Graph:
    """Costs of nodes, and edges with theirs; two edges may join the same nodes."""

    node_s: dict[int, Costs]
    edges: tuple[tuple[int, int, Costs], ...]

    def problem(self) -> Problem:
        """Return it with one number for each pair of nodes."""
        total: dict[tuple[int, int], Costs] = {}
        for i, j, costs in self.edges:
            total[i, j] = total[i, j] + costs if (i, j) in total else costs
        return Problem(tuple(self.node_s[v] for v in sorted(self.node_s)), total)


@st.composite
def series_parallel_graphs(draw: st.DrawFn) -> Graph:
    """An edge, with edges in it replaced by two in a row or by two side by side."""
    pairs, place = [(0, 1)], {0: 0.0, 1: 1.0}
    for _ in range(draw(st.integers(0, 7))):
        a, b = pairs[draw(st.integers(0, len(pairs) - 1))]
        if draw(st.booleans()):
            pairs.append((a, b))
        else:
            new = len(place)
            place[new] = (place[a] + place[b]) / 2
            pairs.remove((a, b))
            pairs += [(a, new), (new, b)]
    number = {v: k for k, v in enumerate(sorted(place, key=lambda v: (place[v], v)))}
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    sizes = [draw(st.integers(1, 3)) for _ in place]
    node_s = {v: rng.integers(0, 9, size) / 8 for v, size in enumerate(sizes)}
    numbered = [(number[a], number[b]) for a, b in pairs]
    return Graph(node_s, tuple((i, j, rng.integers(0, 9, (sizes[i], sizes[j])) / 8) for i, j in numbered))


def optcnn_algorithm(graph: Graph) -> tuple[float, Choice, int]:
    """Return optimal cost and choice by [OptCNN18, Algorithm 1], and how many nodes it enumerated in the end."""
    nodes, edges = dict(graph.node_s), list(graph.edges)
    undo: list[tuple[int, int, int, np.ndarray]] = []
    while True:
        double = next(((a, b) for a, b in itertools.combinations(edges, 2) if a[:2] == b[:2]), None)
        if double is not None:  # edge elimination: t_X' = t_X(e1) + t_X(e2)
            first, second = double
            edges = [e for e in edges if e is not first and e is not second]
            edges.append((first[0], first[1], first[2] + second[2]))
            continue
        for j in nodes:  # node elimination: one edge in, one out
            into, out = [e for e in edges if e[1] == j], [e for e in edges if e[0] == j]
            if len(into) == len(out) == 1:
                break
        else:
            break
        (i, _, before), (_, k, behind) = into[0], out[0]
        sums = nodes[j][None, :, None] + before[:, :, None] + behind[None, :, :]
        edges = [e for e in edges if e is not into[0] and e is not out[0]]
        edges.append((i, k, sums.min(axis=1)))
        undo.append((j, i, k, sums.argmin(axis=1)))
        del nodes[j]
    left = sorted(nodes)
    best, chosen = float("inf"), {}
    for options in itertools.product(*(range(len(nodes[v])) for v in left)):
        picked = dict(zip(left, options, strict=True))
        cost = sum(nodes[v][picked[v]] for v in left) + sum(c[picked[i], picked[j]] for i, j, c in edges)
        if cost < best:
            best, chosen = float(cost), picked
    for j, i, k, options in reversed(undo):
        chosen[j] = int(options[chosen[i], chosen[k]])
    return best, tuple(chosen[v] for v in sorted(chosen)), len(left)


@given(series_parallel_graphs())
def test_variable_elimination_finds_what_node_and_edge_elimination_find(graph: Graph) -> None:
    cost, choice, num_left = optcnn_algorithm(graph)
    assert num_left == 2
    problem = graph.problem()
    found, wanted = solve_dp(problem), solve_exhaustively(problem)
    assert found.cost_s == cost == wanted.cost_s  # eighths: sums of them are exact
    assert problem.cost_s(choice) == cost


@given(series_parallel_graphs())
def test_its_tables_are_no_larger_than_those_of_node_elimination(graph: Graph) -> None:
    sizes = [len(costs) for costs in graph.problem().node_s]
    _, largest = elimination_order(sizes, set(graph.problem().edge_s))
    assert largest <= max(sizes) ** 3  # C^3, as the paper's bound has it


# --- its cost on our tables


def position(table: CostTable, layer: int, *dimensions: Dimension) -> int:
    """Return the position of a split among those of a layer."""
    splits = table.space.splits[table.space.graph.layers[layer].id]
    return next(i for i, split in enumerate(splits) if split.dimensions == dimensions)


def option(table: CostTable, found: OptcnnProblem, layer: int, *dimensions: Dimension) -> int:
    """Return the option of a layer's variable that is a split."""
    return found.formulation.options[layer].index(position(table, layer, *dimensions))


def edge(found: OptcnnProblem, i: int, j: int) -> tuple[Costs, Costs]:
    """Return seconds and bytes of the edge between two layers."""
    key = found.formulation.variable_of[i], found.formulation.variable_of[j]
    return found.problem.edge_s[key], found.edge_bytes[key]


def test_a_parameter_server_takes_every_gradient_and_gives_every_device_the_parameters() -> None:
    """Four devices of one node; the server is spread: each sends 3/4 of its gradient and gets as much, twice."""
    table = linear_table((256, 512, 128), "4xp100-nvlink")
    found = optcnn_problem(table, formulate(table))
    weights, s_per_byte = 512 * 256 * 4, table.model.pricer.router.alltoall((0,))[1]
    data, cut = option(table, found, 1, SAMPLE), option(table, found, 1, CHANNEL)
    cost, v = table.layers[1], found.formulation.variable_of[1]
    compute_s = cost[position(table, 1, SAMPLE)].forward_s + cost[position(table, 1, SAMPLE)].backward_s
    assert found.node_bytes[v][data] == 2 * 4 * weights
    assert found.problem.node_s[v][data] == pytest.approx(compute_s + 2 * 3 / 4 * weights * s_per_byte)
    assert found.node_bytes[v][cut] == 0
    assert s_per_byte == pytest.approx(1 / 80e9)  # NVLink of a P100


def test_a_device_fetches_what_it_lacks() -> None:
    """A tensor of 16 x 512 floats, cut by samples in 4; the reader wants all of it, on every device or on one."""
    table = linear_table((256, 512, 128), "4xp100-nvlink")
    found = optcnn_problem(table, formulate(table))
    seconds, num_bytes = edge(found, 1, 2)
    data = option(table, found, 1, SAMPLE)
    tensor, s_per_byte = BATCH * 512 * 4, table.model.pricer.router.alltoall((0,))[1]
    both_ways = 2
    for dimension, devices in ((CHANNEL, 4), (WHOLE, 1)):
        pair = data, option(table, found, 2, dimension)
        assert num_bytes[pair] == both_ways * devices * 3 / 4 * tensor
        assert seconds[pair] == pytest.approx(both_ways * 3 / 4 * tensor * s_per_byte)
    assert num_bytes[data, option(table, found, 2, SAMPLE)] == 0
    alone = option(table, found, 1, WHOLE)  # the three devices that were idle lack everything, and have nothing to give
    assert num_bytes[alone, option(table, found, 2, SAMPLE)] == both_ways * 3 / 4 * tensor
    assert num_bytes[alone, option(table, found, 2, CHANNEL)] == both_ways * 3 * tensor
    assert num_bytes[alone, option(table, found, 2, WHOLE)] == 0


def test_the_nearest_devices_are_asked_first() -> None:
    """Two nodes of two: a quarter is here, a quarter at the neighbour, half on the other node."""
    table = linear_table((256, 512, 128), "2x2-p100-ib100")
    found = optcnn_problem(table, formulate(table))
    seconds, num_bytes = edge(found, 1, 2)
    pair = option(table, found, 1, SAMPLE, SAMPLE), option(table, found, 2, CHANNEL, CHANNEL)
    tensor, router = BATCH * 512 * 4, table.model.pricer.router
    node, gpu = (router.alltoall((axis,))[1] for axis in (0, 1))
    assert node > gpu
    assert num_bytes[pair] == 2 * 4 * 3 / 4 * tensor
    assert seconds[pair] == pytest.approx(2 * tensor * (gpu / 4 + node / 2))
    pair = option(table, found, 1, SAMPLE, CHANNEL), option(table, found, 2, SAMPLE, SAMPLE)
    assert num_bytes[pair] == 2 * 4 * tensor / 8  # half of the quarter that it wants lies with the neighbour
    assert seconds[pair] == pytest.approx(2 * tensor / 8 * gpu)
    pair = option(table, found, 1, SAMPLE, WHOLE), option(table, found, 2, SAMPLE, CHANNEL)
    assert num_bytes[pair] == 2 * 2 * tensor / 2  # one device of each node was idle and fetches its node's half
    assert seconds[pair] == pytest.approx(2 * tensor / 2 * gpu)
    pair = option(table, found, 1, WHOLE, SAMPLE), option(table, found, 2, CHANNEL, SAMPLE)
    assert num_bytes[pair] == 2 * 2 * tensor / 2  # both of the second node fetch half from the first
    assert seconds[pair] == pytest.approx(2 * tensor / 2 * node)


@pytest.mark.parametrize("machine", ["4xp100-nvlink", "2x2-p100-ib100"])
def test_where_no_device_is_idle_the_bytes_are_those_of_the_accounting(machine: str) -> None:
    for table in (linear_table((256, 512, 128), machine), lenet_table(machine), residual_table(2, machine)):
        found = optcnn_problem(table, formulate(table))
        graph, checked = table.space.graph, 0
        for (i, j), num_bytes in found.edge_bytes.items():
            a, b = (next(k for k, v in enumerate(found.formulation.variable_of) if v == u) for u in (i, j))
            producer, consumer = graph.layers[a], graph.layers[b]
            for o, p in itertools.product(range(num_bytes.shape[0]), range(num_bytes.shape[1])):
                splits = [
                    table.space.splits[layer.id][found.formulation.options[k][x]]
                    for layer, k, x in ((producer, a, o), (consumer, b, p))
                ]
                if any(WHOLE in split.dimensions for split in splits):
                    continue
                have = table.model.layouts(producer, splits[0]).output.value
                inputs = table.model.layouts(consumer, splits[1]).inputs
                reads = [need for need, name in zip(inputs, consumer.inputs, strict=True) if source(table, name) == a]
                wanted = sum(2 * received_elements(have, need.value) * 4 for need in reads)
                assert num_bytes[o, p] == pytest.approx(wanted)
                checked += 1
        assert checked >= 4


def source(table: CostTable, name: object) -> int:
    """Return the layer that made a tensor, behind its redistribution."""
    graph = table.space.graph
    layer = next(layer for layer in graph.layers if layer.id == name)
    while layer.op.kind == "redistribute":
        layer = graph[layer.inputs[0]]
    return graph.index[layer.id]


@pytest.mark.parametrize("network", ["lenet", "linear", "residual"])
def test_its_choice_is_the_best_of_its_space(network: str) -> None:
    if network == "lenet":
        table = lenet_table("4xp100-nvlink")
    else:
        table = (
            linear_table((64, 512, 32), "2x2-p100-ib100") if network == "linear" else residual_table(1, "4xp100-pcie3")
        )
    found = optcnn_problem(table, formulate(table))
    wanted = solve_exhaustively(found.problem)
    assert found.problem.cost_s(found.solve()) == pytest.approx(wanted.cost_s, rel=1e-12)
    choice = optcnn_choice(table, formulate(table))
    assert choice == optcnn_choice(table, formulate(table))
    own = [split for name, split in table.strategy(choice).items() if table.space.graph[name].op.kind != "redistribute"]
    assert {d for split in own for d in split.dimensions} <= {SAMPLE, CHANNEL, WHOLE}
    options = found.solve()
    for layer, v in enumerate(found.formulation.variable_of):
        if table.space.graph.layers[layer].op.kind != "redistribute":
            assert choice[layer] == found.formulation.options[layer][options[v]]


def test_a_sum_of_volumes() -> None:
    """Data parallelism moves 2 x devices x weights, and no activations."""
    table = linear_table((256, 512, 128), "2x2-p100-ib100")
    found = optcnn_problem(table, formulate(table))
    options = [0] * len(found.problem.node_s)
    for layer in (1, 2):
        options[found.formulation.variable_of[layer]] = option(table, found, layer, SAMPLE, SAMPLE)
    assert found.volume_bytes(options) == 2 * 4 * 4 * (256 * 512 + 512 * 128)
