"""What a pipelined plan says of its stages, as rows of text."""

from collections.abc import Iterator

from planner.plan.schema import Plan, StageCostPart, StagePart
from planner.report.tables import Table, axes_text, percent
from planner.units import format_bytes, format_seconds


def costs(plan: Plan) -> list[StageCostPart]:
    """Return the predicted numbers of every stage of a pipelined plan."""
    return [stage.cost for stage in plan.stages if stage.cost is not None]


def stages(plan: Plan) -> Table:
    """Return the stages side by side; forward and backward are of one micro-batch."""
    numbers = costs(plan)
    work = [cost.forward_s + cost.backward_s for cost in numbers]
    columns = {
        "stage": [f"{s}" for s in range(len(plan.stages))],
        "layers": [_layers(stage) for stage in plan.stages],
        "ranks": [_ranks(stage) for stage in plan.stages],
        "mesh": [axes_text(stage) + (", recomputed" if stage.recompute else "") for stage in plan.stages],
        "forward": [format_seconds(cost.forward_s) for cost in numbers],
        "backward": [format_seconds(cost.backward_s) for cost in numbers],
        "of the slowest": [percent(seconds / (max(work) or 1)) for seconds in work],
        "sent": [format_bytes(cost.sent_bytes) for cost in numbers],
        "sync, update": [format_seconds(cost.tail_s) for cost in numbers],
        "bubble": [percent(cost.bubble_share) for cost in numbers],
        "staleness": [f"{cost.staleness}" for cost in numbers],
        "weights": [f"{cost.weight_versions}" for cost in numbers],
        "in flight": [f"{cost.num_in_flight}" for cost in numbers],
        "memory": [format_bytes(cost.memory_bytes) for cost in numbers],
    }
    spare = ("in flight", "weights", "staleness", "sync, update", "sent")
    return Table("Stages", tuple(columns), tuple(zip(*columns.values(), strict=True)), num_text=4, spare=spare)


def sentences(plan: Plan) -> Iterator[str]:
    """Yield how even the stages are, and what of their time is lost."""
    numbers = costs(plan)
    work = [cost.forward_s + cost.backward_s for cost in numbers]
    mean = sum(work) / len(work)
    bubble = sum(cost.bubble_share for cost in numbers) / len(numbers)
    yield (
        f"Stages: the slowest takes {percent(max(work) / mean - 1) if mean else percent(0)} longer than the mean; "
        f"{percent(bubble)} of the devices' time is bubble."
    )
    if any(cost.staleness for cost in numbers):
        yield (
            "Weights change between a batch's forward and its backward pass (staleness, in updates): the numerics are "
            f"those of the schedule {plan.schedule.kind!r}, not of one device."
        )


def _layers(stage: StagePart) -> str:
    own = [layer.id for layer in stage.layers if layer.op not in {"receive", "send", "input", "output"}]
    own = own or [layer.id for layer in stage.layers]
    return f"{own[0]} … {own[-1]}" if len(own) > 1 else own[0]


def _ranks(stage: StagePart) -> str:
    ranks = stage.mesh.ranks
    return f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"
