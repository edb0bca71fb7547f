"""Stages by dynamic programming against every way to cut."""

import itertools
import os
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.errors import InfeasibleError, UsageError
from planner.search.stages import Cuts, Objective, Part, StageSpace, best_cuts, cycle_s, step_s

SCALE = 10 if os.environ.get("LAYERWISE_FULL") else 1


class Prices:
    """Random seconds and bytes of every stage; what it holds grows with the stages behind it, as under 1F1B."""

    def __init__(self, seed: int, space: StageSpace, limit: int) -> None:
        rng = np.random.default_rng(seed)
        shape = space.num_units + 1, space.num_units + 1, space.num_devices + 1, space.num_devices + 1
        self.seconds, self.kept = rng.integers(1, 9, shape), rng.integers(0, 5, shape)
        self.limit = limit
        self.asked: list[tuple[Part, int, int]] = []

    def __call__(self, part: Part, num_behind: int, num_microbatches: int) -> float | None:
        self.asked.append((part, num_behind, num_microbatches))
        if self.kept[part] * min(num_microbatches, num_behind + 1) > self.limit * num_microbatches:
            return None
        return float(self.seconds[part]) / num_microbatches


def compositions(total: int, sizes: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    if total == 0:
        yield ()
    for size in sizes:
        if size <= total:
            for rest in compositions(total - size, sizes):
                yield (size, *rest)


def every_way(space: StageSpace, price: Prices, counts: list[int], objective: Objective) -> list[Cuts]:
    found = []
    for devices in compositions(space.num_devices, space.sizes):
        if space.max_stages is not None and len(devices) > space.max_stages:
            continue
        device_stops = list(itertools.accumulate(devices, initial=0))
        for cuts in itertools.combinations(range(1, space.num_units), len(devices) - 1):
            stops = [0, *cuts, space.num_units]
            parts = tuple(
                Part(*units, *ranks)
                for units, ranks in zip(itertools.pairwise(stops), itertools.pairwise(device_stops), strict=True)
            )
            for m in counts:
                seconds = [price(part, len(parts) - 1 - i, m) for i, part in enumerate(parts)]
                known = [s for s in seconds if s is not None]
                if len(known) == len(parts):
                    cost_s = objective(sum(known), max(known), m)
                    found.append(Cuts(cost_s, parts, m, sum(known), max(known)))
    return found


@settings(max_examples=200 * SCALE, deadline=None)
@given(
    space=st.builds(
        StageSpace,
        st.integers(1, 6),
        st.integers(1, 6),
        st.sets(st.integers(1, 4), min_size=1).map(lambda sizes: tuple(sorted(sizes))),
        st.one_of(st.none(), st.integers(1, 4)),
    ),
    counts=st.lists(st.integers(1, 5), min_size=1, max_size=3, unique=True),
    seed=st.integers(0, 2**32 - 1),
    limit=st.sampled_from([1, 2, 100]),
    count=st.integers(1, 5),
    objective=st.sampled_from([step_s, cycle_s]),
)
def test_the_best_of_all_ways_to_cut_are_found(
    space: StageSpace, counts: list[int], seed: int, limit: int, count: int, objective: Objective
) -> None:
    price = Prices(seed, space, limit)
    ways = every_way(space, price, counts, objective)
    price.asked.clear()
    if not ways:
        with pytest.raises(InfeasibleError, match="fits in memory"):
            best_cuts(space, price, counts, count=count, objective=objective)
        return
    found = best_cuts(space, price, counts, count=count, objective=objective)
    assert len(set(price.asked)) == len(price.asked)
    wanted = sorted(way.cost_s for way in ways)[:count]
    assert [cuts.cost_s for cuts in found] == pytest.approx(wanted, rel=1e-12)
    costs = {(way.parts, way.num_microbatches): (way.cost_s, way.sum_s, way.slowest_s) for way in ways}
    assert len({(cuts.parts, cuts.num_microbatches) for cuts in found}) == len(found)
    for cuts in found:
        wanted_costs = costs[cuts.parts, cuts.num_microbatches]
        assert (cuts.cost_s, cuts.sum_s, cuts.slowest_s) == pytest.approx(wanted_costs, rel=1e-12)


def test_more_micro_batches_favour_even_stages() -> None:
    seconds = {Part(0, 1, 0, 1): 1.0, Part(1, 3, 1, 2): 6.0, Part(0, 2, 0, 1): 4.0, Part(2, 3, 1, 2): 4.0}

    def price(part: Part, _behind: int, _count: int) -> float | None:
        return seconds.get(part)

    space = StageSpace(3, 2, (1,))
    for count, slowest_s in ((1, 6.0), (2, 4.0)):
        (best,) = best_cuts(space, price, [count])
        assert best.slowest_s == slowest_s
    uneven, even = best_cuts(space, price, [1], count=9)
    assert (uneven.cost_s, even.cost_s) == (7.0, 8.0)
    assert [part.num_devices for part in even.parts] == [1, 1]


def test_numbers_that_make_no_sense() -> None:
    with pytest.raises(UsageError, match="must be at least 1"):
        StageSpace(3, 2, (0, 1))
    with pytest.raises(UsageError, match="candidates must be at least 1"):
        best_cuts(StageSpace(3, 2, (1,)), lambda *_: 1.0, [1], count=0)
