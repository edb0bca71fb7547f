"""The metadata of a checkpoint as a kind of file: a pickle, of which nothing but descriptions of tensors may come."""

import atexit
import functools
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from planner.ir.region import Region
from runtime.checkpoint.stored import Stored
from support.fuzz.targets import Target


@functools.cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    write({"a.weight": torch.ones(3, 2), "b": torch.zeros(2, dtype=torch.float64), "step": 3, "note": "here"}, folder)
    return folder


def write(values: dict[str, Any], folder: Path) -> None:
    """Write a checkpoint as torch does, in this process alone."""
    with warnings.catch_warnings(action="ignore"):  # that it is one process
        state_dict_saver.save(values, storage_writer=FileSystemWriter(folder), no_dist=True)


def _good() -> Sequence[bytes]:
    return [(_folder() / ".metadata").read_bytes()]


def _use(path: Path) -> None:
    metadata = _folder() / ".metadata"
    before = metadata.read_bytes()
    try:
        metadata.write_bytes(path.read_bytes())
        stored = Stored(_folder())
        for key, shape in stored.shapes.items():
            if shape == (3, 2):
                stored.read([(key, Region((0, 0), (3, 2)), torch.empty(3, 2, dtype=stored.dtype(key)))])
        stored.blobs("step", "note")
    finally:
        metadata.write_bytes(before)


METADATA = Target("checkpoint metadata", "", _good, _use)
