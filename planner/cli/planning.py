"""``plan``; and what every command that plans asks and refuses."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from planner.cli.options import SAMPLES_PER_DEVICE, Asked
from planner.cli.placing import Placed, place
from planner.cli.terminal import Terminal, rendered
from planner.errors import EXIT_INTERRUPTED
from planner.ir.canonical import target_of
from planner.plan import Plan
from planner.report import tables

if TYPE_CHECKING:
    from rich.console import Console

    from planner.api import Machine, Planner


def plan(
    context: typer.Context,
    asked: Asked,
    placed: Placed,
    terminal: Terminal,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the plan here instead of stdout.")
    ] = None,
) -> None:
    """Find the fastest training step and write it as a plan.

    With --objective: place the network on small devices for inference, and write a partition. Without -o the file is
    printed on stdout, and nothing else is.
    """
    if output is not None:
        refuse_unwritable(output)
    if placed.objective is not None:
        place(asked, placed, terminal, output, context.obj or "")
        return
    placed.refuse_for_training()
    with terminal.working(f"planning {asked.model}"):
        found, is_whole = _planned(prepared(asked, terminal, context.obj or ""), terminal)
    if found.schedule.num_microbatches > 1 and found.sync_batch_norm:
        terminal.err.print(
            "note: batch norms, if there are any, take their statistics over each micro-batch (as GPipe)"
        )
    if output is None:
        typer.echo(found.to_json(), nl=False)
        _say_changes(found.model.changes, terminal.err)
    else:
        _save(found, output, terminal)
    if not is_whole:
        raise typer.Exit(EXIT_INTERRUPTED)


def _planned(planner: "Planner", terminal: Terminal) -> tuple[Plan, bool]:
    """Return the plan, and whether the search ended by itself."""
    from planner.api.planning import InterruptedSearchError

    try:
        return planner.plan(), True
    except InterruptedSearchError as error:
        terminal.err.print("note: interrupted; this is the best plan until then")
        return error.plan, False


def _save(found: Plan, output: Path, terminal: Terminal) -> None:
    """Write a plan, and print what it is held against."""
    found.save(output)
    rows = tables.rows_of_plan(found)
    terminal.err.print(rendered(tables.strategies(rows)))
    for sentence in tables.standing_sentences(rows, found.search.lower_bound_s):
        terminal.err.print(sentence)
    _say_changes(found.model.changes, terminal.err)
    for sentence in tables.branch_sentences(found.search.branches, found.totals.step_s):
        terminal.err.print(sentence)
    terminal.err.print(f"wrote {output}")


def prepared(asked: Asked, terminal: Terminal, command: str = "", on: "tuple[Machine, int] | None" = None) -> "Planner":
    """Return the traced model on its machine; what is wrong with a request shows here.

    Args:
        asked: the request.
        terminal: for notes.
        command: what was typed, for the plan's provenance.
        on: machine and batch of the first of several cases, where they are not those of the request.

    Raises:
        LayerwiseError: a part of the request is wrong, or the model cannot be traced.
    """
    from planner.api import Options, Origin, example_inputs, machine_of, prepare
    from planner.frontend.source import load_model
    from planner.space.enumerate import DEFAULT_DIMENSIONS

    arguments = asked.arguments()
    asked.input_shapes()  # refuses what cannot be understood, before anything is built
    options = Options(
        solver=asked.solver, memory_limit_bytes=asked.memory_limit_bytes(), precision=asked.precision,
        optimizer=asked.optimizer, sync_batch_norm=not asked.local_batch_norm, io=asked.io,
        dimensions=asked.dimensions() or DEFAULT_DIMENSIONS, mesh=asked.mesh, time_limit_s=asked.time_limit_s(),
        constraints=asked.constraints(), parameter_sharding=asked.parameter_sharding, all_devices=asked.all_devices,
        shares=asked.shares, halo_overlap=asked.halo_overlap, halo_recompute=asked.halo_recompute,
        stages=asked.num_stages(), schedule=asked.schedule, microbatches=asked.microbatches, branches=asked.branches,
    )  # fmt: skip
    machine, batch = on or (machine_of(asked.cluster, asked.devices, asked.precision, asked.profile), None)
    model = load_model(asked.model, arguments)
    shapes, named = asked.inputs_of(model.input_shapes)
    num_ranks = len(machine.graph.devices)
    batch = batch or asked.batch_size() or SAMPLES_PER_DEVICE * num_ranks
    if on is None:
        note_uneven([(batch, num_ranks)], terminal)
    inputs = example_inputs(shapes, batch)
    keywords = dict(zip(named, example_inputs(tuple(named.values()), batch), strict=True))
    origin = Origin(model.name, model.source, arguments, command)
    return prepare(model.module, inputs, machine, options, origin, keywords)


def _say_changes(changes: Sequence[str], console: "Console") -> None:
    for sentence in tables.change_sentences(changes):
        console.print(sentence)


def note_uneven(cases: Iterable[tuple[int, int]], terminal: Terminal) -> None:
    """Say of batches and numbers of devices where the samples cannot be split evenly."""
    for batch, num_ranks in dict.fromkeys(cases):
        if batch < num_ranks:
            terminal.err.print(f"note: batch {batch} has fewer samples than the machine has devices, {num_ranks}")
        elif batch % num_ranks:
            terminal.err.print(
                f"note: batch {batch} does not divide by {num_ranks} devices: where samples are split over all of "
                "them, some get one more than others"
            )


def refuse_unwritable(path: Path) -> None:
    """Refuse a place that cannot be written, before a long search."""
    target_of(path)
