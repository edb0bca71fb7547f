"""Checkpoints: saved under one plan and number of ranks, loaded under any other.

A checkpoint is a folder that all ranks see. It holds whole tensors in pieces (weights and buffers of the state dict,
the optimizer's state by the names of parameters), and what a run needs to go on: the step, the seed of everything
random in the network, torch's generators of every rank, and what the user adds. ``storage`` has the format.
"""

import io
import os
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import state_dict_saver as saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import AsyncStager

from planner.errors import LayerwiseError, MismatchError, UsageError
from planner.ir.region import Region
from runtime.checkpoint import storage, stored
from runtime.checkpoint.generators import generators, restore_generators
from runtime.checkpoint.optimizers import (
    OptimizerPart,
    State,
    matched,
    of_all_ranks,
    of_this_rank,
    parameter_names,
    restore,
    target,
)
from runtime.checkpoint.storage import Entry, Job
from runtime.checkpoint.stored import Stored
from runtime.checkpoint.whole import Part, refuse_differences, source_of
from runtime.comm.failures import has_failed
from runtime.comm.groups import FILES_TIMEOUT_S, saving_group

FORMAT: Final = 1
_ABOUT: Final = "about"
_MODEL: Final = "model"
_STATE: Final = ("optim", "state")
_RANDOM: Final = "random"


@dataclass(frozen=True)
class Resumed:
    """Where a run goes on.

    Attributes:
        step: as given to ``save``.
        extra: likewise.
    """

    step: int
    extra: Any


class Saving:
    """A checkpoint on its way to disk."""

    _last: ClassVar["Saving | None"] = None

    def __init__(self, folder: Path, result: "Future[Any]", group: dist.ProcessGroup | None) -> None:
        self._folder, self._result, self._group, self._told = folder, result, group, False

    def done(self) -> bool:
        """Return whether it is on disk, or failed."""
        return self._result.done()

    def wait(self) -> None:
        """Return when the checkpoint is on disk on all ranks.

        Raises:
            RunError: some rank could not write. It is raised once: here, or by the next save.
        """
        if self._told:
            return
        self._told = True
        try:
            self._result.result()
        except (Exception, CheckpointException) as error:
            raise storage.failure(error, self._folder) from error

    @classmethod
    def _let_go(cls) -> None:
        """Let go of a save that waits for a rank which will not come, where this process ends by an error.

        The interpreter joins the thread that saves, and a rank that hangs would hold this one up until the timeout.
        """
        last, ends_by_error = cls._last, has_failed() or getattr(sys, "last_value", None) is not None
        if ends_by_error and last is not None and last._group is not None and not last.done():
            last._group.abort()

    @classmethod
    def finish(cls) -> None:
        """Wait for the last one that this process started."""
        last, cls._last = cls._last, None
        if last is not None:
            last.wait()


threading._register_atexit(Saving._let_go)  # type: ignore[attr-defined]  # of the handlers, only these run before threads


def exists(folder: str | os.PathLike[str]) -> bool:
    """Return whether there is a complete checkpoint of this name."""
    return stored.exists(_path(folder))


def save(
    net: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    folder: str | os.PathLike[str],
    *,
    step: int,
    extra: Any = None,
    timeout_s: float = FILES_TIMEOUT_S,
) -> None:
    """Write a checkpoint; every rank must call it.

    Each region of each tensor is written by one of the ranks that store it. The folder appears under its name when all
    of it is on disk; until then an older checkpoint of that name stays, and stays readable if a rank is killed.

    Args:
        net: of ``parallelize`` or ``pipelined``; or a plain module that every rank has whole.
        optimizer: of its parameters, any of ``torch.optim`` whose state is numbers and tensors of each parameter. None
            on a rank whose stages have none.
        folder: on a file system that all ranks see. An older checkpoint there is replaced.
        step: how many steps were made; for the user.
        extra: what else to keep, such as the state dicts of a scheduler and a ``GradScaler``: numbers, strings,
            tensors, and lists and dicts of them. That of the first rank is kept.
        timeout_s: of waiting for the slowest rank's files; a rank that hangs is an error after that time.

    Raises:
        UsageError: the folder holds other things, not every rank sees it, or something cannot be saved.
        RunError: some rank could not write; or the save before this one failed in the background.
    """
    Saving.finish()
    part, path = Part.of(net, timeout_s), _path(folder)
    job = _job(part, optimizer, path, step, extra)
    try:
        if dist.is_initialized():
            group = saving_group(part.mesh, timeout_s)
            saver.save(job.tensors, storage_writer=job.writer, planner=job.planner, process_group=group)
        else:
            storage.write_together([job])
    except LayerwiseError:
        raise
    except (Exception, CheckpointException) as error:
        raise storage.failure(error, path) from error


