"""A reproduction as rows of text: what ``layerwise reproduce`` prints and writes."""

import csv
import io
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from planner.report.tables import Table
from planner.reproduce.figures import Figure, Reproduction, Value

COLUMNS: Final = ("part", "figure", "paper", "ours", "unit", "difference", "remark")
"""Of the file: values in SI units with all their digits, the difference relative to the paper's value."""

_FAR_BELOW: Final = -0.9
_FAR_ABOVE: Final = 1.0
"""Relative differences beyond which a ratio says more than percents."""
_MAX_NAMES: Final = 4

_PREFIXES: Final = {-3: "n", -2: "µ", -1: "m", 0: "", 1: "k", 2: "M", 3: "G", 4: "T", 5: "P"}


def tables(found: Reproduction) -> Iterator[tuple[Table, tuple[str, ...]]]:
    """Yield one table per part, paper | ours | difference, with the remarks on its figures."""
    for title, figures in found.parts:
        is_text = any(isinstance(value, str) for f in figures for value in (f.paper, f.ours))  # may need several lines
        columns = ("figure", "paper", "ours", "difference")
        yield Table(title, columns, tuple(map(_row, figures)), num_text=3 if is_text else 1), _notes(figures)


def as_csv(found: Reproduction) -> str:
    """Return every figure as CSV with a header."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for title, figures in found.parts:
        for f in figures:
            relative = "" if f.relative is None else f"{f.relative:.6g}"
            writer.writerow((title, f.name, _plain(f.paper), _plain(f.ours), f.unit, relative, f.remark))
    return text.getvalue()


def difference(figure: Figure) -> str:
    """Return ``equal``, by how much ours is above the paper's, or what is missing."""
    if figure.ours is None:
        return "not reproduced"
    if figure.is_equal is None:
        return ""
    if figure.is_equal:
        return "equal"
    if figure.relative is None:
        return "differs"
    if _FAR_BELOW < figure.relative < _FAR_ABOVE:
        return f"{100 * figure.relative:+.2g} %"
    ratio = figure.relative + 1
    return f"1/{1 / ratio:.3g}" if 0 < ratio < 1 else f"{ratio:.3g} times"


def _row(figure: Figure) -> tuple[str, ...]:
    known = [value for value in (figure.paper, figure.ours) if isinstance(value, float | int)]
    power = _power(known[0], figure.unit) if known else 0
    unit = f" {_PREFIXES[power]}{figure.unit}" if figure.unit else ""
    paper = _shown(figure.paper, figure.digits, power, unit)
    ours = _shown(figure.ours, figure.digits + 1, power, unit)  # one digit more, which shows what was rounded
    return figure.name, paper, ours, difference(figure)


def _notes(figures: Iterable[Figure]) -> tuple[str, ...]:
    """Return every remark once, behind the names of its figures."""
    names: dict[str, list[str]] = {}
    for figure in figures:
        if figure.remark:
            names.setdefault(figure.remark, []).append(figure.name)
    return tuple(f"{_listed(of)}: {remark}." for remark, of in names.items())


def _listed(names: Sequence[str]) -> str:
    if len(names) <= _MAX_NAMES:
        return "; ".join(names)
    return f"{names[0]}, and {len(names) - 1} more"


def _power(value: float, unit: str) -> int:
    """Return the power of 1000 whose prefix leaves one to three digits before the point; there are no kiloseconds."""
    if not unit.isalpha():
        return 0  # no unit, or one such as images/s
    wanted = math.floor(math.log10(abs(value)) / 3) if value else 0
    return min(max(wanted, min(_PREFIXES)), 0 if unit == "s" else max(_PREFIXES))


def _shown(value: Value, digits: int, power: int, unit: str) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    scaled = value / 1000.0**power
    exponent = math.floor(math.log10(abs(scaled))) if scaled else 0
    if -4 <= exponent < max(digits, 7):
        return f"{scaled:.{max(digits - 1 - exponent, 0)}f}{unit}"
    return f"{scaled:.{digits}g}{unit}"


def _plain(value: Value) -> str:
    return "" if value is None else value if isinstance(value, str) else f"{value:.12g}"
