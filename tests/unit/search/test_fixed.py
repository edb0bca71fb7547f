"""The fixed strategies: what each asks of each layer, and what happens where that is illegal."""

import itertools

import pytest

from planner.cost.model import CostModel, Settings
from planner.cost.sharding import ParameterSharding
from planner.cost.table import CostTable
from planner.devices.library import cluster
from planner.errors import InfeasibleError, UnknownNameError
from planner.ir.dimension import Dimension
from planner.ir.graph import Layer, LayerGraph, Parameter
from planner.ir.mesh import Mesh
from planner.ir.ops import Conv, Elementwise, Input, Linear, Output, Reshape
from planner.ir.rules import InputOutput, is_legal
from planner.ir.split import LayerId, Split
from planner.ir.tensor import TensorSpec
from planner.profile.roofline import Roofline
from planner.profile.table import ProfileTable
from planner.search.fixed import FIXED, fixed_splits, fixed_strategy
from planner.search.formulate import formulate
from planner.space.constraints import Constraints
from planner.space.enumerate import enumerate_splits

S, H, W = Dimension.SAMPLE, Dimension.HEIGHT, Dimension.WIDTH
OUT, IN, SCATTER, REPLICATE = (
    Dimension.OUT_CHANNEL, Dimension.IN_CHANNEL, Dimension.IN_CHANNEL_SCATTER, Dimension.REPLICATE,
)  # fmt: skip


def conv(name: str, reads: str, channels: tuple[int, int], size: tuple[int, int], batch: int = 8) -> Layer:
    weight = Parameter(f"{name}.weight", TensorSpec((channels[1], channels[0], 3, 3)), 0, 1, role="weight")
    op = Conv(*channels, (3, 3), (1, 1), (1, 1), (1, 1))
    return Layer(LayerId(name), op, (LayerId(reads),), TensorSpec((batch, channels[1], *size)), (weight,))


def net(height: int = 8, width: int = 8) -> LayerGraph:
    """Return conv1 (3 channels), conv2 and conv3 in a residual block, flatten, fc, behind each other."""
    size = height, width
    flat = TensorSpec((8, 16 * height * width), roles=(S, OUT))
    weight = Parameter("fc.weight", TensorSpec((16, flat.shape[1])), 0, 1, role="weight")
    units = TensorSpec((8, 16), roles=(S, OUT))
    layers = (
        Layer(LayerId("input"), Input(), (), TensorSpec((8, 3, *size))),
        conv("conv1", "input", (3, 16), size),
        conv("conv2", "conv1", (16, 16), size),
        conv("conv3", "conv2", (16, 16), size),
        Layer(LayerId("add"), Elementwise("add"), (LayerId("conv1"), LayerId("conv3")), TensorSpec((8, 16, *size))),
        Layer(LayerId("flat"), Reshape(((0, 1, 0, 1), (1, 4, 1, 2))), (LayerId("add"),), flat),
        Layer(LayerId("fc"), Linear(flat.shape[1], 16), (LayerId("flat"),), units, (weight,)),
        Layer(LayerId("output"), Output(), (LayerId("fc"),), units),
    )  # fmt: skip
    return LayerGraph("net", layers, 8)


def dimensions(name: str, graph: LayerGraph, mesh: Mesh) -> dict[str, tuple[Dimension, ...]]:
    return {str(layer): split.dimensions for layer, split in fixed_splits(name, graph, mesh).items()}


TWO = Mesh.of(node=2, gpu=2)


def test_spatial_alternates_the_dimensions_of_space_over_the_axes_and_replicates_behind_them() -> None:
    found = dimensions("spatial", net(), TWO)
    assert found["conv1"] == found["conv2"] == found["add"] == (H, W)
    assert found["flat"] == found["fc"] == (REPLICATE, REPLICATE)
    assert dimensions("spatial", net(), Mesh.of(node=2, gpu0=2, gpu1=2))["conv1"] == (H, W, H)


def test_spatial_begins_with_the_largest_dimension() -> None:
    assert dimensions("spatial", net(height=4, width=16), TWO)["conv1"] == (W, H)


def test_spatial_takes_the_other_dimension_where_one_is_too_small() -> None:
    narrow = net(height=16, width=4)
    assert dimensions("spatial", narrow, Mesh.of(node=2, gpu=4))["conv1"] == (H, W)
    assert dimensions("spatial", narrow, Mesh.of(node=2, gpu=8))["conv1"] == (H, H)


def test_sample_spatial_has_space_on_the_innermost_axis() -> None:
    found = dimensions("sample-spatial", net(), Mesh.of(node=2, gpu0=2, gpu1=2))
    assert found["conv1"] == found["add"] == (S, S, H)
    assert found["fc"] == (S, S, REPLICATE)


