"""JSON here: canonical bytes, digests, strict decoding, atomic files."""

import contextlib
import hashlib
import json
import os
import secrets
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Final, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from planner.errors import FormatError, UsageError
from planner.units import MIB

MAX_FILE_BYTES: Final = 64 * MIB  # a guard against the wrong file; a plan of 10,000 layers has 10 MiB
MAX_VALUES: Final = 2**20
"""Of a file, likewise: a plan of 10,000 layers has 250,000. A value in three bytes takes a hundred in memory, and once
more for every missing key of an object around it, of which pydantic puts a copy into each error: up to 1.8 KB."""
MAX_KEYS: Final = 10_000
"""Of one object."""
_EXACT_INTEGERS: Final = 2**53  # above, a float no longer tells neighbouring integers apart
_SHOWN_CHARACTERS: Final = 60
_NAME_CHARACTERS: Final = 40  # of a file's name in that of its temporary one: names have at most 255 bytes

ModelT = TypeVar("ModelT", bound=BaseModel)

# Figures of files have bounds that nothing real comes near, so that products and quotients of them stay finite.
Count = Annotated[int, Field(ge=1, le=2**53)]
Size = Annotated[int, Field(ge=0, le=2**53)]
Bytes = Annotated[int, Field(ge=0, le=2**63)]
Memory = Annotated[int, Field(ge=1, le=2**63)]
Seconds = Annotated[float, Field(ge=0, le=1e15)]
PositiveSeconds = Annotated[float, Field(gt=0, le=1e15)]
Amount = Annotated[float, Field(ge=0, le=1e30)]
Rate = Annotated[float, Field(ge=1e-6, le=1e30)]
"""Per second."""


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
        text: at most 64 MiB, with at most ``MAX_VALUES`` values.
        what: the kind of file and its place, for the message.

    Raises:
        FormatError: every problem with its JSON path, such as ``$.stages[0].layers[3].split.gpu``; of long lists
            (``FailFast``) those of the first item that has any.
    """
    raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    _refuse_large(raw, what, "$", b",[{")
    try:
        repeated = [(path, "this key appears twice") for path in _repeated_keys(raw.decode())]
    except (ValueError, RecursionError) as error:
        raise FormatError(what, [("$", f"is not JSON: {error}")]) from error
    if repeated:
        raise FormatError(what, repeated)
    try:
        return model_type.model_validate_json(raw)
    except ValidationError as error:
        raise FormatError(what, _problems(error)) from error


@contextlib.contextmanager
def bounded(what: str) -> Iterator[None]:
    """Say it where the body makes a model that no file may have; also decorates functions.

    Raises:
        FormatError: as in ``decode``.
    """
    try:
        yield
    except ValidationError as error:
        raise FormatError(what, _problems(error)) from error


def decode_file(model_type: type[ModelT], path: Path, what: str) -> ModelT:
    """Return the model that a JSON file describes.

    Raises:
        UsageError: there is no such file, or it cannot be read.
        FormatError: as in ``decode``.
    """
    return decode(model_type, read_bytes(path, what), f"{what} {path}")


def read_bytes(path: Path, what: str) -> bytes:
    """Return what is in a file, cut behind the most that ``decode`` takes.

    Raises:
        UsageError: there is no such file, or it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise UsageError(f"cannot read {what} {str(path)!r}: {error.strerror}") from error


def read_text(path: Path, what: str) -> str:
    """Return the text of a file that is not JSON or is no object; bounded as ``decode``, lines count as values.

    Raises:
        UsageError: there is no such file, or it cannot be read.
        FormatError: it is too large, or no UTF-8 text.
    """
    raw = read_bytes(path, what)
    _refuse_large(raw, f"{what} {path}", "the file", b",[{\n")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        problem = f"is not UTF-8 text: {error.reason} at byte {error.start}"
        raise FormatError(f"{what} {path}", [("the file", problem)]) from error


