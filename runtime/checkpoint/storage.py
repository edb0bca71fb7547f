"""Writing named tensors in pieces, and small blobs, to a folder, through ``torch.distributed.checkpoint``.

A checkpoint is a folder in torch's own format, ``.metadata`` and ``*.distcp``, with ``.checksums``. Only the planners
are ours: they say which regions of a tensor a rank writes and reads, because pieces of a plan are hyper-rectangles that
no DTensor describes (uneven pieces, rows of a piece). A folder has its name only when all of it is on disk.
"""

import io
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from planner.errors import LayerwiseError, RunError, UsageError
from planner.ir.region import Region
from runtime.checkpoint.checksums import CHECKSUMS, summed, write_checksums

METADATA: Final = ".metadata"
"""Of a complete checkpoint; torch writes it last."""
_LISTED: Final = 5

Path_ = tuple[str, ...]
"""Where a value is in the nested dict that torch's own tools make of a checkpoint."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint, as the ranks store it.

    Attributes:
        path: its name in a nested dict.
        tensor: this rank's piece.
        shape: of the whole.
        regions: what the rank at each mesh position stores; equal or disjoint. None where it has no such tensor.
    """

    path: Path_
    tensor: torch.Tensor
    shape: tuple[int, ...]
    regions: tuple[Region | None, ...]

    @property
    def key(self) -> str:
        """Its name in the checkpoint."""
        return ".".join(self.path)


def shares(entries: Sequence[Entry], num_ranks: int) -> list[list[Entry]]:
    """Return what the rank at each mesh position writes: every region once, bytes balanced.

    Largest first, each region goes to the rank that has least so far among those that store it. All ranks get the same
    answer without a word.
    """
    num_bytes = [0] * num_ranks
    found: list[list[Entry]] = [[] for _ in range(num_ranks)]
    for entry in sorted(entries, key=lambda e: (-Region((0,) * len(e.shape), e.shape).volume, e.path)):
        holders: dict[Region, list[int]] = {}
        for position, region in enumerate(entry.regions):
            if region is not None:
                holders.setdefault(region, []).append(position)
        for region, positions in holders.items():
            if region.volume or not any(r.volume for r in holders):
                writer = min(positions, key=lambda p: (num_bytes[p], p))
                num_bytes[writer] += region.volume * entry.tensor.element_size()
                found[writer].append(entry)
    return found


