"""Rows of measurements, dataclasses of texts and numbers, as CSV files that are written in one step."""

import csv
import dataclasses
import io
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from planner.ir.canonical import write_atomically

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

R = TypeVar("R", bound="DataclassInstance")


def read_rows(path: Path, kind: type[R]) -> list[R]:
    """Return the rows of a file; none where there is no file.

    Args:
        path: of the file.
        kind: a dataclass; its fields are made from texts by their types.
    """
    if not path.exists():
        return []
    kinds: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(kind)}
    with path.open(newline="") as file:
        return [kind(**{name: kinds[name](text) for name, text in line.items()}) for line in csv.DictReader(file)]


def write_rows(path: Path, rows: Iterable[R], kind: type[R]) -> None:
    """Write rows with five significant digits; an existing file is replaced."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([field.name for field in dataclasses.fields(kind)])
    for row in rows:
        writer.writerow([f"{v:.5g}" if isinstance(v, float) else v for v in dataclasses.astuple(row)])
    write_atomically(path, text.getvalue())
