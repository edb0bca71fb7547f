"""Changed steps against the whole simulation."""

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.cost.resimulate import Resimulation
from planner.cost.sharding import ParameterSharding
from planner.cost.simulate import simulate
from planner.cost.table import CostTable
from support.tables import linear_table, residual_table

SMALLEST, LARGEST = 1, 100_000  # bytes of a bucket: a weight has 16 x 16 x 9 x 4 = 9,216 before it is split
EXACT = 1e-12


@functools.cache
def table(number: int) -> CostTable:
    makers = (
        lambda: residual_table(3),
        lambda: residual_table(3, loaded=True),
        lambda: linear_table((64, 256, 64, 256, 64), "2x2-a100-ib400", loaded=True),
        lambda: residual_table(2, "4xa100-nvlink"),
        lambda: linear_table((64, 1024, 64, 64, 64), "2x2-p100-eth10"),
        lambda: residual_table(2, sharding=ParameterSharding.OPTIMIZER),
        lambda: residual_table(2, sharding=ParameterSharding.FULL),
    )
    return makers[number]()


@settings(max_examples=120, deadline=None)
@given(st.integers(0, 6), st.integers(SMALLEST, LARGEST), st.data())
def test_changed_steps_are_those_of_the_whole_simulation(number: int, bucket_bytes: int, data: st.DataObject) -> None:
    costs = table(number)
    sizes = [len(layer) for layer in costs.layers]
    choice = [data.draw(st.integers(0, size - 1)) for size in sizes]
    ours = Resimulation(costs, choice, bucket_bytes)
    assert ours.step_s() == pytest.approx(simulate(costs, choice, bucket_bytes).step_s, rel=EXACT, abs=0)
    for _ in range(data.draw(st.integers(1, 6))):
        layers = data.draw(st.lists(st.integers(0, len(sizes) - 1), min_size=1, max_size=3, unique=True))
        changes = {j: data.draw(st.integers(0, sizes[j] - 1)) for j in layers}
        changed = [changes.get(j, position) for j, position in enumerate(choice)]
        wanted = simulate(costs, changed, bucket_bytes).step_s
        assert ours.step_s(changes) == pytest.approx(wanted, rel=EXACT, abs=0)
        assert ours.choice == tuple(choice)  # a trial keeps nothing
        if data.draw(st.booleans()):
            assert ours.apply(changes) == pytest.approx(wanted, rel=EXACT, abs=0)
            choice = changed
            assert ours.choice == tuple(choice)


def test_many_changes_in_turn_do_not_drift() -> None:
    costs = table(1)
    ours = Resimulation(costs, [0] * len(costs.layers), 20_000)
    choice = [0] * len(costs.layers)
    for turn in range(300):
        j = turn * 7 % len(choice)
        choice[j] = turn * 5 % len(costs.layers[j])
        found = ours.apply({j: choice[j]})
    assert found == pytest.approx(simulate(costs, choice, 20_000).step_s, rel=EXACT, abs=0)


def test_the_same_choice_again_changes_nothing() -> None:
    costs = table(0)
    ours = Resimulation(costs, [0] * len(costs.layers), 20_000)
    before = ours.step_s()
    assert ours.step_s(dict(enumerate(ours.choice))) == before
    assert ours.apply(dict(enumerate(ours.choice))) == before


def test_the_tables_of_these_tests_hide_some_reductions_and_expose_others() -> None:
    """So that the streams are busy at some layers and idle at others, which is what they are about."""
    exposed, hidden = [], []
    for number in range(5):
        costs = table(number)
        most = [
            int(np.argmax([sum(cost.sync.values()) for cost in layer]))  # the split with most to reduce
            for layer in costs.layers
        ]
        step = simulate(costs, most, 10_000)
        assert len([event for event in step.events if event.stream.startswith("sync")]) >= 2
        exposed.append(step.exposed_s > step.blocking_s * 1.001)
        hidden.append(step.exposed_s < (step.blocking_s + step.sync_s) * 0.999)
    assert any(exposed)
    assert any(hidden)
