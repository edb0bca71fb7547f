"""A run of a pipelined plan as rows of text: its step and stages, predicted beside measured."""

from collections.abc import Sequence

from planner.ir.schedule import ScheduleKind
from planner.plan.measured_stages import MeasuredPipeline
from planner.plan.schema import Plan, StageCostPart
from planner.report.tables import UNKNOWN, Table, counted, percent
from planner.units import format_count, format_seconds


def steps(plan: Plan, predicted: Sequence[tuple[str, float]], measured: MeasuredPipeline) -> Table:
    """Return predicted and measured steps below each other; of schedules in cycles, cycles.

    Args:
        plan: that was run.
        predicted: for what, and seconds.
        measured: the run.
    """
    found = [(f"predicted for {where}", said, f"{said / measured.step_s - 1:+.1%}") for where, said in predicted]
    found.append(("measured", measured.step_s, ""))
    rows = tuple((name, format_seconds(s), format_count(plan.batch / s), error) for name, s, error in found)
    count, schedule, unit = plan.schedule.num_microbatches, str(plan.schedule.kind), "cycle"
    if _is_synchronous(plan):
        schedule, unit = f"{schedule}, {count} micro-batch{'es' if count != 1 else ''}", "step"
    title = f"{plan.model.name}, batch {plan.batch}, {counted(plan.num_ranks, 'rank')}, {schedule}"
    return Table(title, ("", unit, "samples/s", "against measured"), rows, emphasis=len(predicted))


def stages(plan: Plan, where: str, costs: Sequence[StageCostPart | None], measured: MeasuredPipeline) -> Table:
    """Return for every stage what a micro-batch and the end of the step take.

    Args:
        plan: that was run.
        where: the machine of the prediction.
        costs: predicted, of every stage.
        measured: the run.
    """
    rows = []
    for s, (stage, said, found) in enumerate(zip(plan.stages, costs, measured.stages, strict=True)):
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
    spans = ("micro-batch", "step") if _is_synchronous(plan) else ("batch", "cycle")
    title = f"Stages, predicted for {where}: seconds of a {spans[0]}, and of the end of the {spans[1]}"
    return Table(title, columns, tuple(rows), num_text=2)


def marking_sentence(plan: Plan, measured: MeasuredPipeline) -> str:
    """Return whose seconds these are, and what it cost to learn them."""
    unit = "step" if _is_synchronous(plan) else "cycle"
    return (
        f"Seconds of a stage are medians on its rank that computes most; waiting is what is left of its {unit}. "
        f"{unit.capitalize()}s with marks took {measured.slow_down:+.1%} against plain ones."
    )


def _is_synchronous(plan: Plan) -> bool:
    return ScheduleKind(plan.schedule.kind).is_synchronous


def _ranks(ranks: list[int]) -> str:
    return f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"
