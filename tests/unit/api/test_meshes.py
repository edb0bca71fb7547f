"""The search over meshes: fewer devices where links are slow, levels in factors, and what it costs."""

import functools
import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from planner.api import Machine, Options, Origin, Plan, Planner, compare_with, example_inputs, prepare, price_plan
from planner.api.meshes import MAX_AXES, MAX_PAIRS, num_pairs, whole_meshes
from planner.cost.sharding import ParameterSharding
from planner.devices.graph import Cluster, Device, Level, Link
from planner.devices.library import cluster
from planner.errors import InfeasibleError, UnknownNameError, UsageError
from planner.frontend.lower import TracedModel, trace_layers
from planner.frontend.source import load_model
from planner.ir.dimension import Dimension
from planner.ir.graph import is_boundary
from planner.ir.ops import Redistribute
from planner.profile.roofline import Roofline
from planner.profile.table import ProfileTable
from planner.search.fixed import FIXED
from planner.space.constraints import Constraints
from planner.space.enumerate import DEFAULT_DIMENSIONS

LINK_S = 1e-6


def machine(sizes: dict[str, int], bandwidths: dict[str, float]) -> Machine:
    """Return a tree of switches: devices of a level hang on one, with links of so many bytes/s."""
    names = [""]
    switches, links = ["root"], []
    for level, size in sizes.items():
        inner = level == list(sizes)[-1]
        grown = []
        for above in names:
            for i in range(size):
                name = f"{above}{level}{i}"
                links.append(Link(above or "root", name, "wire", LINK_S, bandwidths[level]))
                grown.append(name)
        names = grown
        if not inner:
            switches += grown
    devices = tuple(Device(name, "made-up", 2**34, {"fp32": 1e12}, 1e11) for name in names)
    levels = tuple(Level(name, size) for name, size in sizes.items())
    graph = Cluster("tree", devices, tuple(switches), tuple(links), levels)
    return Machine(graph, ProfileTable("made-up", Roofline.of_data_sheet(1e12, 1e11)))


@functools.cache
def traced(name: str, batch: int) -> TracedModel:
    loaded = load_model(name)
    return trace_layers(loaded.module, example_inputs(loaded.input_shapes, batch), name)


def planner(found: Machine, name: str = "lenet5", batch: int = 64, **options: Any) -> Planner:
    return Planner(traced(name, batch), found, Options(**options), Origin(name, name))


def refused(found: Machine, **options: Any) -> Planner:
    """Return what ``prepare`` says to a request."""
    loaded = load_model("lenet5")
    return prepare(
        loaded.module, example_inputs(loaded.input_shapes, 64), found, Options(**options), Origin("lenet5", "lenet5")
    )


def test_slow_links_are_left_and_one_device_does_all() -> None:
    found = planner(machine({"node": 2, "gpu": 4}, {"node": 1e5, "gpu": 1e5})).plan()
    assert found.mesh.size == 1
    assert found.stages[0].devices == ["node0gpu0"]
    assert found.totals.communication_bytes == 0
    assert found.totals.exposed_s == 0


def test_only_a_slow_level_is_left_and_the_plan_names_the_devices_of_one_node() -> None:
    there = machine({"node": 2, "gpu": 4}, {"node": 1e5, "gpu": 1e12})
    found = planner(there, "alexnet").plan()
    assert "node" not in [axis.name for axis in found.mesh.axes]
    assert found.mesh.size == 4
    assert found.mesh.ranks == (0, 1, 2, 3)
    assert found.stages[0].devices == [f"node0gpu{i}" for i in range(4)]
    assert price_plan(Plan.from_json(found.to_json()), there).timeline.step_s == found.totals.step_s
    data_s = next(b.step_s for b in found.baselines if b.name == "data")
    assert found.totals.step_s < data_s


def test_a_slow_innermost_level_leaves_one_device_of_each_node() -> None:
    """Each device is alone with its node's link, so the plan takes the first of every node."""
    there = machine({"node": 4, "gpu": 2}, {"node": 1e12, "gpu": 1e12})
    plain = planner(there, "alexnet", mesh="node=4,gpu=1").plan()
    assert plain.stages[0].devices == [f"node{i}gpu0" for i in range(4)]
    assert plain.mesh.ranks == (0, 1, 2, 3)
    assert price_plan(plain, there).timeline.step_s == plain.totals.step_s


