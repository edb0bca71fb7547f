"""PaSE's costs against arithmetic written out, its space against its definition, its optimum against brute force."""

import itertools
import math

import numpy as np
import pytest

from planner.cost.model import CostModel, Settings
from planner.cost.table import CostTable
from planner.devices.library import cluster
from planner.ir.dimension import Dimension
from planner.ir.graph import Absorbed, Layer, LayerGraph, Parameter, share_transfers
from planner.ir.ops import BatchNorm, Concat, Conv, Elementwise, Input, Linear, Output, Pool, Reshape
from planner.ir.rules import InputOutput
from planner.ir.split import LayerId, Split
from planner.ir.tensor import TensorSpec
from planner.profile.roofline import Roofline
from planner.profile.table import ProfileTable
from planner.reproduce.pase import CODE_OPTIMA, NETWORKS, cut_out
from planner.search.elimination import solve_dp
from planner.search.exhaustive import solve_exhaustively
from planner.search.formulate import formulate
from planner.search.problem import Problem
from planner.search.published.pase import pase_choice, pase_costs, pase_problem
from planner.search.published.pase_cost import configurations, edge_costs, node_costs
from planner.search.published.pase_layers import operators_of, pase_graph
from planner.search.published.pase_operators import Kind, Node, Operator, Shape
from planner.space.enumerate import enumerate_splits

R = 10.0
"""FLOP per word in the examples."""
READS: Shape = (8, 16, 6, 6)
CONV = Operator(Kind.PRODUCT, (8, 16, 4, 4, 3, 3, 32), (8, 32, 4, 4), READS, pointwise=1)
LINEAR = Operator(Kind.PRODUCT, (8, 64, 1, 1, 1, 1, 32), (8, 32, 1, 1), (8, 64, 1, 1))
DEPTHWISE = Operator(Kind.PRODUCT, (8, 32, 4, 4, 3, 3, 32), (8, 32, 4, 4), (8, 32, 6, 6), groups=32)


def plain(kind: Kind, shape: Shape, **more: object) -> Operator:
    return Operator(kind, (*shape, 1, 1, 1), shape, shape, **more)  # type: ignore[arg-type]


# --- costs


@pytest.mark.parametrize(
    ("operator", "degrees", "flop"),
    [
        # m = 8 x 16 = 128 positions, n = 32, k = 16 x 9 = 144; one activation
        (CONV, {}, 3 * 128 * 32 * 144 + 3 * 128 * 32),
        # m = 64, n = 16, k = 144: the input's gradient (64 x 144) over 2, the weight's (16 x 144) over 2
        (CONV, {"b": 2, "n": 2}, 3 * 64 * 16 * 144 + 3 * 64 * 16 + R * 2 * 1 * (64 * 144 / 2 + 16 * 144 / 2)),
        # m = 128, n = 32, k = 36: the output (128 x 32) over 4
        (CONV, {"c": 4}, 3 * 128 * 32 * 36 + 3 * 128 * 32 + R * 2 * 3 * (128 * 32 / 4)),
        # height in 2: m = 64; the weight's gradient over 2; 3 more rows of 6 columns, 8 x 16 times
        (CONV, {"h": 2}, 3 * 64 * 32 * 144 + 3 * 64 * 32 + R * (2 * 32 * 144 / 2 + (6 * 6 - 3 * 6) * 8 * 16)),
        (LINEAR, {}, 3 * 8 * 32 * 64),
        (LINEAR, {"n": 2, "c": 4}, 3 * 8 * 16 * 16 + R * 2 * (3 * 8 * 16 / 4 + 1 * 8 * 16 / 2)),
        (LINEAR, {"b": 8}, 3 * 1 * 32 * 64 + R * 2 * 7 * 32 * 64 / 8),
        # 16 of 32 groups of m = 128, n = 1, k = 9: nothing to reduce
        (DEPTHWISE, {"n": 2}, 16 * 3 * 128 * 1 * 9),
        (DEPTHWISE, {"b": 2}, 32 * (3 * 64 * 9 + R * 2 * 9 / 2)),
        (plain(Kind.POOL, READS, window=(3, 3)), {"b": 4}, 2 * 16 * 36),
        # each piece of 3 x 6 needs 3 more rows
        (plain(Kind.POOL, READS, window=(3, 3)), {"h": 2}, 8 * 16 * 18 + R * (6 * 6 - 3 * 6) * 8 * 16),
        # 4 reductions of c h w = 576 words over 2 devices, none of weights
        (plain(Kind.NORM, READS), {"b": 2}, 16 * 4 * 576 + 4 * R * 2 * 576 / 2),
        # the weights: 8 words over 4 devices
        (plain(Kind.NORM, READS), {"c": 4}, 16 * 8 * 4 * 36 + 4 * R * 2 * 3 * 8 / 4),
        (plain(Kind.ELEMENTWISE, READS, pointwise=1), {"c": 4}, 2 * 8 * 4 * 36),
        (plain(Kind.MEAN, READS), {"b": 2, "h": 3}, R * 2 * 2 * (4 * 16 * 2 * 6) / 3),
        (plain(Kind.LOSS, (8, 64, 1, 1)), {"b": 2}, 4 * 4 * 64 + 2 * 4),
        (plain(Kind.LOSS, (8, 64, 1, 1)), {"c": 2}, 4 * 8 * 32 + 2 * 8 + R * 2 * 8),
        (plain(Kind.CONCAT, READS), {"b": 8}, 0),
    ],
)
def test_the_cost_of_an_operator(operator: Operator, degrees: dict[str, int], flop: float) -> None:
    row = np.array([[degrees.get(name, 1) for name in "bchwrsn"]])
    assert node_costs(operator, row, R).tolist() == [flop]


