"""A run of a pipelined plan as rows of text: its step and stages, predicted beside measured."""

from planner.plan.measured_stages import MeasuredPipeline
from planner.plan.schema import Plan
from planner.report.tables import UNKNOWN, Table, counted, percent
from planner.units import format_count, format_seconds


def steps(plan: Plan, measured: MeasuredPipeline) -> Table:
    """Return the predicted and the measured step."""
    said, found = plan.totals.step_s, measured.step_s
    rows = (
        (f"predicted for {plan.cluster.name}", format_seconds(said), format_count(plan.batch / said),
         f"{said / found - 1:+.1%}"),
        ("measured", format_seconds(found), format_count(plan.batch / found), ""),
    )  # fmt: skip
    count = plan.schedule.num_microbatches
    schedule = f"{plan.schedule.kind}, {count} micro-batch{'es' if count != 1 else ''}"
    title = f"{plan.model.name}, batch {plan.batch}, {counted(plan.num_ranks, 'rank')}, {schedule}"
    return Table(title, ("", "step", "samples/s", "against measured"), rows, emphasis=1)


def stages(plan: Plan, measured: MeasuredPipeline) -> Table:
    """Return for every stage what a micro-batch and the end of the step take."""
    rows = []
    for s, (stage, found) in enumerate(zip(plan.stages, measured.stages, strict=True)):
        said = stage.cost
        pairs = [
            (None if said is None else said.forward_s, found.forward_s),
            (None if said is None else said.backward_s, found.backward_s),
            (None if said is None else said.tail_s, found.tail_s),
        ]
        seconds = [UNKNOWN if x is None else format_seconds(x) for pair in pairs for x in pair]
        bubbles = (UNKNOWN if said is None else percent(said.bubble_share), percent(found.bubble_share))
        rows.append((str(s), _ranks(stage.mesh.ranks), *seconds, *bubbles))
    columns = (
        "stage", "ranks", "forward, predicted", "measured", "backward, predicted", "measured ",
        "sync and update, predicted", "measured  ", "waiting, predicted", "measured   ",
    )  # fmt: skip
    return Table("Stages: seconds of a micro-batch, and of the end of the step", columns, tuple(rows), num_text=2)


def marking_sentence(measured: MeasuredPipeline) -> str:
    """Return whose seconds these are, and what it cost to learn them."""
    return (
        "Seconds of a stage are medians on its rank that computes most; waiting is what is left of its step. Steps "
        f"with marks took {measured.slow_down:+.1%} against plain ones."
    )


def _ranks(ranks: list[int]) -> str:
    return f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"