def start_saving(
    net: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    folder: str | os.PathLike[str],
    *,
    step: int,
    extra: Any = None,
    timeout_s: float = FILES_TIMEOUT_S,
) -> Saving:
    """Start to write a checkpoint behind training; every rank must call it. Arguments and errors as of ``save``.

    It returns when this rank's share is copied to host memory; training may go on. A save that is still under way is
    waited for first, and its error is raised here. Call ``wait()`` of the last one before the process group is
    destroyed.
    """
    Saving.finish()
    part, path = Part.of(net, timeout_s), _path(folder)
    job = _job(part, optimizer, path, step, extra)
    result: Any
    group = None
    if dist.is_initialized():
        group = saving_group(part.mesh, timeout_s)
        result = saver.async_save(
            job.tensors,
            storage_writer=job.writer,
            planner=job.planner,
            process_group=group,
            async_stager=_Copies(),
        )
    else:
        job.tensors = _Copies().stage(job.tensors)
        executor = ThreadPoolExecutor(1)
        result = executor.submit(storage.write_together, [job])
        executor.shutdown(wait=False)
    Saving._last = saving = Saving(path, result, group)
    return saving


class _Copies(AsyncStager):
    """Copies what is to be written, so that training may go on; only this rank's share is here."""

    _synchronize_after_execute = False

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        return {key: tensor.detach().to("cpu", copy=True) for key, tensor in state_dict.items()}

    def synchronize_staging(self) -> None:
        """Nothing is under way when ``stage`` has returned."""
        return

    def close(self) -> None:
        """Nothing is kept."""
        return


def load(net: nn.Module, optimizer: torch.optim.Optimizer | None, folder: str | os.PathLike[str]) -> Resumed:
    """Read a checkpoint into a module and an optimizer; every rank must call it.

    Each rank reads its pieces. Names, shapes and files are checked before anything is overwritten. Gradients, and how
    the optimizer computes a step (``foreach``, ``fused``), stay. Torch's generators get the state that they had on the
    same rank; on ranks that did not exist, they are seeded from those of rank ``r mod n`` and r, where n ranks saved.

    Args:
        net: of ``parallelize``, under any plan on any number of ranks, or a plain module.
        optimizer: of its parameters, of the class that was saved; None to leave its state in the file.
        folder: as given to ``save``.

    Returns:
        The step and what else was saved.

    Raises:
        UsageError: there is no such checkpoint, it is incomplete, or it is damaged.
        MismatchError: it is of another model or optimizer; nothing was overwritten.
        RunError: a file cannot be read.
    """
    Saving.finish()
    part, path = Part.of(net), _path(folder)
    ready = part.agree(lambda: _Loading(part, optimizer, path), f"loading {path}")
    part.refuse_differing(ready.identity, path)
    part.agree(ready.read, f"reading {path}")
    return ready.finish()


def step_of(folder: Path) -> int:
    """Return the step that a checkpoint was saved with.

    Raises:
        UsageError: there is no such checkpoint, it is incomplete, or it is damaged.
        RunError: a file cannot be read.
    """
    return int(_about(Stored(folder))["step"])


def _about(found: Stored) -> Mapping[str, Any]:
    """Return what a checkpoint says beside its tensors."""
    blobs = found.blobs(_ABOUT)
    try:
        about = _unpacked(blobs[_ABOUT]) if blobs else {}
    except Exception as error:  # unpickling may raise anything
        raise UsageError(f"{found.folder} is damaged: {type(error).__name__}: {error}") from error
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise UsageError(f"{found.folder} was not written by this version of runtime.checkpoint")
    return about


