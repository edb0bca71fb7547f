"""``export``: a plan for other tools."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from planner.cli.planning import refuse_unwritable
from planner.cli.reading import PlanPath, read_plan
from planner.cli.terminal import Terminal
from planner.ir.canonical import write_atomically


def export(
    path: PlanPath,
    terminal: Terminal,
    form: Annotated[
        Literal["dot", "dtensor"],
        typer.Option("--format", help="dot: the layers for Graphviz; dtensor: DeviceMesh and placements, for torch."),
    ],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write it here instead of stdout.")] = None,
) -> None:
    """Write a plan for other tools: its layers for Graphviz, or where its parameters lie for torch's DTensor.

    The model is built from its source, which runs its code.
    """
    plan = read_plan(path)
    if output is not None:
        refuse_unwritable(output)
    with terminal.working(f"tracing {plan.model.name}"):
        from planner.api import export_dot, export_placements

        if form == "dot":
            text = export_dot(plan)
        else:
            found = export_placements(plan)
            text = found.to_json()
            for name, why in found.missing.items():
                terminal.err.print(f"note: no placements for {name}: {why}")
            if plan.stages[0].parameter_sharding != "none":
                terminal.err.print("note: parameter sharding is not in the placements: use torch's fully_shard for it")
    if output is None:
        typer.echo(text, nl=False)
        return
    write_atomically(output, text)
    terminal.err.print(f"wrote {output}")
