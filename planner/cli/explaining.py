"""``explain``: why a layer of a plan is split as it is; ``diff``: where two plans differ."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from planner.cli.reading import PlanPath, read_plan
from planner.cli.terminal import Terminal, rendered
from planner.cli.tracing import Target, machine_of_plan, note_other_machine
from planner.report import differences, explanation

if TYPE_CHECKING:
    from planner.search.alternatives import Explanation, Placed

SHOWN = 12
"""Alternatives, unless all are asked for."""


def explain(
    path: PlanPath,
    target: Target,
    terminal: Terminal,
    layer: Annotated[
        str | None, typer.Argument(metavar="LAYER", help="The layer; left out: all, each with its next best split.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All splits, not only the best ones.")] = False,
    flips: Annotated[bool, typer.Option(help="Look for link rates and batches under which another split wins.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with all digits.")] = False,
) -> None:
    """Say why a layer is split as it is: what its other splits cost, and what would have to change for them to win.

    The model is built from its source, which runs its code.
    """
    from planner.api.explaining import explain as explained
    from planner.api.explaining import overview, refuse_pipelined

    found = read_plan(path)
    refuse_pipelined(found)
    machine = machine_of_plan(found, target)
    note_other_machine(found, machine, terminal)
    if found.only_stage.recomputing():
        terminal.err.print("note: halos that the plan recomputes are explained as if they were exchanged")
    if layer is None:
        with terminal.working("explaining all layers", silent=as_json):
            seen = overview(found, machine)
        rows = seen.standings
        if as_json:
            typer.echo(
                json.dumps([{**asdict(row), "split": str(row.split), "other": _text(row.other)} for row in rows])
            )
            return
        terminal.out.print(rendered(explanation.standings(rows, found.totals.step_s)))
        _print_placed(seen.placed, terminal)
        if found.num_ranks == 1:
            terminal.out.print("The plan is for one device: no layer has another split.")
        return
    with terminal.working(f"explaining {layer}", silent=as_json) as say:
        result = explained(found, machine, layer, flips=flips, progress=say)
    if as_json:
        typer.echo(json.dumps(_document(result)))
        return
    most = len(result.alternatives) if everything else SHOWN
    terminal.out.print(rendered(explanation.alternatives(result, most)))
    terminal.out.print()
    for sentence in explanation.sentences(result, most):
        terminal.out.print(sentence)
    _print_placed(result.placed, terminal)


def _print_placed(regions: "Sequence[Placed]", terminal: Terminal) -> None:
    for region in regions:
        terminal.out.print()
        terminal.out.print(rendered(explanation.placed(region)))
        terminal.out.print(explanation.placed_sentence(region))


def diff(
    path: Annotated[str, typer.Argument(metavar="FIRST", help="A plan file.", show_default=False)],
    other: Annotated[str, typer.Argument(metavar="SECOND", help="Another one.", show_default=False)],
    terminal: Terminal,
) -> None:
    """Print where two plans differ: as wholes, and layer by layer."""
    first, second = read_plan(path), read_plan(other)
    for table in (differences.facts(first, second), differences.layers(first, second)):
        if table.rows:
            terminal.out.print(rendered(table))
            terminal.out.print()
    terminal.out.print(differences.sentence(first, second))


def _text(split: object) -> str | None:
    return None if split is None else str(split)


def _document(found: "Explanation") -> dict[str, Any]:
    """Return an explanation as JSON; what does not fit in memory has no step."""
    document = asdict(found)
    for each, alternative in zip(document["alternatives"], found.alternatives, strict=True):
        each["split"] = str(alternative.split)
        each["followed_s"] = None if math.isinf(alternative.followed_s) else alternative.followed_s
    for each, placed in zip(document["placed"], found.placed, strict=True):
        each["spread_s"] = None if math.isinf(placed.spread_s) else placed.spread_s
    for each, flip in zip(document["flips"], found.flips, strict=True):
        each["split"] = str(flip.split)
    return document
