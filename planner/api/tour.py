"""The search over candidate meshes."""

import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from planner.api.meshes import MAX_PAIRS, Counts, factorings, num_pairs
from planner.deadline import OutOfTimeError
from planner.errors import InfeasibleError, LayerwiseError, NoPlanError, UsageError
from planner.ir.mesh import Mesh
from planner.search.auto import Planned, Search
from planner.search.fixed import FIXED

if TYPE_CHECKING:
    from planner.api.planning import Planner

_log = logging.getLogger(__name__)


EQUAL: Final = 1e-9
"""Relative difference of equally fast plans, and the gap that is a proof. Sums are rounded."""


def fastest(found: Sequence[tuple[Search, Planned]]) -> tuple[Search, Planned]:
    """Return the fastest plan; of equally fast ones that on the fewest devices, the first of those."""
    least_s = min(planned.timeline.step_s for _, planned in found)
    equal = [pair for pair in found if pair[1].timeline.step_s <= least_s * (1 + EQUAL)]
    return min(equal, key=lambda pair: pair[0].table.space.mesh.size)


class Tour:
    """Goes through candidate meshes, keeps the plans and leaves out what cannot be faster than the best.

    Args:
        planner: what is planned.
        found: gets the plans, as they are found.
    """

    def __init__(self, planner: "Planner", found: list[tuple[Search, Planned]]) -> None:
        self._planner, self._solver = planner, planner.options.solver
        self._found = found
        self._failure: LayerwiseError | None = None
        self._start = time.perf_counter()
        self._left = MAX_PAIRS

    def go(self) -> list[tuple[Search, Planned]]:
        """Return the plan on every mesh that was searched, at least one."""
        planner = self._planner
        if self._solver in FIXED:
            self._solve(planner.fixed_mesh(self._solver))
        else:
            first, *cut = planner.meshes()
            self._solve(first)
            # what cannot be done on all devices (a pin that is illegal there) is not to be done on fewer
            counts_of = {mesh: counts for counts, mesh in self._fewer()} if self._found else {}
            for mesh in cut:
                self._visit(mesh)
            best = self._best_mesh() if self._found else first
            for mesh in factorings(planner.machine.graph, counts_of[best]) if best in counts_of else ():
                self._visit(mesh)
        if not self._found:
            assert self._failure is not None
            raise self._failure
        return self._found

    def _fewer(self) -> list[tuple[Counts, Mesh]]:
        """Visit meshes over fewer devices; return them."""
        meshes = self._planner.fewer_meshes()
        hopeless: list[Counts] = []
        for counts, mesh in meshes:
            if not any(all(a <= b for a, b in zip(counts, above, strict=True)) for above in hopeless) and (
                self._visit(mesh) is False
            ):
                hopeless.append(counts)
        return meshes

    def _best_mesh(self) -> Mesh:
        return fastest(self._found)[0].table.space.mesh

    def _visit(self, mesh: Mesh) -> bool | None:
        """Search a mesh if there is time; return False where its compute alone takes too long, None without a look."""
        planner = self._planner
        if self._left >= 0 and self._found and time.perf_counter() - self._start > planner.options.time_limit_s:
            _log.warning("time limit: %d candidate meshes searched", len(self._found))
            self._left = -1
        pairs = num_pairs(planner.traced.layers, planner.dimensions, len(mesh.axes)) * planner.share_factor
        if pairs > self._left:
            return None
        try:
            is_part = mesh.size < len(planner.machine.graph.devices)  # over all of them, compute is hardly ever longer
            if (
                is_part
                and self._found
                and planner.floor_s(mesh) > fastest(self._found)[1].timeline.step_s * (1 + EQUAL)
            ):
                return False
        except InfeasibleError:
            return None  # pinned so that no split is legal on this mesh
        self._left -= pairs
        self._solve(mesh)
        return True

    def _solve(self, mesh: Mesh) -> None:
        name = "x".join(map(str, mesh.shape)) or "1"
        _log.info("searching mesh %s", name)
        try:
            search = self._planner.search(mesh)
            planned = search.solve(self._solver)
        except OutOfTimeError:
            raise
        except (InfeasibleError, NoPlanError, UsageError) as error:  # another mesh may do
            _log.info("mesh %s: %s", name, error)
            self._failure = self._failure or error
            return
        self._found.append((search, planned))
        _log.info("mesh %s: %.6g s", name, planned.timeline.step_s)
