"""PipeDream's partitioner against every partition of small random networks, priced by the formula written out here."""

import itertools
from collections.abc import Iterator, Sequence
from functools import cache

import networkx as nx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.errors import UsageError
from planner.profile.pipedream import MeasuredLayer
from planner.search.published import pipedream_states
from planner.search.published.pipedream import Level, Partition, SyncTerm, partition
from planner.search.published.pipedream_states import States, chain_of, states_of

BANDWIDTH = 8.0
NUMBERS = st.integers(0, 20)


@st.composite
def networks(draw: st.DrawFn, max_layers: int = 5, *, chain: bool = True) -> list[MeasuredLayer]:
    """Small numbers, so that ties and zeros are common; one source, one sink."""
    n = draw(st.integers(1, max_layers))
    found = []
    for i in range(n):
        reads = {i - 1} if i else set()
        if not chain and i > 1:
            reads = draw(st.sets(st.integers(0, i - 1), min_size=1, max_size=2))
        forward_s, backward_s, output_bytes, weight_bytes = (float(draw(NUMBERS)) for _ in range(4))
        found.append(
            MeasuredLayer(f"node{i}", "Conv2d", forward_s, backward_s, output_bytes, weight_bytes, tuple(sorted(reads)))
        )
    return found


def compositions(total: int) -> Iterator[tuple[int, ...]]:
    for parts in range(1, total + 1):
        for cuts in itertools.combinations(range(1, total), parts - 1):
            yield tuple(b - a for a, b in itertools.pairwise((0, *cuts, total)))


def one_stage(inner_s: float, weight_bytes: float, m: int, sync: SyncTerm, within: int) -> float:
    if sync is SyncTerm.PRINTED:
        return max(inner_s, 2 * (m - 1) * weight_bytes / BANDWIDTH) / m
    return (inner_s + 4 * (m - 1) * weight_bytes / BANDWIDTH / m / within) / m


def least(states: States, sizes: Sequence[int], sync: SyncTerm) -> float:
    """Return the least time over every list of cuts and replicas, level by level."""

    @cache
    def interval(level: int, start: int, end: int) -> float:
        if level < 0:
            return float(states.compute_s[end] - states.compute_s[start])
        return min(of(level, points, m) for m in compositions(sizes[level]) for points in paths(start, end, len(m)))

    def paths(start: int, end: int, stages: int) -> Iterator[tuple[int, ...]]:
        for inner in itertools.combinations(range(start + 1, end), stages - 1):
            points = (start, *inner, end)
            if all(states.extends[a, b] for a, b in itertools.pairwise(points)):
                yield points

    def of(level: int, points: tuple[int, ...], replicas: tuple[int, ...]) -> float:
        found = []
        for number, ((a, b), m) in enumerate(zip(itertools.pairwise(points), replicas, strict=True)):
            weight_bytes = float(states.weight_bytes[b] - states.weight_bytes[a])
            within = sizes[level - 1] if level and not number else 1
            found.append(one_stage(interval(level - 1, a, b), weight_bytes, m, sync, within))
            share = m if sync is SyncTerm.RELEASED else 1
            crossing = ([a] if number else []) + ([b] if number and sync is SyncTerm.RELEASED else [])
            found += [2 * float(states.sent_bytes[c]) / BANDWIDTH / share for c in crossing]
        return max(found)

    return interval(len(sizes) - 1, 0, len(states.compute_s) - 1)


def price(states: States, found: Partition, sync: SyncTerm) -> float:
    """Return the time of the stages of a partition on one level."""
    times = []
    for number, stage in enumerate(found.stages):
        m, weight_bytes = stage.replicas, float(states.weight_bytes[stage.end] - states.weight_bytes[stage.start])
        compute_s = float(states.compute_s[stage.end] - states.compute_s[stage.start])
        times.append(one_stage(compute_s, weight_bytes, m, sync, 1))
        share = m if sync is SyncTerm.RELEASED else 1
        crossing = [stage.start] * (number > 0) + [stage.end] * (number > 0 and sync is SyncTerm.RELEASED)
        times += [2 * float(states.sent_bytes[c]) / BANDWIDTH / share for c in crossing]
    return max(times)


