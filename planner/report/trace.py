"""Timelines as Chrome trace JSON, which https://ui.perfetto.dev and chrome://tracing show.

The format is the "JSON Array Format" and "JSON Object Format" of Google's *Trace Event Format*: complete events
(``ph`` X) with ``ts`` and ``dur`` in microseconds, and metadata events (``ph`` M) that name processes and threads.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from planner.cost.overlap import Event
from planner.errors import FormatError
from planner.ir.canonical import read_bytes
from planner.report.tracks import order_of

Entry = Mapping[str, Any]
"""An event of a trace file."""


def trace_json(steps: Mapping[str, Sequence[Event]], facts: Mapping[str, str], beside: Sequence[Entry] = ()) -> str:
    """Return a trace file.

    Args:
        steps: events by what they are a step of, such as a rank; each is a process of the trace, and each of its
            streams a thread. Where events of a stream overlap, it is as many threads as there are at once.
        facts: about all of it, under ``otherData``.
        beside: entries of another file, whose processes come after these.
    """
    events: list[Entry] = [
        entry for pid, (name, found) in enumerate(steps.items()) for entry in _process(pid, name, found)
    ]
    pids = sorted({entry["pid"] for entry in beside})
    events += ({**entry, "pid": len(steps) + pids.index(entry["pid"])} for entry in beside)
    rows = ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in events)
    head = f'"displayTimeUnit": "ms",\n"otherData": {json.dumps(dict(facts), ensure_ascii=False)}'
    return f'{{\n{head},\n"traceEvents": [\n{rows}\n]\n}}\n'


def read_trace(path: Path) -> tuple[list[Entry], Mapping[str, Any]]:
    """Return the events of a trace file that was written here, and its facts.

    Raises:
        UsageError: it cannot be read.
        FormatError: it is no such file.
    """
    what = f"trace {path}"
    try:
        found = json.loads(read_bytes(path, "trace"))
    except (ValueError, RecursionError) as error:
        raise FormatError(what, [("$", f"no JSON: {error}")]) from None
    events = found.get("traceEvents") if isinstance(found, dict) else None
    if not isinstance(events, list):
        raise FormatError(what, [("$.traceEvents", "no list of events, such as `layerwise run --trace` writes")])
    problems = [
        (f"$.traceEvents[{i}]", "no event of a process: it needs a name, ph and a whole number pid")
        for i, event in enumerate(events)
        if not (isinstance(event, dict) and {"name", "ph"} <= event.keys() and isinstance(event.get("pid"), int))
    ]
    if problems:
        raise FormatError(what, problems)
    facts = found.get("otherData")
    return events, facts if isinstance(facts, dict) else {}


def tracks_of(entries: Sequence[Entry]) -> dict[str, list[Event]]:
    """Return the steps of a trace file, as ``trace_json`` takes them.

    Args:
        entries: of ``read_trace``.

    Raises:
        FormatError: an event has no times, or no named track.
    """
    processes: dict[int, str] = {}
    tracks: dict[tuple[int, int], str] = {}
    found: dict[str, list[Event]] = {}
    try:
        for entry in entries:
            pid, kind = entry["pid"], (entry["ph"], entry["name"])
            if kind == ("M", "process_name"):
                processes[pid] = str(entry["args"]["name"])
            elif kind == ("M", "thread_name"):
                tracks[pid, entry["tid"]] = str(entry["args"]["name"])
            elif entry["ph"] == "X":
                start_s, seconds = float(entry["ts"]) / 1e6, float(entry["dur"]) / 1e6
                event = Event(str(entry["name"]), tracks[pid, entry["tid"]], start_s, start_s + seconds)
                found.setdefault(processes[pid], []).append(event)
    except (KeyError, TypeError, ValueError) as error:
        said = f"events need ts, dur and the names of their tracks: {error}"
        raise FormatError("trace", [("$.traceEvents", said)]) from None
    return found


def _process(pid: int, name: str, events: Sequence[Event]) -> Iterator[Entry]:
    yield {"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": name}}
    yield {"ph": "M", "name": "process_sort_index", "pid": pid, "tid": 0, "args": {"sort_index": pid}}
    rows = list(threads(events))
    for tid, (stream, _) in enumerate(rows):
        yield {"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": stream}}
        yield {"ph": "M", "name": "thread_sort_index", "pid": pid, "tid": tid, "args": {"sort_index": tid}}
    for tid, (_, own) in enumerate(rows):
        for event in own:
            start_ns, stop_ns = _nanoseconds(event)
            yield {
                "ph": "X", "name": event.name, "cat": event.stream, "pid": pid, "tid": tid,
                "ts": start_ns / 1e3, "dur": (stop_ns - start_ns) / 1e3,
            }  # fmt: skip


def threads(events: Sequence[Event]) -> Iterator[tuple[str, list[Event]]]:
    """Yield the names of threads with their events, which never overlap; events that take no time are left out."""
    streams: dict[str, list[Event]] = {event.stream: [] for event in events}
    for event in sorted(events, key=_nanoseconds):
        start_ns, stop_ns = _nanoseconds(event)
        if stop_ns > start_ns:
            streams[event.stream].append(event)
    for stream in order_of(streams):
        lanes: list[list[Event]] = [[]]
        for event in streams[stream]:
            free = (lane for lane in lanes if not lane or _nanoseconds(lane[-1])[1] <= _nanoseconds(event)[0])
            lane = next(free, None)
            if lane is None:
                lanes.append([event])
            else:
                lane.append(event)
        for k, lane in enumerate(lanes):
            yield stream if k == 0 else f"{stream} {k + 1}", lane


def _nanoseconds(event: Event) -> tuple[int, int]:
    """Return start and stop as whole nanoseconds, so that neighbours meet and never overlap."""
    return round(event.start_s * 1e9), round(event.stop_s * 1e9)
