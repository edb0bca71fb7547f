"""Parts of machines, and machines with other outermost links: against the machine of that name, and by hand."""

import pytest

from planner.devices.graph import Cluster
from planner.devices.library import cluster
from planner.devices.measured import CollectiveKind, CollectivePoint, MeasuredCollective
from planner.devices.variants import first_devices, with_outer_rate
from planner.errors import UsageError


def rates(graph: Cluster, kind: str) -> set[float]:
    return {link.bandwidth_bytes_per_s for link in graph.links if link.kind == kind}


@pytest.mark.parametrize(
    ("whole", "count", "same"),
    [("8xa100-nvlink", 4, "4xa100-nvlink"), ("4x8-h100-ib400", 16, "2x8-h100-ib400"),
     ("16x1-t4-eth10", 2, "2x1-t4-eth10"), ("36x4-p100-fat100", 144, "36x4-p100-fat100")],
)  # fmt: skip
def test_a_part_is_the_machine_that_has_so_many(whole: str, count: int, same: str) -> None:
    part, named = first_devices(cluster(whole), count), cluster(same)
    assert part.levels == named.levels
    assert part.devices == named.devices
    assert set(part.links) == set(named.links)
    assert set(part.switches) == set(named.switches)


@pytest.mark.parametrize(("count", "sizes"), [(1, [1, 1]), (6, [1, 6]), (12, [2, 6]), (20, [4, 5]), (32, [4, 8])])
def test_inner_levels_are_filled_first(count: int, sizes: list[int]) -> None:
    part = first_devices(cluster("4x8-h100-ib400"), count)
    assert [level.size for level in part.levels] == sizes
    assert len(part.devices) == count
    assert not part.links or count > 1


def test_devices_that_are_left_out_still_forward() -> None:
    torus = cluster("16xhmc-torus")
    part = first_devices(torus, 12)
    assert len(part.devices) == 12
    for a, b in ((0, 11), (2, 9)):
        ends = torus.devices[a].id, torus.devices[b].id
        assert part.paths.latency_s(*ends) == torus.paths.latency_s(*ends)


@pytest.mark.parametrize(("count", "words"), [(0, "has 32 devices"), (33, "has 32 devices"), (11, "no equal parts")])
def test_what_is_no_part_is_refused(count: int, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        first_devices(cluster("4x8-h100-ib400"), count)


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("4x8-h100-ib400", {"ib400"}),
        ("16x1-t4-eth10", {"eth10"}),
        ("4xa100-nvlink", {"nvlink3"}),
    ],
)
def test_only_the_outermost_links_get_the_rate(name: str, changed: set[str]) -> None:
    before = cluster(name)
    after = with_outer_rate(before, 1.25e8)
    for kind in {link.kind for link in before.links}:
        assert rates(after, kind) == ({1.25e8} if kind in changed else rates(before, kind))
    assert [(link.a, link.b, link.latency_s) for link in after.links] == [
        (link.a, link.b, link.latency_s) for link in before.links
    ]
    assert after.name == f"{name} at 1 Gbit/s"


def test_of_a_fat_tree_the_links_between_leaves_change_and_those_below_do_not() -> None:
    before = cluster("36x4-p100-fat100")
    after = with_outer_rate(before, 1.0)
    differ = [(a.a, a.b) for a, b in zip(after.links, before.links, strict=True) if a != b]
    leaves = len(differ) // 18  # every leaf hangs on 18 spines
    assert leaves == before.levels[0].size
    assert not any("node" in end for link in differ for end in link)


def test_of_two_sockets_only_the_link_between_them_changes() -> None:
    before = cluster("8xk80-qpi")
    differ = [a for a, b in zip(with_outer_rate(before, 1.0).links, before.links, strict=True) if a != b]
    assert [link.kind for link in differ] == ["qpi"]


def test_what_was_measured_of_links_that_change_or_levels_that_shrink_is_left_out() -> None:
    points = (CollectivePoint(1, 1.0, 1.0, 0.0), CollectivePoint(2, 2.0, 2.0, 0.0))
    inner, outer = (MeasuredCollective(CollectiveKind.ALL_REDUCE, (level,), points) for level in ("gpu", "node"))
    plain = cluster("2x2-a100-eth10")
    machine = Cluster(plain.name, plain.devices, plain.switches, plain.links, plain.levels, (inner, outer))
    assert with_outer_rate(machine, 1.0).collectives == (inner,)
    assert first_devices(machine, 2).collectives == (inner,)
    assert first_devices(machine, 1).collectives == ()


def test_a_single_device_has_no_links() -> None:
    with pytest.raises(UsageError, match="has one device"):
        with_outer_rate(cluster("1xa100-nvlink"), 1.0)
