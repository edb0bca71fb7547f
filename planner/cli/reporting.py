"""``report``: everything that is known of a plan, in one HTML file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from planner.cli.options import counts
from planner.cli.planning import note_uneven, refuse_unwritable
from planner.cli.reading import PlanPath, read_plan
from planner.cli.terminal import Terminal
from planner.cli.tracing import Target, machine_of_plan, note_other_machine
from planner.errors import MismatchError
from planner.plan.schema import Plan
from planner.units import format_bytes

if TYPE_CHECKING:
    from planner.cost.overlap import Event
    from planner.plan.measured import Measured
    from planner.plan.measured_stages import MeasuredPipeline


@dataclass(frozen=True, slots=True)
class WasRun:
    """What is known of a run of the plan, as it was typed."""

    measured: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What layerwise run PLAN --measured FILE wrote.")
    ] = None
    trace: Annotated[Path | None, typer.Option(metavar="FILE", help="What layerwise run PLAN --trace FILE wrote.")] = (
        None
    )

    def seconds(self, plan: Plan) -> "Measured | MeasuredPipeline | None":
        """Return the seconds of the parts of a step."""
        from planner.plan.measured import read_measured
        from planner.plan.measured_stages import read_measured_pipeline

        if self.measured is None:
            return None
        return (read_measured_pipeline if plan.is_pipelined else read_measured)(self.measured, plan)

    def timeline(self, plan: Plan) -> "Timeline":
        """Return the timeline of a step.

        Raises:
            MismatchError: it is of another plan.
        """
        from planner.report.trace import read_trace, tracks_of

        if self.trace is None:
            return Timeline()
        entries, facts = read_trace(self.trace)
        if facts.get("plan_sha256") != plan.digest:
            raise MismatchError(
                f"trace {str(self.trace)!r} is of another plan (of {facts.get('model', 'an unknown model')!r}) than "
                f"the one given (of {plan.model.name!r}). Run this plan: layerwise run PLAN --trace {self.trace}"
            )
        steps = {name: events for name, events in tracks_of(entries).items() if not name.startswith("predicted")}
        return Timeline(steps, facts)


@dataclass(frozen=True, slots=True)
class Timeline:
    """A measured timeline, by rank, and what its file says of it."""

    ranks: "Mapping[str, Sequence[Event]]" = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict)


def report(
    path: PlanPath,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the page goes; any browser shows it.")],
    target: Target,
    terminal: Terminal,
    was_run: WasRun,
    scale: Annotated[
        str | None,
        typer.Option(metavar="LIST", help="Plan for other numbers of devices of the machine too, such as 1,2,4,8."),
    ] = None,
    alternatives: Annotated[bool, typer.Option(help="Look for the next best split of every layer.")] = True,
) -> None:
    """Write one HTML file on a plan, which needs no network: the network, timelines, memory, traffic, layers, accuracy.

    The model is built from its source, which runs its code.
    """
    found = read_plan(path)
    refuse_unwritable(output)
    measured, timeline = was_run.seconds(found), was_run.timeline(found)
    devices = () if scale is None else counts("--scale", scale)
    from planner.api.reporting import report as reported
    from planner.ir.canonical import write_atomically

    machine = machine_of_plan(found, target)
    note_other_machine(found, machine, terminal)
    note_uneven([(found.batch, count) for count in sorted(devices)], terminal)
    with terminal.working(f"reporting on {found.model.name}") as say:
        text = reported(
            found, machine, measured=measured, trace=timeline.ranks, trace_facts=timeline.facts, scale=devices,
            alternatives=alternatives, progress=say,
        )  # fmt: skip
    write_atomically(output, text)
    terminal.err.print(f"wrote {output}: {format_bytes(len(text.encode()))}")
