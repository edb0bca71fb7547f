"""Small tables of costs whose gradient reductions partly hide behind backward."""

import itertools
from dataclasses import dataclass, replace

from planner.cost.model import CostModel, Settings
from planner.cost.sharding import ParameterSharding
from planner.cost.table import CostTable
from planner.cost.transfer import Reduction, StepPricer
from planner.devices.library import cluster
from planner.devices.measured import CollectiveKind
from planner.devices.route import Router
from planner.ir.dimension import Dimension
from planner.ir.graph import Layer, LayerGraph, Parameter
from planner.ir.ops import Conv, Elementwise, Input, Linear, Output, Pool, Redistribute, Reshape
from planner.ir.rules import InputOutput
from planner.ir.split import LayerId
from planner.ir.tensor import TensorSpec
from planner.profile.roofline import Roofline
from planner.profile.table import ProfileTable
from planner.space.enumerate import enumerate_splits

BATCH, CHANNELS, SIDE = 16, 16, 4
DIMENSIONS = (Dimension.SAMPLE, Dimension.OUT_CHANNEL, Dimension.IN_CHANNEL)


@dataclass(frozen=True)
class LoadedPricer(StepPricer):
    """Reductions that are slower behind computation and take from it, as some are that were measured."""

    def reduction(
        self, axes: tuple[int, ...], num_bytes: int, kind: CollectiveKind = CollectiveKind.ALL_REDUCE
    ) -> Reduction:
        price = super().reduction(axes, num_bytes, kind)
        return Reduction(price.seconds, 1.5 * price.seconds, 0.4 * price.seconds, price.levels)


def residual_table(
    num_blocks: int,
    machine_name: str = "2x2-a100-ib400",
    *,
    loaded: bool = False,
    sharding: ParameterSharding = ParameterSharding.NONE,
) -> CostTable:
    """Return the costs of blocks of two convolutions with a sum around them, and a linear layer behind a block."""
    image = TensorSpec((BATCH, CHANNELS, SIDE, SIDE))
    layers = [Layer(LayerId("input"), Input(), (), image)]
    for i in range(num_blocks):
        layers.append(Layer(LayerId(f"share{i}"), Redistribute(), (layers[-1].id,), image))
        shared = layers[-1].id
        for name in (f"conv{i}a", f"conv{i}b"):
            weight = Parameter(f"{name}.weight", TensorSpec((CHANNELS, CHANNELS, 3, 3)), 0, 1, role="weight")
            op = Conv(CHANNELS, CHANNELS, (3, 3), (1, 1), (1, 1), (1, 1))
            layers.append(Layer(LayerId(name), op, (layers[-1].id,), image, (weight,)))
        layers.append(Layer(LayerId(f"sum{i}"), Elementwise("add"), (layers[-1].id, shared), image))
    layers.append(Layer(LayerId("output"), Output(), (layers[-1].id,), image))
    return table_of(layers, machine_name, loaded=loaded, sharding=sharding)


def linear_table(widths: tuple[int, ...], machine_name: str, *, loaded: bool = False) -> CostTable:
    """Return the costs of linear layers one after the other."""
    layers = [Layer(LayerId("input"), Input(), (), TensorSpec((BATCH, widths[0])))]
    for i, (inside, out) in enumerate(itertools.pairwise(widths)):
        weight = Parameter(f"fc{i}.weight", TensorSpec((out, inside)), 0, 1, role="weight")
        layers.append(
            Layer(LayerId(f"fc{i}"), Linear(inside, out), (layers[-1].id,), TensorSpec((BATCH, out)), (weight,))
        )
    layers.append(Layer(LayerId("output"), Output(), (layers[-1].id,), layers[-1].output))
    return table_of(layers, machine_name, loaded=loaded)


