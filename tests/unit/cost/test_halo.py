"""Halo exchanges in prices, steps and bounds: hidden where that is faster, and nothing else."""

import functools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from planner.api import Options, Origin, machine_of, prepare
from planner.cost.halo import HaloOverlap, HaloPair
from planner.cost.model import CostModel, Settings
from planner.cost.overlap import Streams
from planner.cost.resimulate import Resimulation
from planner.cost.simulate import InputGradients, LayerBackward, simulate, simulated_step_s
from planner.cost.table import CostTable
from planner.cost.transfer import Reduction
from planner.devices.library import cluster
from planner.devices.route import Router
from planner.ir.dimension import Dimension
from planner.ir.graph import Layer, LayerGraph, Parameter
from planner.ir.ops import Conv, Input, Output
from planner.ir.rules import InputOutput
from planner.ir.split import LayerId
from planner.ir.tensor import TensorSpec
from planner.ir.transfer import is_halo
from planner.profile.key import LocalLayer
from planner.profile.roofline import Roofline
from planner.profile.table import LayerTime, ProfileTable
from planner.search.dual import bound_chain
from planner.search.formulate import formulate
from planner.space.enumerate import enumerate_splits
from support.tables import LoadedPricer

BATCH, CHANNELS, SIDE = 4, 16, 64
DIMENSIONS = (Dimension.SAMPLE, Dimension.HEIGHT, Dimension.WIDTH, Dimension.OUT_CHANNEL)
NODE = 1
ROUNDING = 1 + 1e-9


@functools.cache
def table(wish: HaloOverlap, *, loaded: bool = False, batch: int = BATCH) -> CostTable:
    """Four convolutions one after the other, on devices that are slow enough to hide what they exchange."""
    image = TensorSpec((batch, CHANNELS, SIDE, SIDE))
    layers = [Layer(LayerId("input"), Input(), (), image)]
    for i in range(4):
        weight = Parameter(f"conv{i}.weight", TensorSpec((CHANNELS, CHANNELS, 3, 3)), 0, 1, role="weight")
        op = Conv(CHANNELS, CHANNELS, (3, 3), (1, 1), (1, 1), (1, 1))
        layers.append(Layer(LayerId(f"conv{i}"), op, (layers[-1].id,), image, (weight,)))
    layers.append(Layer(LayerId("output"), Output(), (layers[-1].id,), image))
    machine = cluster("2x2-a100-eth10")
    mesh, graph = machine.meshes()[0], LayerGraph("convs", tuple(layers), batch)
    profile = ProfileTable("any", Roofline.of_data_sheet(3e11, 1e11))
    model = CostModel.of(graph, machine, mesh, profile, Settings(halo_overlap=wish))
    if loaded:
        model = replace(model, pricer=LoadedPricer(Router(machine, mesh)))
    return CostTable.of(enumerate_splits(graph, mesh, InputOutput.GLOBAL, DIMENSIONS), model)


def halos(costs: CostTable) -> dict[tuple[int, int, int, int], HaloPair]:
    """Return every halo by its edge and the positions of the splits."""
    return {(i, j, *pair): halo for (i, j, _), edge in costs.edges.items() for pair, halo in edge.halos.items()}


def test_halos_are_the_pairs_whose_windows_alone_differ() -> None:
    costs = table(HaloOverlap.AUTO)
    graph, splits = costs.space.graph, costs.space.splits
    found = halos(costs)
    for i, j, _ in graph.edges():
        producer, consumer = graph.layers[i], graph.layers[j]
        for a, have in enumerate(splits[producer.id]):
            for b, need in enumerate(splits[consumer.id]):
                pair = costs.model.layouts(producer, have).output, costs.model.layouts(consumer, need).inputs[0]
                assert ((i, j, a, b) in found) == (isinstance(consumer.op, Conv) and is_halo(*pair))
    assert len(found) > 10


def test_a_halo_costs_the_least_of_both_ways() -> None:
    auto, always, never = (halos(table(wish)) for wish in HaloOverlap)
    assert not any(halo.is_overlapped for halo in never.values())
    assert any(halo.is_overlapped for halo in auto.values())
    for key, halo in auto.items():
        costs = [found[key].forward_s + found[key].backward_s for found in (always, never)]
        assert halo.forward_s + halo.backward_s == min(costs)
        assert halo.hidden_s <= halo.whole_s
        assert halo.is_overlapped == (costs[0] < costs[1])