def test_an_edge_costs_what_the_readers_tile_lacks_forward_and_backward() -> None:
    source = np.array([[4, 1, 1, 1], [2, 2, 1, 1]])
    target = np.array([[4, 1, 1, 1], [1, 4, 1, 1], [2, 1, 1, 1], [8, 1, 1, 1]])
    # tiles of the maker: 2 x 16 x 36, 4 x 8 x 36; of the reader: 2 x 16, 8 x 4, 4 x 16, 1 x 16
    overlap = [[2 * 16, 2 * 4, 2 * 16, 0], [2 * 8, 4 * 4, 4 * 8, 0]]  # the last has more pieces than its maker
    tile = [2 * 16, 8 * 4, 4 * 16, 1 * 16]
    wanted = [[2 * R * 36 * (t - o) for t, o in zip(tile, row, strict=True)] for row in overlap]
    assert edge_costs(READS, source, target, R).tolist() == wanted


# --- configurations


@pytest.mark.parametrize("devices", [1, 6, 16])
@pytest.mark.parametrize(
    ("operator", "splittable"),
    [(CONV, "bcrsn"), (LINEAR, "bcn"), (plain(Kind.POOL, (8, 16, 12, 9)), "bchw"), (plain(Kind.CONCAT, READS), "bhw")],
)
def test_configurations_are_all_factors_that_leave_four_with_a_product_within_the_devices(
    operator: Operator, splittable: str, devices: int
) -> None:
    columns = [
        [d for d in range(1, size + 1) if size % d == 0 and size / d >= 4] or [1] if name in splittable else [1]
        for name, size in zip("bchwrsn", operator.sizes, strict=True)
    ]
    wanted = [row for row in itertools.product(*columns) if math.prod(row) <= devices]
    assert [tuple(row) for row in configurations(operator, devices).tolist()] == wanted


def test_a_reshape_is_cut_by_samples_alone() -> None:
    flatten = Operator(Kind.FLATTEN, (8, 16, 6, 6, 1, 1, 1), (8 * 16 * 36, 1, 1, 1), READS)
    assert configurations(flatten, 64)[:, 0].tolist() == [1, 2]
    assert configurations(flatten, 64)[:, 1:].max() == 1


# --- problems


def test_a_residual_join_is_solved_as_brute_force_solves_it() -> None:
    shape: Shape = (16, 8, 4, 4)
    conv = Operator(Kind.PRODUCT, (16, 8, 4, 4, 3, 3, 8), shape, shape)
    nodes = [conv, conv, conv, plain(Kind.ELEMENTWISE, shape, pointwise=1)]
    reads: list[tuple[int, ...]] = [(), (0,), (0,), (1, 2)]
    graph = tuple(Node(str(k), o, i) for k, (o, i) in enumerate(zip(nodes, reads, strict=True)))
    for balance in (1.0, 50.0, 5000.0):
        problem = pase_problem(graph, 4, balance=balance).problem
        assert solve_dp(problem).cost_s == solve_exhaustively(problem).cost_s