def forked_table(
    branches: tuple[tuple[int, ...], ...], machine_name: str, *, stem: int = 64, speeds: tuple[float, ...] = ()
) -> CostTable:
    """Return the costs of branches of linear layers of these widths between a stem and a sum; all end equally wide."""
    x = Layer(LayerId("input"), Input(), (), TensorSpec((BATCH, stem)))
    layers = [x, _linear("stem", x, stem)]
    fork = Layer(LayerId("stem:shared"), Redistribute(), (layers[-1].id,), layers[-1].output)
    layers.append(fork)
    ends = []
    for b, widths in enumerate(branches):
        before = fork
        for i, width in enumerate(widths):
            before = _linear(f"b{b}.{i}", before, width)
            layers.append(before)
        ends.append(before)
    joined = Layer(LayerId("sum"), Elementwise("add"), tuple(end.id for end in ends), ends[0].output)
    layers += [joined, Layer(LayerId("output"), Output(), (joined.id,), joined.output)]
    return table_of(layers, machine_name, speeds=speeds)


def _linear(name: str, read: Layer, width: int) -> Layer:
    inside = read.output.shape[1]
    weight = Parameter(f"{name}.weight", TensorSpec((width, inside)), 0, 1, role="weight")
    return Layer(LayerId(name), Linear(inside, width), (read.id,), TensorSpec((BATCH, width)), (weight,))


def table_of(
    layers: list[Layer],
    machine_name: str,
    *,
    loaded: bool = False,
    sharding: ParameterSharding = ParameterSharding.NONE,
    speeds: tuple[float, ...] = (),
) -> CostTable:
    """Return the costs of these layers on the whole levels of a machine with quick devices, of these speeds."""
    machine = cluster(machine_name)
    if speeds:
        devices = tuple(replace(d, speed=speed) for d, speed in zip(machine.devices, speeds, strict=True))
        machine = replace(machine, devices=devices)
    mesh, graph = machine.meshes()[0], LayerGraph("small", tuple(layers), BATCH)
    profile, settings = ProfileTable("any", Roofline.of_data_sheet(1e13, 1e12)), Settings(parameter_sharding=sharding)
    model = CostModel.of(graph, machine, mesh, profile, settings)
    if loaded:
        model = replace(model, pricer=LoadedPricer(Router(machine, mesh)))
    return CostTable.of(enumerate_splits(graph, mesh, InputOutput.PER_RANK, DIMENSIONS), model)


def lenet_table(machine_name: str) -> CostTable:
    """Return the costs of LeNet-5 on images of 32 x 32: convolutions, pools and linear layers."""
    layers = [Layer(LayerId("input"), Input(), (), TensorSpec((BATCH, 1, 32, 32)))]
    for i, (inside, out, side) in enumerate([(1, 6, 28), (6, 16, 10)]):
        weight = Parameter(f"conv{i}.weight", TensorSpec((out, inside, 5, 5)), 0, 1, role="weight")
        op = Conv(inside, out, (5, 5), (1, 1), (0, 0), (1, 1))
        image, half = TensorSpec((BATCH, out, side, side)), TensorSpec((BATCH, out, side // 2, side // 2))
        layers.append(Layer(LayerId(f"conv{i}"), op, (layers[-1].id,), image, (weight,)))
        layers.append(Layer(LayerId(f"pool{i}"), Pool("max", (2, 2), (2, 2), (0, 0), (1, 1)), (layers[-1].id,), half))
    layers.append(
        Layer(LayerId("flatten"), Reshape(((0, 1, 0, 1), (1, 4, 1, 2))), (layers[-1].id,), TensorSpec((BATCH, 400)))
    )
    for i, (inside, out) in enumerate([(400, 120), (120, 84), (84, 10)]):
        weight = Parameter(f"fc{i}.weight", TensorSpec((out, inside)), 0, 1, role="weight")
        output = TensorSpec((BATCH, out))
        layers.append(Layer(LayerId(f"fc{i}"), Linear(inside, out), (layers[-1].id,), output, (weight,)))
    layers.append(Layer(LayerId("output"), Output(), (layers[-1].id,), layers[-1].output))
    return table_of(layers, machine_name)
