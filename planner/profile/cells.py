"""Tables of measurements as text: CSV and JSON become rows of named cells, cells become values."""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from planner.errors import FormatError
from planner.ir.canonical import read_text

WHAT: Final = "measurements"
PHASES: Final = ("forward", "backward_data", "backward_weight")
UNITS: Final[Mapping[str, float]] = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
SIZES: Final = ("batch", "in_channels", "out_channels", "height", "width", "groups", "repeats")
PAIRS: Final = ("kernel", "stride", "padding", "dilation")
WORDS: Final = ("op", "bias", "precision", "memory_format", "device")
COLUMNS: Final = (*WORDS, *SIZES, *PAIRS)
MAX_DIGITS: Final = 12
MAX_TIME: Final = 1e15
_YES: Final[Mapping[str, bool]] = {"yes": True, "true": True, "1": True, "no": False, "false": False, "0": False}


class BadCellError(Exception):
    """A cell that cannot be understood: its column, and why."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row; the methods turn cells into values.

    Attributes:
        place: of the row in the file, for messages.
        cells: text by column, none of it empty.
    """

    place: str
    cells: Mapping[str, str]

    def word(self, column: str, known: Sequence[str], default: str | None = None) -> str:
        """Return one of the known words."""
        text = self.cells.get(column, default)
        if text is None:
            raise BadCellError(column, "is missing")
        if text not in known:
            raise BadCellError(column, f"{text!r} is none of {', '.join(known)}")
        return text

    def size(self, column: str, default: int | None = None) -> int:
        """Return a whole number from 1."""
        return self._whole(column, self.cells.get(column), default, least=1)

    def pair(self, column: str, default: tuple[int, int] | None = None, least: int = 1) -> tuple[int, int]:
        """Return ``3`` or ``3x5`` as two whole numbers."""
        text = self.cells.get(column)
        if text is None:
            if default is None:
                raise BadCellError(column, "is missing")
            return default
        parts = text.lower().split("x")
        if len(parts) > 2:
            raise BadCellError(column, f"{text!r} is not of the form 3 or 3x5")
        numbers = [self._whole(column, part.strip(), None, least) for part in parts]
        return numbers[0], numbers[-1]

    def flag(self, column: str) -> bool:
        """Return ``yes`` or ``no``; no where it is left out."""
        return _YES[self.word(column, tuple(_YES), "no")]

    def seconds(self, phase: str) -> float | None:
        """Return a time, whatever its unit; None where it is left out."""
        for unit, factor in UNITS.items():
            column = f"{phase}_{unit}"
            text = self.cells.get(column)
            if text is None:
                continue
            try:
                value = float(text)
            except ValueError:
                raise BadCellError(column, f"{text!r} is no number") from None
            if not 0 <= value < MAX_TIME:
                raise BadCellError(column, f"{text} is no time")
            return value * factor
        return None

    @staticmethod
    def _whole(column: str, text: str | None, default: int | None, least: int) -> int:
        if text is None:
            if default is None:
                raise BadCellError(column, "is missing")
            return default
        if not text.isdecimal() or len(text) > MAX_DIGITS or int(text) < least:
            raise BadCellError(column, f"{text!r} is no whole number from {least} with at most {MAX_DIGITS} digits")
        return int(text)


def read_rows(path: Path) -> tuple[list[Row], str]:
    """Return the rows of a file and what it says of itself; ``.json`` is JSON, anything else CSV.

    Raises:
        UsageError: it cannot be read.
        FormatError: it is no table, a column is not known, or a row has other cells than the header.
    """
    what, text = f"{WHAT} {path}", read_text(path, WHAT)
    rows, notes = _json_rows(what, text) if path.suffix == ".json" else _csv_rows(what, text)
    if not rows:
        raise FormatError(what, [("line 1", "there is no row of measurements")])
    return rows, notes


def _csv_rows(what: str, text: str) -> tuple[list[Row], str]:
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    notes = " ".join(line.lstrip("# ").strip() for _, line in lines if line.startswith("#"))
    table = [(number, line) for number, line in lines if not line.startswith("#")]
    if not table:
        raise FormatError(what, [("line 1", "there is no line of column names")])
    parsed = [(number, next(csv.reader([line], skipinitialspace=True))) for number, line in table]
    first, header = parsed[0]
    names = [name.strip() for name in header]
    _refuse_columns(what, f"line {first}", names)
    problems = []
    rows = []
    for number, cells in parsed[1:]:
        if len(cells) != len(names):
            problems.append((f"line {number}", f"has {len(cells)} cells, the header has {len(names)}"))
            continue
        stripped = {name: cell.strip() for name, cell in zip(names, cells, strict=True)}
        rows.append(Row(f"line {number}", {name: cell for name, cell in stripped.items() if cell}))
    if problems:
        raise FormatError(what, problems)
    return rows, notes


def _json_rows(what: str, text: str) -> tuple[list[Row], str]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(what, [("$", f"is not JSON: {error}")]) from error
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        raise FormatError(what, [("$", "is not an array of objects")])
    names = list(dict.fromkeys(name for row in value for name in row))
    _refuse_columns(what, "$", names)
    problems = []
    rows = []
    for index, row in enumerate(value, 1):
        bad = [name for name, cell in row.items() if isinstance(cell, list | dict)]
        problems += [(f"row {index}, column {name}", "is neither text nor a number") for name in bad]
        cells = {name: _cell(cell) for name, cell in row.items() if cell is not None and name not in bad}
        rows.append(Row(f"row {index}", {name: cell for name, cell in cells.items() if cell}))
    if problems:
        raise FormatError(what, problems)
    return rows, ""


def _cell(value: object) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value).strip()


def _refuse_columns(what: str, place: str, names: Sequence[str]) -> None:
    times = {f"{phase}_{unit}" for phase in (*PHASES, "iqr") for unit in UNITS}
    problems = []
    for name in dict.fromkeys(names):
        if name not in times and name not in COLUMNS:
            problems.append((f"{place}, column {name or '(no name)'}", "is not known; see `profile import --help`"))
        if names.count(name) > 1:
            problems.append((f"{place}, column {name}", "appears twice"))
    for phase in (*PHASES, "iqr"):
        given = [f"{phase}_{unit}" for unit in UNITS if f"{phase}_{unit}" in names]
        if len(given) > 1:
            problems.append((f"{place}, column {given[1]}", f"repeats {given[0]} in another unit"))
    if "op" not in names:
        problems.append((place, "there is no column op"))
    if not times & set(names):
        problems.append((place, "there is no column of times, such as forward_ms"))
    if problems:
        raise FormatError(what, problems)