@pytest.mark.parametrize(
    ("network", "first", "count"),
    [("AlexNet", 8, 4), ("AlexNet", 10, 3), ("ResNet-101", 10, 3), ("Inception-v3", 216, 3), ("Inception-v3", 191, 3)],
)
def test_cut_outs_are_solved_as_brute_force_solves_them(network: str, first: int, count: int) -> None:
    part = cut_out(NETWORKS[network](128), range(first, first + count))
    assert len(pase_problem(part, 4).problem.edge_s) == count - 1
    problem = pase_problem(part, 4).problem
    assert solve_dp(problem).cost_s == solve_exhaustively(problem).cost_s


@pytest.mark.parametrize(("network", "devices"), CODE_OPTIMA)
def test_optimum_and_space_are_those_of_the_published_code(network: str, devices: int) -> None:
    found = pase_problem(NETWORKS[network](128), devices)
    assert (solve_dp(found.problem).cost_s, found.largest) == CODE_OPTIMA[network, devices]


@pytest.mark.parametrize(
    ("network", "nodes", "edges"), [("AlexNet", 14, 13), ("Inception-v3", 219, 253), ("ResNet-101", 245, 277)]
)
def test_graphs_have_the_published_size_and_equal_operators_share_their_arrays(
    network: str, nodes: int, edges: int
) -> None:
    graph = NETWORKS[network](128)
    problem = pase_problem(graph, 8).problem
    assert (len(problem.node_s), len(problem.edge_s)) == (nodes, edges)
    assert len({id(costs) for costs in problem.node_s}) == len({node.operator for node in graph})
    kinds = {(graph[i].operator, graph[j].operator) for i, j in problem.edge_s}
    assert len({id(costs) for costs in problem.edge_s.values()}) == len(kinds)


def test_what_is_no_graph_is_refused() -> None:
    with pytest.raises(ValueError, match=r"node 'late' at position 0 reads node 1, which is not in front of it"):
        pase_problem((Node("late", LINEAR, (1,)),), 4)
    with pytest.raises(ValueError, match="at least one"):
        pase_problem((Node("only", LINEAR, ()),), 0)


# --- our layers


def network() -> LayerGraph:
    """Convolution with norm and activation, two branches joined, pool, flatten, linear layer."""
    image = TensorSpec((16, 8, 8, 8))

    def conv(name: str, reads: str, *absorbed: Absorbed) -> Layer:
        op = Conv(8, 8, (3, 3), (1, 1), (1, 1), (1, 1))
        weight = Parameter(f"{name}.weight", TensorSpec((8, 8, 3, 3)), 0, 1, role="weight")
        return Layer(LayerId(name), op, (LayerId(reads),), image, (weight,), absorbed)

    relu = Elementwise("relu")
    weight = Parameter("fc.weight", TensorSpec((32, 256)), 0, 1, role="weight")
    layers = (
        Layer(LayerId("input"), Input(), (), image),
        conv("a", "input", Absorbed("norm", BatchNorm(8)), Absorbed("relu", relu)),
        conv("b", "a", Absorbed("relu", relu)),
        Layer(LayerId("add"), Elementwise("add"), (LayerId("a"), LayerId("b")), image, (), (Absorbed("relu", relu),)),
        Layer(
            LayerId("pool"), Pool("max", (2, 2), (2, 2), (0, 0), (1, 1)), (LayerId("add"),), TensorSpec((16, 8, 4, 4))
        ),
        Layer(LayerId("both"), Concat(1), (LayerId("pool"), LayerId("pool")), TensorSpec((16, 16, 4, 4))),
        Layer(LayerId("flatten"), Reshape(((1, 4, 1, 2),)), (LayerId("both"),), TensorSpec((16, 256))),
        Layer(LayerId("fc"), Linear(256, 32), (LayerId("flatten"),), TensorSpec((16, 32)), (weight,)),
        Layer(LayerId("output"), Output(), (LayerId("fc"),), TensorSpec((16, 32))),
    )
    return LayerGraph("small", layers, 16)


