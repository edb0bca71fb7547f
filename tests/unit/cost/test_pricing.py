"""Prices of edges against the steps and copies behind them, and how often pricing asks what it asks."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import planner.cost.edges
from planner.cost.edges import EdgePricer
from planner.cost.exchange import exchanged
from planner.cost.model import CostModel, Settings
from planner.cost.moves import Move, copied_elements, moves, moves_of_pairs
from planner.cost.table import CostTable
from planner.cost.transfer import FREE, Price, StepPricer
from planner.devices.library import equal_devices
from planner.devices.route import Router
from planner.ir.graph import Layer, LayerGraph, Parameter
from planner.ir.layout import BALANCED, CHUNK, Cut, CutRule, Index, Layout, Placement, Whole, family
from planner.ir.mesh import Mesh
from planner.ir.ops import Conv, Input, Output
from planner.ir.rules import InputOutput
from planner.ir.split import LayerId
from planner.ir.tensor import TensorSpec
from planner.ir.transfer import Step, StepKind, steps, transfers
from planner.profile.key import LocalLayer
from planner.profile.roofline import Roofline
from planner.profile.table import LayerTime, ProfileTable
from planner.space.enumerate import enumerate_splits
from support import layouts as some

EQUAL, PARTIAL = Whole.EQUAL, Whole.PARTIAL
KINDS = list(StepKind)


def busiest(source: Layout, target: Layout) -> int:
    """Return the most elements that a rank sends or receives, copy by copy."""
    sent: Counter[int] = Counter()
    received: Counter[int] = Counter()
    for copy in transfers(source, target):
        if copy.source != copy.target:
            sent[copy.source] += copy.region.volume
            received[copy.target] += copy.region.volume
    return max([0, *sent.values(), *received.values()])


def elements(step: Step) -> int:
    """Return the elements that the price of a step goes by, region by region."""
    positions = range(step.source.mesh.size)
    match step.kind:
        case StepKind.ALL_REDUCE | StepKind.REDUCE_SCATTER:
            return math.prod(max(step.source.region(p).shape[d] for p in positions) for d in dims(step))
        case StepKind.ALL_GATHER:
            return math.prod(max(step.target.region(p).shape[d] for p in positions) for d in dims(step))
        case StepKind.EXCHANGE:
            return busiest(step.source, step.target)
        case _:
            return 0


def copied(step: Step) -> int:
    """Return the elements that the busiest rank copies for a step, region by region."""
    if step.kind is not StepKind.EXCHANGE:
        return copied_elements(step)
    found: Counter[int] = Counter()
    is_sum = any(d.overlaps for d in step.source.divisions)
    for position in range(step.source.mesh.size):
        need = step.target.region(position)
        kept = [c.region for c in transfers(step.source, step.target) if c.source == c.target == position]
        found[position] += need.volume if is_sum and kept != [need] else 0
    for copy in transfers(step.source, step.target):
        if copy.source == copy.target:
            found[copy.source] += 2 * copy.region.volume
        else:
            found[copy.source] += 2 * copy.region.volume
            found[copy.target] += (2 + is_sum) * copy.region.volume
    return max(found.values())


def dims(step: Step) -> range:
    return range(len(step.source.shape))


@dataclass(frozen=True)
class Tally(StepPricer):
    """Prices that tell kinds, axes and bytes apart."""

    def move(self, kind: StepKind, axes: tuple[int, ...], num_bytes: int, copied_bytes: int) -> Price:
        tag = 1 + KINDS.index(kind) + 10 * sum(1 << a for a in axes)
        return Price(float(num_bytes * tag + copied_bytes / 2**20), float(num_bytes), tag)


def tally(mesh: Mesh) -> Tally:
    return Tally(Router(equal_devices(mesh.size), mesh))


def by_steps(source: Layout, target: Layout, item_bytes: int) -> Price:
    pricer = tally(source.mesh)
    found = steps(source.value, target.value)
    priced = (pricer.move(s.kind, s.axes, elements(s) * item_bytes, copied(s) * item_bytes) for s in found)
    return sum(priced, FREE)


@st.composite
def families(draw: st.DrawFn, *, with_shares: bool = True) -> tuple[list[Layout], list[Layout]]:
    """Layouts of one tensor before and after; at times in units, and at times with the rows that a window reads."""
    mesh = draw(some.meshes())
    shape = (draw(st.integers(1, 24)), draw(st.sampled_from([7, 12, 24, 48, 96])), draw(st.integers(2, 16)))
    unit = draw(st.sampled_from([u for u in (1, 2, 3, 4) if shape[1] % u == 0]))
    window = draw(st.one_of(st.none(), some.windows(shape[2])))
    held: list[Placement] = [0, 1, 2, *Whole]
    cuts = [
        (BALANCED, CHUNK, BALANCED),
        (BALANCED, Cut(CutRule.CHUNK, unit), Cut(window=window)),
    ]
    if draw(st.booleans()):
        cuts.reverse()
    found = []
    for own in cuts:
        drawn = []
        for _ in range(4):
            placements = tuple(draw(st.sampled_from(held)) for _ in mesh.axes)
            shares = draw(some.shares(mesh, placements)) if with_shares and draw(st.booleans()) else ()
            drawn.append(family(shape, mesh, own, shares).at(placements))
        found.append([x for x in drawn if not x.has_empty_piece()])
    assume(found[0] and found[1])
    return found[0], found[1]


@given(families(), st.sampled_from([2, 4]))
def test_matrices_of_an_edge_are_the_prices_of_the_steps_of_each_pair(
    pair: tuple[list[Layout], list[Layout]], item_bytes: int
) -> None:
    before, after = pair
    pricer = tally(before[0].mesh)
    found = EdgePricer(pricer).price(before, after, item_bytes)
    for i, source in enumerate(before):
        for j, target in enumerate(after):
            expected = by_steps(source, target, item_bytes)
            assert (found.seconds[i, j], found.num_bytes[i, j], found.levels[i, j]) == (
                expected.seconds, expected.num_bytes, expected.levels,
            )  # fmt: skip
            assert pricer.price(source, target, item_bytes) == expected


@pytest.mark.parametrize("cut", [0, 1])
def test_ranks_idle_before_and_after_are_not_in_the_exchange_beside_them(cut: int) -> None:
    cuts, idle = (BALANCED, CHUNK, BALANCED), (None, (1, 0), None)
    layouts = family((2, 7, 2), Mesh.of(a=2, b=2, c=2), cuts, idle)
    before, after = layouts.at((cut, EQUAL, Whole.SHARED)), layouts.at((Whole.SHARED, EQUAL, 0))
    assert [step.axes for step in steps(before.value, after.value)] == [(0,)]
    assert tally(before.mesh).price(before, after, 2) == by_steps(before, after, 2)


@given(families())
def test_the_busiest_rank_of_an_exchange_sends_or_receives_what_the_copies_say(
    pair: tuple[list[Layout], list[Layout]],
) -> None:
    for source in pair[0]:
        for target in pair[1]:
            if not source.axes_with(PARTIAL) and not target.axes_with(PARTIAL):
                assert exchanged(source, target).moved == busiest(source, target)


@given(families(with_shares=False))
def test_pairs_of_layouts_at_once_move_what_each_of_them_moves(pair: tuple[list[Layout], list[Layout]]) -> None:
    before, after = pair
    rows, columns = (x.ravel() for x in np.indices((len(before), len(after))))
    found = moves_of_pairs(before, after, (rows, columns))
    assert found == [moves(before[i], after[j]) for i, j in zip(rows, columns, strict=True)]


def test_a_rank_that_sends_more_than_any_receives_sets_the_price() -> None:
    mesh = Mesh.of(node=4, gpu=4)
    source, target = (Layout((4, 16), mesh, p, (BALANCED, CHUNK)) for p in ((EQUAL, 1), (1, 1)))
    # Every gpu holds 4 channels of 4 samples. On node n all 4 ranks need one of those that gpu n holds:
    received, sent = 4 * 1, 4 * 3
    assert exchanged(source, target).moved == max(received, sent)


def test_evenly_cut_tensors_of_all_sizes_share_their_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = count_pairs(monkeypatch)
    mesh = Mesh.of(node=2, gpu=4)
    edges = EdgePricer(tally(mesh))
    placements: list[tuple[Placement, ...]] = [(a, b) for a in (0, 1, EQUAL) for b in (0, 1, EQUAL)]
    for shape in ((16, 8), (16, 64, 56, 56), (512, 24, 7, 7)):
        layouts = family(shape, mesh, (BALANCED, CHUNK, BALANCED, BALANCED)[: len(shape)])
        edges.price([layouts.at(p) for p in placements], [layouts.at(p) for p in placements], 4)
    assert set(asked.values()) == {1}
    assert len(asked) == len(placements) ** 2


def count_pairs(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[Layout, Layout]]:
    """Count the pairs of layouts whose steps are worked out, from now on."""
    asked: Counter[tuple[Layout, Layout]] = Counter()

    def counted(
        before: Sequence[Layout], after: Sequence[Layout], pairs: tuple[Index, Index]
    ) -> list[tuple[Move, ...]]:
        asked.update((before[i], after[j]) for i, j in zip(*pairs, strict=True))
        return moves_of_pairs(before, after, pairs)

    monkeypatch.setattr(planner.cost.edges, "moves_of_pairs", counted)
    return asked


def chain(num_convolutions: int) -> LayerGraph:
    """Return equal convolutions one after the other, each with its own weight."""
    tensor = TensorSpec((16, 8, 6, 6))
    op = Conv(8, 8, (3, 3), (1, 1), (1, 1), (1, 1))
    layers = [Layer(LayerId("input"), Input(), (), tensor)]
    for i in range(num_convolutions):
        weight = Parameter(f"conv{i}.weight", TensorSpec((8, 8, 3, 3)), 0, 1, role="weight")
        layers.append(Layer(LayerId(f"conv{i}"), op, (layers[-1].id,), tensor, (weight,)))
    layers.append(Layer(LayerId("output"), Output(), (layers[-1].id,), tensor))
    return LayerGraph("chain", tuple(layers), 16)


def test_the_profile_is_asked_at_most_once_for_each_local_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: Counter[LocalLayer] = Counter()
    timed = ProfileTable.time

    def counted(self: ProfileTable, local: LocalLayer) -> LayerTime:
        asked[local] += 1
        return timed(self, local)

    monkeypatch.setattr(ProfileTable, "time", counted)
    graph, machine, mesh = chain(9), equal_devices(8), Mesh.of(gpu0=2, gpu1=4)
    space = enumerate_splits(graph, mesh, InputOutput.PER_RANK)
    model = CostModel.of(graph, machine, mesh, ProfileTable("any", Roofline.of_data_sheet(1e12, 1e11)), Settings())
    table = CostTable.of(space, model)

    assert set(asked.values()) == {1}
    convolutions = [layer for layer in graph.layers if isinstance(layer.op, Conv)]
    plain = {replace(model.local(c, s), layer=graph.layers[0]) for c in convolutions for s in space.splits[c.id]}
    # the first convolution computes no gradient of the input; the others are alike
    assert sum(isinstance(local.layer.op, Conv) for local in asked) == len(plain)
    for layer, costs in zip(graph.layers, table.layers, strict=True):
        for split, cost in zip(space.splits[layer.id], costs, strict=True):
            time = timed(model.profile, model.local(layer, split))
            assert (cost.forward_s, cost.backward_s) == (time.forward_s, time.backward_s)


def test_a_network_of_more_equal_layers_works_out_no_more_pairs_of_layouts(monkeypatch: pytest.MonkeyPatch) -> None:
    machine, mesh = equal_devices(8), Mesh.of(gpu0=2, gpu1=4)
    counts = []
    for length in (4, 9):
        asked = count_pairs(monkeypatch)
        graph = chain(length)
        space = enumerate_splits(graph, mesh, InputOutput.PER_RANK)
        model = CostModel.of(graph, machine, mesh, ProfileTable("any", Roofline.of_data_sheet(1e12, 1e11)), Settings())
        CostTable.of(space, model)
        counts.append(asked)
    assert counts[0]
    assert counts[0] == counts[1]


def test_a_number_that_every_rank_adds_to_is_priced() -> None:
    """A loss has no dimensions: its only move is an all-reduce of 4 bytes."""
    machine = equal_devices(2)
    mesh = machine.mesh()
    partial, equal = (Layout((), mesh, (placement,), ()) for placement in (Whole.PARTIAL, Whole.EQUAL))
    pricer = StepPricer(Router(machine, mesh))
    found = EdgePricer(pricer).price([partial, equal], [equal], 4)
    assert found.seconds.tolist() == [[pricer.move(StepKind.ALL_REDUCE, (0,), 4, 8).seconds], [0.0]]
    assert pricer.price(partial, equal, 4).seconds == found.seconds[0, 0]
