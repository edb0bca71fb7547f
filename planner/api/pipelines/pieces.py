"""Stages as networks of their own: traced at micro-batch size, searched on a mesh of their own, each once."""

import contextlib
import functools
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from planner.cost.model import CostModel
from planner.cost.pipeline import InFlight
from planner.cost.sharding import ParameterSharding
from planner.cost.stages import accumulating, holding, without_tail
from planner.cost.table import CostTable, layer_pieces
from planner.cost.transfer import StepPricer
from planner.devices.route import Router
from planner.errors import InfeasibleError, NoPlanError
from planner.frontend.lower import TracedModel
from planner.ir.dimension import Dimension
from planner.ir.graph import LayerGraph
from planner.ir.mesh import Mesh, MeshAxis
from planner.ir.rules import default_io
from planner.ir.split import LayerId
from planner.ir.stages import legal_cuts
from planner.profile.key import PieceKey
from planner.search.auto import Planned, Search
from planner.search.elimination import solve_dp
from planner.search.formulate import formulate
from planner.search.problem import Choice, Limits
from planner.space.constraints import NO_CONSTRAINTS, Constraints
from planner.space.enumerate import SearchSpace, enumerate_splits

if TYPE_CHECKING:
    from planner.api.planning import Planner

MAX_UNITS: Final = 40
"""Between which cuts may lie; of more, neighbours of little compute are joined."""
ANY_SIZE_DEVICES: Final = 8
ANY_SIZE: Final = 400
"""Machines of so many devices at most, or units times devices: stages may have any number of devices (3, 5, …)."""
LEAN: Final = 1e4
"""What saves a share of the bytes may take so many times that share of the step longer."""
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
    _within: dict[tuple[int, Key, Mesh, InFlight, bool], list[Planned]] = field(default_factory=dict)
    _lean: dict[tuple[int, Key, Mesh, int], Choice | None] = field(default_factory=dict)
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

    def within(self, graph: LayerGraph, key: Key, mesh: Mesh, in_flight: InFlight, *, recompute: bool) -> list[Planned]:
        """Return splits of a stage with which all that it holds fits in memory; none where there are no such.

        The memory of what is returned counts what is in flight.

        Args:
            graph: of the stage.
            key: of the stage.
            mesh: of the stage.
            in_flight: what the stage holds.
            recompute: it computes activations again.
        """
        place = graph.batch, key, mesh, in_flight, recompute
        if place not in self._within:
            search, bare, _ = self.searched(graph, key, mesh, quick=False)
            limits, limit = Limits(self.planner.options.time_limit_s), self.planner.limit_bytes
            found = []
            for table, solver in ((bare, "dp"), (search.table, "auto")):
                with contextlib.suppress(InfeasibleError, NoPlanError):
                    held = holding(table, in_flight, recompute=recompute)
                    found.append(Search(held, limit, limits).solve(solver))
            self._within[place] = found
        return self._within[place]

    def lean(self, graph: LayerGraph, key: Key, mesh: Mesh, copies: int) -> Choice | None:
        """Return splits that hold as few bytes as possible, of those the fastest; None where none were found.

        Args:
            graph: of the stage.
            key: of the stage.
            mesh: of the stage.
            copies: how often its activations are held.
        """
        place = graph.batch, key, mesh, copies
        if place not in self._lean:
            _, bare, (fastest, *_) = self.searched(graph, key, mesh, quick=True)
            formulation = formulate(holding(bare, InFlight((0,), (((copies - 1, 1),),), (1,)), recompute=False))
            problem = formulation.problem
            s_per_byte = LEAN * fastest.timeline.step_s / max(fastest.timeline.memory_bytes, 1)
            pairs = zip(problem.node_s, problem.resident_bytes, strict=True)
            priced = replace(problem, node_s=tuple(s + s_per_byte * held for s, held in pairs))
            chosen = solve_dp(priced, Limits(self.planner.options.time_limit_s)).choice
            self._lean[place] = None if chosen is None else formulation.layer_choice(chosen)
        return self._lean[place]

    def table(
        self,
        graph: LayerGraph,
        mesh: Mesh,
        dimensions: Collection[Dimension],
        constraints: Constraints = NO_CONSTRAINTS,
    ) -> CostTable:
        """Return the priced search space of a stage on its mesh."""
        table = CostTable.of(*self._space(graph, mesh, dimensions, constraints))
        several = graph.batch < self.planner.traced.layers.batch
        return accumulating(table) if several and self.planner.sharding is ParameterSharding.FULL else table

    def _space(
        self, graph: LayerGraph, mesh: Mesh, dimensions: Collection[Dimension], constraints: Constraints
    ) -> tuple[SearchSpace, CostModel]:
        """Return the search space of a stage on its mesh, and what prices it."""
        planner = self.planner
        machine = planner.machine
        model = CostModel.of(graph, machine.graph, mesh, machine.profile, planner.settings, machine.others)
        io = default_io(graph.batch, mesh.size)
        own = not planner.options.sync_batch_norm
        return enumerate_splits(graph, mesh, io, dimensions, constraints, own_statistics=own), model

    def kernels(self, count: int) -> Iterator[PieceKey]:
        """Yield the pieces of layers that a search can ask for with so many micro-batches, some of them several times.

        They are those of the whole network on every number of devices that a stage may have.
        """
        planner, graph = self.planner, self.traced(count).layers
        for mesh in self.first_meshes(len(legal_cuts(graph)) + 1):
            yield from layer_pieces(*self._space(graph, mesh, planner.dimensions, planner.options.constraints))

    def first_meshes(self, num_units: int) -> Iterator[Mesh]:
        """Yield the mesh of the first devices for every number of them that a stage may have.

        Any number where that is cheap, else powers of two and whole groups.

        Args:
            num_units: between which cuts may lie.
        """
        devices = len(self.planner.machine.graph.devices)
        inner = self.planner.machine.graph.levels[-1].size
        every = devices <= ANY_SIZE_DEVICES or min(num_units, MAX_UNITS) * devices <= ANY_SIZE
        for n in range(1, devices):
            mesh = self.mesh(0, n) if every or n & (n - 1) == 0 or n % inner == 0 else None
            if mesh is not None:
                yield mesh

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
