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
from runtime.checkpoint.storage import Path_
from runtime.comm.communicator import Communicator
from runtime.comm.failures import peer_failed
from runtime.comm.groups import FILES_TIMEOUT_S, files_group
from runtime.module import ParallelModule
from runtime.parameters.local import Held, held
from runtime.pipeline.holding import HeldStages
from runtime.state import StepState

T = TypeVar("T")

_LISTED: Final = 20


@dataclass(frozen=True)
class Piece:
    """What the ranks store of one tensor.

    Attributes:
        tensor: this rank's.
        shape: of the whole.
        regions: what the rank at each mesh position stores; None where it has no such tensor.
        position: of this rank among them.
    """

    tensor: torch.Tensor
    shape: tuple[int, ...]
    regions: tuple[Region | None, ...]
    position: int

    @property
    def own(self) -> Region | None:
        """What this rank stores."""
        return self.regions[self.position]


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
        states: of the steps; none likewise, and one for each stage of a pipeline on this rank.
        elsewhere: shapes of the tensors that only ranks of other stages have, by every name; None without stages.
        stages: that this rank holds of a pipeline.
        timeout_s: of waiting for other ranks' files.
    """

    tensors: dict[str, torch.Tensor]
    held: dict[str, Held]
    tied: dict[str, str]
    mesh: Mesh
    position: int
    communicator: Communicator | None = None
    states: tuple[StepState, ...] = ()
    elsewhere: Mapping[str, tuple[int, ...]] | None = None
    stages: HeldStages | None = None
    timeout_s: float = FILES_TIMEOUT_S

    @staticmethod
    def of(net: nn.Module, timeout_s: float = FILES_TIMEOUT_S) -> "Part":
        """Return this rank's part of a parallel module, or of one that every rank has whole.

        Raises:
            UsageError: a parallel module is inside another one, which would be taken for a whole one; or a pipeline in
                cycles has batches in flight.
        """
        states: tuple[StepState, ...] = ()
        communicator: Communicator | None = None
        elsewhere: dict[str, tuple[int, ...]] | None = None
        if isinstance(net, HeldStages):
            net.require_settled("its weights are saved, loaded or put together")
            states = tuple(stage._state for stage in net.held_stages)
            communicator = net.world
            mesh, position = communicator.mesh, communicator.position
            places = {name: place for stage in net.held_stages for name, place in stage.held.items()}
            elsewhere = {name: whole.shape for name, whole in net.whole.items() if name not in places}
        elif isinstance(net, ParallelModule):
            states = (net._state,)
            communicator = net._state.communicator
            mesh, position, places = communicator.mesh, communicator.position, net.held
        else:
            inside = next((name for name, each in net.named_modules() if isinstance(each, ParallelModule)), None)
            if inside is not None:
                raise UsageError(f"give the parallel module itself: it is {inside!r} of this {type(net).__name__}")
            size, position = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
            mesh = Mesh((MeshAxis("ranks", size),) if size > 1 else (), tuple(range(size)))
            places = held(net, net, {}, mesh, position)
        kept = net.state_dict(keep_vars=True)
        tensors: dict[str, torch.Tensor] = {}
        for name, place in places.items():
            if name in kept:
                tensors.setdefault(place.name, kept[name])
        tied = {name: place.name for name, place in places.items() if name in kept and name != place.name}
        own = {place.name: place for place in places.values()}
        if isinstance(net, HeldStages):
            tied = {name: whole.first for name, whole in net.whole.items() if name != whole.first}
        stages = net if isinstance(net, HeldStages) else None
        return Part(tensors, own, tied, mesh, position, communicator, states, elsewhere, stages, timeout_s)

    def piece(self, name: str) -> Piece:
        """Return this rank's piece of a tensor."""
        place = self.held[name]
        return Piece(self.tensors[name], place.shape, place.regions, place.position)

    def everyones(self, value: T) -> list[T]:
        """Return what every rank has to say, by mesh position; all must call it."""
        assert dist.is_initialized()
        pairs: list[Any] = [None] * self.mesh.size
        try:
            dist.all_gather_object(pairs, (dist.get_rank(), value), group=files_group(self.mesh, self.timeout_s))
        except RuntimeError as error:
            raise peer_failed(dist.get_rank(), "all_gather of what each rank has of a checkpoint", error) from error
        by_rank = dict(pairs)
        return [by_rank[rank] for rank in self.mesh.ranks]

    def complete(self, own: Mapping[Path_, Piece]) -> dict[Path_, Piece]:
        """Return the tensors of all ranks, in one order; those of other stages have an empty tensor here.

        Without stages every rank has them all, and nothing is said. Else all ranks must call it.
        """
        if self.elsewhere is None or self.mesh.size == 1:
            return dict(own)
        mine = {
            path: (piece.shape, str(piece.tensor.dtype).removeprefix("torch."), piece.own)
            for path, piece in own.items()
        }
        everyone = self.everyones(mine)
        device = next((piece.tensor.device for piece in own.values()), torch.device("cpu"))
        found: dict[Path_, Piece] = {}
        for path in sorted({path for listed in everyone for path in listed}):
            shape, dtype, _ = next(listed[path] for listed in everyone if path in listed)
            regions = tuple(listed[path][2] if path in listed else None for listed in everyone)
            here = own[path].tensor if path in own else torch.empty(0, dtype=getattr(torch, dtype), device=device)
            found[path] = Piece(here, shape, regions, self.position)
        return found

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

    def refuse_differing(self, identity: str, folder: Path) -> None:
        """Check that all ranks read the same checkpoint; all that have a part of the model must call it.

        Raises:
            MismatchError: on every rank, where machines have different folders of the name.
        """
        if self.communicator is None or self.mesh.size == 1 or not dist.is_initialized():
            return
        found = self.everyones(identity)
        for rank, other in zip(self.mesh.ranks, found, strict=True):
            if other != found[0]:
                raise MismatchError(
                    f"{folder} is not the same checkpoint on all ranks: rank {self.mesh.ranks[0]} reads one of "
                    f"{found[0]}, rank {rank} one of {other}. It must be on a file system that all ranks see."
                )

    def _everyones(self, value: bool) -> list[int]:
        """Return a value of every mesh position."""
        if self.mesh.size == 1:
            return [value]
        assert self.communicator is not None
        if not dist.is_initialized():  # threads of one process
            return self.communicator.start_gather_ints(int(value))()
        return self.everyones(int(value))


