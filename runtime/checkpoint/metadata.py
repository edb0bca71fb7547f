"""Reading ``.metadata`` of a checkpoint, which torch writes as a pickle, without running what a pickle can ask for.

A pickle names classes and functions, which unpickling calls. Here it may name those that describe tensors, and no
others; torch's own reader takes any [``pickle``, "Restricting globals"].
"""

import importlib
import io
import pickle  # nosec B403  # restricted below
from pathlib import Path, PurePath
from typing import Any, Final

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, StorageMeta

from planner.errors import UsageError

_DESCRIBE = "torch.distributed.checkpoint.metadata"
_ALLOWED: Final = {
    _DESCRIBE: {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch": {
        "Size", "bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64",
        "complex64", "complex128", "float8_e4m3fn", "float8_e5m2",
    },
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "pathlib._local": {"PosixPath", "PurePosixPath"},
}  # fmt: skip
"""By module."""
MAX_BYTES: Final = 2**26
"""Of the file: the metadata of 10,000 tensors in 8 pieces has 20 MB."""


class _Restricted(pickle._Unpickler):  # the one in Python: that in C takes memory for any number that the file names
    def find_class(self, module: str, name: str) -> Any:
        if name not in _ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which describes no tensor; nothing was run")
        return getattr(importlib.import_module(module), name)


def _missing(metadata: Metadata) -> str:
    """Return what metadata does not say that it has to; a changed byte may rename, lose or retype any of its values."""
    tensors, places = (getattr(metadata, name, None) for name in ("state_dict_metadata", "storage_data"))
    if not isinstance(tensors, dict) or not isinstance(places, dict):
        return "it has no tensors, or no places of these"
    for key, described in tensors.items():
        if isinstance(described, BytesStorageMetadata):
            continue
        dtype = getattr(getattr(described, "properties", None), "dtype", None)
        chunks = getattr(described, "chunks", None)
        sizes = [getattr(described, "size", None)]
        if isinstance(chunks, list):
            sizes += [getattr(chunk, name, None) for chunk in chunks for name in ("offsets", "sizes")]
        is_whole = isinstance(dtype, torch.dtype) and isinstance(chunks, list) and all(map(_are_counts, sizes))
        if not isinstance(key, str) or not is_whole:
            return f"shape, type or pieces of {key!r} are not there"
    for index, place in places.items():
        numbers = tuple(getattr(place, name, None) for name in ("offset", "length"))
        if not isinstance(getattr(place, "relative_path", None), str) or not _are_counts(numbers):
            return f"the place of {getattr(index, 'fqn', index)!r} is not there"
    return ""


def _are_counts(numbers: object) -> bool:
    return isinstance(numbers, tuple) and all(isinstance(n, int) and n >= 0 for n in numbers)


class SafeReader(FileSystemReader):
    """Reads a checkpoint from a folder; metadata that names other code or files elsewhere is refused."""

    def read_metadata(self, *_: Any, **kwargs: Any) -> Metadata:
        """Return what ``.metadata`` says.

        Raises:
            UsageError: it is larger than ``MAX_BYTES``, or lists files outside of the folder.
            pickle.UnpicklingError: it names what is not allowed; other exceptions where it is no pickle.
        """
        path = Path(self._get_metadata_path(kwargs.get("rank")))
        if path.stat().st_size > MAX_BYTES:
            raise UsageError(f"{path} is larger than {MAX_BYTES} bytes")
        found = _Restricted(io.BytesIO(path.read_bytes())).load()
        if not isinstance(found, Metadata):
            raise UsageError(f"{path} describes no checkpoint but a {type(found).__name__}")
        if missing := _missing(found):
            raise UsageError(f"{path} is damaged: {missing}")
        for info in found.storage_data.values():
            if (
                PurePath(info.relative_path).name != info.relative_path
                or (path.parent / info.relative_path).is_symlink()
            ):
                raise UsageError(f"{path} names {info.relative_path!r}, which is no file of this folder")
        meta: StorageMeta = getattr(found, "storage_meta", None) or StorageMeta()
        meta.load_id, found.storage_meta = self.load_id, meta
        return found
