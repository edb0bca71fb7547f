"""``profiles/devices/NAME.json``: measured times of single layers on one kind of device, and the fit to them."""

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Annotated, Final, Literal, get_args

from pydantic import FailFast, Field, JsonValue, TypeAdapter, ValidationError, model_validator

from planner.ir.canonical import Count, Seconds, StrictModel, decode_file, write_atomically
from planner.ir.ops import Op
from planner.ir.tensor import DType
from planner.profile.calibrated import CalibratedRoofline
from planner.profile.demand import demands
from planner.profile.key import PieceKey
from planner.profile.table import Measurement

MAX_SIZE: Final = 2**40
"""Of one dimension, and of every number of an operator: products of a few of them are no more than a float holds."""
_MAX_DEPTH: Final = 6
_Shape = Annotated[list[Annotated[int, Field(ge=1, le=MAX_SIZE)]], Field(max_length=8)]
_Name = Annotated[str, Field(min_length=1, max_length=1000)]

WHAT: Final = "device profile"
"""What messages call such a file."""
_OPS: Final[Mapping[str, type[Op]]] = {op.kind: op for op in get_args(Op)}


class NamedOp(StrictModel):
    """An operator: its kind and the fields of its class in ``planner.ir.ops``.

    Attributes:
        op, attributes: the operator as one device sees it.
        weight_gradient: whether backward computes the gradient of its parameters.
    """

    op: _Name
    attributes: dict[str, JsonValue]
    weight_gradient: bool = False

    @model_validator(mode="after")
    def _is_an_operator(self) -> "NamedOp":
        if self.op not in _OPS:
            raise ValueError(f"{self.op!r} is no kind of operator; known: {', '.join(sorted(_OPS))}")
        names = {field.name for field in dataclasses.fields(_OPS[self.op])}
        if unknown := sorted(set(self.attributes) - names):
            raise ValueError(f"{self.op} has no attribute {unknown[0]!r}, only {', '.join(sorted(names))}")
        _refuse_unbounded(self.attributes)
        try:
            _adapter(self.op).validate_json(json.dumps(self.attributes), strict=True)
        except ValidationError as error:
            problems = (f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_url=False))
            raise ValueError(f"attributes of {self.op}: {'; '.join(problems)}") from None
        return self


def _refuse_unbounded(value: JsonValue, depth: int = 0) -> None:
    """Refuse what no operator has, before it is computed with."""
    if isinstance(value, int | float) and abs(value) > MAX_SIZE:
        raise ValueError(f"attributes have a number beyond {MAX_SIZE}")
    if depth > _MAX_DEPTH:
        raise ValueError("attributes are lists in lists in lists")
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _refuse_unbounded(item, depth + 1)


@cache
def _adapter(kind: str) -> "TypeAdapter[Op]":
    return TypeAdapter(_OPS[kind])


class LayerKey(NamedOp):
    """What decides the time of a piece of a layer: the fields of ``PieceKey`` as plain values.

    Attributes:
        absorbed: operators that work on its output in place.
        inputs, output: local shapes.
        dtype: element type of activations.
        precision, memory_format: how products are computed, and where channels are in memory.
        input_gradient: whether backward computes the gradient of the inputs.
        bias, synchronised, resolved: left out where they say nothing of the operator.
    """

    absorbed: Annotated[list[NamedOp], Field(max_length=1000)]
    inputs: Annotated[list[_Shape], Field(max_length=1000)]
    output: _Shape
    dtype: DType
    precision: Literal["fp32", "tf32", "bf16"]
    memory_format: Literal["contiguous", "channels_last"]
    input_gradient: bool
    weight_gradient: bool
    bias: bool | None = None
    synchronised: bool | None = None
    resolved: _Shape | None = None

    @model_validator(mode="after")
    def _is_a_piece(self) -> "LayerKey":
        try:
            demands(self.piece)
        except (ArithmeticError, LookupError, TypeError) as error:
            shapes = f"inputs {self.inputs} and output {self.output}"
            raise ValueError(f"{shapes} are none of {self.op}: {type(error).__name__} {error}") from None
        return self

    @cached_property
    def piece(self) -> PieceKey:
        """The key as a value; attributes that the file leaves out have their defaults."""
        return PieceKey.of_text(json.dumps(self.model_dump(mode="json", exclude_unset=True)))


