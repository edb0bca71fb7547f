"""`layerwise run`: execute a plan, time it layer by layer, hold it against the prediction."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from planner.cli.launched import Launcher, is_rank
from planner.cli.options import Timed
from planner.cli.planning import refuse_unwritable
from planner.cli.racing import refuse_too_many
from planner.cli.terminal import Terminal, rendered
from planner.cli.tracing import Target, is_as_planned, note_other_machine
from planner.errors import UsageError
from planner.plan import Plan
from planner.report.tables import change_sentences

if TYPE_CHECKING:
    from planner.api import Machine, PricedStages
    from planner.plan.measured import Measured
    from planner.plan.measured_stages import MeasuredPipeline

Spans = list[list[list[Any]]]
"""For every rank phase, layer, start and stop of the parts of a step."""


def run(
    path: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan file.", show_default=False)],
    terminal: Terminal,
    timed: Timed,
    target: Target,
    launcher: Launcher,
    measured: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the measured seconds of every layer and phase here.")
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the measured timeline of a step of every rank here.")
    ] = None,
) -> None:
    """Run a plan on synthetic data; print predicted and measured seconds of the step, its parts and its layers.

    Under torchrun or srun, this process is one of the plan's ranks; otherwise it starts local ones, or some on Ray.
    The model's code is run, so run plans of people you trust.
    """
    from planner.plan.schema import require_single_rank_count

    found = Plan.load(path)
    launcher.refuse_unfit()
    launched = is_rank()
    if not launched or os.environ["RANK"] == "0":
        for place in (measured, trace):
            if place is not None:
                refuse_unwritable(place)
    argument = {"plan": found.to_json(), "steps": timed.steps, "warmup": timed.warmup}
    if launched:
        from runtime.slurm import whole_number

        require_single_rank_count(found, whole_number("WORLD_SIZE", 1))
        is_here = whole_number("LOCAL_WORLD_SIZE", found.num_ranks) == found.num_ranks
        outcome = _as_rank(argument)
        if outcome is None:
            return
    else:
        with terminal.working(f"running {found.model.name} on {found.num_ranks} ranks"):
            outcome, is_here = _started(found, argument, timed.timeout, launcher)
    timings, spans = _decoded(outcome, has_cpu=launched or is_here)
    if measured is not None:
        timings.save(measured)
    if trace is not None:
        _write_trace(trace, found, timings, spans)
    _print(found, timings, _machine(found, target, is_here), terminal)
    for place in filter(None, (measured, trace)):
        terminal.err.print(f"wrote {place}")


def _as_rank(argument: dict[str, Any]) -> dict[str, Any] | None:
    """Run as one rank of torchrun's; return the measurements on rank 0."""
    from runtime.launch import initialize, leave
    from runtime.training import measure_plan

    process = initialize()
    measured = measure_plan(argument, process)
    leave()
    return measured if process.rank == 0 else None


def _locally(plan: Plan, argument: dict[str, Any], timeout_s: float) -> dict[str, Any]:
    from planner.measure.host import threads_per_rank
    from runtime.launch import run_local

    size = plan.num_ranks
    results = run_local(
        "runtime.training:measure_plan", argument, num_ranks=size, timeout_s=timeout_s,
        threads_per_rank=threads_per_rank(size),
    )  # fmt: skip
    outcome = results[0]
    assert isinstance(outcome, dict)
    return outcome


def _started(plan: Plan, argument: dict[str, Any], timeout_s: float, launcher: Launcher) -> tuple[dict[str, Any], bool]:
    """Start the ranks; return the measurements, and whether all ran on this host."""
    if launcher.is_on_this_host():
        refuse_too_many(plan.num_ranks, "the plan")
    if launcher.launcher == "ray":
        return _on_ray(plan, argument, timeout_s, launcher.ray_address)
    return _locally(plan, argument, timeout_s), True


def _on_ray(plan: Plan, argument: dict[str, Any], timeout_s: float, address: str | None) -> tuple[dict[str, Any], bool]:
    from runtime.ray import run_on_ray

    # one axis over nodes and none inside of them: the plan is for one device of each
    levels = {axis.name.rstrip("0123456789") for stage in plan.stages for axis in stage.mesh.axes}
    found = run_on_ray(
        "runtime.training:measure_plan", argument, num_ranks=plan.num_ranks, timeout_s=timeout_s, address=address,
        apart=levels == {"node"},
    )  # fmt: skip
    outcome = found.results[0]
    assert isinstance(outcome, dict)
    return outcome, found.is_here


