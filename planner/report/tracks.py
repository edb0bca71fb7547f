"""The tracks of a step: the same names for a predicted and a measured one, so that both can be laid side by side.

A rank, or ranks that do the same, is a process of a trace file and has these tracks, as threads. What happens at the
same time on one track, as gradient reductions do, is on further ones with a number (``planner.report.trace``).

| track | predicted | measured |
|---|---|---|
| compute | forward and backward of layers, the optimizer | the same, and gradients into buckets |
| transfer | moves between layers, partial sums, halos; of a pipeline, messages to other stages | waiting for these |
| gradient sync | reductions, with the level of the machine that they use | from their start until the rank waited |
| waiting for gradients | what reductions add to the step | the same |
| other | | the loss, the interpreter, waiting for other stages |
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Final

from planner.cost.overlap import Event
from planner.plan.schema import Plan

COMPUTE: Final = "compute"
TRANSFER: Final = "transfer"
SYNC: Final = "gradient sync"
WAITING: Final = "waiting for gradients"
OTHER: Final = "other"
TRACKS: Final = (COMPUTE, TRANSFER, SYNC, WAITING, OTHER)
"""In the order in which they are shown."""

_OF_PHASE: Final = {
    "transfer_forward": TRANSFER, "transfer_backward": TRANSFER, "reduction": SYNC, "exposed_sync": WAITING,
    "other": OTHER,
}  # fmt: skip
"""Of the phases of ``runtime.timing``; all others compute."""
_MOVES: Final = re.compile(r"(.*) (?:input|sums|halo)( backward)?")
_ACTION: Final = re.compile(r"(\d+)([FBIW])(\d+)")
_KINDS: Final = {"F": "forward", "B": "backward", "I": "backward of inputs", "W": "backward of weights"}

Spans = Sequence[Sequence[Any]]
"""Phase, layer, start and stop of the parts of a measured step of one rank."""


def measured_tracks(ranks: Sequence[Spans]) -> dict[str, list[Event]]:
    """Return the tracks of a measured step, rank by rank."""
    return {
        f"measured, rank {rank}": [
            Event(f"{layer} {phase.replace('_', ' ')}".strip(), _OF_PHASE.get(phase, COMPUTE), start, stop)
            for phase, layer, start, stop in spans
        ]
        for rank, spans in enumerate(ranks)
    }


def predicted_tracks(plan: Plan, events: Sequence[Event]) -> dict[str, list[Event]]:
    """Return the tracks of a simulated step, for ranks that do the same together.

    Args:
        plan: that was simulated.
        events: of its timeline.
    """
    found: dict[str, list[Event]] = {}
    for event in events:
        ranks, moved = _of_pipeline(plan, event) if plan.is_pipelined else _of_one_stage(event)
        found.setdefault(f"predicted, {ranks}", []).append(moved)
    in_order = sorted(found.items(), key=lambda item: [int(rank) for rank in re.findall("[0-9]+", item[0])])
    return {name: [*own, *_waiting(own)] for name, own in in_order}


def _of_one_stage(event: Event) -> tuple[str, Event]:
    """Return whose event this is, on its track and with the words of a measured one."""
    match = re.fullmatch(r"(?:(ranks [0-9,]+) )?(compute|transfer|sync.*)", event.stream)
    assert match is not None, event.stream
    ranks, stream = match[1] or "every rank", match[2]
    if stream.startswith("sync"):
        return ranks, replace(event, stream=SYNC, name=f"{event.name} ({stream.removeprefix('sync').strip()})")
    move = _MOVES.fullmatch(event.name) if stream == TRANSFER else None
    name = event.name if move is None else f"{move[1]} transfer {'backward' if move[2] else 'forward'}"
    return ranks, replace(event, stream=stream, name=name)


def _of_pipeline(plan: Plan, event: Event) -> tuple[str, Event]:
    """Return whose event of a pipeline this is; positions of several stages have the ranks of the first of them."""
    kind, _, place = event.stream.partition(" ")
    position = int(place.partition("-")[0])
    ranks = f"ranks {','.join(map(str, plan.stages[position].mesh.ranks))}"
    action = _ACTION.fullmatch(event.name)
    if action is not None:
        move = "transfer " if kind == "link" else ""
        name = f"stage {action[1]} {move}{_KINDS[action[2]]}, micro-batch {action[3]}"
        return ranks, replace(event, stream=TRANSFER if kind == "link" else COMPUTE, name=name)
    what, _, stage = event.name.partition(" ")
    if what == "sync":
        return ranks, replace(event, stream=SYNC, name=f"sync stage {stage}")
    return ranks, replace(event, stream=COMPUTE, name=f"stage {stage} optimizer")


def _waiting(events: Sequence[Event]) -> Iterator[Event]:
    """Yield the times when a rank does nothing, because a reduction runs."""
    busy = sorted((event.start_s, event.stop_s) for event in events if event.stream != SYNC)
    idle, free_s = [], 0.0
    for start_s, stop_s in [*busy, (float("inf"), float("inf"))]:
        if start_s > free_s:
            idle.append((free_s, start_s))
        free_s = max(free_s, stop_s)
    reduced = _joined(sorted((event.start_s, event.stop_s) for event in events if event.stream == SYNC))
    for start_s, stop_s in reduced:
        for a, b in idle:
            if min(b, stop_s) > max(a, start_s):
                yield Event("exposed sync", WAITING, max(a, start_s), min(b, stop_s))


def _joined(intervals: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return sorted intervals with those that touch made one."""
    found: list[tuple[float, float]] = []
    for start, stop in intervals:
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], stop))
        else:
            found.append((start, stop))
    return found


def order_of(tracks: Iterable[str]) -> list[str]:
    """Return tracks in the order in which they are shown; unknown ones last."""
    return sorted(tracks, key=lambda name: TRACKS.index(name) if name in TRACKS else len(TRACKS))
