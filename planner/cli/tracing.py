"""``trace``: the simulated step of a plan as a file for Perfetto; and the machine that a plan is held against."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from planner.cli.planning import refuse_unwritable
from planner.cli.reading import PlanPath, read_plan
from planner.cli.terminal import Terminal
from planner.errors import UnknownNameError, UsageError
from planner.plan.schema import Plan
from planner.report.trace import read_trace, trace_json
from planner.report.tracks import predicted_tracks
from planner.units import format_seconds

if TYPE_CHECKING:
    from planner.api import Machine


@dataclass(frozen=True, slots=True)
class Target:
    """The machine that a plan is priced on, as it was typed."""

    cluster: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|NAME",
            help="The machine to predict for; left out: the plan's, if it is known by name; of a run, this host.",
        ),
    ] = None
    profile: Annotated[Path | None, typer.Option(metavar="FILE", help="A device profile to price layers with.")] = None

    def machine(self, plan: Plan, name: str) -> "Machine":
        """Return the machine that was asked for, or the one of this name."""
        from planner.api import machine_of

        return machine_of(self.cluster or name, precision=plan.precision, profile=self.profile)


def trace(
    path: PlanPath,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Where the trace goes; https://ui.perfetto.dev shows it.")
    ],
    target: Target,
    terminal: Terminal,
    beside: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A trace of `layerwise run --trace`, to be put below in the same file."),
    ] = None,
) -> None:
    """Write the predicted timeline of a plan's step: what is computed, what is sent, what waits for what.

    Its tracks have the names of those of a measured step (`layerwise run --trace`). The model is built from its source,
    which runs its code.
    """
    from planner.api import reprice
    from planner.ir.canonical import write_atomically

    found = read_plan(path)
    refuse_unwritable(output)
    entries, of = ([], {}) if beside is None else read_trace(beside)
    machine = machine_of_plan(found, target)
    note_other_machine(found, machine, terminal)
    with terminal.working(f"simulating {found.model.name}"):
        timeline = reprice(found, machine)
    facts = {
        "model": found.model.name, "batch": str(found.batch), "cluster": machine.graph.name,
        "plan_sha256": found.digest, "step_s": repr(timeline.step_s), "source": "simulated by layerwise trace",
    }  # fmt: skip
    if beside is not None and of.get("plan_sha256") != found.digest:
        terminal.err.print(f"note: {beside} is a trace of another plan")
    write_atomically(output, trace_json(predicted_tracks(found, timeline.events), facts, entries))
    step = format_seconds(timeline.step_s, 5)
    terminal.err.print(f"wrote {output}: a step of {step}, {len(timeline.events)} events")


def machine_of_plan(plan: Plan, target: Target) -> "Machine":
    """Return the machine that was asked for, else the one that the plan's name for it means.

    Raises:
        UsageError: the name means a file or measurements, which a plan must not choose, or nothing.
    """
    name = plan.cluster.name
    if target.cluster is None and ("/" in name or name.endswith(".json") or name.startswith("local-")):
        raise UsageError(
            f"the plan is for {name!r}, whose figures are measurements or a file: give --cluster {name}, or another "
            "machine"
        )
    try:
        return target.machine(plan, name)
    except UnknownNameError as error:
        if target.cluster is not None:
            raise
        raise UsageError(f"the plan is for {name!r}, which is no known machine: give --cluster FILE") from error


def note_other_machine(plan: Plan, machine: "Machine", terminal: Terminal) -> None:
    """Say so if a plan was made for another machine than this, or priced with another profile."""
    if machine.graph.digest != plan.cluster.sha256:
        terminal.err.print(f"note: the plan was made for {plan.cluster.name}; this is another machine")
    elif not is_as_planned(plan, machine):
        terminal.err.print("note: the plan was made with another device profile (or other host measurements) than this")


def is_as_planned(plan: Plan, machine: "Machine") -> bool:
    """Return whether a machine has the links, devices and layer times that a plan was made with."""
    from planner.plan.check import is_as_planned as has_figures

    return has_figures(plan, machine.graph.digest, machine.profile.digest)
