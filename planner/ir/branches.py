"""Fork-join regions of a layer graph: where a network goes several ways at once, and where the ways meet again.

A fork is a layer whose tensor several layers read, or the inputs of the model taken together. Its join is its
immediate post-dominator: the first layer through which everything behind the fork goes. What lies in between falls
into branches, which have no tensor in common, and which different ranks may therefore compute at the same time.
"""

import functools
import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import networkx as nx

from planner.deadline import look
from planner.ir.count import layer_flop
from planner.ir.graph import LayerGraph, is_boundary, tied_layers
from planner.ir.mesh import Mesh
from planner.ir.split import Split


@dataclass(frozen=True, slots=True)
class Region:
    """Layers between a fork and its join, by their positions in the graph.

    Attributes:
        fork: the layer whose tensor goes several ways; None for the inputs of the model.
        join: the layer where they meet; None where each way ends in an output of its own.
        branches: two or more; each in the order of the graph, those that share a parameter as one.
    """

    fork: int | None
    join: int | None
    branches: tuple[tuple[int, ...], ...]

    @property
    def layers(self) -> frozenset[int]:
        """All layers of all branches."""
        return frozenset(layer for branch in self.branches for layer in branch)


def fork_join_regions(graph: LayerGraph) -> tuple[Region, ...]:
    """Return every region of a graph, outer ones before those nested in their branches.

    Inputs and outputs of the model are in no branch: the plan's io places them. A region is left out where a way into
    it leads past its fork, or where less than two branches are left once those that share a parameter are one.
    """
    root, sink = -1, len(graph.layers)
    flow: nx.DiGraph[int] = nx.DiGraph()
    flow.add_nodes_from(range(root, sink + 1))
    flow.add_edges_from((i, j) for i, j, _ in graph.edges())
    flow.add_edges_from([(root, j) for j, layer in enumerate(graph.layers) if not layer.inputs])
    flow.add_edges_from([(i, sink) for i in range(sink) if not flow.out_degree(i)])
    join_of = nx.immediate_dominators(flow.reverse(copy=False), sink)
    tied: dict[int, list[int]] = {}
    for i, first in enumerate(tied_layers(graph)):
        tied.setdefault(first, []).append(i)
    groups = [group for group in tied.values() if len(group) > 1]
    found = []
    for fork in range(root, sink):
        if flow.out_degree(fork) > 1:
            look()
            inside = _between(flow, fork, join_of[fork])
            if all(set(flow.predecessors(i)) <= inside | {fork} for i in inside):
                own = {i for i in inside if not is_boundary(graph.layers[i].op)}
                branches = _branches(flow, own, groups)
                if len(branches) > 1:
                    ends = [None if end in {root, sink} else end for end in (fork, join_of[fork])]
                    found.append(Region(ends[0], ends[1], branches))
    return tuple(sorted(found, key=lambda region: (-len(region.layers), region.branches)))


def _between(flow: "nx.DiGraph[int]", fork: int, join: int) -> set[int]:
    """Return what is reached from a fork before its join."""
    inside: set[int] = set()
    waiting = [fork]
    while waiting:
        new = [j for j in flow.successors(waiting.pop()) if j != join and j not in inside]
        inside.update(new)
        waiting += new
    return inside


def _branches(flow: "nx.DiGraph[int]", own: set[int], tied: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    """Return the parts of a region's layers that have neither a tensor nor a parameter in common."""
    parts: nx.Graph[int] = nx.Graph()
    parts.add_nodes_from(own)
    parts.add_edges_from((i, j) for i in own for j in flow.successors(i) if j in own)
    for group in tied:
        if own.intersection(group):
            if not own.issuperset(group):
                return ()  # a parameter is also used outside of the region, on all ranks
            parts.add_edges_from((group[0], other) for other in group[1:])
    return tuple(sorted(tuple(sorted(part)) for part in nx.connected_components(parts)))


def outermost(regions: Sequence[Region]) -> tuple[Region, ...]:
    """Return the regions that are nested in no other; their layers are disjoint."""
    taken: set[int] = set()
    found = []
    for region in regions:  # outer ones come first
        if taken.isdisjoint(region.layers):
            found.append(region)
            taken |= region.layers
    return tuple(found)


def branch_bound(graph: LayerGraph, num_parts: int, regions: Sequence[Region] | None = None) -> float:
    """Return by how much computing branches at the same time can shorten a network's compute, by FLOP; at least 1.

    Everything outside of regions takes as long as before. A region takes at least as long as its longest branch, and
    at least its share of the whole where there are fewer parts than branches. Nested regions make a branch shorter.

    Args:
        graph: the network.
        num_parts: groups of ranks that may compute different branches.
        regions: of the graph, if they are known.
    """
    flop = layer_flop(graph)
    found = fork_join_regions(graph) if regions is None else regions
    total = sum(flop)
    return total / (total - _saved(flop, found, num_parts)) if total else 1.0


def _saved(flop: Sequence[int], regions: Sequence[Region], num_parts: int) -> float:
    saved = 0.0
    for region in outermost(regions):
        spans = []
        for branch in region.branches:
            members = set(branch)
            nested = [r for r in regions if r is not region and r.layers <= members]
            spans.append(sum(flop[i] for i in branch) - _saved(flop, nested, num_parts))
        whole = sum(flop[i] for branch in region.branches for i in branch)
        saved += whole - max(*spans, whole / num_parts)
    return saved


@functools.lru_cache(maxsize=1 << 14)
def busy_positions(split: Split, mesh: Mesh) -> int:
    """Return the mesh positions that hold something of a layer under a split, as bits."""
    if not split.weights:
        return (1 << mesh.size) - 1
    by_axis = [[True] * n if own is None else [w > 0 for w in own]
               for own, n in zip(split.weights, mesh.shape, strict=True)]  # fmt: skip
    return sum(1 << position for position, each in enumerate(itertools.product(*by_axis)) if all(each))


def moves_at_reader(made_by: Collection[int], read_by: Collection[int]) -> bool:
    """Return whether a tensor is moved where its reader runs, not right behind where it was made.

    So is what leaves a branch: ranks that compute other branches are not disturbed before they join. What enters a
    branch is moved at the fork, while all ranks are there.

    Args:
        made_by: the ranks, or groups of ranks, that compute the layer that makes it.
        read_by: those that compute its reader.
    """
    return set(made_by) < set(read_by)


def describe_region(graph: LayerGraph, region: Region) -> str:
    """Return in a few words where a region is."""
    names = [None if end is None else graph.layers[end].id for end in (region.fork, region.join)]
    fork = "the inputs" if names[0] is None else names[0].removesuffix(":shared")
    return f"{len(region.branches)} branches from {fork} to {'the outputs' if names[1] is None else names[1]}"