def _refuse_large(raw: bytes, what: str, place: str, marks: bytes) -> None:
    if len(raw) > MAX_FILE_BYTES:
        raise FormatError(what, [(place, f"is larger than {MAX_FILE_BYTES // MIB} MiB")])
    if sum(map(raw.count, marks)) > MAX_VALUES:
        raise FormatError(what, [(place, f"has more than {MAX_VALUES:,} values")])


def write_atomically(path: Path, text: str) -> None:
    """Write a text file whole or not at all: under a temporary name beside it, then renamed.

    Raises:
        UsageError: the folder is missing or not writable, or the path is no regular file.
    """
    target = target_of(path)
    temporary = target.with_name(f".{target.name[:_NAME_CHARACTERS]}.{secrets.token_hex(6)}.tmp")
    try:
        with temporary.open("x", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException as error:  # Ctrl-C too
        with contextlib.suppress(OSError):
            temporary.unlink()
        if not isinstance(error, OSError):
            raise
        raise UsageError(f"cannot write {str(path)!r}: {error.strerror}") from error


def target_of(path: Path) -> Path:
    """Return the file that is written where a path is given: links are followed.

    Raises:
        UsageError: the folder is missing or not writable, or the path is no regular file and cannot become one.
    """
    try:
        target = path.resolve()
        mode = target.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        mode = stat.S_IFREG  # of a new one
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle, before Python 3.13
        raise UsageError(f"cannot write {str(path)!r}: {getattr(error, 'strerror', error)}") from error
    folder = target.parent if path.is_symlink() else path.parent
    if stat.S_ISDIR(mode):
        raise UsageError(f"cannot write {str(path)!r}: it is a folder")
    if not stat.S_ISREG(mode):
        raise UsageError(f"cannot write {str(path)!r}: it is not a regular file")
    if not folder.is_dir():
        raise UsageError(f"cannot write {str(path)!r}: there is no folder {str(folder)!r}")
    if not os.access(folder, os.W_OK):
        raise UsageError(f"cannot write {str(path)!r}: the folder {str(folder)!r} is not writable")
    return target


def json_path(location: Sequence[str | int]) -> str:
    """Return keys and indices as a JSON path, such as ``$.stages[0]["a b"]``."""
    return "$" + "".join(
        f".{key}" if isinstance(key, str) and key.isidentifier() else f"[{json.dumps(key, ensure_ascii=False)}]"
        for key in location
    )


class _Object(dict[str, object]):
    """A JSON object that remembers which of its keys were repeated."""

    __slots__ = ("repeated",)

    def __init__(self, pairs: list[tuple[str, object]]) -> None:
        super().__init__(pairs)
        self.repeated = [key for key, count in Counter(k for k, _ in pairs).items() if count > 1]


def _repeated_keys(text: str) -> Iterator[str]:
    """Yield the paths of keys that appear twice in an object; objects are kept only where there are any."""
    is_repeated = False

    def look(pairs: list[tuple[str, object]]) -> None:
        nonlocal is_repeated
        if len(pairs) > MAX_KEYS:
            raise ValueError(f"an object has more than {MAX_KEYS:,} keys")
        is_repeated = is_repeated or len(dict(pairs)) < len(pairs)

    json.loads(text, object_pairs_hook=look, parse_constant=_refuse_constant)
    if is_repeated:
        yield from _repeated_below(json.loads(text, object_pairs_hook=_Object), ())


def _repeated_below(value: object, here: tuple[str | int, ...]) -> Iterator[str]:
    if isinstance(value, _Object):
        yield from (json_path((*here, key)) for key in value.repeated)
        for key, item in value.items():
            yield from _repeated_below(item, (*here, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _repeated_below(item, (*here, index))


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
    text = json.dumps(found[: _SHOWN_CHARACTERS + 1] if isinstance(found, str) else found, ensure_ascii=False)
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
