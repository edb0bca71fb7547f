"""Branch parallelism: branches of a fork-join region on different coordinates of a mesh axis, at the same time.

A coordinate of the axis computes its branches alone; over the other axes they are split as any layer. So of a region

    step of the region = max over coordinates of (sum of the layers of its branches) + bringing the branches together,

where the second is the transfers between the branches and the layers around them. The first is a number
partitioning problem for the times of whole branches (``planner.search.partition``); transfers, the splits over the
other axes and the layers around are decided by the exact search with the region's layers on their coordinates, and the
simulated step, in which each coordinate has streams of its own, decides whether the region stays so.
"""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from planner.cost.model import LayerCost
from planner.cost.table import CostTable
from planner.ir.branches import Region, branch_bound, describe_region, fork_join_regions
from planner.ir.dimension import Dimension
from planner.ir.ops import Redistribute
from planner.ir.rules import partition
from planner.ir.split import LayerId, Split
from planner.search.auto import Branches, Planned, Search, Start
from planner.search.elimination import solve_dp
from planner.search.local import PROGRESS
from planner.search.partition import fullest, partitioned
from planner.search.problem import Limits
from planner.space.enumerate import SearchSpace

_log = logging.getLogger(__name__)

MAX_PAIRS: Final = 4_000_000
"""Of splits on all edges, up to which a space with branches is priced."""
MAX_RANKS: Final = 64
"""Of a mesh on which branches are placed; on more, what one placement changes is small, and simulated rank by rank."""
MAX_ASSIGNMENTS: Final = 4
"""Of each region that are simulated; those whose compute is shortest."""
WORTH: Final = 0.01
"""A step that no plan with branches can undercut by more than this share is left as it is."""


@dataclass(frozen=True)
class Assignment:
    """Some branches of a region on coordinates of a mesh axis; the others stay on all ranks.

    Attributes:
        region: the region.
        axis: of the mesh.
        coordinates: by layer.
        estimate_s: compute of the region.
    """

    region: Region
    axis: int
    coordinates: Mapping[int, int]
    estimate_s: float


@dataclass(frozen=True)
class Branched:
    """What is known of branch parallelism on a mesh.

    Attributes:
        regions: fork-join regions of the network.
        bound: by how much computing branches at the same time can shorten compute, by FLOP.
        lower_bound_s: no strategy, with branches or without, has a shorter simulated step.
        tried_s: the shortest simulated step with branches; None where none was worth a simulation, or possible.
        found: the better plan, with the search it comes from; None where the plan without branches is as good.
        taken: the regions that it computes so.
    """

    regions: tuple[Region, ...]
    bound: float
    lower_bound_s: float
    tried_s: float | None = None
    found: tuple[Search, Planned] | None = None
    taken: tuple[Assignment, ...] = ()

    def summary(self, *, taken: bool) -> Branches:
        """Return what a plan says of it, with the regions that are computed so or without."""
        regions = [] if self.found is None or not taken else self.taken
        described = tuple(_described(self.found[0].table.space, own) for own in regions if self.found is not None)
        return Branches(len(self.regions), self.bound, self.tried_s, described)


def _described(space: SearchSpace, assignment: Assignment) -> str:
    """Return which branches of a region run where, each by its first layer."""
    axis, region = space.mesh.axes[assignment.axis].name, assignment.region
    firsts: dict[int, list[str]] = {}
    for first in sorted(branch[0] for branch in region.branches):
        if first in assignment.coordinates:
            firsts.setdefault(assignment.coordinates[first], []).append(space.graph.layers[first].id)
    parts = "; ".join(f"{axis}={c}: {', '.join(names)}" for c, names in sorted(firsts.items()))
    return f"{describe_region(space.graph, region)} ({parts})"


