"""Rows and columns of what ``show``, ``plan -o`` and ``compare`` print, as plain data.

Seconds are per step; memory and communication are those of the busiest device.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from planner.ir.dimension import SPATIAL_DIMENSIONS
from planner.plan.schema import BranchesPart, LayerPart, Plan, StagePart
from planner.units import format_bytes, format_count, format_seconds

if TYPE_CHECKING:
    from planner.search.auto import Planned

EQUAL: Final = 1e-9
"""Relative difference up to which two predicted steps are the same: rounding."""
UNKNOWN: Final = "?"


@dataclass(frozen=True, slots=True)
class Table:
    """A table of text.

    Attributes:
        title: above it; empty for none.
        columns: headings.
        rows: of as many cells.
        num_text: leading columns that are text; the others are numbers, aligned to the right.
        emphasis: index of the row that stands out, if any.
        spare: headings of columns that a narrow terminal leaves out, the first ones first.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    num_text: int = 1
    emphasis: int | None = None
    spare: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class StrategyRow:
    """What is predicted for one strategy; None where it is not known.

    Attributes:
        name: of the solver or fixed strategy.
        speed_up: over ``data``.
        num_replaced: layers that could not follow the rule of a fixed strategy.
        fits: obeys the memory limit.
        is_planned: the strategy that was asked for, to be held against the fixed ones.
        note: why a fixed strategy could not have been planned; empty where it could.
    """

    name: str
    step_s: float
    samples_per_s: float
    speed_up: float | None
    communication_bytes: float
    exposed_s: float
    memory_bytes: int
    num_replaced: int
    fits: bool
    is_planned: bool
    note: str = ""


def rows_of_plan(plan: Plan) -> tuple[StrategyRow, ...]:
    """Return the fixed strategies that a plan was held against, and the plan, last."""
    data_s = next((b.step_s for b in plan.baselines if b.name == "data"), None)
    limit = plan.search.memory_limit_bytes

    fixed = (
        StrategyRow(
            b.name, b.step_s, plan.batch / b.step_s, _ratio(data_s, b.step_s),
            b.communication_bytes, b.exposed_s, b.memory_bytes, b.num_replaced, b.memory_bytes <= limit,
            is_planned=False, note=b.note,
        )
        for b in plan.baselines
    )  # fmt: skip
    totals, solver = plan.totals, plan.search.solver
    planned = StrategyRow(
        solver, totals.step_s, totals.samples_per_s, _ratio(data_s, totals.step_s),
        totals.communication_bytes, totals.exposed_s, totals.memory_bytes,
        next((b.num_replaced for b in plan.baselines if b.name == solver), 0),
        fits=True, is_planned=True,
    )  # fmt: skip
    return (*fixed, planned)


def rows_of_search(
    found: Sequence["Planned"], fits: Sequence[bool], batch: int, notes: Sequence[str] = ()
) -> tuple[StrategyRow, ...]:
    """Return the strategies of a comparison; the planned one is the last."""
    data_s = next((row.timeline.step_s for row in found[:-1] if row.solver == "data"), None)
    return tuple(
        StrategyRow(
            row.solver, t.step_s, batch / t.step_s, _ratio(data_s, t.step_s), t.communication_bytes,
            t.exposed_s, t.memory_bytes, row.num_replaced, ok, row is found[-1], note,
        )
        for row, ok, t, note in (
            (row, ok, row.timeline, note)
            for row, ok, note in zip(found, fits, notes or [""] * len(found), strict=True)
        )
    )  # fmt: skip


def strategies(rows: Sequence[StrategyRow]) -> Table:
    """Return the strategies side by side."""
    columns = {
        "strategy": [f"planned ({r.name})" if r.is_planned else r.name for r in rows],
        "step": [format_seconds(r.step_s, 5) for r in rows],
        "samples/s": [format_count(r.samples_per_s) for r in rows],
        "over data": [f"{r.speed_up:.3f}x" if r.speed_up else UNKNOWN for r in rows],
        "communication": [format_bytes(r.communication_bytes) for r in rows],
        "exposed": [part_of_step(r.exposed_s, r.step_s) for r in rows],
        "memory": [format_bytes(r.memory_bytes) for r in rows],
        "replaced": [f"{r.num_replaced}" for r in rows],
        "fits": ["yes" if r.fits else "no" for r in rows],
        "allowed": ["no" if r.note else "yes" for r in rows],
    }
    emphasis = next((i for i, row in enumerate(rows) if row.is_planned), None)
    cells = tuple(zip(*columns.values(), strict=True))
    spare = ("replaced", "samples/s", "exposed", "memory")
    return Table("Strategies, predicted", tuple(columns), cells, emphasis=emphasis, spare=spare)