def test_in_place_a_halo_costs_what_is_left_of_it_and_what_its_rows_and_corners_add() -> None:
    costs, blocking, seen = table(HaloOverlap.ALWAYS), halos(table(HaloOverlap.NEVER)), set()
    model = costs.model
    for (i, j, a, b), halo in halos(costs).items():
        layer = costs.space.graph.layers[j]
        split = costs.space.splits[layer.id][b]
        local = model.local(layer, split)

        def share(is_row: bool, is_column: bool, local: LocalLayer = local) -> LayerTime:
            """Return the time of what a neighbour above or below, beside, or both, adds."""
            assert isinstance(local.layer.op, Conv)
            (n, c, *frame), (_, k, *rows), cut = local.inputs[0], local.output, (is_row, is_column)
            kernel, padding = (
                tuple(of_cut if is_cut else other for is_cut in cut) for of_cut, other in ((1, 3), (0, 1))
            )
            op = replace(local.layer.op, kernel=kernel, padding=padding)
            x, y = ([1 if is_cut else size for is_cut, size in zip(cut, s, strict=True)] for s in (frame, rows))
            piece = replace(
                local, layer=replace(local.layer, op=op), inputs=((n, c, *x),), output=(n, k, *y),
                params=((*local.params[0][:2], *kernel),),
            )  # fmt: skip
            return model.profile.estimate(piece)

        above, beside = ({0: 0, 1: 1, 2: 2}[split.dimensions.count(d)] for d in (Dimension.HEIGHT, Dimension.WIDTH))
        added = [share(True, False)] * above + [share(False, True)] * beside + [share(True, True)] * (above * beside)
        frame_s = 2 * 4 * math.prod(local.inputs[0]) / model.crew.bandwidth_bytes_per_s
        whole = model.profile.estimate(local)
        there_s, back_s = blocking[i, j, a, b].forward_s - frame_s, blocking[i, j, a, b].backward_s - frame_s
        assert (halo.is_overlapped, halo.has_frame) == (True, False)
        expected = max(there_s - whole.forward_s, 0.0) + sum(each.forward_s for each in added)
        assert halo.forward_s == pytest.approx(expected, rel=1e-9)
        expected = max(back_s - whole.backward_s, 0.0) + sum(each.backward_s for each in added)
        assert halo.backward_s == pytest.approx(expected, rel=1e-9)
        seen.add((above, beside))
    assert seen == {(1, 0), (0, 1), (1, 1), (2, 0), (0, 2)}


def test_elsewhere_a_halo_costs_what_is_left_of_it_strips_and_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Conv, "keeps_size", False)
    costs, blocking, seen = table.__wrapped__(HaloOverlap.ALWAYS), halos(table.__wrapped__(HaloOverlap.NEVER)), 0
    model = costs.model
    for (i, j, a, b), halo in halos(costs).items():
        layer = costs.space.graph.layers[j]
        split = costs.space.splits[layer.id][b]
        if Dimension.WIDTH in split.dimensions:
            continue
        local = model.local(layer, split)
        copy_s = 2 * 4 / model.crew.bandwidth_bytes_per_s
        frame_s, join_s = copy_s * math.prod(local.inputs[0]), copy_s * math.prod(local.output)

        def part(outputs: int, local: LocalLayer = local) -> LayerTime:
            (n, c, _, width), (_, k, *_) = local.inputs[0], local.output
            x, y = (n, c, outputs + 2, width), (n, k, outputs, width)
            return model.profile.estimate(replace(local, inputs=(x,), output=y))

        whole, strip, inside = model.profile.estimate(local), part(1), part(local.output[2] - 2)
        there_s, back_s = blocking[i, j, a, b].forward_s - frame_s, blocking[i, j, a, b].backward_s - frame_s
        extra_s = inside.forward_s + 2 * strip.forward_s - whole.forward_s
        weight_s = model.profile.estimate(replace(local, input_gradient=False)).backward_s
        assert (halo.is_overlapped, halo.has_frame) == (True, True)
        expected = max(there_s - inside.forward_s, 0.0) + max(extra_s, 0.0) + join_s
        assert halo.forward_s == pytest.approx(expected, rel=1e-9)
        assert halo.backward_s == pytest.approx(max(back_s - weight_s, 0.0) + frame_s, rel=1e-9)
        seen += 1
    assert seen > 5