def test_links_of_the_devices_that_are_used_are_priced_not_those_of_the_first_ranks() -> None:
    """One device on each of two nodes: slow links between the nodes, though ranks 0 and 1 of the machine share one."""
    there = machine({"node": 2, "gpu": 2}, {"node": 1e6, "gpu": 1e12})
    across = planner(there, mesh="node=2,gpu=1", solver="data")
    inside = planner(there, mesh="node=1,gpu=2", solver="data")
    num_bytes = sum(p.numel() * 4 for p in load_model("lenet5").module.parameters())
    steps = [made.plan().totals.step_s for made in (across, inside)]
    assert steps[0] - steps[1] > 0.9 * num_bytes / 1e6  # a ring of two sends all bytes once over the slow link


def test_all_devices_are_used_where_that_is_asked_or_faster() -> None:
    slow = machine({"gpu": 4}, {"gpu": 1e5})
    assert planner(slow, all_devices=True).plan().mesh.size == 4
    fast = machine({"gpu": 4}, {"gpu": 1e12})
    found = planner(fast, "alexnet").plan()
    assert found.mesh.size == 4
    assert found.stages[0].devices == []


def test_no_candidate_is_better_than_the_plan() -> None:
    """Every mesh over any devices that the search may take, searched alone, is no faster."""
    made = planner(machine({"node": 2, "gpu": 3}, {"node": 2e8, "gpu": 2e10}), batch=96)
    found = made.plan()
    graph = made.machine.graph
    sizes = [(n, g) for n in (1, 2) for g in (1, 2, 3)]
    steps = {
        pair: planner(made.machine, batch=96, mesh=f"node={pair[0]},gpu={pair[1]}").plan().totals.step_s
        for pair in sizes
    }
    assert len(graph.devices) == 6
    assert found.totals.step_s <= min(steps.values()) * (1 + 1e-9)
    assert found.search.lower_bound_s <= min(steps.values())


def test_non_powers_of_two_have_meshes_and_fixed_strategies() -> None:
    made = planner(machine({"node": 2, "gpu": 6}, {"node": 1e9, "gpu": 1e10}), batch=96)
    assert [mesh.shape for mesh in made.meshes()] == [(2, 6), (2, 2, 3), (2, 3, 2)]
    assert {counts for counts, _ in made.fewer_meshes()} >= {(1, 6), (2, 1), (1, 1), (2, 4), (2, 3), (2, 2)}
    one = planner(machine({"gpu": 6}, {"gpu": 1e9}), batch=96)
    assert one.fixed_mesh("sample-spatial").shape == (3, 2)
    assert one.fixed_mesh("data").shape == (6,)
    assert planner(machine({"gpu": 7}, {"gpu": 1e9}), batch=96).fixed_mesh("sample-spatial").shape == (7,)


FOUR = {"pod": 2, "leaf": 2, "node": 2, "gpu": 2}


def test_a_machine_of_four_levels_joins_two_of_them() -> None:
    there = machine(FOUR, {"pod": 1e8, "leaf": 1e9, "node": 1e10, "gpu": 1e11})
    made = planner(there, all_devices=True, solver="dp")
    written = [[f"{a.name}={a.size}" for a in mesh.axes] for mesh in whole_meshes(there.graph)]
    assert written == [
        ["pod=2", "leaf=2", "node+gpu=4"], ["pod=2", "leaf+node=4", "gpu=2"], ["pod+leaf=4", "node=2", "gpu=2"],
    ]  # fmt: skip
    found = made.plan()
    assert found.mesh.size == 16
    assert price_plan(found, there).timeline.step_s == found.totals.step_s
    text = ",".join(f"{axis.name}={axis.size}" for axis in found.mesh.axes)
    assert there.graph.parse_mesh(text).axes == found.mesh.axes
    pricer = made.cost_model(made.meshes()[0]).pricer
    assert [pricer.levels((axis,)) for axis in range(3)] == [0b0001, 0b0010, 0b1100]


