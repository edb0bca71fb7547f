"""Sharded parameters: what they send, hold and update, and how their gathers run behind compute."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.cost.collectives import all_gather_s, all_reduce_s
from planner.cost.memory import LayerBytes, Optimizer
from planner.cost.model import CostModel, Settings
from planner.cost.overlap import Streams
from planner.cost.peak import Phase, step_memory
from planner.cost.sharding import ParameterSharding
from planner.cost.simulate import simulate, simulated_step_s
from planner.cost.table import CostTable
from planner.cost.transfer import Reduction
from planner.devices.library import cluster
from planner.ir.dimension import Dimension
from planner.ir.graph import Layer, LayerGraph, Parameter
from planner.ir.ops import Conv, Input, Output
from planner.ir.rules import InputOutput
from planner.ir.split import LayerId
from planner.ir.tensor import TensorSpec
from planner.profile.roofline import Roofline
from planner.profile.table import ProfileTable
from planner.search.auto import Search
from planner.search.formulate import formulate
from planner.space.enumerate import enumerate_splits

NONE, OPTIMIZER, FULL = ParameterSharding.NONE, ParameterSharding.OPTIMIZER, ParameterSharding.FULL
WEIGHT, BIAS, BUFFER = 64 * 64 * 9 * 4, 63 * 4, 7 * 4
"""Bytes of a layer's parameters; the bias is made not to divide by 4."""
RANKS = 4
HUGE = 2**40


def graph(num_layers: int = 4, size: int = 28) -> LayerGraph:
    """Return a chain of convolutions with weight, bias and buffer each."""
    spec = TensorSpec((16, 64, size, size))
    layers = [Layer(LayerId("input"), Input(), (), spec)]
    for i in range(num_layers):
        params = (
            Parameter(f"conv{i}.weight", TensorSpec((64, 64, 3, 3)), 0, 1, role="weight"),
            Parameter(f"conv{i}.bias", TensorSpec((63,)), 0, None, role="bias"),
            Parameter(f"conv{i}.table", TensorSpec((7,)), None, None, trainable=False, whole=True),
        )
        op = Conv(64, 64, (3, 3), (1, 1), (1, 1), (1, 1))
        layers.append(Layer(LayerId(f"conv{i}"), op, (layers[-1].id,), spec, params))
    return LayerGraph("chain", (*layers, Layer(LayerId("output"), Output(), (layers[-1].id,), spec)), 16)


def table(
    sharding: ParameterSharding,
    dims: frozenset[Dimension] = frozenset({Dimension.SAMPLE}),
    machine: str = "4xa100-nvlink",
    size: int = 28,
) -> CostTable:
    found = cluster(machine)
    settings = Settings(optimizer=Optimizer.ADAM, parameter_sharding=sharding)
    profile = ProfileTable("any", Roofline.of_data_sheet(2e13, 1e12))
    model = CostModel.of(graph(size=size), found, found.mesh(), profile, settings)
    return CostTable.of(enumerate_splits(model.graph, found.mesh(), InputOutput.PER_RANK, dims), model)


def data(priced: CostTable) -> tuple[int, ...]:
    """Return the choice of samples everywhere."""
    splits = priced.space.splits
    return tuple(
        next(i for i, s in enumerate(splits[layer.id]) if set(s.dimensions) == {Dimension.SAMPLE})
        for layer in priced.space.graph.layers
    )


