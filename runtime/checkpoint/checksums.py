"""Checksums of what a checkpoint's files hold: torch's format has none, and changed bytes would be loaded as weights.

They are a JSON file beside torch's: the CRC-32 of ``.metadata``, and of every piece of every other file by its place.
They find accidents, not manipulation.
"""

import dataclasses
import json
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from torch.distributed.checkpoint.storage import WriteResult

from planner.errors import UsageError

CHECKSUMS: Final = ".checksums"
_CHUNK_BYTES: Final = 2**22


@dataclasses.dataclass(frozen=True)
class Summed(WriteResult):
    """What torch says of a piece that was written, and its checksum."""

    crc32: int


def summed(folder: Path, results: Iterable[WriteResult]) -> list[WriteResult]:
    """Return what was written, with checksums of the files as they are now."""
    found: list[WriteResult] = []
    for each in results:
        place = each.storage_data
        crc32 = _crc32(folder / place.relative_path, place.offset, place.length)
        found.append(Summed(each.index, each.size_in_bytes, place, crc32))
    return found


def write_checksums(folder: Path, metadata: str, results: Sequence[Sequence[Any]]) -> None:
    """Write the checksums of ``metadata``, a file of the folder, and of what all ranks have written."""
    pieces = [
        [each.storage_data.relative_path, each.storage_data.offset, each.storage_data.length, each.crc32]
        for of_rank in results
        for each in of_rank
    ]
    text = json.dumps({"version": 1, "metadata": _crc32(folder / metadata), "pieces": pieces})
    with (folder / CHECKSUMS).open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


class Checksums:
    """The checksums of a checkpoint; none for an older one.

    Args:
        folder: of the checkpoint.
        metadata: name of torch's own file in it.

    Raises:
        UsageError: they cannot be read, or that file has changed.
    """

    def __init__(self, folder: Path, metadata: str) -> None:
        self._folder = folder
        self._pieces: dict[tuple[str, int], tuple[int, int]] = {}
        if not (folder / CHECKSUMS).exists():
            return
        try:
            found = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
            expected = int(found["metadata"])
            for name, offset, length, crc32 in found["pieces"]:
                self._pieces[str(name), int(offset)] = int(length), int(crc32)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UsageError(f"{folder / CHECKSUMS} is damaged: {type(error).__name__}: {error}") from error
        if _crc32(folder / metadata) != expected:
            raise UsageError(f"{folder / metadata} is damaged: its checksum is not the one that was written")

    def verify(self, pieces: Mapping[tuple[str, int], str]) -> None:
        """Check pieces of files before they are used.

        Args:
            pieces: by file and offset, the names of what they hold.

        Raises:
            UsageError: one has changed.
        """
        for (name, offset), what in pieces.items():
            if (name, offset) in self._pieces:
                length, expected = self._pieces[name, offset]
                if _crc32(self._folder / name, offset, length) != expected:
                    raise UsageError(f"{self._folder / name} is damaged: the bytes of {what} are not those written")


def _crc32(path: Path, offset: int = 0, length: int | None = None) -> int:
    """Return the checksum of a part of a file, to its end unless a length in bytes is given."""
    found, left = 0, path.stat().st_size if length is None else length
    with path.open("rb") as file:
        file.seek(offset)
        while left > 0 and (chunk := file.read(min(left, _CHUNK_BYTES))):
            found = zlib.crc32(chunk, found)
            left -= len(chunk)
    return found
