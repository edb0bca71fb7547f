"""Between a model in pieces and the model of one device: full tensors on request, and pretrained weights cut."""

import contextlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from planner.errors import MismatchError, RunError, UsageError
from planner.ir.mesh import Mesh, MeshAxis
from planner.ir.region import Region
from runtime.comm.communicator import Communicator
from runtime.comm.groups import files_group
from runtime.module import ParallelModule
from runtime.parameters.local import Held, held
from runtime.state import StepState

T = TypeVar("T")

_LISTED: Final = 20


@dataclass(frozen=True)
class Part:
    """What one rank has of a model; names are the first ones of the tensors.

    Attributes:
        tensors: local pieces of the parameters and buffers of the state dict.
        held: what the ranks store of each, and of buffers that are no part of the state dict.
        tied: further names of a tensor, and its first.
        mesh: the ranks.
        position: of this rank.
        communicator: None for a module that is no parallel one.
        state: of the steps; None likewise.
    """

    tensors: dict[str, torch.Tensor]
    held: dict[str, Held]
    tied: dict[str, str]
    mesh: Mesh
    position: int
    communicator: Communicator | None = None
    state: StepState | None = None

    @staticmethod
    def of(net: nn.Module) -> "Part":
        """Return this rank's part of a parallel module, or of one that every rank has whole.

        Raises:
            UsageError: a parallel module is inside another one, which would be taken for a whole one.
        """
        if isinstance(net, ParallelModule):
            state = net._state
            communicator = state.communicator
            mesh, position, places = communicator.mesh, communicator.position, net.held
        else:
            inside = next((name for name, each in net.named_modules() if isinstance(each, ParallelModule)), None)
            if inside is not None:
                raise UsageError(f"give the parallel module itself: it is {inside!r} of this {type(net).__name__}")
            size, position = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
            mesh = Mesh((MeshAxis("ranks", size),) if size > 1 else (), tuple(range(size)))
            state, communicator, places = None, None, held(net, net, {}, mesh, position)
        kept = net.state_dict(keep_vars=True)
        tensors: dict[str, torch.Tensor] = {}
        for name, place in places.items():
            if name in kept:
                tensors.setdefault(place.name, kept[name])
        tied = {name: place.name for name, place in places.items() if name in kept and name != place.name}
        own = {place.name: place for place in places.values()}
        return Part(tensors, own, tied, mesh, position, communicator, state)

    def agree(self, work: Callable[[], T], what: str) -> T:
        """Do something that may fail on some ranks only; then it fails on all that have a part of the model.

        Raises:
            RunError: on ranks that succeeded, where another did not.
        """
        if self.communicator is None:
            return work()
        result, error = None, None
        try:
            result = work()
        except Exception as caught:  # told to the others, then raised
            error = caught
        failed = [rank for rank, bad in zip(self.mesh.ranks, self._everyones(error is not None), strict=True) if bad]
        if error is not None:
            raise error
        if failed:
            raise RunError(f"{what} failed on rank {failed[0]}; its message says why")
        return result  # type: ignore[return-value]  # of the work, as nothing failed

    def _everyones(self, value: bool) -> list[int]:
        """Return a value of every mesh position."""
        if self.mesh.size == 1:
            return [value]
        assert self.communicator is not None
        if not dist.is_initialized():  # threads of one process
            return self.communicator.start_gather_ints(int(value))()
        pairs = [(0, 0)] * self.mesh.size
        dist.all_gather_object(pairs, (dist.get_rank(), int(value)), group=files_group(self.mesh))
        by_rank = dict(pairs)
        return [by_rank[rank] for rank in self.mesh.ranks]


def whole_tensor(
    piece: torch.Tensor, shape: tuple[int, ...], regions: tuple[Region, ...], part: Part, *, everywhere: bool
) -> torch.Tensor | None:
    """Return a copy of a whole tensor on the CPU, put together from the pieces of all ranks; all of them must call it.

    Args:
        piece: this rank's.
        shape: of the whole.
        regions: of every mesh position.
        part: of this rank.
        everywhere: on every rank; else on mesh position 0, and None on the others.
    """
    is_first = part.position == 0
    if all(region.shape == shape for region in regions):
        return piece.detach().to("cpu", copy=True) if everywhere or is_first else None
    assert part.communicator is not None
    givers = {region: position for position, region in reversed(list(enumerate(regions)))}
    counts = [region.volume if givers[region] == p else 0 for p, region in enumerate(regions)]
    send = [counts[part.position] if p == 0 else 0 for p in range(len(regions))]
    receive = counts if is_first else [0] * len(regions)
    flat = piece.detach().contiguous().flatten()[: counts[part.position]]
    axes = tuple(range(len(part.mesh.axes)))
    got = part.communicator.exchange(flat, send, receive, axes)
    if not (is_first or everywhere):
        return None
    whole = piece.new_empty(shape)
    if is_first:
        frame = Region((0,) * len(shape), shape)
        for region, numbers in zip(regions, got.split(receive), strict=True):
            if numbers.numel():
                whole[region.slices_in(frame)] = numbers.view(region.shape)
    if everywhere:
        part.communicator.broadcast(whole)
    return whole.cpu()


