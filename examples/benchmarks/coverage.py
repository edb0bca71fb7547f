"""How many models of torchvision and timm can be traced, counted, run from their graph, and planned.

    python -m examples.benchmarks.coverage --sample

tries a handful; without ``--sample`` every model of torchvision and some of every family of timm
(``coverage_models.py``), each in a process of its own (``coverage_trial.py``). Writes a line for each
to a CSV file and prints a summary.

    python -m examples.benchmarks.coverage --training

trains a step of 40 of them on two ranks under four strategies instead, and holds all numbers against one
device (``coverage_training.py``). Needs ``pip install 'layerwise[zoo]'`` and Linux; no weights are
downloaded, and unless ``--numbers`` is given none are made. Exits with 1 where a model failed.
"""

import csv
import fnmatch
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from examples.benchmarks.coverage_models import (
    SAMPLE,
    TRAINED,
    TRAINED_SAMPLE,
    Case,
    chosen_models,
    every_model,
    spread,
)  # fmt: skip
from examples.benchmarks.coverage_training import (
    STRATEGIES,
    TrainingRow,
    training_cases,
    training_trial,
    write_training,
)  # fmt: skip
from examples.benchmarks.coverage_trial import MIB, OK, Kind, Row, Settings, trial, trials
from planner.errors import LayerwiseError, UsageError
from planner.units import parse_bytes

OUTPUT = Path(__file__).with_suffix(".csv")
TRAINING_OUTPUT = OUTPUT.with_name("coverage_training.csv")


