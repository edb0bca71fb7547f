"""Every process group, created in one order on every rank. The only file that creates groups."""

from collections.abc import Iterable
from datetime import timedelta

import torch.distributed as dist

from planner.ir.mesh import Mesh

Axes = tuple[int, ...]


class ProcessGroups:
    """The groups of a mesh along sets of its axes.

    Blocking collectives and the gradient reductions that overlap with backward have groups of their
    own, so that neither waits for the other. A third group on the host collects batch sizes.
    """

    def __init__(self, mesh: Mesh, axes: Iterable[Axes], timeout_s: float) -> None:
        """Create the groups; every rank of the job must call this with the same arguments.

        Args:
            mesh: the ranks.
            axes: the sets of mesh axes along which ranks will talk.
            timeout_s: after which a collective with a missing peer fails.
        """
        timeout = timedelta(seconds=timeout_s)
        everyone = tuple(range(len(mesh.axes)))
        wanted = sorted({tuple(sorted(a)) for a in axes} | ({everyone} if everyone else set()))
        self._blocking = {a: _create(mesh, a, timeout) for a in wanted}
        self._overlapped = {a: _create(mesh, a, timeout) for a in wanted}
        self._host = _create(mesh, everyone, timeout, backend="gloo") if everyone else None

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


def _create(mesh: Mesh, axes: Axes, timeout: timedelta, backend: str | None = None) -> dist.ProcessGroup:
    enumeration = [[mesh.ranks[p] for p in group] for group in mesh.groups(axes)]
    group: dist.ProcessGroup
    group, _ = dist.new_subgroups_by_enumeration(enumeration, timeout=timeout, backend=backend)
    return group