def whole_tensor(piece: Piece, part: Part, *, everywhere: bool) -> torch.Tensor | None:
    """Return a copy of a whole tensor on the CPU, put together from the pieces of all ranks; all of them must call it.

    Args:
        piece: of the tensor, with the regions of every mesh position.
        part: of this rank.
        everywhere: on every rank; else on mesh position 0, and None on the others.
    """
    is_first, shape, regions = part.position == 0, piece.shape, piece.regions
    if all(region is not None and region.shape == shape for region in regions):
        return piece.tensor.detach().to("cpu", copy=True) if everywhere or is_first else None
    assert part.communicator is not None
    givers = {region: position for position, region in reversed(list(enumerate(regions)))}
    counts = [region.volume if region is not None and givers[region] == p else 0 for p, region in enumerate(regions)]
    send = [counts[part.position] if p == 0 else 0 for p in range(len(regions))]
    receive = counts if is_first else [0] * len(regions)
    flat = piece.tensor.detach().contiguous().flatten()[: counts[part.position]]
    axes = tuple(range(len(part.mesh.axes)))
    got = part.communicator.exchange(flat, send, receive, axes)
    if not (is_first or everywhere):
        return None
    whole = piece.tensor.new_empty(shape)
    if is_first:
        frame = Region((0,) * len(shape), shape)
        for region, numbers in zip(regions, got.split(receive), strict=True):
            if region is not None and numbers.numel():
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
    pieces = part.complete({(name,): part.piece(name) for name in part.tensors})
    found: dict[str, torch.Tensor] = {}
    for path in sorted(pieces):  # one order on all ranks
        whole = whole_tensor(pieces[path], part, everywhere=everywhere)
        if whole is not None:
            found[path[0]] = whole
    if not found:
        return {}
    names = (*part.tensors, *part.tied) if part.elsewhere is None else (*sorted(found), *part.tied)
    return {name: found[part.tied.get(name, name)] for name in names}


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
    part.agree(lambda: write_file(full, path) if part.position == 0 else None, f"writing {path}")


def write_file(value: Any, path: Path) -> None:
    """Write what ``torch.load`` reads; the file has its name only when all of it is on disk."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        unfinished.unlink(missing_ok=True)  # of a call that was killed, or somebody's link, which is not followed
        with unfinished.open("xb") as stream:
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
    known = set(part.tensors) | set(part.tied) | set(part.elsewhere or ())
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
