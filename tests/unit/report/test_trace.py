"""Trace files: the documented fields, streams without overlaps, and the whole step between first and last event."""

import itertools
import json
from typing import Any

import pytest

from planner.api import machine_of, reprice
from planner.cost.overlap import Event
from planner.report.trace import trace_json
from support.equality import planner_for, random_plan


def complete(text: str) -> list[dict[str, Any]]:
    """Return the complete events of a trace; check the fields that the Trace Event Format asks for."""
    found = json.loads(text)
    assert found["displayTimeUnit"] in {"ms", "ns"}
    for event in found["traceEvents"]:
        assert event["ph"] in {"X", "M"}
        assert isinstance(event["name"], str)
        assert event["name"]
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        if event["ph"] == "X":
            assert event["ts"] >= 0
            assert event["dur"] > 0
        else:
            assert event["name"] in {"process_name", "thread_name", "thread_sort_index"}
            assert event["args"]
    return [event for event in found["traceEvents"] if event["ph"] == "X"]


def nanoseconds(event: dict[str, Any]) -> tuple[int, int]:
    """Return start and stop; microseconds with three decimals are whole nanoseconds."""
    start, length = round(event["ts"] * 1e3), round(event["dur"] * 1e3)
    assert event["ts"] == start / 1e3
    return start, start + length


def covered_ns(intervals: list[tuple[int, int]]) -> int:
    """Return how long at least one interval lasts."""
    found, end = 0, 0
    for start, stop in sorted(intervals):
        found += max(stop - max(start, end), 0)
        end = max(end, stop)
    return found


@pytest.mark.parametrize(("name", "num_ranks", "seed"), [("lenet5", 2, 0), ("vgg", 4, 1), ("resnet20", 4, 2)])
def test_the_streams_of_a_simulated_step_never_overlap_and_cover_it(name: str, num_ranks: int, seed: int) -> None:
    planner = planner_for(name, num_ranks)
    search = planner.search(planner.meshes()[0])
    plan = random_plan(planner, seed)
    timeline = search.forced(search.table.choice(plan.strategy)).timeline if plan.mesh == planner.meshes()[0] else None
    if timeline is None:
        other = planner.search(plan.mesh)
        timeline = other.forced(other.table.choice(plan.strategy)).timeline
    events = complete(trace_json({"step": timeline.events}, {}))
    streams: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for event in events:
        streams.setdefault((event["pid"], event["tid"]), []).append(nanoseconds(event))
    assert len(streams) > 1
    for intervals in streams.values():
        intervals.sort()
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(intervals))
    everything = [interval for intervals in streams.values() for interval in intervals]
    assert max(stop for _, stop in everything) == round(timeline.step_s * 1e9)
    assert covered_ns(everything) == pytest.approx(timeline.step_s * 1e9, abs=1)


def test_each_step_is_a_process_and_each_stream_a_thread_with_compute_first() -> None:
    first = [
        Event("a sync", "network", 0.5e-3, 2e-3),
        Event("a", "compute", 0, 1e-3),
        Event("b", "compute", 1e-3, 2e-3),
    ]
    second = [Event("c", "compute", 0, 1.5e-6)]
    text = trace_json({"rank 0": first, "rank 1": second}, {"model": "net"})
    events = json.loads(text)["traceEvents"]
    names = {(e["name"], e["pid"], e["tid"]): e["args"].get("name") for e in events if e["ph"] == "M"}
    assert names["process_name", 0, 0] == "rank 0"
    assert names["process_name", 1, 0] == "rank 1"
    assert names["thread_name", 0, 0] == "compute"
    assert names["thread_name", 0, 1] == "network"
    found = [(e["name"], e["pid"], e["tid"], e["ts"], e["dur"]) for e in complete(text)]
    assert found == [
        ("a sync", 0, 1, 500.0, 1500.0), ("a", 0, 0, 0.0, 1000.0), ("b", 0, 0, 1000.0, 1000.0), ("c", 1, 0, 0.0, 1.5)
    ]  # fmt: skip
    assert json.loads(text)["otherData"] == {"model": "net"}


def test_what_takes_no_time_is_left_out() -> None:
    assert complete(trace_json({"step": [Event("a", "compute", 1.0, 1.0)]}, {})) == []


def test_a_plan_that_is_priced_again_on_its_machine_gives_its_own_timeline() -> None:
    from planner.api import Options, Origin, example_inputs, prepare
    from planner.frontend.source import load_model

    machine = machine_of(devices=2)
    loaded = load_model("lenet5")
    inputs = example_inputs(loaded.input_shapes, 16)
    plan = prepare(loaded.module, inputs, machine, Options(), Origin("lenet5", "lenet5")).plan()
    assert reprice(plan, machine).step_s == pytest.approx(plan.totals.step_s, rel=1e-12)


def test_a_plan_is_priced_on_a_machine_whose_levels_have_other_names_and_sizes() -> None:
    from planner.api import Options, Origin, example_inputs, prepare
    from planner.errors import UsageError
    from planner.frontend.source import load_model

    made, flat = machine_of("2x2-a100-eth10"), machine_of(devices=4)
    loaded = load_model("lenet5")
    inputs = example_inputs(loaded.input_shapes, 16)
    plan = prepare(loaded.module, inputs, made, Options(solver="data"), Origin("lenet5", "lenet5")).plan()
    assert plan.mesh.shape == (2, 2)
    assert 0 < reprice(plan, flat).step_s < plan.totals.step_s  # no Ethernet in between
    with pytest.raises(UsageError, match="cannot be laid over"):
        reprice(plan, machine_of(devices=5))
