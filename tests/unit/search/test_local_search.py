"""Local search leaves out what cannot be shorter, and nothing else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import planner.search.auto
import planner.search.local
from planner.cost.model import CostModel, Settings
from planner.cost.resimulate import Changes, Resimulation
from planner.cost.simulate import simulated_step_s
from planner.cost.table import CostTable
from planner.devices.library import cluster
from planner.ir.graph import Layer, LayerGraph, Parameter
from planner.ir.ops import Conv, Input, Output
from planner.ir.rules import InputOutput
from planner.ir.split import LayerId
from planner.ir.tensor import TensorSpec
from planner.profile.roofline import Roofline
from planner.profile.table import ProfileTable
from planner.search.auto import Search, Start
from planner.search.floor import Floor
from planner.search.problem import Problem
from planner.space.enumerate import enumerate_splits
from support.problems import problems


@given(problems(), st.data())
def test_the_floor_is_the_additive_cost_of_every_choice_on_the_way(problem: Problem, data: st.DataObject) -> None:
    sizes = [len(costs) for costs in problem.node_s]
    picked = [data.draw(st.integers(0, n - 1)) for n in sizes]
    floor = Floor(problem, picked)
    for _ in range(4):
        v = data.draw(st.integers(0, len(sizes) - 1))
        for option in range(sizes[v]):
            changed = (*picked[:v], option, *picked[v + 1 :])
            assert floor.with_option(v, option) == pytest.approx(problem.cost_s(changed))
        picked[v] = data.draw(st.integers(0, sizes[v] - 1))
        floor.pick(v, picked[v])


def table() -> CostTable:
    """Return a small network on a machine where some gradient sync hides and some does not."""
    tensor, layers = TensorSpec((16, 32, 8, 8)), [Layer(LayerId("input"), Input(), (), TensorSpec((16, 32, 8, 8)))]
    for i in range(5):
        weight = Parameter(f"conv{i}.weight", TensorSpec((32, 32, 3, 3)), 0, 1, role="weight")
        op = Conv(32, 32, (3, 3), (1, 1), (1, 1), (1, 1))
        layers.append(Layer(LayerId(f"conv{i}"), op, (layers[-1].id,), tensor, (weight,)))
    graph = LayerGraph("chain", (*layers, Layer(LayerId("output"), Output(), (layers[-1].id,), tensor)), 16)
    machine = cluster("4xa100-nvlink")
    profile = ProfileTable("any", Roofline.of_data_sheet(1e13, 1e12))
    mesh = machine.meshes()[-1]
    space = enumerate_splits(graph, mesh, InputOutput.PER_RANK)
    return CostTable.of(space, CostModel.of(graph, machine, mesh, profile, Settings()))


def test_local_search_ends_where_it_ends_when_it_simulates_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    count = 0

    class Counted(Resimulation):
        def step_s(self, changes: Changes | None = None) -> float:
            nonlocal count
            count += bool(changes)
            return super().step_s(changes)

    monkeypatch.setattr(planner.search.local, "Resimulation", Counted)
    search = Search(table(), None)
    for name in ("model", "model-in"):  # far from the best, so that there is something to do
        fixed = search.fixed(name)
        start = Start(fixed.choice, fixed.timeline.step_s, fixed.bucket_bytes)
        count = 0
        found = search.refine([start])
        simulated, count = count, 0
        with monkeypatch.context() as patch:
            patch.setattr(Floor, "with_option", lambda *_: 0.0)
            expected = search.refine([start])
        assert found.choice == expected.choice
        assert found.timeline.step_s == expected.timeline.step_s
        assert simulated < count < planner.search.auto.MAX_TRIALS
        assert found.timeline.step_s < start.step_s


def test_every_start_of_auto_is_a_plan_that_it_does_not_undercut() -> None:
    search = Search(table(), None)
    starts, planned = search.starts(), search.solve("auto")
    assert [start.step_s for start in starts] == sorted(start.step_s for start in starts)
    for start in starts:
        step_s = simulated_step_s(search.table, start.choice, start.bucket_bytes)
        assert start.step_s == step_s >= planned.timeline.step_s
    for name in ("data", "model", "model-in", "conv-data-fc-model", "dp", "ilp", "hypar", "pase"):
        assert planned.timeline.step_s <= search.solve(name).timeline.step_s * (1 + 1e-12)
    assert planned.lower_bound_s <= planned.timeline.step_s * (1 + 1e-12)


def test_buckets_are_tried_from_one_that_holds_all_no_smaller_than_makes_sense() -> None:
    search = Search(table(), None)
    total = sum(b for c in (search.table.layers[i][0] for i in range(7)) for b in c.sync.values())
    sizes = search.bucket_sizes((0,) * 7)
    assert sizes == sorted(sizes)
    assert sizes[-1] >= total > sizes[-2]
    assert total / planner.search.auto.MAX_BUCKETS <= sizes[0]


def test_a_plan_keeps_the_buckets_of_its_start_where_the_usual_ones_are_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    search = Search(table(), None)
    choice = search.fixed("data").choice
    (best_s, best), *_, (worst_s, worst) = sorted(
        (simulated_step_s(search.table, choice, size), size) for size in (1, 2**14, 2**16, 2**18)
    )
    assert best_s < worst_s
    start = Start(choice, best_s, best)
    monkeypatch.setattr(search, "bucket_sizes", lambda _: [worst])
    found = search.refine([start])
    assert found.timeline.step_s <= start.step_s
    assert simulated_step_s(search.table, found.choice, found.bucket_bytes) == found.timeline.step_s
