"""``compare``: strategies beside each other, on one machine or on each of several that could be rented."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from planner.cli.cases import WhatIf
from planner.cli.options import Asked, Timed, counts
from planner.cli.planning import note_uneven, prepared, refuse_unwritable
from planner.cli.racing import raced, refuse_unraceable
from planner.cli.terminal import Rendered, Terminal, rendered
from planner.errors import UsageError
from planner.ir.canonical import write_atomically
from planner.report import comparison, measured, tables
from planner.report import figures as figures_of

if TYPE_CHECKING:
    from planner.api.what_if import Case, Outcome

EXIT_LOST: Final = 6
"""Of ``compare --fail-if-lost``: another strategy is faster."""
SUFFIXES: Final = (".csv", ".json")
"""Of files of figures."""


@dataclass(frozen=True, slots=True)
class Figures:
    """Where all figures go, with all digits."""

    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of tables.")] = False
    as_csv: Annotated[bool, typer.Option("--csv", help="CSV instead of tables: a line for every strategy.")] = False
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Write all figures there too: FILE.csv or FILE.json."),
    ] = None

    def refuse_unfit(self) -> None:
        """Refuse options that contradict each other, and a file that cannot be written.

        Raises:
            UsageError: there are such.
        """
        if self.as_json and self.as_csv:
            raise UsageError("give one of --json and --csv; -o FILE writes the other one")
        if self.output is not None:
            if self.output.suffix not in SUFFIXES:
                raise UsageError(f"--output {str(self.output)!r}: give a name that ends in {' or '.join(SUFFIXES)}")
            refuse_unwritable(self.output)

    @property
    def on_stdout(self) -> str | None:
        """The suffix of what stdout gets; None for tables."""
        return ".json" if self.as_json else ".csv" if self.as_csv else None


def compare(
    asked: Asked,
    what_if: WhatIf,
    figures: Figures,
    timed: Timed,
    terminal: Terminal,
    fail_if_lost: Annotated[
        bool, typer.Option("--fail-if-lost", help="Exit with 6 where another strategy is faster than the planned one.")
    ] = False,
    measure: Annotated[
        bool, typer.Option("--measure", help="Run every strategy too, in local processes, a step of each in turn.")
    ] = False,
) -> None:
    """Hold the planned strategy against every fixed one: by prediction and, with --measure, by the clock.

    With several batches, --clusters, --scale or --links: in every such case, side by side.
    """
    figures.refuse_unfit()
    what_if.refuse_unfit(asked)
    if asked.num_stages() != 1:
        raise UsageError(
            "compare holds plans of one stage against each other. The table of `layerwise plan --stages` has the best "
            "of them beside the pipeline."
        )
    if measure:
        _refuse_unraceable(asked, what_if)
    with terminal.working(f"comparing {asked.model}", silent=figures.on_stdout is not None) as say:
        model, rows, exit_code = _compared(asked, what_if, timed if measure else None, terminal, say)
    texts = {
        ".json": json.dumps(figures_of.document(model.name, model.changes, rows), indent=2) + "\n",
        ".csv": figures_of.as_csv(rows),
    }
    if figures.on_stdout is not None:
        typer.echo(texts[figures.on_stdout], nl=False)
    else:
        for part in _of_one(rows[0]) if len(rows) == 1 else _of_several(rows):
            terminal.out.print(part)
        for sentence in tables.change_sentences(model.changes):
            terminal.out.print(sentence)
    if figures.output is not None:
        write_atomically(figures.output, texts[figures.output.suffix])
        terminal.err.print(f"wrote {figures.output}")
    if exit_code:
        raise typer.Exit(exit_code)
    if fail_if_lost and any(row.has_lost for row in rows):
        raise typer.Exit(EXIT_LOST)


@dataclass(frozen=True, slots=True)
class _Model:
    name: str
    changes: Sequence[str]


def _compared(
    asked: Asked, what_if: WhatIf, timed: Timed | None, terminal: Terminal, say: Callable[[str], None]
) -> tuple[_Model, list[comparison.CaseRow], int]:
    """Return the model, every case with its strategies, and the exit code: why there is no plan, if none has one.

    The strategies are run too where it is said for how long.
    """
    from planner.api import what_if as outcomes_of

    solvers = what_if.other_solvers()
    machines = what_if.machines(asked)
    cases = what_if.cases(asked, machines)
    prices = what_if.prices_per_h(asked, machines)
    planner = prepared(asked, terminal, on=(cases[0].machine, cases[0].batch))
    note_uneven([(case.batch, case.num_devices) for case in cases], terminal)
    rows: list[comparison.CaseRow] = []
    failures: list[int] = []

    def begin(case: "Case") -> None:
        if len(cases) > 1:
            say(f"{len(rows) + 1} of {len(cases)}: {case.machine.graph.name}, batch {case.batch}")

    for outcome in outcomes_of(planner, cases, solvers, begin):
        if outcome.error is not None and len(cases) == 1:
            raise outcome.error
        failures += [] if outcome.error is None else [outcome.error.exit_code]
        row = _row(outcome, prices.get(outcome.case.cluster), what_if.samples_per_epoch)
        if timed is not None and outcome.comparison is not None:
            say("running strategies")
            ran = raced(outcome.comparison, timed, terminal, outcome.case.num_whole)
            row = replace(row, race=comparison.Race(ran, timed.steps, timed.warmup))
        rows.append(row)
        for name, why in row.missing:
            terminal.err.print(f"note: {name} found nothing: {why}")
    exit_code = failures[0] if len(failures) == len(cases) else 0
    return _Model(planner.traced.layers.name, planner.traced.changes), rows, exit_code


def _row(outcome: "Outcome", price_per_h: float | None, samples_per_epoch: int | None) -> comparison.CaseRow:
    """Return a case with its strategies."""
    case, found = outcome.case, outcome.comparison
    row = comparison.CaseRow(
        case.cluster, case.num_devices, case.batch, case.link_bytes_per_s, (),
        price_per_h=None if price_per_h is None else price_per_h * case.share,
        samples_per_epoch=samples_per_epoch, fixed_batch=case.fixed_batch,
    )  # fmt: skip
    if found is None:
        return replace(row, why_not=str(outcome.error))
    return replace(
        row,
        strategies=tables.rows_of_search(found.rows, found.fits, case.batch, found.notes),
        lower_bound_s=found.planned.lower_bound_s,
        num_used=found.searches[-1].table.space.mesh.size,
        missing=found.missing,
    )


def _refuse_unraceable(asked: Asked, what_if: WhatIf) -> None:
    """Refuse machines that local processes cannot stand for, before anything is measured or traced.

    Raises:
        UsageError: one has too many devices, is none, or is to have links that this host has not.
    """
    if what_if.links is not None:
        raise UsageError("--measure runs on this host, whose links --links cannot change: leave one of them out")
    if what_if.scale is not None:
        refuse_unraceable(None, max(counts("--scale", what_if.scale)))
        return
    for name in what_if.names() or (asked.cluster,):
        refuse_unraceable(name, asked.devices)


def _of_one(row: comparison.CaseRow) -> Iterator[Rendered | str]:
    """Yield what is printed of the only case."""
    yield rendered(tables.strategies(row.strategies))
    yield tables.bound_sentence(row.strategies[-1].step_s, row.lower_bound_s)
    yield from tables.standing_sentences(row.strategies, row.lower_bound_s)
    yield from comparison.use_sentences(row)
    yield from comparison.epoch_sentences(row)
    yield from _race(row)


def _of_several(rows: Sequence[comparison.CaseRow]) -> Iterator[Rendered | str]:
    """Yield what is printed of several cases."""
    yield rendered(comparison.cases(rows))
    if any(row.strategies for row in rows):
        yield ""
        yield rendered(comparison.by_strategy(rows))
    yield from comparison.sentences(rows)
    for row in rows:
        if row.race is not None:
            yield ""
            yield f"{comparison.named(row, rows)}:"
            yield from _race(row)


def _race(row: comparison.CaseRow) -> Iterator[Rendered | str]:
    if row.race is not None:
        yield ""
        yield rendered(measured.race(row.race.rows))
        yield from measured.race_sentences(row.race.rows)