def with_branches(
    search: Search, planned: Planned, *, limit_bytes: int | None, limits: Limits | None = None
) -> Branched:
    """Return what branch parallelism makes of a plan on its mesh.

    Args:
        search: of the plan; its space has no idle ranks.
        planned: the best plan without branches.
        limit_bytes: of memory per device.
        limits: of each solver.
    """
    table = search.table
    regions = fork_join_regions(table.space.graph)
    sizes = table.space.mesh.shape
    bound = branch_bound(table.space.graph, max(sizes, default=1), regions)
    nothing = Branched(regions, bound, search.lower_bound_s())
    if not regions or not sizes:
        return nothing
    floor_s = branch_floor_s(table, regions)
    unplaced = replace(nothing, lower_bound_s=min(nothing.lower_bound_s, floor_s))
    if table.space.mesh.size > MAX_RANKS or planned.timeline.step_s * (1 - WORTH) <= floor_s:
        return unplaced
    every = [_every_assignment(table, region) for region in regions]
    candidates = [a for own in every for a in _shortest(own)]
    if not candidates:
        return nothing
    space = _widened(table.space, candidates)
    if num_pairs(space) > MAX_PAIRS:
        _log.info("branches: %d pairs of splits are too many", num_pairs(space))
        return unplaced
    wide = Search(CostTable.of(space, table.model), limit_bytes, limits)
    # coordinates of equal devices are one like the other; others may be better than those that are searched
    is_whole = len(table.model.crew.different) == 1 and _placed(candidates) == _placed(a for own in every for a in own)
    lower_bound_s = min(nothing.lower_bound_s, wide.lower_bound_s() if is_whole else floor_s)
    climb = _Climb(wide, table, planned)
    for assignment in candidates:  # outer regions first
        climb.attempt(assignment)
    if not climb.taken:
        return replace(nothing, lower_bound_s=lower_bound_s, tried_s=climb.tried_s)
    final = Search(CostTable.of(assigned_space(table.space, climb.taken), table.model), limit_bytes, limits)
    strategy = wide.table.strategy(climb.best.choice)
    refined = final.refine([replace(climb.best, choice=final.table.choice(strategy))])
    found = final, replace(refined, lower_bound_s=lower_bound_s)
    return Branched(regions, bound, lower_bound_s, refined.timeline.step_s, found, tuple(climb.taken))


def assignments(table: CostTable, region: Region) -> list[Assignment]:
    """Return the ways to compute a region's branches at the same time that take least compute.

    The longest branches may stay on all ranks, where splitting them gains more than leaving them whole.
    """
    return _shortest(_every_assignment(table, region))


def _placed(candidates: Iterable[Assignment]) -> set[tuple[int, int]]:
    """Return which layers may be alone on which axes."""
    return {(i, assignment.axis) for assignment in candidates for i in assignment.coordinates}


def _shortest(found: Iterable[Assignment]) -> list[Assignment]:
    return sorted(found, key=lambda assignment: assignment.estimate_s)[:MAX_ASSIGNMENTS]


def _every_assignment(table: CostTable, region: Region) -> list[Assignment]:
    stay_s = [sum(min(map(compute_s, table.layers[i])) for i in branch) for branch in region.branches]
    leaders = table.space.leaders
    elsewhere = [{own for i, own in enumerate(leaders) if i not in set(branch)} for branch in region.branches]
    found = []
    for axis, size in enumerate(table.space.mesh.shape):
        of_coordinate = [
            [sum(_alone_s(table, i, axis, c) for i in branch) for branch in region.branches]
            for c in _unlike(table, axis)
        ]
        alone_s = [max(each) for each in zip(*of_coordinate, strict=True)]
        movable = sorted((b for b, t in enumerate(alone_s) if t < math.inf), key=lambda b: -alone_s[b])
        movable = [b for b in movable if not elsewhere[b] & {leaders[i] for i in region.branches[b]}]
        for num_staying in range(len(movable) - 1):
            moved = movable[num_staying:]
            bins = partitioned([alone_s[b] for b in moved], size)
            if len(of_coordinate) > 1:
                bins = _on_fastest([[own[b] for b in moved] for own in of_coordinate], bins)
            own_s = [of_coordinate[c % len(of_coordinate)][b] for b, c in zip(moved, bins, strict=True)]
            staying_s = sum(own for b, own in enumerate(stay_s) if b not in moved)
            coordinates = {i: own for b, own in zip(moved, bins, strict=True) for i in region.branches[b]}
            if len(set(bins)) > 1:
                found.append(Assignment(region, axis, coordinates, staying_s + fullest(own_s, bins)))
    return found


