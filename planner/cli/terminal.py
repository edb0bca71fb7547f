"""What commands print on: results on stdout, everything else on stderr."""

import io
import logging
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Final, TextIO

import typer
from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from planner.report.tables import Table

_PIPE_WIDTH: Final = 1000  # a table in a file is as wide as its cells
_LEVELS: Final = (logging.WARNING, logging.INFO, logging.DEBUG)


@dataclass(frozen=True)
class Terminal:
    """The options of every command, and where its output goes; making one sets up logging."""

    verbose: Annotated[
        int,
        typer.Option(
            "--verbose", "-v", count=True, show_default=False, metavar="",
            help="Log the phases on stderr; twice: details, and tracebacks of errors.",
        ),
    ] = 0  # fmt: skip
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only the result and errors.", show_default=False)] = (
        False
    )

    def __post_init__(self) -> None:
        level = logging.ERROR if self.quiet else _LEVELS[min(self.verbose, len(_LEVELS) - 1)]
        logging.getLogger().addHandler(_ON_STDERR)
        for package in ("planner", "runtime"):
            logging.getLogger(package).setLevel(level)

    @cached_property
    def out(self) -> Console:
        """The result."""
        return _console(sys.stdout)

    @cached_property
    def err(self) -> Console:
        """Notes, summaries; nothing with ``--quiet``."""
        return _console(sys.stderr, quiet=self.quiet)


def is_debugging() -> bool:
    """Return whether ``-vv`` was given."""
    return logging.getLogger("planner").isEnabledFor(logging.DEBUG)


def rendered(table: Table) -> RichTable:
    """Return a table for rich."""
    found = RichTable(
        title=table.title or None, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD,
        show_edge=False, pad_edge=False, show_header=any(table.columns),
    )  # fmt: skip
    for i, heading in enumerate(table.columns):
        is_text = i < table.num_text
        found.add_column(heading, justify="left" if is_text else "right", no_wrap=not is_text)
    for i, row in enumerate(table.rows):
        found.add_row(*row, style="bold" if i == table.emphasis else None)
    return found


def as_text(parts: Iterable[RichTable | str]) -> str:
    """Return what a file gets to see of what would be printed."""
    stream = io.StringIO()
    console = _console(stream)
    for part in parts:
        console.print(part)
    return stream.getvalue()


class _OnStderr(logging.Handler):
    """Prints on what is stderr now; warnings say so, the rest speaks for itself."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        print(f"{prefix}{self.format(record)}", file=sys.stderr)


_ON_STDERR: Final = _OnStderr()


def _console(stream: TextIO, quiet: bool = False) -> Console:
    """Return a console that takes text as it is: no markup, emoji or highlighting."""
    width = None if stream.isatty() else _PIPE_WIDTH
    return Console(file=stream, quiet=quiet, width=width, markup=False, emoji=False, highlight=False)