@pytest.mark.parametrize(
    ("sharding", "parameters", "gradients", "state", "updated", "gathered"),
    [
        (NONE, WEIGHT + BIAS + BUFFER, WEIGHT + BIAS, 2 * (WEIGHT + BIAS), WEIGHT + BIAS, 0),
        (OPTIMIZER, WEIGHT + BIAS + BUFFER, WEIGHT + BIAS, 2 * (WEIGHT // 4 + 64), WEIGHT // 4 + 64, 0),
        (FULL, WEIGHT // 4 + 64 + BUFFER, WEIGHT // 4 + 64, 2 * (WEIGHT // 4 + 64), WEIGHT // 4 + 64, WEIGHT + BIAS),
    ],
)
def test_bytes_of_a_layer_with_adam_on_four_ranks(
    sharding: ParameterSharding, parameters: int, gradients: int, state: int, updated: int, gathered: int
) -> None:
    """63 elements on 4 ranks are 16 on the largest, 64 bytes; buffers are whole."""
    priced = table(sharding)
    cost = priced.layers[1][data(priced)[1]]
    memory = cost.memory
    assert (memory.parameters, memory.gradients, memory.state) == (parameters, gradients, state)
    assert (memory.updated, memory.gathered, memory.other_gathered) == (updated, gathered, gathered)
    assert memory.reduced == (0 if sharding is FULL else WEIGHT + BIAS)
    assert cost.sync == {(0,): WEIGHT + BIAS}
    copied = 2 * (WEIGHT + BIAS) if sharding is OPTIMIZER else 0  # out of the message with what others updated
    assert cost.update_s == pytest.approx((updated * 7 + copied) / (0.7 * 1e12))  # p twice, g once, two states twice
    plain = table(NONE).layers[1][data(priced)[1]].memory
    assert memory.transient == plain.transient + (4 * gathered - (WEIGHT + BIAS) if sharding is FULL else 0)


def test_layers_whose_parameters_nobody_shares_are_as_they_were() -> None:
    dims = frozenset({Dimension.SAMPLE, Dimension.OUT_CHANNEL})
    whole, sharded = table(NONE, dims), table(FULL, dims)
    out = next(i for i, s in enumerate(whole.space.splits[LayerId("conv0")]) if Dimension.OUT_CHANNEL in s.dimensions)
    before, after = whole.layers[1][out], sharded.layers[1][out]
    held = before.memory.parameters - BUFFER
    assert held == WEIGHT // 4 + 64
    assert after.memory == replace(before.memory, other_gathered=WEIGHT + BIAS)
    assert (after.sync, after.update_s, after.collect_s) == (before.sync, before.update_s, before.collect_s) == ({}, *(
        before.update_s, 0.0
    ))  # fmt: skip


def test_what_is_sent() -> None:
    sums = {sharding: table(sharding).model.sync((0,), 10**6) for sharding in ParameterSharding}
    router = table(NONE).model.pricer.router
    assert sums[NONE].seconds == all_reduce_s(router, (0,), 10**6)
    gather_s = all_gather_s(router, (0,), 10**6)
    assert sums[OPTIMIZER].seconds == pytest.approx(2 * gather_s)
    assert sums[FULL].seconds == pytest.approx(3 * gather_s)
    assert [sums[s].num_bytes for s in ParameterSharding] == pytest.approx([2 * 75e4, 2 * 75e4, 3 * 75e4])


def reference_full_s(priced: CostTable) -> float:
    """Return the step of fully sharded data parallelism: one queue of collectives beside one of compute.

    What waits for what is written out by hand; no reduction of an unmeasured accelerator delays compute.
    """
    costs = [layer[c] for layer, c in zip(priced.layers, data(priced), strict=True)][1:-1]
    gather_s = all_gather_s(priced.model.pricer.router, (0,), WEIGHT + BIAS)
    now = free = 0.0  # of compute, of the queue
    for is_forward in (True, False):
        order = costs if is_forward else costs[::-1]
        ready = free = max(now, free) + gather_s
        for i, cost in enumerate(order):
            now = max(now, ready)
            if i + 1 < len(order):
                ready = free = max(now, free) + gather_s
            now += cost.forward_s if is_forward else cost.backward_s + cost.collect_s
            if not is_forward:
                free = max(now, free) + gather_s  # the reduce-scatter takes as long
    return max(now, free) + sum(cost.update_s for cost in costs)


@pytest.mark.parametrize("machine", ["4xa100-nvlink", "4x1-a100-eth10", "4x1-t4-eth10"])
@pytest.mark.parametrize("size", [4, 28, 112])
def test_the_step_of_full_sharding_by_hand(machine: str, size: int) -> None:
    priced = table(FULL, machine=machine, size=size)
    choice = data(priced)
    step_s = simulated_step_s(priced, choice, 1)
    assert step_s == pytest.approx(reference_full_s(priced))
    assert simulated_step_s(priced, choice, HUGE) == step_s  # there are no buckets
    timeline = simulate(priced, choice, HUGE)
    assert timeline.step_s == step_s
    gather_s = all_gather_s(priced.model.pricer.router, (0,), WEIGHT + BIAS)
    assert timeline.sync_s == pytest.approx(4 * 3 * gather_s)
    gathers = [event for event in timeline.events if event.name.startswith("gather ")]
    assert [event.name.removeprefix("gather conv") for event in gathers] == [*"0123", *"3210"]
    assert all(a.stop_s <= b.start_s + 1e-12 for a, b in pairwise(gathers))


def test_the_step_of_a_sharded_optimizer_by_hand() -> None:
    """One bucket is scattered when backward has ended; the update is a quarter; then parameters are gathered."""
    priced, plain = table(OPTIMIZER), table(NONE)
    costs = [layer[c] for layer, c in zip(priced.layers, data(priced), strict=True)]
    compute_s = sum(c.forward_s + c.backward_s + c.collect_s + c.update_s for c in costs)
    gather_s = all_gather_s(priced.model.pricer.router, (0,), 4 * (WEIGHT + BIAS))
    timeline = simulate(priced, data(priced), HUGE)
    assert timeline.step_s == pytest.approx(compute_s + 2 * gather_s)
    assert timeline.sync_s == pytest.approx(2 * gather_s)
    updates = [sum(c.update_s for c in (layer[i] for layer, i in zip(t.layers, data(t), strict=True)))
               for t in (priced, plain)]  # fmt: skip
    assert updates[0] == pytest.approx(updates[1] * ((WEIGHT // 4 + 64) / (WEIGHT + BIAS) + 2 / 7))
    layer_s = all_gather_s(priced.model.pricer.router, (0,), WEIGHT + BIAS)
    by_layer = [e for e in simulate(priced, data(priced), 1).events if e.name == "gather parameters"]
    assert [e.stop_s - e.start_s for e in by_layer] == pytest.approx([layer_s] * 4)


def test_a_parameter_of_fewer_rows_than_ranks_is_held_and_reduced_whole() -> None:
    """63 rows on 4 ranks are 16 at most, whatever a row has; 3 rows are not cut."""
    few = TensorSpec((3, 64))

    def with_few(sharding: ParameterSharding) -> CostTable:
        priced = table(sharding)
        layers = list(priced.space.graph.layers)
        layers[1] = replace(layers[1], params=(*layers[1].params, Parameter("few", few, 0, None, role="weight")))
        made = LayerGraph("chain", tuple(layers), 16)
        model = CostModel.of(made, priced.model.machine, priced.model.mesh, priced.model.profile, priced.model.settings)
        return CostTable.of(
            enumerate_splits(made, model.mesh, InputOutput.PER_RANK, frozenset({Dimension.SAMPLE})), model
        )  # fmt: skip

    few_bytes = 3 * 64 * 4
    for sharding in ParameterSharding:
        before, after = (t.layers[1][data(t)[1]] for t in (table(sharding), with_few(sharding)))
        assert after.memory.parameters - before.memory.parameters == few_bytes
        assert after.memory.state - before.memory.state == 2 * few_bytes
        assert after.memory.reduced - before.memory.reduced == few_bytes
        assert after.memory.gathered == before.memory.gathered
        is_cut = sharding is not NONE
        assert after.whole == ({(0,): few_bytes} if is_cut else {})
        assert after.sync == {(0,): WEIGHT + BIAS + (0 if is_cut else few_bytes)}
    priced = with_few(FULL)
    plain, found = simulate(table(FULL), data(table(FULL)), HUGE), simulate(priced, data(priced), HUGE)
    reduce = priced.model.pricer.all_reduce((0,), few_bytes)
    assert found.sync_s - plain.sync_s == pytest.approx(reduce.seconds)
    assert found.communication_bytes - plain.communication_bytes == reduce.num_bytes


@pytest.mark.parametrize("sharding", [OPTIMIZER, FULL])
def test_no_step_is_below_the_bound_and_auto_is_no_worse_than_data(sharding: ParameterSharding) -> None:
    priced = table(sharding, frozenset({Dimension.SAMPLE, Dimension.OUT_CHANNEL, Dimension.IN_CHANNEL}))
    search = Search(priced, None)
    best = search.solve("auto")
    bound_s = search.lower_bound_s()
    assert bound_s <= best.timeline.step_s <= search.forced(data(priced)).timeline.step_s * (1 + 1e-9)
    assert formulate(priced, sync_weight=0.0).problem.cost_s(best.choice) <= best.timeline.step_s * (1 + 1e-9)


def test_waiting_for_a_reduction_lets_later_ones_go_on() -> None:
    step = Streams(("node", "gpu"), keeps_events=True)
    step.start("first", Reduction(1.0, 1.0, 0.0, 1))
    second = step.start("second", Reduction(2.0, 2.0, 0.0, 1))
    step.start("third", Reduction(5.0, 5.0, 0.0, 1))
    step.compute("a", 0.5)
    step.wait(second)
    assert step.now_s == pytest.approx(1.0 + 2.0)
    step.wait(second)
    step.finish()
    assert step.now_s == pytest.approx(1.0 + 2.0 + 5.0)


def test_the_walk_holds_two_layers_whole() -> None:
    """Layer b has no parameters: while it runs, those of its neighbour on the way are whole already."""

    def layer(gathered: int) -> LayerBytes:
        return LayerBytes(
            parameters=gathered // 4, gradients=gathered // 4, reduced=0, state=0, activations=0, computed=0, inputs=0,
            gathered=gathered, other_gathered=400,
        )  # fmt: skip

    moments = step_memory(["a", "b", "c"], [layer(400), layer(0), layer(80)]).moments
    assert [(m.name, m.phase, m.working) for m in moments[:-1]] == [
        ("a", Phase.FORWARD, 400 + 80),
        ("b", Phase.FORWARD, 80),
        ("c", Phase.FORWARD, 80),
        ("c", Phase.BACKWARD, 80 + 400 + 80),  # parameters of c and a, gradient of c
        ("b", Phase.BACKWARD, 400 + 80),
        ("a", Phase.BACKWARD, 400 + 400 + 80),
    ]
    assert [m.gradients for m in moments] == [0, 0, 0, 20, 20, 120, 120]


@given(st.lists(st.tuples(*[st.integers(0, 1000)] * 5), min_size=1, max_size=6))
def test_the_peak_is_below_the_bound_of_the_solvers(drawn: list[tuple[int, ...]]) -> None:
    def other(i: int) -> int:
        return max((row[0] for j, row in enumerate(drawn) if j != i), default=0)

    layers = [
        LayerBytes(shard, shard, 0, shard, kept, computed, inputs, shard, gathered, other(i))
        for i, (gathered, shard, kept, computed, inputs) in enumerate(drawn)
    ]
    peak = step_memory([str(i) for i in range(len(layers))], layers).peak.total
    assert peak <= sum(m.resident for m in layers) + max(m.transient for m in layers)