class Entry(StrictModel):
    """A layer and its median times; a phase that was not measured is null.

    Attributes:
        layer: what was timed.
        forward_s, backward_data_s, backward_weight_s: medians; 0 where there is nothing to compute.
        iqr_s: inter-quartile ranges together.
        num_repeats: timed repeats.
    """

    layer: LayerKey
    forward_s: Seconds | None
    backward_data_s: Seconds | None
    backward_weight_s: Seconds | None
    iqr_s: Seconds
    num_repeats: Count

    @property
    def measurement(self) -> Measurement | None:
        """The times as the cost model takes them; None where a phase is missing."""
        if self.forward_s is None or self.backward_data_s is None or self.backward_weight_s is None:
            return None
        return Measurement(
            self.forward_s, self.backward_data_s, self.backward_weight_s, self.iqr_s, self.num_repeats
        )  # fmt: skip


class ProfileFile(StrictModel):
    """A whole file.

    Attributes:
        schema_version: of this form.
        device: a kind of ``kinds.json``, or any name.
        environment: versions and settings behind the measurements.
        layers: every layer once.
        fit: of ``layerwise profile fit``.
    """

    schema_version: Literal[1]
    device: _Name
    environment: dict[str, str]
    layers: Annotated[list[Entry], FailFast(), Field(max_length=200_000)]
    fit: CalibratedRoofline | None = None

    @model_validator(mode="after")
    def _every_layer_once(self) -> "ProfileFile":
        counts = Counter(entry.layer.piece.text for entry in self.layers)
        if repeated := [key for key, count in counts.items() if count > 1]:
            raise ValueError(f"layers that appear more than once: {len(repeated)}; the first is {repeated[0]}")
        return self

    def measurements(self) -> dict[str, Measurement]:
        """Return the layers whose phases are all measured, by ``LocalLayer.key``."""
        return {e.layer.piece.text: m for e in self.layers if (m := e.measurement) is not None}


def read_profile(path: Path) -> ProfileFile:
    """Read a file.

    Raises:
        UsageError: it cannot be read.
        FormatError: every problem with its JSON path.
    """
    return decode_file(ProfileFile, path, WHAT)


def write_profile(path: Path, profile: ProfileFile) -> None:
    """Write a file whole or not at all.

    Raises:
        UsageError: the folder is missing or not writable.
    """
    write_atomically(path, text_of(profile))


def text_of(profile: ProfileFile) -> str:
    """Return the text of a file: layers in the order of their keys, one a line."""
    data = profile.model_dump(mode="json", exclude_unset=True)
    keys = (entry.layer.piece.text for entry in profile.layers)
    rows = sorted(zip(keys, data["layers"], strict=True), key=lambda pair: pair[0])
    head = "".join(f'"{key}": {_line(data[key])},\n' for key in ("schema_version", "device", "environment"))
    layers = ",\n".join(_line(row) for _, row in rows)
    return f'{{\n{head}"layers": [\n{layers}\n],\n"fit": {_line(data.get("fit"))}\n}}\n'


def _line(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def processor_of(environment: Mapping[str, str]) -> str | None:
    """Return what computed, by an environment of a profile or of a measured run; None where it does not tell."""
    device = environment.get("device")
    return environment.get("processor", environment.get("cpu") if device == "cpu" else device)


def profile_of(device: str, environment: Mapping[str, str], layers: Mapping[str, Measurement]) -> ProfileFile:
    """Return the file of measurements by ``LocalLayer.key``.

    Raises:
        ValueError: a key does not follow ``LayerKey``.
    """
    return with_measurements(device, environment, (), layers)


def with_measurements(
    device: str, environment: Mapping[str, str], before: Iterable[Entry], layers: Mapping[str, Measurement]
) -> ProfileFile:
    """Return the file of these entries, with measurements in place of those of the same layers.

    It has no fit: that of the entries before would not be of all that the file has.

    Args:
        device: of the file.
        environment: of the file.
        before: entries.
        layers: by ``LocalLayer.key``.

    Raises:
        ValueError: a key does not follow ``LayerKey``.
    """
    new = list(_entries(layers))
    known = {entry.layer.piece.text for entry in new}
    kept = [entry for entry in before if entry.layer.piece.text not in known]
    return from_entries(device, environment, [*kept, *new])


def from_entries(device: str, environment: Mapping[str, str], layers: Sequence[Entry]) -> ProfileFile:
    """Return the file of these entries."""
    return ProfileFile(
        schema_version=1, device=device, environment=dict(environment), layers=list(layers), fit=None
    )  # fmt: skip


def _entries(layers: Mapping[str, Measurement]) -> Iterator[Entry]:
    for key, found in layers.items():
        yield Entry(
            layer=LayerKey.model_validate_json(key),
            forward_s=found.forward_s, backward_data_s=found.backward_data_s,
            backward_weight_s=found.backward_weight_s, iqr_s=found.iqr_s, num_repeats=found.num_repeats,
        )  # fmt: skip
