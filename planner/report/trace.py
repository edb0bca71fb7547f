"""Timelines as Chrome trace JSON, which https://ui.perfetto.dev and chrome://tracing show.

The format is the "JSON Array Format" and "JSON Object Format" of Google's *Trace Event Format*: complete events
(``ph`` X) with ``ts`` and ``dur`` in microseconds, and metadata events (``ph`` M) that name processes and threads.
"""

import json
from collections.abc import Iterator, Mapping, Sequence

from planner.cost.overlap import Event

COMPUTE = "compute"
"""The stream that is shown first."""


def trace_json(steps: Mapping[str, Sequence[Event]], facts: Mapping[str, str]) -> str:
    """Return a trace file.

    Args:
        steps: events by what they are a step of, such as a rank; each is a process of the trace, and each of its
            streams a thread.
        facts: about all of it, under ``otherData``.
    """
    events = [entry for pid, (name, found) in enumerate(steps.items()) for entry in _process(pid, name, found)]
    rows = ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in events)
    head = f'"displayTimeUnit": "ms",\n"otherData": {json.dumps(dict(facts), ensure_ascii=False)}'
    return f'{{\n{head},\n"traceEvents": [\n{rows}\n]\n}}\n'


def _process(pid: int, name: str, events: Sequence[Event]) -> Iterator[dict[str, object]]:
    streams = sorted(dict.fromkeys(event.stream for event in events), key=lambda stream: stream != COMPUTE)
    yield {"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": name}}
    for tid, stream in enumerate(streams):
        yield {"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": stream}}
        yield {"ph": "M", "name": "thread_sort_index", "pid": pid, "tid": tid, "args": {"sort_index": tid}}
    for event in events:
        start_ns, stop_ns = round(event.start_s * 1e9), round(event.stop_s * 1e9)
        if stop_ns > start_ns:  # whole nanoseconds: neighbours meet and never overlap
            yield {
                "ph": "X", "name": event.name, "cat": event.stream, "pid": pid, "tid": streams.index(event.stream),
                "ts": start_ns / 1e3, "dur": (stop_ns - start_ns) / 1e3,
            }  # fmt: skip
