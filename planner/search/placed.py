"""Branches that a strategy computes at the same time on different devices: what each is busy with, what that gains."""

import math
from collections.abc import Iterator

from planner.cost.simulate import simulated_step_s
from planner.ir.branches import Region, describe_region, fork_join_regions
from planner.ir.split import Split
from planner.search.alternatives import Around, Place, Placed, least
from planner.search.branches import compute_s


def placed_branches(around: Around) -> Iterator[Placed]:
    """Yield the regions of which a strategy computes branches at the same time."""
    step_s = simulated_step_s(around.table, around.choice, around.bucket_bytes)
    graph = around.table.space.graph
    for region in fork_join_regions(graph):
        if len(found := _places(around, region)) > 1:
            spread = least(around.table, around.formulation, _on_all(around, region), around.bucket_bytes)
            yield Placed(describe_region(graph, region), found, step_s, math.inf if spread is None else spread[0])


def _places(around: Around, region: Region) -> tuple[Place, ...]:
    """Return what coordinates compute alone; nothing of a branch of which others compute a part."""
    table = around.table
    branches: dict[str, list[tuple[int, ...]]] = {}
    for branch in region.branches:
        wheres = {_where(_split(around, i)) for i in branch}
        if len(wheres) == 1 and (where := wheres.pop()) is not None:
            branches.setdefault(where, []).append(branch)
    seconds = {
        where: math.fsum(compute_s(table.layers[i][around.choice[i]]) for branch in own for i in branch)
        for where, own in branches.items()
    }
    names = [layer.id for layer in table.space.graph.layers]
    return tuple(
        Place(
            where,
            tuple(names[branch[0]] for branch in own),
            tuple(names[i] for branch in own for i in branch),
            seconds[where],
            max(seconds.values()) - seconds[where],
        )
        for where, own in sorted(branches.items())
    )


def _split(around: Around, i: int) -> Split:
    space = around.table.space
    return space.splits[space.graph.layers[i].id][around.choice[i]]


def _where(split: Split) -> str | None:
    """Return the only coordinate of an axis that computes a layer; None where all do."""
    alone = [f"{axis}={own.index(1)}" for axis, own in split.shares if sum(own) == 1]
    return alone[0] if len(alone) == 1 else None


def _on_all(around: Around, region: Region) -> dict[int, list[int]]:
    """Return the positions of the splits that leave no device idle, of every layer of a region."""
    space = around.table.space
    names = {i: space.graph.layers[i].id for i in region.layers}
    return {i: [c for c, split in enumerate(space.splits[n]) if _where(split) is None] for i, n in names.items()}
