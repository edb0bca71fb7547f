"""`layerwise run`: execute a plan, time it layer by layer, hold it against the prediction."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from planner.cli.options import Timed
from planner.cli.planning import refuse_unwritable
from planner.cli.racing import refuse_too_many
from planner.cli.terminal import Terminal, rendered
from planner.cli.tracing import Target, is_as_planned, note_other_machine
from planner.errors import UsageError
from planner.plan import Plan

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
    measured: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the measured seconds of every layer and phase here.")
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the measured timeline of a step of every rank here.")
    ] = None,
) -> None:
    """Run a plan on synthetic data; print predicted and measured seconds of the step, its parts and its layers.

    Under torchrun, this process is one of the plan's ranks; otherwise local processes are started.
    The model's code is run, so run plans of people you trust.
    """
    from planner.plan.measured_stages import MeasuredPipeline
    from planner.plan.schema import require_single_rank_count

    found = Plan.load(path)
    is_rank = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if not is_rank or os.environ["RANK"] == "0":
        for place in (measured, trace):
            if place is not None:
                refuse_unwritable(place)
    argument = {"plan": found.to_json(), "steps": timed.steps, "warmup": timed.warmup}
    if is_rank:
        require_single_rank_count(found, int(os.environ["WORLD_SIZE"]))
        outcome = _as_rank(argument)
        if outcome is None:
            return
    else:
        refuse_too_many(found.num_ranks, "the plan")
        outcome = _locally(found, argument, timed.timeout)
    timings, spans = _decoded(outcome)
    if measured is not None:
        timings.save(measured)
    if trace is not None:
        _write_trace(trace, found, timings, spans)
    machine = _machine(found, target)
    if isinstance(timings, MeasuredPipeline):
        _report_stages(found, timings, machine, terminal)
    else:
        _report(found, timings, machine, terminal)
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


def _decoded(outcome: dict[str, Any]) -> "tuple[Measured | MeasuredPipeline, Spans]":
    """Return what the ranks sent, as values; the CPU is named here."""
    from planner.measure.host import cpu_name
    from planner.plan.measured import Measured
    from planner.plan.measured_stages import MeasuredPipeline

    kind: type[Measured | MeasuredPipeline] = MeasuredPipeline if "pipeline" in outcome else Measured
    found = kind.model_validate_json(json.dumps(outcome.get("pipeline") or outcome["measured"]))
    facts = {**found.environment, "cpu": cpu_name()}
    return found.model_copy(update={"environment": facts}), outcome["spans"]


def _write_trace(path: Path, plan: Plan, measured: "Measured | MeasuredPipeline", spans: Spans) -> None:
    from planner.cost.overlap import Event
    from planner.ir.canonical import write_atomically
    from planner.report.trace import trace_json

    streams = {
        "transfer_forward": "transfer", "transfer_backward": "transfer", "exposed_sync": "waiting for gradients",
        "other": "other",
    }  # fmt: skip
    ranks = {
        f"rank {rank}, measured": [
            Event(
                f"{layer} {phase.replace('_', ' ')}".strip(),
                f"reduction, {layer}" if phase == "reduction" else streams.get(phase, "compute"),
                start,
                stop,
            )
            for phase, layer, start, stop in found
        ]
        for rank, found in enumerate(spans)
    }
    facts = {
        "model": plan.model.name, "batch": str(plan.batch), "plan_sha256": plan.digest,
        "source": "measured by layerwise run",
    }  # fmt: skip
    write_atomically(path, trace_json(ranks, {**facts, **measured.environment}))


def _machine(plan: Plan, target: Target) -> "Machine | None":
    """Return the machine to predict for: the one asked for, or this host; None in a job on several hosts."""
    if target.cluster is None and int(os.environ.get("LOCAL_WORLD_SIZE", plan.num_ranks)) < plan.num_ranks:
        return None
    return target.machine(plan, f"local-{plan.num_ranks}")


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
        yield "Predictions of layers: give --cluster, because these ranks are on several hosts."