def summary(plan: Plan) -> Table:
    """Return what a plan is for and what it promises."""
    totals = plan.totals
    if plan.is_pipelined:
        mesh = f"{len(plan.stages)} stages on {plan.num_ranks} of {counted(plan.cluster.num_devices, 'device')}"
    else:
        mesh = f"{axes_text(plan.stages[0])}{_part(plan)}"
    passed = {"per-rank": "each rank its own samples", "global": "every rank the whole batch"}
    samples = passed.get(plan.io, "each rank its region of samples and space")
    limit = plan.search.memory_limit_bytes
    norm = "" if plan.sync_batch_norm else ", batch norm of each rank's own samples"
    sharding = plan.stages[0].parameter_sharding
    held = "" if sharding == "none" else f", parameter sharding: {sharding}"
    fixed = "; ".join(f"{part.kind} {part.text}" for part in plan.search.constraints)
    rows = {
        "model": f"{plan.model.name}, {format_count(plan.model.num_params)} parameters",
        **({"changes the model": "; ".join(plan.model.changes)} if plan.model.changes else {}),
        "machine": f"{plan.cluster.name}, {counted(plan.cluster.num_devices, 'device')}",
        "mesh": mesh,
        "batch": f"{plan.batch}, {samples}",
        **({"schedule": _schedule(plan)} if plan.is_pipelined else {}),
        "numbers": f"{plan.precision}, {plan.optimizer}{norm}{held}",
        **({"constraints": fixed} if fixed else {}),
        "step": f"{format_seconds(totals.step_s)}, {format_count(totals.samples_per_s)} samples/s",
        **({"halos": _halos(plan)} if any(stage.recomputing() for stage in plan.stages) else {}),
        "compute": format_seconds(totals.compute_s),
        "exposed communication": part_of_step(totals.exposed_s, totals.step_s),
        "communication per device": format_bytes(totals.communication_bytes),
        "memory per device": f"{format_bytes(totals.memory_bytes)} of {format_bytes(limit)} allowed",
        "solver": f"{plan.search.solver}, {plan.search.status}, out of {plan.search.num_strategies} strategies",
    }
    return Table("Plan", ("", ""), tuple(rows.items()), num_text=2)


def _halos(plan: Plan) -> str:
    """Return how many layers recompute, and how many runs of them there are, one behind the other."""
    marks = [part.halo == "recompute" for stage in plan.stages for part in stage.layers]
    runs = sum(mark and not before for before, mark in zip([False, *marks], marks, strict=False))
    return f"{counted(sum(marks), 'layer')} in {counted(runs, 'run')} compute those of the layers behind, no messages"


def axes_text(stage: StagePart) -> str:
    """Return the mesh of a stage as text."""
    return " x ".join(f"{axis.name}={axis.size}" for axis in stage.mesh.axes) or "one device"


def _schedule(plan: Plan) -> str:
    count = plan.schedule.num_microbatches
    return (
        f"{plan.schedule.kind}, "
        + ("1 micro-batch" if count == 1 else f"{count} micro-batches")
        + (f" of {counted(plan.microbatch, 'sample')}")
    )


def _part(plan: Plan) -> str:
    """Return what a plan says where it does not use all of its machine."""
    if plan.mesh.size == plan.cluster.num_devices:
        return ""
    devices = plan.stages[0].devices
    listed = f" ({', '.join(devices[:4])}{', …' if len(devices) > 4 else ''})" if devices else ""
    return f"; uses {plan.mesh.size} of {counted(plan.cluster.num_devices, 'device')}{listed}"


def layers(plan: Plan, grouped: bool = False) -> tuple[Table, ...]:
    """Return the split and prediction of every layer, a table for each stage; of several, for one micro-batch.

    Args:
        plan: the plan.
        grouped: join consecutive layers with the same operator and split; their figures add up.
    """
    titles = [f"Layers of stage {s}" for s in range(len(plan.stages))] if plan.is_pipelined else ["Layers"]
    return tuple(_layers(title, stage, grouped) for title, stage in zip(titles, plan.stages, strict=True))


def _layers(title: str, stage: StagePart, grouped: bool) -> Table:
    axes = tuple(axis.name for axis in stage.mesh.axes)
    figures = ("compute", "transfer", "sync", "exposed", "memory")
    runs = _runs(stage.layers) if grouped else ([x] for x in stage.layers)
    rows = tuple(
        (
            run[0].id if len(run) == 1 else f"{run[0].id} … {run[-1].id} ({len(run)})",
            run[0].op,
            *_splits(run[0]),
            format_seconds(sum(layer.cost.compute_s for layer in run)),
            format_seconds(sum(layer.cost.transfer_s + layer.cost.halo_s for layer in run)),
            format_seconds(sum(layer.cost.sync_s for layer in run)),
            format_seconds(sum(layer.cost.exposed_s for layer in run)),
            format_bytes(sum(layer.memory_bytes for layer in run)),
        )
        for run in runs
    )
    spare = ("sync", "operator", "transfer", "memory")
    return Table(title, ("layer", "operator", *axes, *figures), rows, num_text=2 + len(axes), spare=spare)


