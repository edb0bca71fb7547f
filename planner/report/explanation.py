"""Why a layer is split as it is, as rows of text."""

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from planner.report.tables import EQUAL, Table, percent
from planner.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from planner.search.alternatives import Alternative, Explanation, Placed, Standing

NEVER = "does not fit"


def alternatives(found: "Explanation", most: int) -> Table:
    """Return the alternatives of a layer side by side, at most so many; the planned one stands out.

    ``rest kept`` is how much longer the step is if no other layer changes, ``rest follows`` if all others are planned
    around it.
    """
    rows = tuple(
        (
            str(each.split),
            format_seconds(each.compute_s),
            format_seconds(each.sums_s),
            format_seconds(each.transfer_s),
            format_seconds(each.halo_s),
            format_seconds(each.sync_s),
            format_bytes(each.memory_bytes),
            _longer(each.kept_s, found.step_s),
            _longer(each.followed_s, found.step_s),
        )
        for each in found.alternatives[:most]
    )
    columns = ("split", "compute", "sums", "transfer", "halo", "sync", "memory", "rest kept", "rest follows")
    title = f"Splits of {found.layer} ({found.op})"
    return Table(title, columns, rows, num_text=1, emphasis=0, spare=("halo", "sums", "memory"))


def sentences(found: "Explanation", most: int) -> Iterator[str]:
    """Yield what decides for the planned split, and what would have to change for another one."""
    if found.tied:
        yield f"Takes the split of {', '.join(found.tied)} too, which share a parameter with it."
    hidden = len(found.alternatives) - most
    if hidden > 0:
        yield f"{hidden} further splits, all with longer steps, are left out (--all)."
    for region in found.placed:
        place = region.place_of(found.layer)
        if place is not None:
            beside = ", ".join(other.where for other in region.places if other is not place)
            yield f"Only {place.where} computes it; {beside}: other branches at the same time ({region.region})."
    others = found.alternatives[1:]
    if not others:
        yield "It has no other legal split."
        return
    yield _reason(found.planned, others)
    for flip in found.flips:
        changed = _changed(flip.what, flip.factor)
        yield f"With {changed}, {flip.split} wins and saves {percent(flip.gain)} of the step."
    yield from _better(found)


def standings(rows: Sequence["Standing"], step_s: float) -> Table:
    """Return every layer with its runner-up while no other layer changes."""
    cells = tuple(
        (
            row.layer,
            row.op,
            str(row.split),
            "" if row.other is None else str(row.other),
            "" if row.other is None else _longer(step_s + row.more_s, step_s),
        )
        for row in rows
    )
    return Table("Layers and their next best splits", ("layer", "operator", "planned", "next best", "step"), cells, 4)


def placed(found: "Placed") -> Table:
    """Return what each device computes alone of a region, beside the others."""
    rows = tuple(
        (
            place.where,
            ", ".join(place.branches),
            str(len(place.layers)),
            format_seconds(place.compute_s),
            format_seconds(place.idle_s),
        )
        for place in found.places
    )
    title = f"At the same time: {found.region}"
    return Table(title, ("devices", "branches, by their first layers", "layers", "compute", "idle"), rows, num_text=2)


def placed_sentence(found: "Placed") -> str:
    """Return what running branches at the same time gains over computing each of them on all devices."""
    every = "With every layer of them on all devices, and the rest planned around that, the step"
    if math.isinf(found.spread_s):
        return f"{every} would not fit in memory."
    return f"{every} would take {format_seconds(found.spread_s, 5)}, {_longer(found.spread_s, found.step_s)}."


def _reason(planned: "Alternative", others: Sequence["Alternative"]) -> str:
    """Return what speaks for the planned split against the one that is cheapest by itself, or against the next best."""
    cheapest = min(others, key=lambda each: each.own_s)
    if planned.own_s <= cheapest.own_s * (1 + EQUAL):
        following = min(others, key=lambda each: each.followed_s)
        return (
            f"It is the cheapest by itself, {format_seconds(planned.own_s)} of compute, sums and sync; the next best, "
            f"{following.split}, takes {format_seconds(following.own_s)}."
        )
    saved = planned.own_s - cheapest.own_s
    pairs = zip(cheapest.handovers, planned.handovers, strict=True)
    costs = [(theirs.seconds - ours.seconds, ours.neighbour) for theirs, ours in pairs]
    most, neighbour = max(costs, default=(0.0, ""))
    if most <= 0:
        return (
            f"By itself {cheapest.split} would save {format_seconds(saved)}, most of it in reductions that run behind "
            "backward or are paid for elsewhere: the step would not be shorter."
        )
    return (
        f"By itself {cheapest.split} would save {format_seconds(saved)}, but {neighbour} forces it: handing over to it "
        f"would take {format_seconds(most)} longer."
    )


def _better(found: "Explanation") -> Iterator[str]:
    best = min(found.alternatives, key=lambda each: each.followed_s)
    if best.followed_s < found.step_s * (1 - EQUAL):
        saved = percent(1 - best.followed_s / found.step_s)
        yield f"On this machine a plan with {best.split} would be faster by {saved}: plan again."


def _changed(what: str, factor: float) -> str:
    if what == "links":
        return f"links {factor:g} times as fast" if factor > 1 else f"links {1 / factor:g} times slower"
    return f"a batch {factor:g} times as large" if factor > 1 else f"a batch {1 / factor:g} times smaller"


def _longer(step_s: float, planned_s: float) -> str:
    if math.isinf(step_s):
        return NEVER
    more = step_s / planned_s - 1
    return "the same" if abs(more) <= EQUAL else f"{100 * more:+.3g} %"