@given(networks(), st.integers(1, 5), st.sampled_from(SyncTerm))
def test_on_a_flat_level_it_is_the_best_of_all_partitions_of_a_chain(
    layers: list[MeasuredLayer], devices: int, sync: SyncTerm
) -> None:
    states = chain_of(layers)
    found = partition(states, [Level(devices, BANDWIDTH)], sync)
    assert found.bottleneck_s == pytest.approx(least(states, [devices], sync))
    assert price(states, found, sync) == pytest.approx(found.bottleneck_s)
    assert sum(stage.replicas for stage in found.stages) == devices
    assert [stage.start for stage in found.stages[1:]] == [stage.end for stage in found.stages[:-1]]
    assert (found.stages[0].start, found.stages[-1].end) == (0, len(layers))


@given(networks(4, chain=False), st.integers(1, 4), st.sampled_from(SyncTerm))
def test_beside_branches_it_is_the_best_of_all_chains_of_down_sets(
    layers: list[MeasuredLayer], devices: int, sync: SyncTerm
) -> None:
    states = states_of(layers)
    found = partition(states, [Level(devices, BANDWIDTH)], sync)
    assert found.bottleneck_s == pytest.approx(least(states, [devices], sync))
    assert price(states, found, sync) == pytest.approx(found.bottleneck_s)


@given(networks(4), st.sampled_from([(2, 2), (1, 3), (3, 1), (2, 3), (2, 2, 2)]), st.sampled_from(SyncTerm))
def test_level_by_level_it_is_the_best_of_all_partitions(
    layers: list[MeasuredLayer], sizes: tuple[int, ...], sync: SyncTerm
) -> None:
    states = chain_of(layers)
    found = partition(states, [Level(size, BANDWIDTH) for size in sizes], sync)
    assert found.bottleneck_s == pytest.approx(least(states, sizes, sync))


@given(networks(6, chain=False))
def test_states_are_all_down_sets_and_send_what_is_read_behind_them(layers: list[MeasuredLayer]) -> None:
    states = states_of(layers)
    graph = nx.DiGraph([(a, b) for b, layer in enumerate(layers) for a in layer.reads])
    expected = {
        frozenset(chosen)
        for size in range(len(layers) + 1)
        for chosen in itertools.combinations(range(len(layers)), size)
        if all(a in chosen for a, b in graph.edges if b in chosen)
    }
    assert len(states.layers) == len(expected)
    assert set(states.layers) == expected
    for place, inside in enumerate(states.layers):
        crossing = {a for a, b in graph.edges if a in inside and b not in inside}
        assert states.sent_bytes[place] == sum(layers[a].output_bytes for a in crossing)
        assert states.weight_bytes[place] == sum(layers[a].weight_bytes for a in inside)
        assert states.compute_s[place] == sum(layers[a].forward_s + layers[a].backward_s for a in inside)
        assert [bool(x) for x in states.extends[place]] == [inside < other for other in states.layers]


@given(networks(6))
def test_without_branches_both_readings_are_the_same_chain(layers: list[MeasuredLayer]) -> None:
    states, chain = states_of(layers), chain_of(layers)
    assert states.layers == chain.layers
    assert list(states.sent_bytes) == list(chain.sent_bytes)
    assert list(states.compute_s) == list(chain.compute_s)


def test_a_chain_by_hand() -> None:
    """Three devices, 8 bytes/s: 12 s that replicate well, then 4 s with heavy weights."""
    layers = [MeasuredLayer("a", "", 4.0, 8.0, 8.0, 0.0, ()), MeasuredLayer("b", "", 2.0, 2.0, 1.0, 800.0, (0,))]
    found = partition(states_of(layers), [Level(3, BANDWIDTH)])
    assert (found.text, found.bottleneck_s) == ("2-1", 6.0)  # 12 / 2, against 4 and 2 x 8 / 8
    assert found.data_parallel_s == pytest.approx(2 * 2 * 800 / BANDWIDTH / 3)
    assert found.in_flight == 2  # 3 devices over 2 replicas, rounded up
    assert found.speed_up == pytest.approx(found.data_parallel_s / 6)


@pytest.mark.parametrize("levels", [[], [Level(0, 1.0)], [Level(2, 0.0)], [Level(2, float("nan"))]])
def test_a_machine_without_devices_or_links_is_refused(levels: list[Level]) -> None:
    with pytest.raises(UsageError, match="at least one level"):
        partition(chain_of([MeasuredLayer("a", "", 1, 1, 1, 1, ())]), levels)


def test_too_many_branches_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    side_by_side = [MeasuredLayer(f"b{i}", "", 1, 1, 1, 1, ()) for i in range(6)]
    assert len(states_of(side_by_side).layers) == 64
    monkeypatch.setattr(pipedream_states, "MAX_STATES", 63)
    with pytest.raises(UsageError, match="more than 63 places"):
        states_of(side_by_side)
