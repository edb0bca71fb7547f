"""Branches at the same time: placements against brute force, bounds against every step, the step against arithmetic."""

import itertools
import math
import os
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.cost.simulate import simulate, simulated_step_s
from planner.cost.table import CostTable
from planner.ir.branches import fork_join_regions
from planner.search.alternatives import Around, least
from planner.search.auto import BUCKET_BYTES, Search
from planner.search.branches import (
    Assignment,
    alone_splits,
    assigned_space,
    assignments,
    branch_floor_s,
    compute_s,
    with_branches,
)
from planner.search.dual import bound_chain
from planner.search.formulate import formulate
from planner.search.partition import fullest, partitioned
from planner.search.placed import placed_branches
from support.tables import forked_table

ROUNDING = 1 + 1e-9
MOST = 60 if os.environ.get("LAYERWISE_FULL") else 3
"""Placements of branches that are looked at."""
TABLES = {
    "two": lambda: forked_table(((512, 512), (1024, 512)), "2xa100-nvlink"),
    "slow links": lambda: forked_table(((2048, 512), (2048, 512)), "2xk20-pcie", stem=512),
    "unequal devices": lambda: forked_table(((8192, 4096), (2048, 4096)), "2xa100-nvlink", stem=512, speeds=(1, 0.25)),
    "three": lambda: forked_table(((512,), (512,), (512,)), "2xk20-pcie"),
}


@given(st.lists(st.integers(0, 50), min_size=1, max_size=6), st.integers(1, 3))
def test_a_partition_of_few_things_is_the_best(lengths: list[int], num_bins: int) -> None:
    found = partitioned(lengths, num_bins)
    every = itertools.product(range(num_bins), repeat=len(lengths))
    assert fullest(lengths, found) == min(fullest(lengths, bins) for bins in every)
    assert set(found) == set(range(len(set(found))))


@given(st.lists(st.integers(1, 50), min_size=13, max_size=30), st.integers(2, 5))
def test_a_partition_of_many_things_is_near_the_best(lengths: list[int], num_bins: int) -> None:
    least = max(sum(lengths) / num_bins, *lengths)
    assert fullest(lengths, partitioned(lengths, num_bins)) <= least * (4 / 3)


def every_placement(table: CostTable) -> list[CostTable]:
    """Return the table of every way to place the branches of the only region: on all ranks, or on a coordinate."""
    (region,) = fork_join_regions(table.space.graph)
    found = [table]
    for places in itertools.product((None, 0, 1), repeat=len(region.branches)):
        coordinates = {
            i: c for branch, c in zip(region.branches, places, strict=True) if c is not None for i in branch
        }  # fmt: skip
        if coordinates:
            space = assigned_space(table.space, [Assignment(region, 0, coordinates, 0.0)])
            found.append(CostTable.of(space, table.model))
    return found


def every_step_s(table: CostTable, bucket_bytes: int) -> float:
    options = [range(len(costs)) for costs in table.layers]
    return min(simulated_step_s(table, choice, bucket_bytes) for choice in itertools.product(*options))


@pytest.mark.parametrize("name", ["two", "three"])
def test_the_plan_is_the_best_of_all_placements_and_splits_of_a_small_network(name: str) -> None:
    """The stem, the fork and the sum are cut by samples or whole; what is around is part of the choice."""
    table: CostTable = TABLES[name]()
    search = Search(table, None)
    planned = search.solve("auto")
    found = with_branches(search, planned, limit_bytes=None)
    best_s = planned.timeline.step_s if found.found is None else found.found[1].timeline.step_s
    sizes = {planned.bucket_bytes} | ({found.found[1].bucket_bytes} if found.found is not None else set())
    shortest_s = min(every_step_s(own, size) for own in map(thinned, every_placement(table)) for size in sizes)
    assert best_s <= shortest_s * ROUNDING
    assert found.lower_bound_s <= best_s * ROUNDING


def thinned(table: CostTable) -> CostTable:
    """Return the table of at most two splits of each layer and those of its fork, so that all choices are few."""
    space = table.space
    kept = {
        layer.id: space.splits[layer.id] if layer.op.kind == "redistribute" else space.splits[layer.id][:2]
        for layer in space.graph.layers
    }
    return CostTable.of(replace(space, splits=kept), table.model)


@pytest.mark.parametrize("name", TABLES)
def test_no_step_with_branches_is_shorter_than_the_bounds(name: str) -> None:
    table: CostTable = TABLES[name]()
    (region,) = fork_join_regions(table.space.graph)
    floor_s = branch_floor_s(table, [region])
    search = Search(table, None)
    bound_s = with_branches(search, search.solve("auto"), limit_bytes=None).lower_bound_s
    rng = np.random.default_rng(3)
    placements = every_placement(table)
    for number in rng.choice(len(placements), min(len(placements), MOST), replace=False):
        own = placements[number]
        problem = formulate(own, objective="chain", least_of_bucket=max(BUCKET_BYTES))
        least_s = bound_chain(problem.problem).lower_bound_s
        for _ in range(10):
            options = tuple(int(rng.integers(n)) for n in problem.problem.sizes)
            choice = problem.layer_choice(options)
            step_s = min(simulated_step_s(own, choice, size) for size in BUCKET_BYTES[::4])
            assert problem.problem.cost_s(options) <= step_s * ROUNDING
            assert max(bound_s, floor_s, least_s) <= step_s * ROUNDING