def main(
    *,
    only: Annotated[
        str | None,
        typer.Option(metavar="PATTERN", help="Such as 'timm:res*'; where no chosen model fits, of all of them."),
    ] = None,
    sample: Annotated[bool, typer.Option("--sample", help="One model of every kind.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="So many, spread over the list.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Models at a time.")] = 2,
    devices: Annotated[int, typer.Option(min=1, help="To plan for.")] = 8,
    solver: Annotated[str, typer.Option(help="As of `layerwise plan`; none: no plans.")] = "auto",
    all_meshes: Annotated[
        bool, typer.Option("--all-meshes", help="Search every mesh, as `layerwise plan` does; takes much longer.")
    ] = False,
    batch: Annotated[int, typer.Option(min=1, help="Samples per step.")] = 16,
    numbers: Annotated[
        bool, typer.Option("--numbers", help="Also run small inputs on the CPU and compare outputs.")
    ] = False,
    training: Annotated[
        bool, typer.Option("--training", help="Train a step of some on two ranks instead, against one device.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="With --training: keep what went well in the output file.")
    ] = False,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", help="For one model.")] = 300.0,
    memory: Annotated[str, typer.Option(metavar="BYTES", help="For one model, on top of the imports.")] = "8GiB",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The CSV file.")] = None,
    listed: Annotated[bool, typer.Option("--list", help="Print the models and do nothing.")] = False,
) -> None:
    """Try models of torchvision and timm: trace, count, run from the graph, plan."""
    notes = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    try:
        cases = _trained_cases(only, sample, limit) if training else _cases(only, sample, limit)
        settings = Settings(
            devices, "" if solver == "none" else solver, None if all_meshes else f"gpu={devices}", batch, numbers,
            timeout, parse_bytes(memory),
        )  # fmt: skip
    except LayerwiseError as error:
        notes.print(f"error: {error}")
        raise typer.Exit(error.exit_code) from error
    if listed:
        for case in cases:
            typer.echo(f"{case.reference}  {case.family}  {case.kind}")
        return
    if training:
        is_ok = _train(cases, settings, jobs, output or TRAINING_OUTPUT, resume, notes)
    else:
        is_ok = _try(cases, settings, jobs, output or OUTPUT, notes)
    if not is_ok:
        raise typer.Exit(1)


def _try(cases: Sequence[Case], settings: Settings, jobs: int, output: Path, notes: Console) -> bool:
    """Try models; return whether all went well."""
    rows: list[Row] = []
    try:
        for row in trials(cases, settings, jobs, Kind(trial, Row)):
            rows.append(row)
            notes.print(f"[{len(rows)}/{len(cases)}] {_line(row)}")
    finally:  # an interrupted sweep keeps what it has
        rows.sort(key=lambda row: (row.source, row.family, row.model))
        _write(rows, output)
    _print(_summary(rows))
    notes.print(f"wrote {output}")
    return all(row.result == OK for row in rows)


def _train(
    cases: Sequence[Case], settings: Settings, jobs: int, output: Path, resume: bool, notes: Console
) -> bool:  # fmt: skip
    """Train a step of models under every strategy; return whether all numbers are one device's."""
    left, rows = training_cases(cases, output, resume)
    for row in trials(left, settings, jobs, Kind(training_trial, TrainingRow)):
        rows.append(row)
        write_training(rows, output)  # an interrupted sweep keeps what it has
        notes.print(f"[{len(rows)}/{len(cases) * len(STRATEGIES)}] {_training_line(row)}")
    _print(_training_summary(rows))
    notes.print(f"wrote {output}")
    return all(row.result == OK for row in rows)


def _print(table: Table) -> None:
    Console(highlight=False, width=None if Console().is_terminal else 120).print(table)


def _trained_cases(only: str | None, sample: bool, limit: int | None) -> list[Case]:
    """Return the models that are trained.

    Raises:
        UsageError: a library is missing, or no model fits.
    """
    names = TRAINED_SAMPLE if sample else TRAINED
    cases = [case for case in every_model() if (only is not None and not sample) or case.reference in names]
    if only is not None:
        cases = _fitting([case for case in cases if case.reference in names], only) or _fitting(cases, only)
        if not cases:
            raise UsageError(f"no model is called {only!r}")
    return spread(cases, limit or len(cases))


def _cases(only: str | None, sample: bool, limit: int | None) -> list[Case]:
    """Return the models that the options ask for.

    Raises:
        UsageError: a library is missing, or no model fits.
    """
    cases = [case for case in every_model() if case.reference in SAMPLE] if sample else chosen_models()
    if only is not None:
        cases = _fitting(cases, only) or _fitting(every_model(), only)
        if not cases:
            raise UsageError(f"no model is called {only!r}")
    return spread(cases, limit or len(cases))


def _fitting(cases: Iterable[Case], pattern: str) -> list[Case]:
    return [case for case in cases if fnmatch.fnmatch(case.reference, pattern)]


def _line(row: Row) -> str:
    times = (("trace", row.trace_s), ("count", row.count_s), ("plan", row.plan_s))
    done = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in times if seconds is not None)
    failure = "" if row.result == OK else f"failed at {row.result}: {row.reason}"
    return f"{row.source}:{row.model}  {'; '.join(filter(None, (done, failure)))}"


def _training_line(row: TrainingRow) -> str:
    found = (
        f"{row.split} of {row.layers} layers cut, difference {row.difference:.1e}" if row.difference is not None else ""
    )
    failure = "" if row.result == OK else f"failed at {row.result}: {row.reason}"
    return f"{row.source}:{row.model} {row.strategy}  {'; '.join(filter(None, (found, failure)))}"


def _training_summary(rows: Sequence[TrainingRow]) -> Table:
    """Return a table with a line for each strategy."""
    table = Table(title="Training", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_edge=False)
    for heading in ("strategy", "models", "as one device", "layers cut", "largest difference"):
        table.add_column(heading, justify="left" if heading == "strategy" else "right")
    for strategy in STRATEGIES:
        mine = [row for row in rows if row.strategy == strategy]
        num_layers, num_split = (sum(getattr(row, name) or 0 for row in mine) for name in ("layers", "split"))
        worst = max((row.difference for row in mine if row.difference is not None), default=None)
        table.add_row(
            strategy, str(len(mine)), str(sum(row.result == OK for row in mine)),
            f"{num_split / num_layers:.0%}" if num_layers else "", "" if worst is None else f"{worst:.0e}",
        )  # fmt: skip
    return table


def _write(rows: Sequence[Row], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [each.name for each in fields(Row)], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({name: f"{v:.3f}" if isinstance(v, float) else v for name, v in asdict(row).items()})


def _summary(rows: Sequence[Row]) -> Table:
    """Return a table with a line for each library and kind, and one for all."""
    table = Table(title="Coverage", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_edge=False)
    for heading in ("library", "kind"):
        table.add_column(heading)
    for heading in ("models", "ok", "share", "trace", "count", "plan", "layers", "largest peak"):
        table.add_column(heading, justify="right")
    for source, kind in sorted({(row.source, row.kind) for row in rows}):
        table.add_row(source, kind, *_cells([row for row in rows if (row.source, row.kind) == (source, kind)]))
    for source in sorted({row.source for row in rows}):
        table.add_row(source, "all", *_cells([row for row in rows if row.source == source]), style="bold")
    table.caption = "Seconds and layers are medians of the models that got so far."
    return table


def _cells(rows: Sequence[Row]) -> tuple[str, ...]:
    num_ok = sum(row.result == OK for row in rows)
    seconds = ([getattr(row, name) for row in rows] for name in ("trace_s", "count_s", "plan_s"))
    peak_mib = max((row.peak_mib or 0.0 for row in rows), default=0.0)
    return (
        str(len(rows)), str(num_ok), f"{num_ok / len(rows):.1%}", *(_median(each, "{:.2f} s") for each in seconds),
        _median([row.layers for row in rows], "{:.0f}"), f"{peak_mib * MIB / 2**30:.2f} GiB" if peak_mib else "",
    )  # fmt: skip


def _median(values: Iterable[float | None], form: str) -> str:
    found = [value for value in values if value is not None]
    return form.format(statistics.median(found)) if found else ""


if __name__ == "__main__":
    typer.run(main)