def test_every_fixed_strategy_stands_beside_a_plan_and_those_not_allowed_say_so() -> None:
    made = planner(machine({"node": 2, "gpu": 2}, {"node": 1e9, "gpu": 1e10}))
    compared = compare_with(made)
    assert [row.solver for row in compared.rows] == [*FIXED, "auto"]
    notes = dict(zip(FIXED, compared.notes, strict=False))
    assert notes["spatial"] == "it needs --dims with height, width"
    assert notes["sample-spatial"] == "it needs --dims with height"
    assert notes["fsdp"] == "it needs parameter sharding: full"
    assert not any(notes[name] for name in ("data", "model", "model-in", "conv-data-fc-model", "channel-filter"))
    plans = compared.plans()
    assert [plan.stages[0].parameter_sharding for plan in plans] == ["none"] * 7 + ["full", "none"]
    assert [plan.totals.step_s for plan in plans] == [row.timeline.step_s for row in compared.rows]
    assert [b.note for b in plans[-1].baselines] == list(notes.values())


@pytest.mark.parametrize("node_s", [1e7, 1e9, 1e11])
def test_auto_is_no_slower_than_any_fixed_strategy_that_is_allowed(node_s: float) -> None:
    there = machine({"node": 2, "gpu": 2}, {"node": node_s, "gpu": 1e11})
    made = planner(there, dimensions=DEFAULT_DIMENSIONS | {Dimension.HEIGHT, Dimension.WIDTH}, all_devices=True)
    compared = compare_with(made)
    allowed = [row for row, note in zip(compared.rows[:-1], compared.notes, strict=False) if not note]
    assert len(allowed) == len(FIXED) - 1
    assert all(compared.planned.timeline.step_s <= row.timeline.step_s * (1 + 1e-9) for row in allowed)
    assert not compared.planned_lost


def test_constraints_decide_what_is_allowed() -> None:
    there = machine({"gpu": 4}, {"gpu": 1e10})
    made = planner(
        there, constraints=Constraints.of(pin=["classifier*=out_channel"], tie=["classifier*"]), all_devices=True
    )
    notes = {b.planned.solver: b.note for b in made.baselines()}
    assert notes["data"].startswith("--pin or --forbid does not allow gpu=sample for 'classifier")
    assert notes["conv-data-fc-model"] == ""
    plan = made.plan()
    fcs = [set(layer.split.values()) for layer in plan.stages[0].layers if layer.id.startswith("classifier")]
    assert fcs == [{Dimension.OUT_CHANNEL}] * 3
    assert [(part.kind, part.text) for part in plan.search.constraints] == [
        ("pin", "classifier*=out_channel"), ("tie", "classifier*"),
    ]  # fmt: skip
    with pytest.raises(UsageError, match="matches none"):
        refused(there, constraints=Constraints.of(pin=["conf*=sample"]))
    with pytest.raises(InfeasibleError, match=r"'classifier.*has no legal split left.*Legal are gpu"):
        planner(there, constraints=Constraints.of(pin=["classifier*=height"])).plan()


@pytest.mark.parametrize("name", FIXED)
def test_a_fixed_strategy_is_a_solver_that_brings_its_dimensions_and_its_sharding(name: str) -> None:
    made = planner(machine({"node": 2, "gpu": 2}, {"node": 1e9, "gpu": 1e10}), solver=name)
    beside = {b.planned.solver: b for b in made.baselines()}[name]
    plan = made.plan()
    assert beside.note == ""
    assert plan.search.solver == name
    assert plan.totals.step_s == pytest.approx(beside.planned.timeline.step_s)
    assert plan.stages[0].parameter_sharding == ("full" if name == "fsdp" else "none")


def test_sharded_parameters_are_planned_where_they_are_asked_for() -> None:
    there = machine({"gpu": 4}, {"gpu": 1e10})
    made = planner(there, parameter_sharding="full", all_devices=True)
    assert made.sharding is ParameterSharding.FULL
    steps = {b.planned.solver: (b.planned.timeline.step_s, b.note) for b in made.baselines()}
    assert steps["data"] == steps["fsdp"]
    assert steps["fsdp"][1] == ""
    plan = made.plan()
    assert plan.stages[0].parameter_sharding == "full"
    assert price_plan(plan, there).timeline.step_s == plan.totals.step_s
    with pytest.raises(UnknownNameError, match="parameter sharding 'half'"):
        refused(there, parameter_sharding="half")


