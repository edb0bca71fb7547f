"""``plan`` and ``compare``: the commands that search."""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from planner.cli.options import SAMPLES_PER_DEVICE, Asked, Timed
from planner.cli.racing import raced, refuse_unraceable
from planner.cli.terminal import Terminal, rendered
from planner.errors import UsageError
from planner.report import measured, tables

if TYPE_CHECKING:
    from planner.api import Comparison, Planner

EXIT_LOST: Final = 6
"""Of ``compare --fail-if-lost``: a fixed strategy is faster."""


def plan(
    context: typer.Context,
    asked: Asked,
    terminal: Terminal,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the plan here instead of stdout.")
    ] = None,
) -> None:
    """Find the fastest training step and write it as a plan.

    Without -o the plan is printed on stdout, and nothing else is.
    """
    if output is not None:
        refuse_unwritable(output)
    found = prepared(asked, terminal, context.obj or "").plan()
    if found.schedule.num_microbatches > 1 and found.sync_batch_norm:
        terminal.err.print(
            "note: batch norms, if there are any, take their statistics over each micro-batch (as GPipe)"
        )
    if output is None:
        typer.echo(found.to_json(), nl=False)
        return
    found.save(output)
    rows = tables.rows_of_plan(found)
    terminal.err.print(rendered(tables.strategies(rows)))
    for sentence in tables.standing_sentences(rows, found.search.lower_bound_s):
        terminal.err.print(sentence)
    terminal.err.print(f"wrote {output}")


def compare(
    asked: Asked,
    timed: Timed,
    terminal: Terminal,
    fail_if_lost: Annotated[
        bool, typer.Option("--fail-if-lost", help="Exit with 6 where a fixed strategy is faster.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
    measure: Annotated[
        bool, typer.Option("--measure", help="Run every strategy too, in local processes, a step of each in turn.")
    ] = False,
) -> None:
    """Hold the planned strategy against every fixed one: by prediction and, with --measure, by the clock."""
    from planner.api import compare_with

    if asked.num_stages() != 1:
        raise UsageError(
            "compare holds plans of one stage against each other. The table of `layerwise plan --stages` has the best "
            "of them beside the pipeline."
        )
    if measure:
        refuse_unraceable(asked)
    found = compare_with(prepared(asked, terminal))
    runs = raced(found, timed, terminal) if measure else ()
    rows = tables.rows_of_search(found.rows, found.fits, found.planner.traced.layers.batch, found.notes)
    if as_json:
        typer.echo(json.dumps(_document(found, rows) | _measurements(runs, timed), indent=2))
    else:
        terminal.out.print(rendered(tables.strategies(rows)))
        planned = found.planned
        terminal.out.print(tables.bound_sentence(planned.timeline.step_s, planned.lower_bound_s))
        for sentence in tables.standing_sentences(rows, planned.lower_bound_s):
            terminal.out.print(sentence)
        if measure:
            terminal.out.print()
            terminal.out.print(rendered(measured.race(runs)))
            for sentence in measured.race_sentences(runs):
                terminal.out.print(sentence)
    if fail_if_lost and found.planned_lost:
        raise typer.Exit(EXIT_LOST)


def prepared(asked: Asked, terminal: Terminal, command: str = "") -> "Planner":
    """Return the traced model on its machine; what is wrong with a request shows here.

    Args:
        asked: the request.
        terminal: for notes.
        command: what was typed, for the plan's provenance.

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
        halo_overlap=asked.halo_overlap, stages=asked.num_stages(), schedule=asked.schedule,
        microbatches=asked.microbatches,
    )  # fmt: skip
    machine = machine_of(asked.cluster, asked.devices, asked.precision, asked.profile)
    model = load_model(asked.model, arguments)
    shapes, named = asked.inputs_of(model.input_shapes)
    num_ranks = len(machine.graph.devices)
    batch = asked.batch or SAMPLES_PER_DEVICE * num_ranks
    if batch % num_ranks:
        terminal.err.print(f"note: {_uneven(batch, num_ranks)}")
    inputs = example_inputs(shapes, batch)
    keywords = dict(zip(named, example_inputs(tuple(named.values()), batch), strict=True))
    origin = Origin(model.name, model.source, arguments, command)
    return prepare(model.module, inputs, machine, options, origin, keywords)


def _uneven(batch: int, num_ranks: int) -> str:
    if batch < num_ranks:
        return f"batch {batch} has fewer samples than the machine has devices, {num_ranks}"
    return (
        f"batch {batch} does not divide by {num_ranks} devices: where samples are split over all "
        "of them, some get one more than others"
    )


def refuse_unwritable(path: Path) -> None:
    """Refuse a place that cannot be written, before a long search."""
    if path.is_dir():
        raise UsageError(f"cannot write {str(path)!r}: it is a folder")
    if not path.parent.is_dir():
        raise UsageError(f"cannot write {str(path)!r}: there is no folder {str(path.parent)!r}")
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"cannot write {str(path)!r}: the folder {str(path.parent)!r} is not writable")


def _document(found: "Comparison", rows: tuple[tables.StrategyRow, ...]) -> dict[str, object]:
    layers, machine = found.planner.traced.layers, found.planner.machine.graph
    return {
        "model": layers.name,
        "batch": layers.batch,
        "cluster": machine.name,
        "lower_bound_s": found.planned.lower_bound_s,
        "planned_lost": found.planned_lost,
        "strategies": [dataclasses.asdict(row) for row in rows],
    }


def _measurements(runs: Sequence[measured.Raced], timed: Timed) -> dict[str, object]:
    """Return what ``--measure`` adds to the document; nothing where nothing ran."""
    if not runs:
        return {}
    rows = [dataclasses.asdict(row) | {"error": row.error} for row in runs]
    swapped = [[swap.fast.name, swap.slow.name] for swap in measured.swaps(runs)]
    return {
        "measured": {
            "steps": timed.steps,
            "warmup": timed.warmup,
            "strategies": rows,
            "rank_correlation": measured.rank_correlation(runs),
            "predicted_faster_measured_slower": swapped,
        }
    }