def test_a_layer_graph_in_pases_granularity() -> None:
    image: Shape = (16, 8, 8, 8)
    product = Operator(Kind.PRODUCT, (16, 8, 8, 8, 3, 3, 8), image, image)
    active = Operator(Kind.PRODUCT, (16, 8, 8, 8, 3, 3, 8), image, image, pointwise=1)
    half, joined, flat = (16, 8, 4, 4), (16, 16, 4, 4), (16 * 256, 1, 1, 1)
    wide, logits = (16, 256, 1, 1), (16, 32, 1, 1)
    assert [(node.name, node.operator, node.inputs) for node in pase_graph(network())] == [
        ("a", product, ()),
        ("a:norm", plain(Kind.NORM, image), (0,)),
        ("b", active, (1,)),
        ("add", plain(Kind.ELEMENTWISE, image, pointwise=1), (1, 2)),
        ("pool", Operator(Kind.POOL, (*half, 1, 1, 1), half, image, window=(2, 2)), (3,)),
        ("both", Operator(Kind.CONCAT, (*joined, 1, 1, 1), joined, half), (4, 4)),
        ("flatten", Operator(Kind.FLATTEN, (*joined, 1, 1, 1), flat, joined), (5,)),
        ("flatten:unflatten", Operator(Kind.UNFLATTEN, (*wide, 1, 1, 1), wide, flat), (6,)),
        ("fc", Operator(Kind.PRODUCT, (16, 256, 1, 1, 1, 1, 32), logits, wide), (7,)),
        ("output", plain(Kind.LOSS, logits), (8,)),
    ]


def table(dimensions: frozenset[Dimension], graph: LayerGraph | None = None, flop_per_s: float = 1e13) -> CostTable:
    graph, machine = graph or network(), cluster("4xa100-nvlink")
    mesh = machine.meshes()[-1]
    assert [axis.size for axis in mesh.axes] == [2, 2]
    space = enumerate_splits(graph, mesh, InputOutput.PER_RANK, dimensions)
    profile = ProfileTable("any", Roofline.of_data_sheet(flop_per_s, 1e12))
    return CostTable.of(space, CostModel.of(graph, machine, mesh, profile, Settings()))


def pase_balance(found: CostTable) -> float:
    ring = found.model.pricer.router.ring((0, 1))
    return found.model.profile.roofline.flop_per_s[""] * 8 / ring.bandwidth_bytes_per_s


CHANNELS = frozenset(
    {Dimension.SAMPLE, Dimension.OUT_CHANNEL, Dimension.IN_CHANNEL, Dimension.IN_CHANNEL_SCATTER, Dimension.HEIGHT}
)


def test_its_cost_on_a_mesh_has_the_degrees_of_the_splits() -> None:
    found = table(CHANNELS)
    formulation = formulate(found)
    problem = pase_costs(found, formulation)
    graph, mesh = found.space.graph, found.space.mesh
    balance = pase_balance(found)

    def at(layer: str, *dimensions: Dimension) -> tuple[int, int]:
        k = graph.index[LayerId(layer)]
        return formulation.variable_of[k], found.space.splits[LayerId(layer)].index(Split.of(mesh, dimensions))

    def cost(layer: str, *dimensions: Dimension) -> float:
        variable, option = at(layer, *dimensions)
        return float(problem.node_s[variable][option])

    # fc, 16 x 32 x 256: n = 16, k = 128; the output 16 x 16 over 2, the input's gradient 16 x 128 over 2
    wanted = 3 * 16 * 16 * 128 + balance * (16 * 16 + 16 * 128)
    assert cost("fc", Dimension.OUT_CHANNEL, Dimension.IN_CHANNEL) == pytest.approx(wanted)
    # a: m = 8 x 64, n = 4, k = 72 with a norm of (8, 4, 8, 8); 4 reductions of 256 words over 2 and 8 words over 2
    product = 3 * 512 * 4 * 72 + balance * (4 * 72 + 512 * 72)
    norm = 16 * 8 * 256 + 4 * balance * 256 + 4 * balance * 8
    assert cost("a", Dimension.SAMPLE, Dimension.OUT_CHANNEL) == pytest.approx(product + norm)
    # add to pool, by samples on both axes to samples and channels: (4 - 2 of 4 channels) of 8 x .. : 4 x 4 of 8 x 4
    (add, source), (pool, target) = (
        at("add", Dimension.SAMPLE, Dimension.SAMPLE), at("pool", Dimension.SAMPLE, Dimension.OUT_CHANNEL)
    )  # fmt: skip
    missing = (8 * 4 - 4 * 4) * 64
    assert all(min(pair) for pair in problem.edge_s)  # the network's input is where it is read
    assert problem.edge_s[add, pool][source, target] == pytest.approx(2 * balance * missing)


