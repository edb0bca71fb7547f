"""Every process group, created in one order on every rank. The only file that creates groups.

Groups of the same ranks for the same purpose are shared by all parallel modules of a process: a
group holds sockets and threads for as long as the job lives, and a job may make many modules.
"""

from collections.abc import Iterable
from datetime import timedelta
from typing import ClassVar, Final

import torch.distributed as dist

from planner.ir.mesh import Mesh
from runtime.comm.scheduling import let_others_finish

Axes = tuple[int, ...]

FILES_TIMEOUT_S: Final = 1800.0
"""Of waiting for the slowest rank's files, unless a caller says otherwise."""
_ON_HOST: Final = {"host", "saving", "files"}
"""Purposes whose messages are between CPUs."""


class ProcessGroups:
    """The groups of a mesh along sets of its axes.

    Blocking collectives and the gradient reductions that overlap with backward have groups of their
    own, so that neither waits for the other. A third group on the host collects batch sizes.
    """

    def __init__(self, mesh: Mesh, axes: Iterable[Axes], timeout_s: float, user: str = "") -> None:
        """Create the groups; every rank of the job must call this with the same arguments.

        Args:
            mesh: the ranks.
            axes: the sets of mesh axes along which ranks will talk.
            timeout_s: after which a collective with a missing peer fails.
            user: has groups of its own, for messages that must not wait for those of others.
        """
        timeout = timedelta(seconds=timeout_s)
        everyone = tuple(range(len(mesh.axes)))
        wanted = sorted({tuple(sorted(a)) for a in axes} | ({everyone} if everyone else set()))
        self._blocking = {a: _shared(mesh, a, timeout, "blocking", user) for a in wanted}
        self._overlapped = {a: _shared(mesh, a, timeout, "overlapped", user) for a in wanted}
        self._host = _shared(mesh, everyone, timeout, "host", user) if everyone else None

    def blocking(self, axes: Axes) -> dist.ProcessGroup:
        """Return the group for collectives that the caller waits for."""
        return self._blocking[tuple(sorted(axes))]

    def overlapped(self, axes: Axes) -> dist.ProcessGroup:
        """Return the group for collectives that run behind backward."""
        return self._overlapped[tuple(sorted(axes))]

    def host(self) -> dist.ProcessGroup:
        """Return the group of all ranks for small messages between CPUs."""
        assert self._host is not None
        return self._host


_Key = tuple[tuple[tuple[int, ...], ...], timedelta, str, str]


class _Job:
    """The groups of the job that this process is in."""

    world: dist.ProcessGroup | None = None
    groups: ClassVar[dict[_Key, dist.ProcessGroup]] = {}


def _shared(mesh: Mesh, axes: Axes, timeout: timedelta, purpose: str, user: str = "") -> dist.ProcessGroup:
    """Return the group of this rank along some axes, made at the first call; every rank makes the same calls."""
    enumeration = tuple(tuple(mesh.ranks[p] for p in group) for group in mesh.groups(axes))
    world = dist.distributed_c10d._get_default_group()
    if _Job.world is not world:  # this process has left the job that the groups belong to
        _Job.world = world
        _Job.groups.clear()
    key = (enumeration, timeout, purpose, user)
    if key not in _Job.groups:
        backend = "gloo" if purpose in _ON_HOST else None
        listed = [list(group) for group in enumeration]
        _Job.groups[key], _ = dist.new_subgroups_by_enumeration(listed, timeout=timeout, backend=backend)
        let_others_finish()
    return _Job.groups[key]


def saving_group(mesh: Mesh, timeout_s: float) -> dist.ProcessGroup:
    """Return the group of all ranks on which a thread behind training saves checkpoints.

    It is made at the first call, which every rank must make in the same place.
    """
    return _shared(mesh, tuple(range(len(mesh.axes))), timedelta(seconds=timeout_s), "saving")


def files_group(mesh: Mesh, timeout_s: float) -> dist.ProcessGroup:
    """Return the group of all ranks on which they wait for each other's files; made as the one for saving."""
    return _shared(mesh, tuple(range(len(mesh.axes))), timedelta(seconds=timeout_s), "files")