def bound_sentence(step_s: float, lower_bound_s: float, what: str = "strategy") -> str:
    """Return what the bound says about better plans; ``what`` they are."""
    left = max(1 - lower_bound_s / step_s, 0.0) if step_s else 0.0
    return (
        f"Bound: on the searched meshes no {what} has a predicted step below {format_seconds(lower_bound_s, 5)}; "
        + (f"a better plan could save at most {percent(left)}." if left > EQUAL else "this one reaches it.")
    )


def change_sentences(changes: Sequence[str]) -> tuple[str, ...]:
    """Return what is to be said of a model that a transform made another one than it was."""
    return tuple(
        f"Changes the model: {sentence}. Plan and run are exact for the changed model; accuracy and time of training "
        "are not those of the original."
        for sentence in changes
    )


def branch_sentences(found: BranchesPart | None, step_s: float) -> Iterator[str]:
    """Yield what running branches at the same time is worth to a plan of this step."""
    if found is None:
        return
    verbs = "forks and joins" if found.regions == 1 else "fork and join"
    regions = f"{counted(found.regions, 'region')} of the network {verbs}"
    bound = f"by FLOP, computing their branches at the same time gains at most {found.bound:.2f}x"
    if found.taken:
        yield f"Branches: {regions}; {bound}. At the same time run:"
        yield from (f"  {each}" for each in found.taken)
    elif found.step_s is None:
        yield f"Branches: {regions}; {bound}. No placement of them was worth a simulation."
    else:
        slower = found.step_s / step_s - 1
        yield (
            f"Branches: {regions}; {bound}. The best placement of them that was simulated takes "
            f"{format_seconds(found.step_s, 5)}, {percent(slower)} more than this plan, which splits every layer."
        )


def source_sentence(plan: Plan) -> str:
    """Return where the predicted compute time is from, and of a pipeline what would measure the rest of it."""
    totals = plan.totals
    parts = {
        "measured layer by layer": totals.measured_s,
        "from a roofline fitted to measurements": totals.fitted_s,
        "from a roofline of data-sheet rates": totals.data_sheet_s,
    }
    total = sum(parts.values())
    if not total:
        return "Compute: none."
    found = "Compute: " + ", ".join(f"{percent(part / total)} {name}" for name, part in parts.items() if part) + "."
    count = plan.schedule.num_microbatches
    if plan.is_pipelined and totals.fitted_s:
        found += (
            f" Pieces of stages, of {counted(plan.microbatch, 'sample')} at a time, are fitted where they were not "
            f"measured: `layerwise profile layers --microbatches {count}` measures them."
        )
    return found


def standing_sentences(rows: Sequence[StrategyRow], lower_bound_s: float) -> tuple[str, ...]:
    """Return how the planned strategy stands against fixed ones that it does not beat, and why."""
    planned = next(row for row in rows if row.is_planned)
    return tuple(_standing(planned, rows, lower_bound_s))


def _standing(planned: StrategyRow, rows: Sequence[StrategyRow], lower_bound_s: float) -> Iterator[str]:
    rivals = [row for row in rows if row.fits is not False and row.name != planned.name and not row.note]
    for row in rows:
        if row.note and row.fits is not False and row.step_s < planned.step_s * (1 - EQUAL):
            saved = percent(1 - row.step_s / planned.step_s)
            yield f"{row.name} would be faster by {saved}, but was not allowed: {row.note}."
    for row in rivals:
        if row.step_s < planned.step_s * (1 - EQUAL):
            saved = percent(1 - row.step_s / planned.step_s)
            yield f"{row.name} is faster than the planned strategy by {saved}: the planned one lost."
    equal = [row.name for row in rivals if abs(row.step_s - planned.step_s) <= EQUAL * planned.step_s]
    if equal:
        left = 1 - lower_bound_s / planned.step_s
        why = (
            f"nothing faster was found, and the bound leaves at most {percent(left)} to gain"
            if left > EQUAL else "the bound proves that nothing on the searched meshes is faster"
        )  # fmt: skip
        yield f"As fast as the planned strategy: {', '.join(equal)}; {why}."


def percent(share: float) -> str:
    """Return a share as text, three significant digits."""
    return f"{100 * share:.3g} %"


def part_of_step(part_s: float, step_s: float) -> str:
    """Return a part of a step as text; what is rounding is nothing."""
    return format_seconds(part_s if part_s > EQUAL * step_s else 0.0)


def _ratio(reference_s: float | None, step_s: float) -> float | None:
    return None if reference_s is None else reference_s / step_s


def counted(count: int, noun: str) -> str:
    """Return a number of things as text."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _splits(layer: LayerPart) -> tuple[str, ...]:
    """Return what each axis does; where it cuts space, also whether halos are recomputed."""
    told = layer.halo == "recompute"
    pairs = zip(layer.assigned().texts, layer.split.values(), strict=True)
    return tuple(f"{text}, halo recomputed" if told and d in SPATIAL_DIMENSIONS else text for text, d in pairs)


def _runs(found: Sequence[LayerPart]) -> Iterator[list[LayerPart]]:
    for _, run in itertools.groupby(found, key=lambda layer: (layer.op, layer.assigned(), layer.halo)):
        yield list(run)