def full_state_dict(net: nn.Module, *, everywhere: bool = False) -> dict[str, torch.Tensor]:
    """Return the state dict of the model that was parallelized: whole tensors under the user's names, on the CPU.

    Every rank must call it. One tensor after the other is put together, so that a device never holds more than one
    whole tensor beside its own pieces. Names of tied parameters share one tensor.

    Args:
        net: of ``parallelize``.
        everywhere: on every rank; else on the first rank only, and the others get an empty dict.
    """
    part = Part.of(net)
    found: dict[str, torch.Tensor] = {}
    for name in sorted(part.tensors):  # one order on all ranks
        place = part.held[name]
        whole = whole_tensor(part.tensors[name], place.shape, place.regions, part, everywhere=everywhere)
        if whole is not None:
            found[name] = whole
    if not found:
        return {}
    return {name: found[part.tied.get(name, name)] for name in (*part.tensors, *part.tied)}


def load_full(net: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Overwrite this rank's pieces with those of whole tensors, such as pretrained weights.

    The same before ``parallelize``, on the model, needs them on rank 0 only.

    Args:
        net: of ``parallelize``.
        state_dict: of the model that was parallelized; the same on every rank.

    Raises:
        MismatchError: names are missing or unexpected, or shapes differ; nothing was overwritten.
    """
    part = Part.of(net)
    given = {name: tuple(t.shape) for name, t in state_dict.items() if isinstance(t, torch.Tensor)}
    refuse_differences(part, given, "the given state dict")
    with torch.no_grad():
        for name, tensor in part.tensors.items():
            place = part.held[name]
            frame = Region((0,) * len(place.shape), place.shape)
            tensor.detach().copy_(state_dict[source_of(part, name, given)][place.region.slices_in(frame)])


def export(net: nn.Module, file: str | os.PathLike[str]) -> None:
    """Write one file that the model loads without Layerwise; every rank must call it, the first one writes.

    ``model.load_state_dict(torch.load(file, weights_only=True))`` of the model that was parallelized takes it. The file
    has its name only when all of it is on disk.

    Args:
        net: of ``parallelize``.
        file: to be written or replaced.

    Raises:
        OSError: it cannot be written; on the other ranks a ``RunError``.
    """
    full, part, path = full_state_dict(net), Part.of(net), Path(file)
    part.agree(lambda: _write(full, path) if part.position == 0 else None, f"writing {path}")


def _write(value: Any, path: Path) -> None:
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        with unfinished.open("wb") as stream:
            torch.save(value, stream)
            stream.flush()
            os.fsync(stream.fileno())
        unfinished.replace(path)
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)


def source_of(part: Part, name: str, given: Mapping[str, Any]) -> str:
    """Return under which of its names a tensor is given: the first, or another where it is tied."""
    others = (other for other, first in part.tied.items() if first == name and other in given)
    return name if name in given else next(others, name)


def refuse_differences(part: Part, given: Mapping[str, tuple[int, ...]], what: str) -> None:
    """Check that whole tensors are those of a model.

    Args:
        part: of the model.
        given: shapes by name.
        what: gives them.

    Raises:
        MismatchError: with all differences.
    """
    known = set(part.tensors) | set(part.tied)
    problems = []
    for name in sorted(part.tensors):
        source = source_of(part, name, given)
        if source not in given:
            problems.append(f"{name} is missing")
        elif given[source] != part.held[name].shape:
            problems.append(f"{name} has shape {given[source]}, the model's has {part.held[name].shape}")
    problems += [f"{name} is not in the model" for name in sorted(set(given) - known)]
    if problems:
        more = f"\n  and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        listed = "".join(f"\n  {problem}" for problem in problems[:_LISTED])
        raise MismatchError(f"{what} is not of this model; nothing was loaded:{listed}{more}")