class _Loading:
    """Everything that a rank will read, checked."""

    def __init__(self, part: Part, optimizer: torch.optim.Optimizer | None, folder: Path) -> None:
        self._part, self._optimizer = part, optimizer
        self._stored = Stored(folder)
        self._about = _about(self._stored)
        self._targets = self._weights()
        self._state: State = {}
        self._names: dict[int, str] = {}
        self._options: list[dict[str, Any]] = []
        if optimizer is not None:
            self._optimizer_state(optimizer)
        self._stored.verify(self._targets)
        self._rank = part.mesh.ranks[part.position]
        self._generators = self._generators_state()

    def _weights(self) -> list[tuple[str, Region, torch.Tensor]]:
        prefix = f"{_MODEL}."
        keys = {key.removeprefix(prefix): key for key in self._stored.shapes if key.startswith(prefix)}
        keys |= {name: keys[first] for name, first in self._about["tied"].items()}
        refuse_differences(
            self._part, {name: self._stored.shapes[key] for name, key in keys.items()}, str(self._stored.folder)
        )
        return [
            (keys[source_of(self._part, name, keys)], self._part.held[name].region, tensor)
            for name, tensor in self._part.tensors.items()
        ]

    def _optimizer_state(self, optimizer: torch.optim.Optimizer) -> None:
        saved = self._about["optimizer"]
        if saved is None:
            raise MismatchError(f"{self._stored.folder} was saved without an optimizer; load it with None")
        part = self._part
        self._names = parameter_names(part, optimizer)
        self._options = matched(optimizer, self._names, saved["kind"], of_this_rank(part, saved["groups"]))
        for name in self._names.values():
            self._state[name] = dict(saved["numbers"].get(name, {}))
            for state in saved["tensors"].get(name, ()):
                key = ".".join((*_STATE, name, state))
                shape, dtype = self._stored.shapes[key], self._stored.dtype(key)
                slot = target(part.held[name], part.tensors[name], shape, dtype, state)
                self._state[name][state] = slot.tensor
                assert slot.own is not None  # it is this rank's
                self._targets.append((key, slot.own, slot.tensor))
        self._state = {name: state for name, state in self._state.items() if state}

    @property
    def identity(self) -> str:
        """What tells one checkpoint of a run from another."""
        return f"step {self._about['step']}, seed {self._about['seed']}, {self._about['passes']} forward passes"

    def read(self) -> None:
        """Overwrite the weights, and fill the memory of the optimizer's state."""
        self._stored.read(self._targets)

    def finish(self) -> Resumed:
        """Set everything else."""
        about = self._about
        if self._optimizer is not None:
            restore(self._optimizer, self._names, self._state, self._options)
        if about["passes"] is not None:
            for state in self._part.states:
                state.step, state.seed = about["passes"], about["seed"]
        progress = about.get("progress")  # older checkpoints have none
        if self._part.stages is not None and progress is not None:
            self._part.stages.go_on(progress)
        if self._generators is not None:
            is_new = self._rank >= about["ranks"]
            restore_generators(self._generators, _device(self._part), apart=self._rank if is_new else 0)
        return Resumed(about["step"], about["extra"])

    def _generators_state(self) -> dict[str, Any] | None:
        """Return what is there for this rank; those of a plan need not be numbered from 0."""
        key = f"{_RANDOM}.{self._rank % self._about['ranks']}"
        blobs = self._stored.blobs(key)
        return _unpacked(blobs[key]) if blobs else None


def _job(part: Part, optimizer: torch.optim.Optimizer | None, folder: Path, step: int, extra: Any) -> Job:
    """Return what this rank writes."""
    mine = part.agree(lambda: _checked(part, optimizer, folder, extra), f"saving {folder}")
    pieces = part.complete({(_MODEL, name): part.piece(name) for name in part.tensors})
    entries = [Entry(path, piece.tensor, piece.shape, piece.regions) for path, piece in pieces.items()]
    about: dict[str, Any] = {
        "format": FORMAT,
        "step": step,
        "tied": part.tied,
        "optimizer": None,
        "ranks": part.mesh.size,
        "seed": part.states[0].seed if part.states else None,
        "passes": part.states[0].step if part.states else None,
        "progress": part.stages.progress if part.stages is not None else None,
        "torch": str(torch.__version__),
    }
    mine = of_all_ranks(part, mine)
    if mine is not None:
        about["optimizer"] = {"kind": mine.kind, "groups": mine.groups, "tensors": {}, "numbers": mine.numbers}
        for (name, key), slot in mine.tensors.items():
            entries.append(Entry((*_STATE, name, key), slot.tensor, slot.shape, slot.regions))
            about["optimizer"]["tensors"].setdefault(name, []).append(key)
    blobs: dict[tuple[str, ...], bytes] = {
        (_RANDOM, str(part.mesh.ranks[part.position])): _packed(generators(_device(part)))
    }
    if part.position == 0:
        blobs[_ABOUT,] = _packed({**about, "extra": extra})
    return Job(folder, entries, blobs, part.position, part.mesh.size)


def _checked(part: Part, optimizer: torch.optim.Optimizer | None, folder: Path, extra: Any) -> OptimizerPart | None:
    """Return what this rank has of the optimizer, after checking that everything can be saved."""
    storage.refuse_foreign(folder)
    mine = None if optimizer is None else OptimizerPart.of(part, optimizer)
    if mine is not None:
        _refuse_unreadable("the optimizer's groups", {"groups": mine.groups, "numbers": mine.numbers})
    _refuse_unreadable("extra", extra)
    return mine


def _refuse_unreadable(what: str, value: Any) -> None:
    """Check that a value can be read back without running code of the file."""
    try:
        _unpacked(_packed(value))
    except Exception as error:  # pickling and unpickling may raise anything
        if isinstance(value, dict):
            for key, item in value.items():
                _refuse_unreadable(f"{what}[{key!r}]", item)
        raise UsageError(
            f"{what} is a {type(value).__name__} and cannot be saved: only numbers, strings, tensors, and lists and "
            f"dicts of them can ({error.__class__.__name__})"
        ) from error


def _packed(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def _unpacked(blob: bytes) -> Any:
    return torch.load(io.BytesIO(blob), map_location="cpu", weights_only=True)


def _device(part: Part) -> torch.device:
    return next((tensor.device for tensor in part.tensors.values()), torch.device("cpu"))


def _path(folder: str | os.PathLike[str]) -> Path:
    return Path(os.path.realpath(folder))  # links in a circle are told of where it is written or read