class Blurred(nn.Module):
    """A convolution, then one with a fixed kernel that is no state of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.kernel = torch.ones(4, 1, 3, 3) / 9

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.conv2d(self.stem(x), self.kernel, padding=1, groups=4)


def test_halos_of_weights_that_are_no_parameters_are_priced() -> None:
    options = Options(dimensions=frozenset({Dimension.HEIGHT}), halo_overlap="always")
    x = torch.empty((1, 1, 16, 16), device="meta")
    planner = prepare(Blurred(), (x,), machine_of(devices=2), options, Origin("blurred", "blurred"))
    (mesh,) = planner.meshes()
    found = [halo for edge in planner.table(mesh).edges.values() for halo in edge.halos.values()]
    assert [(halo.is_overlapped, halo.has_frame) for halo in found] == [(True, False)]


def test_overlapping_never_makes_a_step_longer() -> None:
    """Where nothing else is sent: the same choice, whose exchanges hide or do not."""
    auto, never = table(HaloOverlap.AUTO), table(HaloOverlap.NEVER)
    rng = np.random.default_rng(1)
    shorter = 0
    for _ in range(100):
        choice = [int(rng.integers(len(layer))) for layer in auto.layers]
        choice[2:5] = [choice[1]] * 3  # convolutions of the same splits: halos are between equal ones
        steps = [simulated_step_s(costs, choice, 2**30) for costs in (auto, never)]
        assert steps[0] <= steps[1] * ROUNDING
        shorter += steps[0] < steps[1] * 0.999
    assert shorter > 5


@pytest.mark.parametrize("loaded", [False, True])
def test_changed_steps_and_bounds_hold_with_halos(loaded: bool) -> None:
    costs = table(HaloOverlap.AUTO, loaded=loaded)
    formulation = formulate(costs, objective="chain", least_of_bucket=20_000)
    bound_s = bound_chain(formulation.problem).lower_bound_s
    rng = np.random.default_rng(2)
    sizes = formulation.problem.sizes
    choice = list(formulation.layer_choice((0,) * len(sizes)))
    ours = Resimulation(costs, choice, 20_000)
    for _ in range(200):
        options = tuple(int(rng.integers(n)) for n in sizes)
        layers = formulation.layer_choice(options)
        step_s = simulated_step_s(costs, layers, 20_000)
        assert formulation.problem.cost_s(options) <= step_s * ROUNDING
        assert bound_s <= step_s * ROUNDING
        j = int(rng.integers(len(choice)))
        choice[j] = layers[j]
        assert ours.apply({j: layers[j]}) == pytest.approx(simulated_step_s(costs, choice, 20_000), rel=1e-12)


def test_a_timeline_tells_halos_from_other_transfers() -> None:
    costs = table(HaloOverlap.AUTO, batch=1)
    splits = costs.space.splits
    rows = [max(range(len(own)), key=lambda k: own[k].dimensions.count(Dimension.HEIGHT)) for own in splits.values()]
    step, blocking = simulate(costs, rows, 2**30), simulate(table(HaloOverlap.NEVER, batch=1), rows, 2**30)
    convs = step.layers[2:5]  # the first one gets the image from every rank, without an exchange
    assert all(layer.overlaps_halo and layer.halo_s > layer.halo_waited_s >= 0 == layer.transfer_s for layer in convs)
    assert [layer.halo_s for layer in step.layers] == [layer.halo_s for layer in blocking.layers]
    assert not any(layer.overlaps_halo for layer in blocking.layers)
    assert step.step_s < blocking.step_s
    assert step.exposed_s < blocking.exposed_s


def streams(*running: Reduction) -> Streams:
    found = Streams(("node", "gpu"), keeps_events=False)
    for reduction in running:
        found.start("sync", reduction)
    return found


def test_computing_beside_a_transfer_takes_as_long_as_either() -> None:
    step = streams()
    step.beside("a", 3.0, NODE)
    assert step.now_s == 3.0


def test_a_transfer_beside_computing_shares_its_link_with_a_reduction() -> None:
    """Both have half of the link: after 4 s the reduction of 2 s is done, and 2 s of the transfer; 1 s is left."""
    step = streams(Reduction(2.0, 2.0, 0.0, NODE))
    step.beside("a", 3.0, NODE)
    assert step.now_s == 5.0


def test_a_layers_reductions_start_behind_its_halo() -> None:
    """2 s of 5 are beside a transfer of 3, of which 1 is left; then the reduction starts, and 2 s of another input."""
    step = streams()
    backward = LayerBackward(0.0, 0, 5.0, InputGradients(waited_s=2.0, halo_s=1.0, hidden_s=2.0, levels=2))
    backward.run(step, [Reduction(4.0, 4.0, 0.0, NODE)])
    assert step.now_s == 8.0
    step.finish()
    assert step.now_s == 10.0
