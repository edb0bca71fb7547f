"""What a terminal shows while a command works; nothing where its output goes to a file, a pipe or a script."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Final

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

PACKAGES: Final = ("planner", "runtime")


@contextlib.contextmanager
def working(console: Console, what: str, *, shown: bool) -> Iterator[Callable[[str], None]]:
    """Show what is being done, since when, and its latest step; gone when it is done.

    Yields:
        Takes the latest step. The log's lines are steps too, so that who works need not know who watches.
    """
    columns = (SpinnerColumn(), _text("{task.description}"), TimeElapsedColumn(), _text("{task.fields[latest]}"))
    with _progress(console, columns, shown=shown) as progress:
        task = progress.add_task(what, total=None, latest="")

        def say(text: str) -> None:
            progress.update(task, latest=text.splitlines()[0] if text else "")

        with _log_to(say) if shown else contextlib.nullcontext():
            yield say


@contextlib.contextmanager
def bar(console: Console, what: str, *, shown: bool) -> Iterator[Callable[[float], None]]:
    """Show how much of something is done, and how long the rest takes.

    Yields:
        Takes the share that is done, from 0 to 1.
    """
    columns = (
        _text("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(),
    )  # fmt: skip
    with _progress(console, columns, shown=shown) as progress:
        task = progress.add_task(what, total=1.0)
        yield lambda share: progress.update(task, completed=share)


def _text(pattern: str) -> TextColumn:
    return TextColumn(pattern, markup=False)


def _progress(console: Console, columns: tuple[ProgressColumn, ...], *, shown: bool) -> Progress:
    return Progress(*columns, console=console, transient=True, disable=not shown)


class _Steps(logging.Handler):
    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__(logging.INFO)
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        self._say(record.getMessage())


@contextlib.contextmanager
def _log_to(say: Callable[[str], None]) -> Iterator[None]:
    """Hand the phases that the packages log to a function, whatever the handlers of the user let through."""
    handler = _Steps(say)
    loggers = [logging.getLogger(name) for name in PACKAGES]
    before = [each.level for each in loggers]
    for each in loggers:
        each.addHandler(handler)
        each.setLevel(min(each.getEffectiveLevel(), logging.INFO))
    try:
        yield
    finally:
        for each, level in zip(loggers, before, strict=True):
            each.removeHandler(handler)
            each.setLevel(level)