def test_the_longest_branch_goes_to_the_fastest_device_and_is_updated_at_its_speed() -> None:
    table: CostTable = TABLES["unequal devices"]()
    (region,) = fork_join_regions(table.space.graph)
    (found,) = assignments(table, region)
    long, short = region.branches
    assert [found.coordinates[i] for i in (*long, *short)] == [0, 0, 1, 1]
    layer = table.space.graph.layers[long[0]]
    fast, slow = (table.model.layers(layer, alone_splits(table.space, long[0], 0, c))[0] for c in (0, 1))
    assert slow.update_s == pytest.approx(4 * fast.update_s)
    assert compute_s(slow) == pytest.approx(4 * compute_s(fast))


def test_a_step_with_branches_is_its_arithmetic() -> None:
    """Everything else is on both ranks, whole.

    A branch begins with a copy and ends with a message; its gradient begins with a copy and ends with a message. Copies
    and layers of both branches are beside each other, messages need both ranks.
    """
    table = placed(TABLES["two"](), {0: 0, 1: 1})
    graph, splits = table.space.graph, table.space.splits
    choice = tuple(0 if splits[layer.id][0].weights else whole(table, i) for i, layer in enumerate(graph.layers))
    (region,) = fork_join_regions(graph)
    assert region.fork is not None
    assert region.join is not None
    costs = [own[c] for own, c in zip(table.layers, choice, strict=True)]
    edges = {(i, j): (e.forward_s[choice[i], choice[j]], e.backward_s[choice[i], choice[j]])
             for (i, j, _), e in table.edges.items()}  # fmt: skip
    alone: dict[str, list[float]] = {"forward": [], "backward": [], "update": []}
    messages_s = 0.0
    for branch in region.branches:
        copied_in, message_back = edges[region.fork, branch[0]]
        message, copied_back = edges[branch[-1], region.join]
        alone["forward"].append(copied_in + sum(costs[i].forward_s for i in branch))
        alone["backward"].append(copied_back + sum(costs[i].backward_s + costs[i].collect_s for i in branch))
        alone["update"].append(sum(costs[i].update_s for i in branch))
        messages_s += message + message_back
    around = [i for i in range(len(costs)) if i not in region.layers]
    around_s = sum(compute_s(costs[i]) for i in around)
    around_s += sum(sum(both) for (i, j), both in edges.items() if i in around and j in around)
    timeline = simulate(table, choice, BUCKET_BYTES[-1])
    assert messages_s > 0
    assert timeline.step_s == pytest.approx(around_s + messages_s + sum(map(max, alone.values())), rel=1e-12)
    streams = {event.stream for event in timeline.events}
    assert {"ranks 0 compute", "ranks 1 compute"} <= streams
    assert timeline.memory_bytes < sum(c.memory.resident for c in costs)


def placed(table: CostTable, coordinates: dict[int, int]) -> CostTable:
    """Return the table in which branches are on these coordinates, by their numbers."""
    (region,) = fork_join_regions(table.space.graph)
    of = {i: c for b, c in coordinates.items() for i in region.branches[b]}
    return CostTable.of(assigned_space(table.space, [Assignment(region, 0, of, 0.0)]), table.model)


def test_what_runs_beside_what_is_said_with_what_it_gains() -> None:
    known: CostTable = TABLES["two"]()
    alone, names = placed(known, {0: 0, 1: 1}).space.splits, [layer.id for layer in known.space.graph.layers]
    splits = {name: tuple(dict.fromkeys((*own, *alone[name]))) for name, own in known.space.splits.items()}
    table = CostTable.of(replace(known.space, splits=splits), known.model)
    (region,) = fork_join_regions(table.space.graph)
    choice = tuple(splits[n].index(alone[n][0]) if i in region.layers else whole(table, i) for i, n in enumerate(names))
    (found,) = placed_branches(Around(table, choice, formulate(table), BUCKET_BYTES[-1]))
    seconds = [sum(compute_s(table.layers[i][choice[i]]) for i in branch) for branch in region.branches]
    assert [place.where for place in found.places] == ["gpu=0", "gpu=1"]
    assert [place.layers for place in found.places] == [tuple(names[i] for i in own) for own in region.branches]
    assert [place.compute_s for place in found.places] == pytest.approx(seconds)
    assert [place.idle_s for place in found.places] == pytest.approx([max(seconds) - own for own in seconds])
    assert found.step_s == simulated_step_s(table, choice, BUCKET_BYTES[-1])
    spread = least(known, formulate(known), {}, BUCKET_BYTES[-1])
    assert spread is not None
    assert found.spread_s == spread[0]
    everywhere = tuple(whole(table, i) for i in range(len(names)))
    assert list(placed_branches(Around(table, everywhere, formulate(table), BUCKET_BYTES[-1]))) == []


def whole(table: CostTable, i: int) -> int:
    """Return the position of the split under which every rank has everything; of an input, the only one."""
    own = table.space.splits[table.space.graph.layers[i].id]
    return next((k for k, s in enumerate(own) if set(s.dimensions) == {"replicate"}), 0)


def test_the_longest_branches_may_stay_on_all_ranks() -> None:
    table = forked_table(((4096, 512), (512,), (512,)), "2xk20-pcie")
    (region,) = fork_join_regions(table.space.graph)
    found = assignments(table, region)
    assert found == sorted(found, key=lambda own: own.estimate_s)
    moved = {frozenset(own.coordinates) for own in found}
    short = frozenset(i for branch in region.branches[1:] for i in branch)
    assert moved == {short, region.layers}
    for own in found:
        times = [
            sum(min(map(compute_s, table.layers[i])) if i not in own.coordinates else 0.0 for i in branch)
            for branch in region.branches
        ]
        assert own.estimate_s >= math.fsum(times)
        for i, coordinate in own.coordinates.items():
            splits = alone_splits(table.space, i, own.axis, coordinate)
            assert splits
            weights = {split.weights[own.axis] for split in splits}
            assert weights == {tuple(int(c == coordinate) for c in range(2))}
