"""Stages as networks of their own: traced at micro-batch size, searched on a mesh of their own, each once."""

import functools
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from planner.cost.model import CostModel
from planner.cost.stages import without_tail
from planner.cost.table import CostTable
from planner.cost.transfer import StepPricer
from planner.devices.route import Router
from planner.frontend.lower import TracedModel
from planner.ir.dimension import Dimension
from planner.ir.graph import LayerGraph
from planner.ir.mesh import Mesh, MeshAxis
from planner.ir.rules import default_io
from planner.ir.split import LayerId
from planner.search.auto import Planned, Search
from planner.search.problem import Limits
from planner.space.constraints import NO_CONSTRAINTS, Constraints
from planner.space.enumerate import enumerate_splits

if TYPE_CHECKING:
    from planner.api.planning import Planner

Key = tuple[LayerId | None, LayerId | None]
"""Of a stage: its first layer, and that of the next stage; none where they are the first and last of the network."""


@dataclass
class Pieces:
    """What is searched and priced of a network's stages.

    Attributes:
        planner: of the whole network.
    """

    planner: "Planner"
    _searched: dict[tuple[int, Key, Mesh], tuple[Search, CostTable, list[Planned]]] = field(default_factory=dict)
    _traced: dict[int, TracedModel] = field(default_factory=dict)
    _meshes: dict[tuple[int, int], Mesh | None] = field(default_factory=dict)
    _links_s: dict[tuple[int, int, int], float] = field(default_factory=dict)

    @functools.cached_property
    def pricer(self) -> StepPricer:
        """What prices messages between stages."""
        graph = self.planner.machine.graph
        return StepPricer(Router(graph, graph.mesh()), self.planner.machine.profile.roofline.bandwidth_bytes_per_s)

    def traced(self, count: int) -> TracedModel:
        """Return the model at the micro-batch size that so many micro-batches give."""
        batch = self.planner.traced.layers.batch // count
        if batch not in self._traced:
            whole = self.planner.traced
            self._traced[batch] = whole if count == 1 else self.planner.retraced(batch)
        return self._traced[batch]

    def searched(
        self, graph: LayerGraph, key: Key, mesh: Mesh, *, quick: bool
    ) -> tuple[Search, CostTable, list[Planned]]:
        """Return searches of a stage with and without the tail of a step, and the splits that they found.

        Args:
            graph: of the stage.
            key: of the stage.
            mesh: of the stage.
            quick: add up, and simulate only what that found.
        """
        place = graph.batch, key, mesh
        if place not in self._searched:
            options, limits = self.planner.options, Limits(self.planner.options.time_limit_s)
            table = self.table(graph, mesh, self.planner.dimensions, options.constraints)
            bare = without_tail(table)
            search = Search(table, None, limits)
            planned = [Search(bare, None, limits).solve("dp")]
            if not quick:
                planned += [search.solve("auto" if mesh.size > 1 else "dp")]
            self._searched[place] = search, bare, planned
        return self._searched[place]

    def table(
        self,
        graph: LayerGraph,
        mesh: Mesh,
        dimensions: Collection[Dimension],
        constraints: Constraints = NO_CONSTRAINTS,
    ) -> CostTable:
        """Return the priced search space of a stage on its mesh."""
        planner = self.planner
        model = CostModel.of(graph, planner.machine.graph, mesh, planner.machine.profile, planner.settings)
        io = default_io(graph.batch, mesh.size)
        return CostTable.of(enumerate_splits(graph, mesh, io, dimensions, constraints), model)

    def link_s(self, source: int, target: int, num_bytes: int) -> float:
        """Return what a message from one device to another takes."""
        key = source, target, num_bytes
        if key not in self._links_s:
            self._links_s[key] = self.pricer.messages_s({(source, target): num_bytes})
        return self._links_s[key]

    def mesh(self, first: int, count: int) -> Mesh | None:
        """Return the mesh of a run of devices: of one group of a level, or whole groups of it; None for another run."""
        if (first, count) not in self._meshes:
            self._meshes[first, count] = self._mesh(first, count)
        return self._meshes[first, count]

    def _mesh(self, first: int, count: int) -> Mesh | None:
        axes: list[MeshAxis] = []
        span = 1
        for level in reversed(self.planner.machine.graph.levels):
            group = span * level.size
            is_last = count <= group
            size = count // span if is_last else level.size
            if size > 1:
                axes.insert(0, MeshAxis(level.name, size))
            if is_last:
                fits = count % span == first % span == 0 and first // group == (first + count - 1) // group
                return Mesh(tuple(axes), tuple(range(first, first + count))) if fits else None
            span = group
        return None
