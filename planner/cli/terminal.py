"""What commands print on: results on stdout, everything else on stderr."""

import io
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Final, TextIO

import typer
from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table as RichTable
from rich.text import Text

from planner.cli import progress
from planner.report.tables import Table

_PIPE_WIDTH: Final = 1000  # a table in a file is as wide as its cells
_TEXT_WIDTH: Final = 12  # that a column of text keeps, at least, in a narrow terminal
_GAP: Final = 3  # between columns
_SPELLED: Final = {code: rf"\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"} | {
    code: rf"\u{code:04x}" for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))
}
"""Control characters, and those that turn the direction of what is written around them."""
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
        _ON_STDERR.setLevel(level)
        logging.getLogger().addHandler(_ON_STDERR)
        for package in progress.PACKAGES:
            logging.getLogger(package).setLevel(level)

    @cached_property
    def out(self) -> Console:
        """The result."""
        return _console(sys.stdout)

    @cached_property
    def err(self) -> Console:
        """Notes, summaries; nothing with ``--quiet``."""
        return _console(sys.stderr, quiet=self.quiet)

    def working(self, what: str, *, silent: bool = False) -> AbstractContextManager[Callable[[str], None]]:
        """Show on stderr what is being done while it is; nothing in a pipe, with ``--quiet``, or if silent (JSON)."""
        return progress.working(self.err, what, shown=self._shows_progress and not silent)

    def bar(self, what: str) -> AbstractContextManager[Callable[[float], None]]:
        """Show on stderr how much of something is done; nothing in a pipe, and nothing with ``--quiet``."""
        return progress.bar(self.err, what, shown=self._shows_progress)

    @property
    def _shows_progress(self) -> bool:
        return not self.quiet and sys.stderr.isatty()  # rich takes FORCE_COLOR, which CI sets, for a terminal


def is_debugging() -> bool:
    """Return whether ``-vv`` was given."""
    return logging.getLogger("planner").isEnabledFor(logging.DEBUG)


@dataclass(frozen=True, slots=True)
class Rendered:
    """A table for rich; a narrow terminal gets it without what it can spare, which is said, and then in parts."""

    table: Table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.table.title:
            yield Text(self.table.title, style="bold")
        kept, left_out = list(range(len(self.table.columns))), []
        for heading in self.table.spare:
            if _width(self.table, kept) <= options.max_width:
                break
            left_out.append(heading.strip())
            kept.remove(self.table.columns.index(heading))
        for number, part in enumerate(_parts(self.table, kept, options.max_width)):
            if number:
                yield ""
            yield _grid(self.table, part)
        if left_out:
            yield f"Left out, for want of room: {', '.join(left_out)}."


def rendered(table: Table) -> Rendered:
    """Return a table for rich."""
    return Rendered(table)


def _parts(table: Table, kept: Sequence[int], most: int) -> Iterator[list[int]]:
    """Yield the columns of tables below each other: each has all text, and as many of the numbers as there is room."""
    text, numbers = ([i for i in kept if (i < table.num_text) is wanted] for wanted in (True, False))
    if _width(table, kept, _TEXT_WIDTH) <= most:
        yield list(kept)
        return
    narrowest = most if _width(table, text) <= most / 2 else _TEXT_WIDTH
    part = list(text)
    for i in numbers:
        if len(part) > len(text) and _width(table, [*part, i], narrowest) > most:
            yield part
            part = list(text)
        part.append(i)
    yield part


def _width(table: Table, kept: Sequence[int], most_text: int = _PIPE_WIDTH) -> int:
    """Return how wide these columns are, with text folded to so much."""
    widths = [min(_cell_width(table, i), most_text if i < table.num_text else _PIPE_WIDTH) for i in kept]
    return sum(widths) + _GAP * (len(widths) - 1)


def _cell_width(table: Table, column: int) -> int:
    return max(cell_len(printable(cells[column])) for cells in (table.columns, *table.rows))


def _grid(table: Table, kept: Sequence[int]) -> RichTable:
    found = RichTable(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, show_header=any(table.columns))
    for i in kept:
        width = _cell_width(table, i)
        if i < table.num_text:
            found.add_column(table.columns[i], overflow="fold", min_width=min(_TEXT_WIDTH, width))
        else:
            found.add_column(table.columns[i], justify="right", no_wrap=True, min_width=width)
    for number, row in enumerate(table.rows):
        found.add_row(*(printable(row[i]) for i in kept), style="bold" if number == table.emphasis else None)
    return found


def as_text(parts: Iterable[Rendered | str]) -> str:
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
        print(printable(f"{prefix}{self.format(record)}"), file=sys.stderr)


_ON_STDERR: Final = _OnStderr()


def _console(stream: TextIO, quiet: bool = False) -> Console:
    """Return a console that takes text as it is: no markup, emoji or highlighting."""
    width = None if stream.isatty() else _PIPE_WIDTH
    return _Console(file=stream, quiet=quiet, width=width, markup=False, emoji=False, highlight=False)


class _Console(Console):
    """Prints text as ``printable`` has it."""

    def print(self, *objects: Any, **options: Any) -> None:  # noqa: ANN401  # as rich has it
        super().print(*(printable(each) if isinstance(each, str) else each for each in objects), **options)


def printable(text: str) -> str:
    """Return a text in which nothing of a file steers the terminal: control characters are spelled out."""
    return text.translate(_SPELLED).encode("utf-8", "backslashreplace").decode()