def test_pairs_are_counted_as_the_space_has_them() -> None:
    """On a mesh where every split is legal the estimate is exact, up to redistribute layers that are asked for less."""
    made = planner(machine({"gpu": 2}, {"gpu": 1e9}), batch=64)
    graph, splits = made.traced.layers, made.space(made.meshes()[0]).splits
    exact = 0
    seen = set()
    for i, j, position in graph.edges():
        a, b = graph.layers[i], graph.layers[j]
        key = (a.op, a.output, b.op, b.output, position)
        if key not in seen:
            seen.add(key)
            exact += len(splits[a.id]) * len(splits[b.id])
    assert not any(isinstance(layer.op, Redistribute) for layer in graph.layers)
    assert all(len(splits[layer.id]) > 1 for layer in graph.layers if not is_boundary(layer.op))
    assert num_pairs(graph, made.dimensions, 1) == pytest.approx(exact, rel=0.35)
    assert num_pairs(graph, made.dimensions, 0) == len(seen)


def test_further_meshes_stop_at_the_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    there = machine({"gpu": 8}, {"gpu": 1e10})
    made = planner(there, all_devices=True)
    made.best()
    assert len(made._searches) == len(made.meshes()) == 4
    monkeypatch.setattr("planner.api.tour.MAX_PAIRS", 0)
    again = planner(there, all_devices=True)
    again.best()
    assert list(again._searches) == again.meshes()[:1]
    assert MAX_PAIRS > 0


def test_a_time_limit_leaves_the_first_mesh_and_says_so_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = planner(machine({"gpu": 8}, {"gpu": 1e9}), time_limit_s=1000.0, solver="dp")
    clock = itertools.count(step=2000.0)  # over between the first mesh and the second
    monkeypatch.setattr("planner.api.tour.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    assert len(found.meshes()) > 2
    assert found.best()[0].table.space.mesh == found.meshes()[0]
    assert [record.message for record in caplog.records].count("time limit: 1 candidate meshes searched") == 1


def test_a_plan_for_a_part_of_another_machine_is_priced_there(tmp_path: Path) -> None:
    there = machine({"node": 2, "gpu": 4}, {"node": 1e5, "gpu": 1e12})
    plan = planner(there, "alexnet").plan()
    path = tmp_path / "plan.json"
    plan.save(path)
    assert json.loads(path.read_text())["stages"][0]["devices"] == [f"node0gpu{i}" for i in range(4)]
    other = machine({"node": 3, "gpu": 4}, {"node": 1e5, "gpu": 1e12})
    assert price_plan(Plan.load(path), other).timeline.step_s == pytest.approx(plan.totals.step_s)
    small = machine({"gpu": 2}, {"gpu": 1e12})
    with pytest.raises(UsageError, match="the plan needs 4 devices"):
        price_plan(plan, small)


def test_axes_are_found_again_from_their_names() -> None:
    graph = machine(FOUR, dict.fromkeys(FOUR, 1e9)).graph
    for runs in ([1, 1, 1, 1], [1, 1, 2], [2, 1, 1], [1, 2, 1]):
        mesh = graph.mesh_of([(2,)] * 4, runs)
        shape = graph.shape_of(mesh.axes)
        assert shape is not None
        assert graph.mesh_of(*shape) == mesh
    for counts in ((2, 1, 2, 2), (1, 1, 1, 2), (1, 1, 1, 1), (2, 2, 2, 1)):
        mesh = graph.mesh_of([(n,) for n in counts])
        assert mesh.size == math.prod(counts)
        shape = graph.shape_of(mesh.axes)
        assert shape is not None
        assert graph.mesh_of(*shape) == mesh
    big = cluster("8x8-a100-ib100")
    assert big.mesh_of([(2,), (2, 2)]).ranks == (0, 1, 2, 3, 8, 9, 10, 11)
    assert big.shape_of(graph.mesh().axes) is None
    assert all(len(mesh.axes) <= MAX_AXES for mesh in whole_meshes(graph))