def _on_fastest(seconds: Sequence[Sequence[float]], bins: Sequence[int]) -> tuple[int, ...]:
    """Return bins by coordinates: the fullest on the one that is fastest.

    Args:
        seconds: of every coordinate, what it takes for each thing.
        bins: of each thing.
    """
    held = [sum(t for t, own in zip(seconds[0], bins, strict=True) if own == b) for b in range(len(seconds))]
    fullest_first = sorted(range(len(held)), key=lambda b: -held[b])
    fastest_first = sorted(range(len(held)), key=lambda c: sum(seconds[c]))
    place = dict(zip(fullest_first, fastest_first, strict=True))
    return tuple(place[own] for own in bins)


def branch_floor_s(table: CostTable, regions: Iterable[Region]) -> float:
    """Return what no step is shorter than, with branches or without: the least mean of compute over the ranks."""
    inside = {i for region in regions for i in region.layers}
    least = []
    for i, costs in enumerate(table.layers):
        least.append(min(map(compute_s, costs)))
        for axis, size in enumerate(table.space.mesh.shape) if i in inside else ():
            least[-1] = min(least[-1], *(_alone_s(table, i, axis, c) / size for c in _unlike(table, axis)))
    return math.fsum(least)


def compute_s(cost: LayerCost) -> float:
    """Return what a device computes of a layer in a step, in seconds."""
    return cost.forward_s + cost.backward_s + cost.collect_s + cost.update_s


def alone_splits(space: SearchSpace, i: int, axis: int, coordinate: int) -> tuple[Split, ...]:
    """Return the splits under which one coordinate of an axis computes a layer alone; none where that is illegal."""
    layer, mesh = space.graph.layers[i], space.mesh
    lies = partition(layer, space.graph.inputs_of(layer), mesh)
    weights = tuple(int(c == coordinate) for c in range(mesh.shape[axis]))
    found: dict[Split, None] = {}
    for split in space.splits[layer.id]:
        dims = list(split.dimensions)
        if isinstance(layer.op, Redistribute):
            dims[axis] = Dimension.REPLICATE  # it follows its readers
        if dims[axis] is Dimension.REPLICATE:
            alone = Split.of(mesh, tuple(dims)).with_shares({**dict(split.shares), mesh.axes[axis].name: weights})
            if lies.is_legal(alone):
                found[alone] = None
    return tuple(found)


def _unlike(table: CostTable, axis: int) -> range:
    """Return the coordinates of an axis that may take unequally long for a layer: one, where devices are equal."""
    return range(table.space.mesh.shape[axis] if len(table.model.crew.different) > 1 else 1)


def _alone_s(table: CostTable, i: int, axis: int, coordinate: int) -> float:
    """Return the least compute of a layer that one coordinate of an axis computes alone; inf where that is illegal."""
    layer = table.space.graph.layers[i]
    alone = alone_splits(table.space, i, axis, coordinate)
    if not alone:
        return math.inf
    if isinstance(layer.op, Redistribute):
        return 0.0
    if len(table.model.crew.different) > 1:
        return min(map(compute_s, table.model.layers(layer, alone)))
    pairs = zip(table.space.splits[layer.id], table.layers[i], strict=True)
    return min(compute_s(cost) for split, cost in pairs if split.dimensions[axis] is Dimension.REPLICATE)


def num_pairs(space: SearchSpace) -> int:
    """Return the pairs of splits on all edges of a space."""
    counts = [len(space.splits[layer.id]) for layer in space.graph.layers]
    return sum(counts[i] * counts[j] for i, j, _ in space.graph.edges())


