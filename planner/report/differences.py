"""Where two plans differ, as rows of text."""

from collections.abc import Callable, Iterator

from planner.plan.schema import Plan
from planner.report.tables import EQUAL, Table, axes_text, counted, part_of_step
from planner.units import format_bytes, format_count, format_seconds

_FACTS: dict[str, Callable[[Plan], str]] = {
    "model": lambda plan: f"{plan.model.name}, {format_count(plan.model.num_params)} parameters",
    "machine": lambda plan: f"{plan.cluster.name}, {counted(plan.cluster.num_devices, 'device')}",
    "batch": lambda plan: f"{plan.batch}",
    "mesh": lambda plan: " | ".join(axes_text(stage) for stage in plan.stages),
    "schedule": lambda plan: f"{plan.schedule.kind}, {counted(plan.schedule.num_microbatches, 'micro-batch')}",
    "numbers": lambda plan: f"{plan.precision}, {plan.optimizer}",
    "input and output": lambda plan: plan.io,
    "batch norm": lambda plan: "of the global batch" if plan.sync_batch_norm else "of each rank's samples",
    "parameter sharding": lambda plan: " | ".join(stage.parameter_sharding for stage in plan.stages),
    "recomputed stages": lambda plan: ", ".join(str(s) for s, stage in enumerate(plan.stages) if stage.recompute),
    "buckets": lambda plan: format_bytes(plan.bucket_bytes),
    "solver": lambda plan: f"{plan.search.solver}, {plan.search.status}",
    "constraints": lambda plan: "; ".join(f"{part.kind} {part.text}" for part in plan.search.constraints),
    "step": lambda plan: format_seconds(plan.totals.step_s, 5),
    "compute": lambda plan: format_seconds(plan.totals.compute_s),
    "exposed communication": lambda plan: part_of_step(plan.totals.exposed_s, plan.totals.step_s),
    "communication per device": lambda plan: format_bytes(plan.totals.communication_bytes),
    "memory per device": lambda plan: format_bytes(plan.totals.memory_bytes),
}


def facts(first: Plan, second: Plan) -> Table:
    """Return what the plans as wholes differ in."""
    pairs = ((name, fact(first), fact(second)) for name, fact in _FACTS.items())
    return Table("", ("", "first", "second"), tuple(row for row in pairs if row[1] != row[2]), num_text=3)


def layers(first: Plan, second: Plan) -> Table:
    """Return the layers that are split, overlapped or recomputed otherwise, on another stage, or in one plan only."""
    before, after = dict(_layers(first)), dict(_layers(second))
    names = [*before, *(name for name in after if name not in before)]
    nothing = "not there", ""
    pairs = ((name, before.get(name, nothing), after.get(name, nothing)) for name in names)
    rows = tuple((name, a[0], b[0], a[1], b[1]) for name, a, b in pairs if a[0] != b[0])
    return Table("Layers", ("layer", "first", "second", "first costs", "second costs"), rows, num_text=3)


def sentence(first: Plan, second: Plan) -> str:
    """Return how much the plans have in common, and which is predicted to be faster."""
    if first.digest == second.digest:
        return "Both make the ranks do the same."
    if first.model.graph_sha256 != second.model.graph_sha256 or first.batch != second.batch:
        return "They are for different networks or batches: their steps are not to be compared."
    ratio = first.totals.step_s / second.totals.step_s
    if abs(ratio - 1) <= EQUAL:
        return "Both are predicted to take the same."
    faster = "second" if ratio > 1 else "first"
    return f"The {faster} is predicted to be {max(ratio, 1 / ratio):.4g} times as fast."


def _layers(plan: Plan) -> Iterator[tuple[str, tuple[str, str]]]:
    """Yield every layer with what is decided of it, and its predicted seconds."""
    for s, stage in enumerate(plan.stages):
        for layer in stage.layers:
            place = f"stage {s}: " if plan.is_pipelined else ""
            overlap = ", halos overlapped" if layer.overlap else ""
            overlap += ", halos recomputed" if layer.halo == "recompute" else ""
            cost = layer.cost
            seconds = cost.compute_s + cost.transfer_s + cost.halo_s
            yield layer.id, (f"{place}{layer.assigned()}{overlap}", format_seconds(seconds))
