"""Trace files: the documented fields, streams without overlaps, and the whole step between first and last event."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from planner.api import machine_of, reprice
from planner.cost.overlap import Event
from planner.errors import FormatError, UsageError
from planner.plan import Plan
from planner.report.trace import read_trace, trace_json, tracks_of
from planner.report.tracks import COMPUTE, OTHER, SYNC, TRACKS, TRANSFER, WAITING, measured_tracks, predicted_tracks
from support.equality import planner_for, random_plan
from support.plans import document, plan_of


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
            assert event["name"] in {"process_name", "process_sort_index", "thread_name", "thread_sort_index"}
            assert all(value is not None for value in event["args"].values())
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
    events = complete(trace_json(predicted_tracks(plan, timeline.events), {}))
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
        ("a", 0, 0, 0.0, 1000.0), ("b", 0, 0, 1000.0, 1000.0), ("a sync", 0, 1, 500.0, 1500.0), ("c", 1, 0, 0.0, 1.5)
    ]  # fmt: skip
    assert json.loads(text)["otherData"] == {"model": "net"}


def test_what_takes_no_time_is_left_out() -> None:
    assert complete(trace_json({"step": [Event("a", "compute", 1.0, 1.0)]}, {})) == []


def test_what_overlaps_on_a_track_gets_further_ones() -> None:
    times = [(0, 3), (1, 2), (2, 4), (3, 5), (4, 6)]
    events = [Event(f"{i}", SYNC, start, stop) for i, (start, stop) in enumerate(times)]
    found = json.loads(trace_json({"step": [*events, Event("c", COMPUTE, 0, 1)]}, {}))["traceEvents"]
    names = {e["tid"]: e["args"]["name"] for e in found if e["name"] == "thread_name"}
    assert list(names.values()) == [COMPUTE, SYNC, f"{SYNC} 2"]
    assert [(e["name"], names[e["tid"]]) for e in found if e["ph"] == "X"] == [
        ("c", COMPUTE), ("0", SYNC), ("3", SYNC), ("1", f"{SYNC} 2"), ("2", f"{SYNC} 2"), ("4", f"{SYNC} 2")
    ]  # fmt: skip


def test_a_measured_step_has_the_tracks_and_words_of_a_predicted_one() -> None:
    from runtime.timing import Phase

    spans = [[phase.value, "c1", float(i), i + 1.0] for i, phase in enumerate(Phase)]
    (measured,) = measured_tracks([spans]).values()
    assert {event.stream for event in measured} == set(TRACKS)
    on = {event.name: event.stream for event in measured}
    planner = planner_for("lenet5", 2)
    search = planner.search(planner.meshes()[0])
    for name in ("data", "model-in"):
        plan = planner.plan_of(search, search.fixed(name))
        (predicted,) = predicted_tracks(plan, search.fixed(name).timeline.events).values()
        for event in predicted:
            if event.stream in {COMPUTE, TRANSFER} and event.name != "optimizer":
                layer, _, words = event.name.partition(" ")
                assert layer in {part.id for part in plan.only_stage.layers}
                assert on[f"c1 {words}"] == event.stream
    assert on["c1 optimizer"] == on["c1 gathering"] == COMPUTE
    assert (on["c1 other"], on["c1 exposed sync"]) == (OTHER, WAITING)


def test_a_rank_waits_for_gradients_where_a_reduction_runs_and_nothing_else_does() -> None:
    plan = plan_of(document())
    events = [
        Event("a backward", "compute", 0, 2), Event("sync a", "sync gpu", 1, 3), Event("b input", "transfer", 4, 5),
        Event("sync b", "sync node", 2.5, 3.5), Event("sync c", "sync gpu", 4, 5.5),
        Event("optimizer", "compute", 6, 7),
    ]  # fmt: skip
    ((name, found),) = predicted_tracks(plan, events).items()
    assert name == "predicted, every rank"
    waiting = [(event.start_s, event.stop_s) for event in found if event.stream == WAITING]
    assert waiting == [(2, 3.5), (5, 5.5)]
    assert [event.name for event in found if event.stream == TRANSFER] == ["b transfer forward"]
    assert [event.name for event in found if event.stream == SYNC] == ["sync a (gpu)", "sync b (node)", "sync c (gpu)"]


def test_positions_of_a_pipeline_are_their_ranks_and_messages_are_transfers_of_the_sender() -> None:
    found = document()
    first, second = found["stages"][0], json.loads(json.dumps(found["stages"][0]))
    first["mesh"], second["mesh"] = ({"axes": [], "ranks": [rank]} for rank in (1, 0))
    plan = Plan.model_validate({**found, "stages": [first, second]}, strict=False)
    events = [
        Event("0F0", "position 0", 0, 1), Event("0F0", "link 0-1", 1, 2), Event("1B0", "position 1", 2, 3),
        Event("sync 1", "sync 1", 3, 4), Event("update 1", "position 1", 4, 5), Event("1W0", "position 1", 5, 6),
    ]  # fmt: skip
    tracks = predicted_tracks(plan, events)
    assert [(e.name, e.stream) for e in tracks["predicted, ranks 1"]] == [
        ("stage 0 forward, micro-batch 0", COMPUTE), ("stage 0 transfer forward, micro-batch 0", TRANSFER)
    ]  # fmt: skip
    assert [(e.name, e.stream) for e in tracks["predicted, ranks 0"]] == [
        ("stage 1 backward, micro-batch 0", COMPUTE), ("sync stage 1", SYNC), ("stage 1 optimizer", COMPUTE),
        ("stage 1 backward of weights, micro-batch 0", COMPUTE), ("exposed sync", WAITING),
    ]  # fmt: skip


def test_the_processes_of_another_file_come_after_the_own(tmp_path: Path) -> None:
    other = trace_json({"measured, rank 0": [Event("a", COMPUTE, 0, 1)]}, {"plan_sha256": "x"})
    (tmp_path / "trace.json").write_text(other)
    entries, facts = read_trace(tmp_path / "trace.json")
    found = json.loads(trace_json({"predicted": [Event("a", COMPUTE, 0, 2)]}, {}, entries))["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in found if e["name"] == "process_name"}
    assert names == {0: "predicted", 1: "measured, rank 0"}
    assert [(e["pid"], e["dur"]) for e in found if e["ph"] == "X"] == [(0, 2e6), (1, 1e6)]
    assert facts == {"plan_sha256": "x"}


def test_a_trace_is_read_as_it_was_written(tmp_path: Path) -> None:
    steps = {
        "measured, rank 0": [Event("a", COMPUTE, 0.0, 1e-3), Event("sync a", SYNC, 0.5e-3, 2e-3)],
        "measured, rank 1": [Event("c", COMPUTE, 0.0, 1.5e-6)],
    }
    (tmp_path / "trace.json").write_text(trace_json(steps, {}))
    found = tracks_of(read_trace(tmp_path / "trace.json")[0])
    assert found.keys() == steps.keys()
    for name, events in steps.items():
        assert [(e.name, e.stream) for e in found[name]] == [(e.name, e.stream) for e in events]
        ends = [(e.start_s, e.stop_s) for e in found[name]]
        assert ends == [pytest.approx((e.start_s, e.stop_s), abs=1e-12) for e in events]


def test_events_without_times_or_tracks_are_refused() -> None:
    named = {"ph": "M", "name": "process_name", "pid": 0, "tid": 0, "args": {"name": "rank 0"}}
    for event in ({"ph": "X", "name": "a", "pid": 0, "tid": 0}, {"ph": "X", "name": "a", "pid": 0, "ts": 0, "dur": 1}):
        with pytest.raises(FormatError, match="need ts, dur and the names of their tracks"):
            tracks_of([named, event])


@pytest.mark.parametrize("text", ["no", "[]", '{"traceEvents": [{"name": "a"}]}', '{"traceEvents": 1}'])
def test_what_is_no_trace_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "trace.json").write_text(text)
    with pytest.raises(UsageError, match=r"trace\.json is not valid"):
        read_trace(tmp_path / "trace.json")


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
