"""Reading a checkpoint: which tensors are in it, and any region of any of them."""

import dataclasses
import io
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from planner.errors import RunError, UsageError
from planner.ir.region import Region
from runtime.checkpoint.checksums import Checksums
from runtime.checkpoint.metadata import SafeReader
from runtime.checkpoint.storage import METADATA, chunk, previous, unfinished


def exists(folder: Path) -> bool:
    """Return whether there is a complete checkpoint of this name."""
    return (folder / METADATA).exists() or (not folder.exists() and (previous(folder) / METADATA).exists())


class Stored:
    """A checkpoint on disk.

    Args:
        folder: its name.

    Raises:
        UsageError: there is none, it is incomplete, or files of it are missing or too short.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not exists(folder):
            raise UsageError(_why_missing(folder))
        self._path = folder if folder.exists() else previous(folder)
        self._checksums = Checksums(self._path, METADATA)
        self._reader = SafeReader(self._path)
        try:
            self._metadata = self._reader.read_metadata()
        except Exception as error:  # unpickling what is no checkpoint may raise anything
            raise UsageError(f"{self._path / METADATA} cannot be read: {type(error).__name__}: {error}") from error
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        self._refuse_damage()

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor, by key."""
        found = self._metadata.state_dict_metadata.items()
        return {key: tuple(d.size) for key, d in found if isinstance(d, TensorStorageMetadata)}

    def dtype(self, key: str) -> torch.dtype:
        """Return the dtype of a tensor."""
        described = self._metadata.state_dict_metadata[key]
        assert isinstance(described, TensorStorageMetadata)
        return described.properties.dtype

    def blobs(self, *keys: str) -> dict[str, bytes]:
        """Return those of some blobs that are there."""
        planner = _Loaded(
            [], [k for k in keys if isinstance(self._metadata.state_dict_metadata.get(k), BytesStorageMetadata)]
        )
        self._verify(planner)
        self._read(planner)
        return planner.blobs

    def read(self, targets: Sequence[tuple[str, Region, torch.Tensor]]) -> None:
        """Overwrite tensors with regions of the stored ones.

        Args:
            targets: key, region and a tensor of the region's shape.

        Raises:
            RunError: a file cannot be read.
        """
        self._read(_Loaded(targets, []))

    def verify(self, targets: Sequence[tuple[str, Region, torch.Tensor]]) -> None:
        """Check that what ``read`` would read is what was written.

        Raises:
            UsageError: a file is damaged.
        """
        self._verify(_Loaded(targets, []))

    def _verify(self, planner: "_Loaded") -> None:
        planner.set_up_planner({}, self._metadata, is_coordinator=True)
        places = [
            (i.storage_index, self._metadata.storage_data[i.storage_index]) for i in planner.create_local_plan().items
        ]
        self._checksums.verify({(place.relative_path, place.offset): index.fqn for index, place in places})

    def _read(self, planner: "_Loaded") -> None:
        planner.set_up_planner({}, self._metadata, is_coordinator=True)
        try:
            self._reader.read_data(planner.create_local_plan(), planner).wait()
        except Exception as error:  # unpickling and unzipping may raise anything
            raise RunError(f"reading {self._path} failed: {type(error).__name__}: {error}") from error

    def _refuse_damage(self) -> None:
        needed: dict[str, int] = {}
        for info in self._metadata.storage_data.values():
            needed[info.relative_path] = max(needed.get(info.relative_path, 0), info.offset + info.length)
        for name, size in sorted(needed.items()):
            path = self._path / name
            if not path.exists():
                raise UsageError(f"{self._path} is no complete checkpoint: {name} is missing")
            if path.stat().st_size < size:
                raise UsageError(f"{path} is damaged: it has {path.stat().st_size} bytes instead of {size}")


class _Loaded(LoadPlanner):
    """Says what one rank reads, and where to."""

    def __init__(self, targets: Sequence[tuple[str, Region, torch.Tensor]], blobs: Sequence[str]) -> None:
        self._targets, self._wanted = targets, blobs
        self._metadata: Metadata | None = None
        self.blobs: dict[str, bytes] = {}

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        del state_dict, is_coordinator
        self._metadata = metadata

    def create_local_plan(self) -> LoadPlan:
        assert self._metadata is not None
        zero = torch.Size((0,))
        items = [
            ReadItem(LoadItemType.BYTE_IO, MetadataIndex(key), zero, MetadataIndex(key), zero, zero)
            for key in self._wanted
        ]
        for number, (key, region, _) in enumerate(self._targets):
            described = self._metadata.state_dict_metadata[key]
            assert isinstance(described, TensorStorageMetadata)
            if region.volume:
                into = MetadataIndex(str(number))  # two targets may read the same
                found = create_read_items_for_chunk_list(key, described, [chunk(region)])
                items += [dataclasses.replace(item, dest_index=into) for item in found]
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.blobs[read_item.storage_index.fqn] = value.getvalue()

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        found = self._targets[int(read_item.dest_index.fqn)][2].detach()
        for dim, (start, size) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            found = found.narrow(dim, start, size)
        return found

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Nothing is left to do: the tensor was the target itself."""


def _why_missing(folder: Path) -> str:
    if folder.exists():
        return f"{folder} is no complete checkpoint: {METADATA} is missing"
    if unfinished(folder).exists():
        return f"there is no checkpoint {folder}, only {unfinished(folder)} of a save that did not finish"
    return f"there is no checkpoint {folder}"
