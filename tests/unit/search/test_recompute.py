"""Where halos are recomputed: against every set of layers that could, priced one by one."""

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest

from planner.cost.model import CostModel, Settings
from planner.cost.simulate import simulated_step_s
from planner.cost.table import CostTable
from planner.devices.library import cluster
from planner.errors import InfeasibleError
from planner.ir.dimension import Dimension
from planner.ir.graph import Layer, LayerGraph, Parameter
from planner.ir.ops import BatchNorm, Conv, Elementwise, Input, Op, Output, Pool, Redistribute
from planner.ir.recompute import all_recomputing, enlarged
from planner.ir.rules import InputOutput
from planner.ir.split import LayerId, Split
from planner.ir.tensor import TensorSpec
from planner.profile.roofline import Roofline
from planner.profile.table import Measurement, ProfileTable, Source
from planner.search.auto import Search
from planner.search.formulate import formulate
from planner.search.problem import Choice
from planner.search.recompute import HaloRecompute, recomputed, tile_space, with_tiles
from planner.space.enumerate import enumerate_splits

CHANNELS = 16
BUCKET = 2**25


class Drawing:
    """A network that is drawn layer by layer; ids are their numbers."""

    def __init__(self, rows: int) -> None:
        self.layers = [Layer(LayerId("input"), Input(), (), TensorSpec((1, CHANNELS, rows, 64)))]

    def add(self, op: Op, inputs: tuple[LayerId, ...] = (), rows: int = 0) -> LayerId:
        """Add a layer behind the last one, or behind others; as many rows as that has, or so many."""
        read = inputs or (self.layers[-1].id,)
        spec = next(x for x in self.layers if x.id == read[0]).output
        output = TensorSpec((1, CHANNELS, rows or spec.shape[2], spec.shape[3]))
        name = LayerId(f"{op.kind}{len(self.layers)}")
        weight = Parameter(f"{name}.weight", TensorSpec((CHANNELS, CHANNELS, 3, 3)), 0, 1, role="weight")
        params = (weight,) if isinstance(op, Conv) else ()
        self.layers.append(Layer(name, op, read, output, params))
        return name

    def conv(self, kernel: int = 3) -> LayerId:
        """Add a convolution that keeps the size."""
        pad = kernel // 2
        return self.add(Conv(CHANNELS, CHANNELS, (kernel, 3), (1, 1), (pad, 1), (1, 1)))


def chain() -> list[Layer]:
    found = Drawing(96)
    for kernel in (3, 5, 3):
        found.conv(kernel)
    found.add(Pool("max", (3, 1), (2, 1), (1, 0), (1, 1)), rows=48)
    for _ in range(3):
        found.conv()
    found.add(Output())
    return found.layers


def residual() -> list[Layer]:
    found = Drawing(64)
    found.conv()
    shared = found.add(Redistribute())
    found.conv()
    found.add(Elementwise("add"), (found.conv(), shared))
    found.conv()
    found.add(Output())
    return found.layers


def with_norm() -> list[Layer]:
    found = Drawing(96)
    found.conv()
    found.conv()
    found.add(BatchNorm(CHANNELS))
    found.conv()
    found.conv()
    found.add(Output())
    return found.layers


def table_of(layers: list[Layer], flop_per_s: float) -> tuple[CostTable, Choice]:
    """Return costs on four ranks that are cut in height, on devices of this speed, and that strategy."""
    machine = cluster("4xa100-nvlink")
    mesh, graph = machine.meshes()[0], LayerGraph("drawn", tuple(layers), 1)
    profile = ProfileTable("any", Roofline.of_data_sheet(flop_per_s, flop_per_s / 10))
    model = CostModel.of(graph, machine, mesh, profile, Settings())
    table = CostTable.of(enumerate_splits(graph, mesh, InputOutput.GLOBAL, (Dimension.HEIGHT,)), model)
    wanted = Split.of(mesh, (Dimension.HEIGHT,) * len(mesh.axes))
    splits = table.space.splits
    return table, tuple(splits[x.id].index(wanted) if wanted in splits[x.id] else 0 for x in graph.layers)


def additive_s(table: CostTable, choice: Choice) -> float:
    problem = formulate(table).problem
    return problem.cost_s(choice)


@pytest.mark.parametrize("drawn", [chain, residual])
def test_no_set_of_layers_that_recompute_costs_less(drawn: Callable[[], list[Layer]]) -> None:
    numbers = set()
    for flop_per_s in (1e11, 1e12, 1e13):
        table, choice = table_of(drawn(), flop_per_s)
        able = sorted(all_recomputing(table.space.graph, table.space.mesh, table.strategy(choice)))
        sets = [layers for count in range(len(able) + 1) for layers in itertools.combinations(able, count)]
        costs = {layers: additive_s(*with_tiles(table, choice, layers)) for layers in sets}
        found = recomputed(table, choice, HaloRecompute.AUTO, BUCKET)
        best_s = min(costs.values())
        assert costs[tuple(sorted(found))] == pytest.approx(best_s, rel=1e-12)
        if found:
            before_s = simulated_step_s(table, choice, BUCKET)
            assert simulated_step_s(*with_tiles(table, choice, found), BUCKET) < before_s
        numbers.add(len(found))
    assert len(numbers) > 1, "one answer for devices of any speed"


