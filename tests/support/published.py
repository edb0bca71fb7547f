"""Small layer graphs and their costs, for the published solvers."""

import itertools

from planner.cost.model import CostModel, Settings
from planner.cost.table import CostTable
from planner.devices.library import cluster
from planner.ir.dimension import Dimension
from planner.ir.graph import Layer, LayerGraph, Parameter
from planner.ir.ops import Concat, Conv, Elementwise, Input, Linear, Op, Output, Pool
from planner.ir.rules import InputOutput
from planner.ir.split import LayerId
from planner.ir.tensor import TensorSpec
from planner.profile.roofline import Roofline
from planner.profile.table import ProfileTable
from planner.space.enumerate import enumerate_splits

BATCH = 16


def layer(name: str, op: Op, inputs: list[str], shape: tuple[int, ...], weight: tuple[int, ...] = ()) -> Layer:
    parameters = (Parameter(f"{name}.weight", TensorSpec(weight), 0, 1, role="weight"),) if weight else ()
    bias = (Parameter(f"{name}.bias", TensorSpec(weight[:1]), 0, role="bias"),) if weight else ()
    return Layer(LayerId(name), op, tuple(map(LayerId, inputs)), TensorSpec((BATCH, *shape)), parameters + bias)


def conv(name: str, source: str, inside: int, out: int, side: int) -> Layer:
    op = Conv(inside, out, (3, 3), (1, 1), (1, 1), (1, 1))
    return layer(name, op, [source], (out, side, side), (out, inside, 3, 3))


def branched() -> LayerGraph:
    """A convolution with a pool, two branches, their concatenation and their sum."""
    return LayerGraph(
        "branched",
        (
            layer("input", Input(), [], (3, 8, 8)),
            conv("stem", "input", 3, 4, 8),
            layer("pool", Pool("max", (2, 2), (2, 2), (0, 0), (1, 1)), ["stem"], (4, 4, 4)),
            conv("left", "pool", 4, 4, 4),
            conv("right", "pool", 4, 4, 4),
            layer("sum", Elementwise("add"), ["left", "right"], (4, 4, 4)),
            layer("cat", Concat(1), ["sum", "pool"], (8, 4, 4)),
            conv("last", "cat", 8, 4, 4),
            layer("output", Output(), ["last"], (4, 4, 4)),
        ),
        BATCH,
    )


def linears(widths: tuple[int, ...]) -> LayerGraph:
    layers = [layer("input", Input(), [], (widths[0],))]
    for i, (inside, out) in enumerate(itertools.pairwise(widths)):
        layers.append(layer(f"fc{i}", Linear(inside, out), [layers[-1].id], (out,), (out, inside)))
    layers.append(layer("output", Output(), [layers[-1].id], widths[-1:]))
    return LayerGraph("linears", tuple(layers), BATCH)


def table(graph: LayerGraph, shape: tuple[int, ...], *dimensions: Dimension) -> CostTable:
    machine = cluster("4xa100-nvlink")
    mesh = next(mesh for mesh in machine.meshes() if mesh.shape == shape)
    model = CostModel.of(graph, machine, mesh, ProfileTable("any", Roofline.of_data_sheet(1e13, 1e12)), Settings())
    return CostTable.of(enumerate_splits(graph, mesh, InputOutput.PER_RANK, dimensions), model)


HYPAR_DIMENSIONS = (Dimension.SAMPLE, Dimension.IN_CHANNEL, Dimension.IN_CHANNEL_SCATTER)