def test_channel_filter_alternates_along_the_way() -> None:
    found = dimensions("channel-filter", net(), TWO)
    assert found["conv1"] == found["conv3"] == (OUT, OUT)
    assert found["conv2"] == found["fc"] == (SCATTER, SCATTER)
    assert found["add"] == found["flat"] == (OUT, OUT)


@pytest.mark.parametrize("name", ["data", "fsdp", "model", "model-in", "conv-data-fc-model"])
def test_the_others_have_one_dimension(name: str) -> None:
    found = dimensions(name, net(), TWO)
    expected = {"data": (S, S), "fsdp": (S, S), "model": (OUT, OUT), "model-in": (IN, IN)}
    assert found["conv2"] == expected.get(name, (S, S))
    assert found["fc"] == expected.get(name, (OUT, OUT))
    if name == "model-in":
        assert found["conv1"] == (IN, REPLICATE)  # three channels over four ranks leave one without any
        assert found["add"] == (REPLICATE, REPLICATE)


@pytest.mark.parametrize("shape", [(2, 2), (4, 2), (8, 1), (3, 2), (2, 8)])
@pytest.mark.parametrize("name", ["data", "fsdp", "model", "model-in", "spatial", "sample-spatial"])
def test_the_split_is_the_first_legal_one_by_the_rule(name: str, shape: tuple[int, int]) -> None:
    graph, mesh = net(), Mesh.of(node=shape[0], gpu=shape[1])
    count = len(mesh.axes)
    order = {
        "data": [[S]] * 2, "fsdp": [[S]] * 2, "model": [[OUT]] * 2, "model-in": [[IN]] * 2,
        "spatial": [[H, W], [W, H]], "sample-spatial": [[S], [H, W]] if count == 2 else [[H, W]],
    }  # fmt: skip
    wishes = [[*wanted, REPLICATE] for wanted in order[name][:count]]
    expected = {}
    for layer in graph.layers[1:-1]:
        tried = (Split.of(mesh, dimensions) for dimensions in itertools.product(*wishes))
        expected[layer.id] = next(split for split in tried if is_legal(layer, graph, mesh, split))
    if all(REPLICATE in split.dimensions for split in expected.values()):
        with pytest.raises(InfeasibleError, match="no layer can follow"):
            fixed_splits(name, graph, mesh)
    else:
        assert fixed_splits(name, graph, mesh) == expected


def test_a_strategy_that_nothing_can_follow_is_refused() -> None:
    with pytest.raises(InfeasibleError, match="no layer can follow strategy 'spatial' on 32 ranks"):
        fixed_splits("spatial", net(), Mesh.of(gpu=32))
    with pytest.raises(UnknownNameError, match="Did you mean 'spatial'"):
        fixed_splits("spacial", net(), TWO)


def table(dims: set[Dimension], constraints: Constraints, settings: Settings) -> CostTable:
    machine = cluster("2x2-a100-eth10")
    mesh = machine.mesh()
    space = enumerate_splits(net(), mesh, InputOutput.PER_RANK, dims, constraints)
    profile = ProfileTable("any", Roofline.of_data_sheet(1e13, 1e12))
    return CostTable.of(space, CostModel.of(net(), machine, mesh, profile, settings))


@pytest.mark.parametrize("name", [name for name in FIXED if name != "fsdp"])
def test_on_a_priced_space_the_strategy_is_the_same(name: str) -> None:
    priced = table(set(Dimension), Constraints(), Settings())
    found = fixed_strategy(name, priced, formulate(priced))
    strategy, alone = priced.strategy(found.choice), fixed_splits(name, net(), priced.space.mesh)
    assert {layer: strategy[layer] for layer in alone} == alone
    assert found.num_replaced == sum(REPLICATE in split.dimensions for split in alone.values())


def test_pinned_layers_keep_their_split_in_a_fixed_strategy() -> None:
    priced = table({S, OUT}, Constraints.of(pin=["fc=out_channel"]), Settings())
    found = fixed_strategy("data", priced, formulate(priced))
    strategy = priced.strategy(found.choice)
    assert strategy[LayerId("fc")].dimensions == (OUT, OUT)
    assert strategy[LayerId("conv2")].dimensions == (S, S)
    assert found.num_replaced == 1


def test_fsdp_needs_costs_of_sharded_parameters() -> None:
    whole = table({S}, Constraints(), Settings())
    with pytest.raises(InfeasibleError, match="parameters sharded: full"):
        fixed_strategy("fsdp", whole, formulate(whole))
    sharded = table({S}, Constraints(), Settings(parameter_sharding=ParameterSharding.FULL))
    found = sharded.strategy(fixed_strategy("fsdp", sharded, formulate(sharded)).choice)
    assert {split.dimensions for split in found.values()} == {(S, S)}
