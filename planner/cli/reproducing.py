"""``reproduce``: published figures beside ours."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from planner.cli.planning import refuse_unwritable
from planner.cli.terminal import Terminal, rendered
from planner.errors import UnknownNameError, UsageError
from planner.ir.canonical import write_atomically


def reproduce(
    paper: Annotated[
        str,
        typer.Argument(
            metavar="PAPER",
            help="One of dn2pciot, flexflow, hypar, optcnn, owt, oyama, pase, pipedream, soybean.",
            show_default=False,
        ),
    ],
    terminal: Terminal,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE.csv", help="Write all figures there too.")
    ] = None,
) -> None:
    """Compute the published figures of a paper again and print both, with their difference."""
    from planner.reproduce import PAPERS
    from planner.reproduce import reproduce as compute
    from planner.reproduce.rows import as_csv, tables

    if paper not in PAPERS:
        raise UnknownNameError("paper", paper, PAPERS)
    if output is not None:
        if output.suffix != ".csv":
            raise UsageError(f"--output {str(output)!r}: the figures are written as CSV; give a name that ends in .csv")
        refuse_unwritable(output)
    with terminal.working(f"reproducing {paper}"):
        found = compute(paper)
    terminal.out.print(found.paper)
    for table, notes in tables(found):
        terminal.out.print()
        terminal.out.print(table.title, style="bold")  # a title of the table would be broken to its width
        terminal.out.print(rendered(replace(table, title="")))
        for note in notes:
            terminal.out.print(note)
    if found.remarks:
        terminal.out.print()
    for remark in found.remarks:
        terminal.out.print(f"- {remark}")
    if output is not None:
        write_atomically(output, as_csv(found))
        terminal.err.print(f"wrote {output}")