class _Saved(SavePlanner):
    """Says what one rank writes.

    Args:
        entries: its share.
        position: of the rank in the mesh.
        blobs: small things that only this rank writes, by path.
    """

    def __init__(self, entries: Sequence[Entry], position: int, blobs: Mapping[Path_, bytes]) -> None:
        self._entries, self._position = entries, position
        self._blobs = {".".join(path): blob for path, blob in blobs.items()}
        self._paths = {".".join(path): path for path in (*blobs, *(entry.path for entry in entries))}
        self._tensors: Mapping[str, torch.Tensor] = {}

    def set_up_planner(
        self, state_dict: dict[str, Any], storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        del storage_meta, is_coordinator
        self._tensors = state_dict

    def create_local_plan(self) -> SavePlan:
        items = [WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in self._blobs]
        for entry in self._entries:
            region = entry.regions[self._position]
            assert region is not None  # it is in the share
            own = chunk(region)
            data = TensorWriteData(own, TensorProperties(entry.tensor.dtype), torch.Size(entry.shape))
            items.append(WriteItem(MetadataIndex(entry.key, own.offsets), WriteItemType.SHARD, tensor_data=data))
        return SavePlan(items, planner_data=self._paths)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, metadata = create_default_global_save_plan(all_plans)
        for key, described in metadata.state_dict_metadata.items():
            if isinstance(described, TensorStorageMetadata):
                written = sum(each.sizes.numel() for each in described.chunks)
                if written != described.size.numel():
                    raise RunError(
                        f"{key}: the ranks hold {written} of {described.size.numel()} elements; some rank has no such "
                        "state, or a piece of another shape"
                    )
        metadata.planner_data = {key: path for plan in all_plans for key, path in plan.planner_data.items()}
        return plans, metadata

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        key = write_item.index.fqn
        return io.BytesIO(self._blobs[key]) if key in self._blobs else self._tensors[key].detach()


class _Writer(FileSystemWriter):
    """Writes under another name and renames when all ranks are done.

    The coordinator's ``finish`` runs when every rank has written and synced its file, and before any rank is told so.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(unfinished(folder), sync_files=True)
        self._folder, self._is_coordinator = folder, False

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        super().set_up_storage_writer(is_coordinator, *args, **kwargs)
        self._is_coordinator = is_coordinator

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        if self._is_coordinator:
            if previous(self._folder).exists() and not self._folder.exists():  # killed between two renames
                previous(self._folder).rename(self._folder)
            shutil.rmtree(unfinished(self._folder), ignore_errors=True)  # of a save that was killed
            unfinished(self._folder).mkdir(parents=True)
        return plan

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:
        if not unfinished(self._folder).is_dir():
            raise UsageError(
                f"this rank does not see {unfinished(self._folder)}, which rank 0 made: a checkpoint needs a folder "
                "that all machines share"
            )
        written: Future[list[WriteResult]] = Future()
        written.set_result(summed(unfinished(self._folder), super().write_data(plan, planner).wait()))
        return written

    def finish(self, metadata: Metadata, results: list[list[Any]]) -> None:
        super().finish(metadata, results)
        new, folder, old = unfinished(self._folder), self._folder, previous(self._folder)
        write_checksums(new, METADATA, results)
        _sync(new)
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
        _sync(folder.parent)
        shutil.rmtree(old, ignore_errors=True)


class Job:
    """What one rank contributes to a checkpoint.

    Args:
        folder: the checkpoint's.
        entries: all tensors, on every rank in the same order.
        blobs: what only this rank writes, by path.
        position: of this rank in the mesh.
        num_ranks: of the mesh.
    """

    def __init__(
        self, folder: Path, entries: Sequence[Entry], blobs: Mapping[Path_, bytes], position: int, num_ranks: int
    ) -> None:
        share = shares(entries, num_ranks)[position]
        self.folder = folder
        self.tensors: dict[str, Any] = {entry.key: entry.tensor for entry in share}
        self.planner, self.writer = _Saved(share, position, blobs), _Writer(folder)


def write_together(jobs: Sequence[Job]) -> None:
    """Write a checkpoint whose ranks are all in this process, without torch.distributed."""
    plans = []
    for index, job in enumerate(jobs):
        job.planner.set_up_planner(job.tensors, is_coordinator=not index)
        job.writer.set_up_storage_writer(not index)
        plans.append(job.writer.prepare_local_plan(job.planner.create_local_plan()))
    plans, metadata = jobs[0].planner.create_global_plan(plans)
    plans = jobs[0].writer.prepare_global_plan(plans)
    results = [job.writer.write_data(plan, job.planner).wait() for job, plan in zip(jobs, plans, strict=True)]
    jobs[0].writer.finish(metadata, results)


def failure(error: BaseException, folder: Path) -> LayerwiseError:
    """Return what is to be raised where saving failed on some rank."""
    causes = error.failures if isinstance(error, CheckpointException) else {}
    for cause, _ in causes.values():
        if isinstance(cause, UsageError):
            return cause
    text = "; ".join(f"rank {rank}: {type(cause).__name__}: {cause}" for rank, (cause, _) in causes.items())
    this = f"rank {dist.get_rank()}: " if dist.is_initialized() and not text else ""
    return RunError(f"{this}saving {folder} failed: {text or f'{type(error).__name__}: {error}'}")


def refuse_foreign(folder: Path) -> None:
    """Check that nothing but an older checkpoint would be replaced.

    Raises:
        UsageError: the folder holds other things, or is a file.
    """
    if folder.is_dir():
        own = {METADATA, CHECKSUMS}
        foreign = sorted(p.name for p in folder.iterdir() if p.name not in own and p.suffix != ".distcp")
        if foreign:
            raise UsageError(
                f"{folder} holds other things than a checkpoint ({', '.join(foreign[:_LISTED])}), and a checkpoint "
                "replaces its folder; give a name inside it"
            )
    elif folder.exists():
        raise UsageError(f"{folder} is a file; a checkpoint is a folder")


def chunk(region: Region) -> ChunkStorageMetadata:
    """Return how torch writes a region."""
    return ChunkStorageMetadata(torch.Size(region.start), torch.Size(region.shape))


def unfinished(folder: Path) -> Path:
    """Return what a checkpoint is called until it is complete."""
    return folder.with_name(f".{folder.name}.unfinished")


def previous(folder: Path) -> Path:
    """Return what an older checkpoint of the name is called while the new one takes its place."""
    return folder.with_name(f".{folder.name}.previous")


def _sync(folder: Path) -> None:
    """Let the names in a folder reach the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