def _widened(space: SearchSpace, candidates: Iterable[Assignment]) -> SearchSpace:
    """Return the space in which layers may also be alone on the coordinates that they are assigned."""
    more: dict[LayerId, dict[Split, None]] = {}
    for assignment in candidates:
        for i, coordinate in assignment.coordinates.items():
            own = more.setdefault(space.graph.layers[i].id, {})
            own.update(dict.fromkeys(alone_splits(space, i, assignment.axis, coordinate)))
    return _with(space, {layer: (*space.splits[layer], *own) for layer, own in more.items()})


def assigned_space(space: SearchSpace, taken: Iterable[Assignment]) -> SearchSpace:
    """Return the space in which these assignments are made."""
    return _with(space, {
        space.graph.layers[i].id: alone_splits(space, i, assignment.axis, coordinate)
        for assignment in taken for i, coordinate in assignment.coordinates.items()
    })  # fmt: skip


def _with(space: SearchSpace, splits: Mapping[LayerId, tuple[Split, ...]]) -> SearchSpace:
    one: dict[tuple[Split, ...], tuple[Split, ...]] = {}  # equal tuples become one object
    return replace(space, splits={**space.splits, **{layer: one.setdefault(own, own) for layer, own in splits.items()}})


class _Climb:
    """Goes through assignments and takes those that make the simulated step shorter.

    Args:
        wide: the search in the space with all of them.
        table: of the space without branches.
        planned: where it starts.
    """

    def __init__(self, wide: Search, table: CostTable, planned: Planned) -> None:
        self._wide, self._table = wide, table
        choice = wide.table.choice(table.strategy(planned.choice))
        self.best = Start(choice, planned.timeline.step_s, planned.bucket_bytes)
        self.taken: list[Assignment] = []
        self.tried_s: float | None = None

    def attempt(self, assignment: Assignment) -> None:
        """Simulate an assignment beside those that were taken; take it, if the step is shorter."""
        clash = [other for other in self.taken if not assignment.region.layers.isdisjoint(other.region.layers)]
        if any(other.region is not assignment.region for other in clash):
            return
        start = self._placed(assignment)
        if start is None:
            return
        self.tried_s = min(start.step_s, self.tried_s or math.inf)
        if start.step_s < self.best.step_s * (1 - PROGRESS):
            _log.debug("%s: %.6g s", describe_region(self._table.space.graph, assignment.region), start.step_s)
            self.best, self.taken = start, [*(other for other in self.taken if other not in clash), assignment]

    def _placed(self, assignment: Assignment) -> Start | None:
        """Return the best choice with these branches in their places; only they and the layers around may change."""
        wide, space = self._wide, self._table.space
        graph = space.graph
        around = {j for i, j, _ in graph.edges() if i in assignment.region.layers}
        around |= {i for i, j, _ in graph.edges() if j in assignment.region.layers}
        if assignment.region.fork is not None:
            around |= {graph.index[i] for i in graph.layers[assignment.region.fork].inputs}
        placed = {i for other in self.taken for i in other.coordinates}
        allowed: dict[int, list[int]] = {}
        for i, layer in enumerate(graph.layers):
            own = wide.table.space.splits[layer.id]
            if i in assignment.coordinates:
                splits = alone_splits(space, i, assignment.axis, assignment.coordinates[i])
                allowed[i] = [own.index(s) for s in splits]
            elif i in assignment.region.layers or (i in around and i not in placed):
                allowed[i] = list(range(len(space.splits[layer.id])))
            else:
                allowed[i] = [self.best.choice[i]]
        formulation, problem = wide.formulation.pinned(allowed)
        solution = solve_dp(problem.additive(), Limits())
        if solution.choice is None:
            return None
        choice = formulation.layer_choice(solution.choice)
        return wide.start(choice, "branches") if wide.choice_fits(choice) else None
