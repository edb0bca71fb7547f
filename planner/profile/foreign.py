"""Measurements of others: rows of operator, shapes, precision, device and times, as CSV or JSON.

Columns, in any order; those with a default may be missing or empty:

==================  ======================================================================================
``op``              ``conv``, ``linear``, ``max_pool``, ``avg_pool``, ``batch_norm``, ``relu`` or ``add``
``batch``           samples
``in_channels``     of the input, or its features
``out_channels``    of ``conv`` and ``linear``
``height, width``   of the input; not of ``linear``
``kernel``          ``3`` or, height first, ``3x5``; so are ``stride`` (1; of a pool the kernel), ``padding`` (0) and
                    ``dilation`` (1)
``groups``          1
``bias``            ``yes`` or ``no`` (no), of ``conv`` and ``linear``
``precision``       ``fp32`` (the default), ``tf32`` or ``bf16``
``memory_format``   ``contiguous`` (the default) or ``channels_last``
``device``          name; needed where a file holds several devices
``repeats``         timed repeats (1)
``forward_ms``      time, and so ``backward_data_ms``, ``backward_weight_ms`` and the inter-quartile range ``iqr_ms``
                    (0); ``_s``, ``_ms`` or ``_us`` is the unit. Empty: not measured. 0: nothing to compute.
==================  ======================================================================================

JSON is an array of objects with these keys. Lines of a CSV file that begin with ``#`` say where it is from.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from planner.errors import FormatError, UsageError
from planner.ir.canonical import decode
from planner.ir.ops import BatchNorm, Conv, Elementwise, Linear, Op, Pool
from planner.ir.tensor import DType
from planner.profile.cells import PHASES, WHAT, BadCellError, Row, read_rows
from planner.profile.file import Entry, LayerKey
from planner.profile.key import MEMORY_FORMATS, PieceKey

PRECISIONS: Final = ("fp32", "tf32", "bf16")


@dataclass(frozen=True, slots=True)
class Foreign:
    """What a file of measurements holds.

    Attributes:
        device: that was measured; empty where the file does not say.
        entries: of that device.
        notes: what the file says of itself.
    """

    device: str
    entries: tuple[Entry, ...]
    notes: str


def read_foreign(path: Path, device: str | None = None) -> Foreign:
    """Read measurements; ``.json`` is JSON, anything else CSV.

    Args:
        path: the file.
        device: whose rows are meant; the only one's if None.

    Raises:
        UsageError: the file cannot be read, holds several devices, or not the one asked for.
        FormatError: every bad cell with its line (of JSON, its row) and column.
    """
    what = f"{WHAT} {path}"
    rows, notes = read_rows(path)
    named = sorted({row.cells["device"] for row in rows if "device" in row.cells})
    wanted = _device(what, named, device)
    problems: list[tuple[str, str]] = []
    places: dict[str, str] = {}
    entries = []
    for row in rows:
        entry = _entry(row, problems)
        if entry is None or (named and row.cells.get("device") != wanted):
            continue
        key = entry.layer.piece.text
        if key in places:
            problems.append((row.place, f"is the same layer as {places[key]}"))
        places.setdefault(key, row.place)
        entries.append(entry)
    if problems:
        raise FormatError(what, problems)
    return Foreign(wanted, tuple(entries), notes)


def _device(what: str, named: Sequence[str], asked: str | None) -> str:
    if asked is None:
        if len(named) > 1:
            raise UsageError(f"{what} holds {len(named)} devices: name one with --device: {', '.join(named)}")
        return named[0] if named else ""
    if named and asked not in named:
        if len(named) > 1:
            raise UsageError(f"{what} has no device {asked!r}, only {', '.join(named)}")
        return named[0]
    return asked


@dataclass(slots=True)
class _Shapes:
    """What a row says of its operator."""

    op: Op
    inputs: list[tuple[int, ...]]
    output: tuple[int, ...]
    bias: bool | None = None
    trains: bool = False
    synchronised: bool | None = None


def _entry(row: Row, problems: list[tuple[str, str]]) -> Entry | None:
    """Return the entry of a row; None, with its problem noted, where it cannot be understood."""
    try:
        shapes = _shapes(row)
        times = {phase: row.seconds(phase) for phase in PHASES}
        if all(value is None for value in times.values()):
            raise BadCellError("forward_ms", "no time is given, in no unit and for no phase")
        if times["forward"] == 0:
            raise BadCellError("forward_ms", "0 is no time")
        precision = row.word("precision", PRECISIONS, "fp32")
        key = PieceKey(
            shapes.op, (), tuple(shapes.inputs), shapes.output,
            DType.BFLOAT16 if precision == "bf16" else DType.FLOAT32, precision,
            row.word("memory_format", MEMORY_FORMATS, MEMORY_FORMATS[0]),
            input_gradient=times["backward_data"] != 0,
            weight_gradient=shapes.trains and times["backward_weight"] != 0,
            bias=shapes.bias, synchronised=shapes.synchronised,
        )  # fmt: skip
        return Entry(
            layer=decode(LayerKey, key.text, row.place),
            forward_s=times["forward"], backward_data_s=times["backward_data"],
            backward_weight_s=times["backward_weight"] if shapes.trains else 0.0,
            iqr_s=row.seconds("iqr") or 0.0, num_repeats=row.size("repeats", 1),
        )  # fmt: skip
    except BadCellError as error:
        column, sentence = error.args
        problems.append((f"{row.place}, column {column}", sentence))
    except FormatError as error:  # shapes that follow from the cells
        problems += [(f"{row.place}, {path}", sentence) for path, sentence in error.problems]
    return None


def _shapes(row: Row) -> _Shapes:
    kind = row.word("op", tuple(_READERS))
    return _READERS[kind](row)


def _conv(row: Row) -> _Shapes:
    inputs = _image(row)
    groups, out_channels = row.size("groups", 1), row.size("out_channels")
    kernel, stride = row.pair("kernel"), row.pair("stride", (1, 1))
    padding, dilation = row.pair("padding", (0, 0), least=0), row.pair("dilation", (1, 1))
    if inputs[1] % groups or out_channels % groups:
        raise BadCellError("groups", f"{groups} divides not both channels, {inputs[1]} and {out_channels}")
    space = _space(inputs, kernel, stride, padding, dilation)
    op = Conv(inputs[1], out_channels, kernel, stride, padding, dilation, groups)
    return _Shapes(op, [inputs], (inputs[0], out_channels, *space), row.flag("bias"), trains=True)


def _linear(row: Row) -> _Shapes:
    batch, features, results = row.size("batch"), row.size("in_channels"), row.size("out_channels")
    return _Shapes(Linear(features, results), [(batch, features)], (batch, results), row.flag("bias"), trains=True)


def _max_pool(row: Row) -> _Shapes:
    return _pool(row, largest=True)


def _avg_pool(row: Row) -> _Shapes:
    return _pool(row, largest=False)


def _pool(row: Row, *, largest: bool) -> _Shapes:
    inputs, kernel = _image(row), row.pair("kernel")
    stride, padding = row.pair("stride", kernel), row.pair("padding", (0, 0), least=0)
    space = _space(inputs, kernel, stride, padding, (1, 1))
    return _Shapes(Pool("max" if largest else "avg", kernel, stride, padding, (1, 1)), [inputs], (*inputs[:2], *space))


def _batch_norm(row: Row) -> _Shapes:
    inputs = _image(row)
    return _Shapes(BatchNorm(inputs[1]), [inputs], inputs, trains=True, synchronised=False)


def _relu(row: Row) -> _Shapes:
    inputs = _image(row)
    return _Shapes(Elementwise("relu"), [inputs], inputs)


def _add(row: Row) -> _Shapes:
    inputs = _image(row)
    return _Shapes(Elementwise("add"), [inputs, inputs], inputs)


_READERS: Final = {
    "conv": _conv,
    "linear": _linear,
    "max_pool": _max_pool,
    "avg_pool": _avg_pool,
    "batch_norm": _batch_norm,
    "relu": _relu,
    "add": _add,
}


def _image(row: Row) -> tuple[int, int, int, int]:
    return row.size("batch"), row.size("in_channels"), row.size("height"), row.size("width")


def _space(inputs: Sequence[int], *window: Sequence[int]) -> tuple[int, ...]:
    """Return the output's height and width; the window is kernel, stride, padding and dilation."""
    found = tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in zip(inputs[2:], *window, strict=True))
    if min(found) < 1:
        raise BadCellError("kernel", "is larger than the padded input")
    return found