def _decoded(outcome: dict[str, Any], has_cpu: bool) -> "tuple[Measured | MeasuredPipeline, Spans]":
    """Return what the ranks sent, as values; the CPU is named here where rank 0 ran on it."""
    from planner.measure.host import cpu_name
    from planner.plan.measured import Measured
    from planner.plan.measured_stages import MeasuredPipeline

    kind: type[Measured | MeasuredPipeline] = MeasuredPipeline if "pipeline" in outcome else Measured
    found = kind.model_validate_json(json.dumps(outcome.get("pipeline") or outcome["measured"]))
    facts = {**found.environment, "cpu": cpu_name()} if has_cpu else found.environment
    return found.model_copy(update={"environment": facts}), outcome["spans"]


def _write_trace(path: Path, plan: Plan, measured: "Measured | MeasuredPipeline", spans: Spans) -> None:
    from planner.ir.canonical import write_atomically
    from planner.report.trace import trace_json
    from planner.report.tracks import measured_tracks

    facts = {
        "model": plan.model.name, "batch": str(plan.batch), "plan_sha256": plan.digest,
        "source": "measured by layerwise run",
    }  # fmt: skip
    write_atomically(path, trace_json(measured_tracks(spans), {**facts, **measured.environment}))


def _machine(plan: Plan, target: Target, is_here: bool) -> "Machine | None":
    """Return the machine to predict for: the one asked for, or this host; None where ranks ran on others."""
    if target.cluster is None and not is_here:
        return None
    return target.machine(plan, f"local-{plan.num_ranks}")


def _print(plan: Plan, measured: "Measured | MeasuredPipeline", machine: "Machine | None", terminal: Terminal) -> None:
    from planner.plan.measured_stages import MeasuredPipeline

    if isinstance(measured, MeasuredPipeline):
        _report_stages(plan, measured, machine, terminal)
    else:
        _report(plan, measured, machine, terminal)
    for sentence in change_sentences(plan.model.changes):
        terminal.out.print(sentence)


def _report(plan: Plan, measured: "Measured", machine: "Machine | None", terminal: Terminal) -> None:
    from planner.api import price_plan
    from planner.report import measured as tables

    steps, said = [], None
    if machine is None or not is_as_planned(plan, machine):
        steps.append((_planned_for(plan, machine), plan.totals.step_s))
    if machine is not None:
        note_other_machine(plan, machine, terminal)
        priced = price_plan(plan, machine)
        ids = [layer.id for layer in priced.table.space.graph.layers]
        said = tables.predicted_parts(ids, priced.costs, priced.timeline)
        steps.append((machine.graph.name, priced.timeline.step_s))
    found = [tables.steps(plan, steps, measured)]
    if said is not None:
        found.append(tables.layer_differences(plan, said, measured))
    found.append(tables.parts(measured, said))
    for table in found:
        terminal.out.print(rendered(table))
        terminal.out.print()
    for sentence in _sentences(measured, machine):
        terminal.out.print(sentence)


def _report_stages(plan: Plan, measured: "MeasuredPipeline", machine: "Machine | None", terminal: Terminal) -> None:
    from planner.report import measured_stages as tables

    where = _planned_for(plan, machine)
    steps, costs = [(where, plan.totals.step_s)], [stage.cost for stage in plan.stages]
    if machine is not None and not is_as_planned(plan, machine):
        note_other_machine(plan, machine, terminal)
        priced = _priced(plan, machine, terminal)
        if priced is not None:
            where, costs = machine.graph.name, list(priced.stages)
            steps.append((where, priced.timeline.step_s))
    for table in (tables.steps(plan, steps, measured), tables.stages(plan, where, costs, measured)):
        terminal.out.print(rendered(table))
        terminal.out.print()
    terminal.out.print(tables.marking_sentence(plan, measured))


def _priced(plan: Plan, machine: "Machine", terminal: Terminal) -> "PricedStages | None":
    """Return a pipelined plan on a machine; None where its stages cannot be laid over that, which has run it anyway."""
    from planner.api import price_stages

    try:
        return price_stages(plan, machine)
    except UsageError as error:
        terminal.err.print(f"note: predicted for {plan.cluster.name} only: {error}")
        return None


def _planned_for(plan: Plan, machine: "Machine | None") -> str:
    """Return the machine that a plan was made for, as a run names it beside the one that it predicts for."""
    name = plan.cluster.name
    is_older = machine is not None and machine.graph.name == name and not is_as_planned(plan, machine)
    return f"{name}, when planned" if is_older else name


def _sentences(measured: "Measured", machine: "Machine | None") -> Iterator[str]:
    from planner.report import measured as tables

    yield tables.marking_sentence(measured)
    if machine is None:
        yield "Predictions of layers: give --cluster, because these ranks ran on other hosts."
