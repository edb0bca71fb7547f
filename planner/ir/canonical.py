"""JSON here: canonical bytes, digests, strict decoding, atomic files."""

import contextlib
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from planner.errors import FormatError, UsageError
from planner.units import MIB

MAX_FILE_BYTES: Final = 64 * MIB  # a guard against the wrong file; a plan of 10,000 layers has 10 MiB
_EXACT_INTEGERS: Final = 2**53  # above, a float no longer tells neighbouring integers apart
_SHOWN_CHARACTERS: Final = 60

ModelT = TypeVar("ModelT", bound=BaseModel)


class StrictModel(BaseModel):
    """Base of everything read from a file: no coercion, no unknown keys, no NaN, no changes."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


def canonical_bytes(value: object) -> bytes:
    """Return the one JSON form of a value: sorted keys, no spaces, UTF-8; 1.0 is written as 1.

    Raises:
        ValueError: the value contains NaN or an infinity.
    """
    plain = _with_whole_numbers_as_int(value)
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


def sha256_of(value: object) -> str:
    """Return the SHA-256 of the canonical bytes, 64 hexadecimal digits."""
    return hashlib.sha256(canonical_bytes(value)).hexdigest()


def decode(model_type: type[ModelT], text: str | bytes, what: str) -> ModelT:
    """Return the model that a JSON text describes.

    Args:
        model_type: the pydantic model, usually a ``StrictModel``.
        text: at most 64 MiB.
        what: the kind of file and its place, for the message.

    Raises:
        FormatError: every problem with its JSON path, such as ``$.stages[0].layers[3].split.gpu``.
    """
    raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    if len(raw) > MAX_FILE_BYTES:
        raise FormatError(what, [("$", f"is larger than {MAX_FILE_BYTES // MIB} MiB")])
    try:
        value = json.loads(raw.decode(), object_pairs_hook=_Object, parse_constant=_refuse_constant)
        repeated = [(path, "this key appears twice") for path in _repeated_keys(value, ())]
    except (ValueError, RecursionError) as error:
        raise FormatError(what, [("$", f"is not JSON: {error}")]) from error
    if repeated:
        raise FormatError(what, repeated)
    try:
        return model_type.model_validate_json(raw)
    except ValidationError as error:
        raise FormatError(what, _problems(error)) from error


def decode_file(model_type: type[ModelT], path: Path, what: str) -> ModelT:
    """Return the model that a JSON file describes.

    Raises:
        UsageError: there is no such file, or it cannot be read.
        FormatError: as in ``decode``.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise UsageError(f"cannot read {what} {str(path)!r}: {error.strerror}") from error
    return decode(model_type, raw, f"{what} {path}")


def write_atomically(path: Path, text: str) -> None:
    """Write a text file whole or not at all: under a temporary name beside it, then renamed.

    Raises:
        UsageError: the folder is missing or not writable, or the path is no regular file.
    """
    target = path.resolve()
    if target.exists() and not target.is_file():
        raise UsageError(f"cannot write {str(path)!r}: it is not a regular file")
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("x", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        advice = "" if target.parent.is_dir() else f"; there is no folder {str(path.parent)!r}"
        raise UsageError(f"cannot write {str(path)!r}: {error.strerror}{advice}") from error


def json_path(location: Sequence[str | int]) -> str:
    """Return keys and indices as a JSON path, such as ``$.stages[0]["a b"]``."""
    return "$" + "".join(
        f".{key}" if isinstance(key, str) and key.isidentifier() else f"[{json.dumps(key, ensure_ascii=False)}]"
        for key in location
    )


class _Object(dict[str, object]):
    """A JSON object that remembers which of its keys were repeated."""

    def __init__(self, pairs: list[tuple[str, object]]) -> None:
        super().__init__(pairs)
        self.repeated = [key for key, count in Counter(k for k, _ in pairs).items() if count > 1]


def _repeated_keys(value: object, here: tuple[str | int, ...]) -> Iterator[str]:
    if isinstance(value, _Object):
        yield from (json_path((*here, key)) for key in value.repeated)
        for key, item in value.items():
            yield from _repeated_keys(item, (*here, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _repeated_keys(item, (*here, index))


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _problems(error: ValidationError) -> list[tuple[str, str]]:
    return [
        (json_path(problem["loc"]), _sentence(problem["type"], problem["msg"], problem["input"]))
        for problem in error.errors(include_url=False)
    ]


def _sentence(kind: str, message: str, found: object) -> str:
    """Return pydantic's message, with the value where the message does not say it."""
    if kind == "value_error" or not isinstance(found, str | int | float | None):
        return message.removeprefix("Value error, ")
    text = json.dumps(found, ensure_ascii=False)
    cut = text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"
    return f"{message}, found {cut}"


def _with_whole_numbers_as_int(value: object) -> object:
    match value:
        case float() if value.is_integer() and abs(value) < _EXACT_INTEGERS:
            return int(value)
        case dict():
            return {key: _with_whole_numbers_as_int(item) for key, item in value.items()}
        case list() | tuple():
            return [_with_whole_numbers_as_int(item) for item in value]
        case _:
            return value