def test_a_tile_is_what_the_readers_of_a_rank_read() -> None:
    table, choice = table_of(chain(), 1e12)
    graph, mesh, strategy = table.space.graph, table.space.mesh, table.strategy(choice)
    convs = [x.id for x in graph.layers if x.op.kind == "conv"]
    found = enlarged(graph, mesh, strategy, convs[3:5])
    # four ranks have 12 of 48 rows; the last convolution reads one more on either side, the one before two
    assert found[convs[4]].tiles == ((2, ((0, 13), (11, 25), (23, 37), (35, 48))),)
    assert found[convs[3]].tiles == ((2, ((0, 14), (10, 26), (22, 38), (34, 48))),)
    assert found[convs[5]] == strategy[convs[5]]
    assert recomputed(table, choice, HaloRecompute.NEVER, BUCKET) == frozenset()
    every = recomputed(table, choice, HaloRecompute.ALWAYS, BUCKET)
    assert every == set(convs[:-1]) | {x.id for x in graph.layers if x.op.kind == "pool"}


def test_halos_that_were_told_to_be_recomputed_but_do_not_fit_are_an_error_and_not_an_exchange() -> None:
    table, choice = table_of(chain(), 1e12)
    plain = Search(table, None).forced(choice)
    _, wide = Search(table, None).with_recomputing(plain, HaloRecompute.ALWAYS)
    assert wide.timeline.memory_bytes > plain.timeline.memory_bytes
    search = Search(table, plain.timeline.memory_bytes)
    with pytest.raises(InfeasibleError, match=r"halos recomputed in 6 layers .* Use --halo-recompute auto"):
        search.with_recomputing(plain, HaloRecompute.ALWAYS)
    for wish in (HaloRecompute.AUTO, HaloRecompute.NEVER):
        found, planned = search.with_recomputing(plain, wish)
        assert found.fits(planned)


def test_tiles_in_shares_take_what_their_pieces_were_measured_at_times_the_ratio_of_estimates() -> None:
    table, choice = table_of(chain(), 1e12)
    graph, mesh, model = table.space.graph, table.space.mesh, table.model
    layer, even = graph[LayerId("conv6")], Split.of(mesh, (Dimension.HEIGHT,))
    cut = even.with_shares({"gpu": (1, 1, 2, 2)})
    strategy = {name: cut if split == even else split for name, split in table.strategy(choice).items()}
    tile = enlarged(graph, mesh, strategy, [layer.id])[layer.id]
    assert tile.tiles == ((2, ((0, 9), (7, 17), (15, 33), (31, 48))),)  # 8, 8, 16 and 16 rows, and a halo
    pieces = model.locals(layer, cut)
    seconds = {piece.piece.text: (k + 1) * 1e-3 for k, piece in enumerate(pieces)}
    layers = {key: Measurement(s, s, s, 0.0, 5) for key, s in seconds.items()}
    measured = CostModel.of(graph, model.machine, mesh, replace(model.profile, layers=layers), Settings())
    (found,) = measured.times(layer, [tile])
    estimate = model.profile.estimate
    assert found.source is Source.MEASURED
    assert found.forward_s == pytest.approx(
        max(
            seconds[piece.piece.text] * estimate(larger).forward_s / estimate(piece).forward_s
            for piece, larger in zip(pieces, model.locals(layer, tile), strict=True)
        )
    )
    (unknown,) = model.times(layer, [tile])
    assert unknown.forward_s < found.forward_s / 10


def test_statistics_over_space_and_other_splits_end_a_run() -> None:
    table, choice = table_of(with_norm(), 1e12)
    graph, mesh, strategy = table.space.graph, table.space.mesh, table.strategy(choice)
    assert sorted(all_recomputing(graph, mesh, strategy)) == ["conv1", "conv4"]
    with pytest.raises(ValueError, match=r"'batch_norm3' .* depends on more than its windows"):
        enlarged(graph, mesh, strategy, [LayerId("batch_norm3")])
    other = {**strategy, LayerId("conv2"): Split.of(mesh, (Dimension.REPLICATE,) * len(mesh.axes))}
    with pytest.raises(ValueError, match="a reader of layer 'conv1' is not split in space as it is"):
        enlarged(graph, mesh, other, [LayerId("conv1")])


def test_layers_that_share_a_parameter_are_refused_with_their_name() -> None:
    layers = chain()
    first, second = (k for k, x in enumerate(layers) if x.id in {"conv5", "conv6"})
    layers[second] = replace(layers[second], params=layers[first].params)
    table, choice = table_of(layers, 1e12)
    graph, mesh, strategy = table.space.graph, table.space.mesh, table.strategy(choice)
    assert all_recomputing(graph, mesh, strategy).isdisjoint({"conv5", "conv6"})
    with pytest.raises(ValueError, match="layer 'conv5' shares a parameter"):
        enlarged(graph, mesh, strategy, [LayerId("conv5")])


def test_the_options_of_a_chain_are_the_ends_of_its_segments() -> None:
    table, choice = table_of(chain(), 1e12)
    space = tile_space(table, choice)
    assert [len(space.splits[x.id]) for x in table.space.graph.layers] == [1, 7, 6, 5, 4, 3, 2, 1, 1]
    assert space.num_strategies == table.space.num_strategies