def test_length_is_height() -> None:
    sound = TensorSpec((16, 8, 32))
    weight = Parameter("conv.weight", TensorSpec((8, 8, 3)), 0, 1, role="weight")
    layers = (
        Layer(LayerId("input"), Input(), (), sound),
        Layer(LayerId("conv"), Conv(8, 8, (3,), (1,), (1,), (1,)), (LayerId("input"),), sound, (weight,)),
        Layer(LayerId("output"), Output(), (LayerId("conv"),), sound),
    )
    found = table(frozenset({Dimension.LENGTH}), LayerGraph("sound", layers, 16))
    balance = pase_balance(found)
    option = found.space.splits[LayerId("conv")].index(Split.of(found.space.mesh, (Dimension.LENGTH,) * 2))
    # m = 16 x 8, n = 8, k = 24; the weight's gradient over 4; 3 more positions of 16 x 8
    wanted = 3 * 128 * 8 * 24 + balance * (2 * 3 * 8 * 24 / 4 + 3 * 16 * 8)
    assert pase_costs(found, formulate(found)).node_s[1][option] == pytest.approx(wanted)


def test_its_choice_is_the_optimum_of_its_cost_without_scattering() -> None:
    found = table(frozenset({Dimension.SAMPLE, Dimension.OUT_CHANNEL, Dimension.IN_CHANNEL_SCATTER}))
    formulation = formulate(found)
    choice = pase_choice(found, formulation)
    chosen = found.strategy(choice)
    assert not any(Dimension.IN_CHANNEL_SCATTER in split.dimensions for split in chosen.values())
    allowed = {
        k: [p for p, s in enumerate(found.space.splits[layer.id]) if Dimension.IN_CHANNEL_SCATTER not in s.dimensions]
        for k, layer in enumerate(found.space.graph.layers)
    }
    narrowed, _ = formulation.pinned(allowed)
    problem = pase_costs(found, narrowed)
    picked = tuple(own.index(c) for own, c in zip(narrowed.options, choice, strict=True))
    # brute force over the layers that PaSE knows; each of those that it does not takes its cheapest split
    assert problem.cost_s(picked) == pytest.approx(brute_force(problem))


def brute_force(problem: Problem) -> float:
    """Return the least cost as the minimum of one table over all variables."""
    total = np.zeros([len(costs) for costs in problem.node_s])
    for v, costs in enumerate(problem.node_s):
        total += costs.reshape([-1 if u == v else 1 for u in range(total.ndim)])
    for (i, j), costs in problem.edge_s.items():
        total += costs.reshape([costs.shape[(i, j).index(u)] if u in (i, j) else 1 for u in range(total.ndim)])
    return float(total.min())


def test_layers_that_it_does_not_know_take_what_our_cost_likes_best() -> None:
    image, relu = TensorSpec((16, 8, 8, 8)), Elementwise("relu")
    weights = [Parameter(f"{name}.weight", TensorSpec((8, 8, 3, 3)), 0, 1, role="weight") for name in "abc"]
    op = Conv(8, 8, (3, 3), (1, 1), (1, 1), (1, 1))
    layers = [Layer(LayerId("input"), Input(), (), image)]
    layers += [
        Layer(LayerId(name), op, (LayerId(reads),), image, (weight,), (Absorbed("relu", relu),))
        for name, reads, weight in zip("abc", ("input", "a", "a"), weights, strict=True)
    ]
    layers += [
        Layer(LayerId("add"), Elementwise("add"), (LayerId("b"), LayerId("c")), image),
        Layer(LayerId("output"), Output(), (LayerId("add"),), image),
    ]
    graph = share_transfers(LayerGraph("two readers", tuple(layers), 16))
    found = table(frozenset({Dimension.OUT_CHANNEL}), graph, flop_per_s=1e8)  # so slow that everything is split
    formulation = formulate(found)
    chosen = found.strategy(pase_choice(found, formulation))
    shared = LayerId("a:shared")
    assert {str(chosen[LayerId(name)]) for name in "abc"} == {"gpu0=out_channel gpu1=out_channel"}
    # replicate has the same tiles, so that it costs the same for PaSE; but there every reader's gradient is reduced
    assert str(chosen[shared]) == "gpu0=broadcast gpu1=broadcast"
    alone = solve_dp(pase_costs(found, formulation)).choice
    assert alone is not None
    assert found.strategy(formulation.layer_choice(alone))[shared] != chosen[shared]


def test_layers_that_hand_on_elements_are_no_operators() -> None:
    tensor = TensorSpec((16, 32))
    for op in (Input(), Reshape(((0, 2, 0, 2),))):
        assert operators_of(Layer(LayerId("x"), op, (), tensor), (tensor,)) == ()
