"""Simulated pipelines against the papers' formulas and arithmetic spelled out."""

import pytest

from planner.cost.cycles import hybrid_limit, hybrid_speedup
from planner.cost.pipeline import PipelineTimeline, StageLink, StageTimes, simulate_pipeline
from planner.errors import UsageError
from planner.ir.schedule import ScheduleKind

GPIPE, ONE_F_ONE_B, ZERO_BUBBLE = ScheduleKind.GPIPE, ScheduleKind.ONE_F_ONE_B, ScheduleKind.ZERO_BUBBLE
SHAPES = [(1, 1), (2, 1), (2, 2), (4, 3), (4, 4), (4, 16), (5, 11)]


def equal(kind: ScheduleKind, num_stages: int, count: int, stage: StageTimes, **options: int) -> PipelineTimeline:
    return simulate_pipeline(kind, [stage] * num_stages, [StageLink()] * (num_stages - 1), count, **options)


@pytest.mark.parametrize(("k", "m"), SHAPES)
@pytest.mark.parametrize("kind", [GPIPE, ONE_F_ONE_B])
def test_equal_stages_have_the_bubble_of_gpipe(kind: ScheduleKind, k: int, m: int) -> None:
    found = equal(kind, k, m, StageTimes(3.0, 2.0, 4.0))
    assert found.step_s == pytest.approx((m + k - 1) * 9.0)
    assert found.bubbles == pytest.approx([(k - 1) / (m + k - 1)] * k)
    assert found.bubble == pytest.approx((k - 1) / (m + k - 1))


@pytest.mark.parametrize(("k", "m"), [(2, 4), (4, 8), (4, 16), (5, 11)])
@pytest.mark.parametrize(("f", "b", "w"), [(1.0, 1.0, 1.0), (3.0, 2.0, 2.0), (3.0, 4.0, 2.0)])
def test_zero_bubble_loses_what_its_paper_says(k: int, m: int, f: float, b: float, w: float) -> None:
    """ZB-H1 idles (p - 1) (T_F + T_B - T_W) instead of (p - 1) (T_F + T_B + T_W) [Zero Bubble, ICLR 2024]."""
    found = equal(ZERO_BUBBLE, k, m, StageTimes(f, b, w))
    assert found.step_s == pytest.approx(m * (f + b + w) + (k - 1) * (f + b - w))
    assert found.step_s < equal(ONE_F_ONE_B, k, m, StageTimes(f, b, w)).step_s


@pytest.mark.parametrize(("p", "v", "m"), [(1, 3, 2), (2, 2, 4), (4, 2, 8), (4, 3, 16)])
def test_interleaved_has_the_bubble_of_megatron(p: int, v: int, m: int) -> None:
    found = equal(ScheduleKind.INTERLEAVED, p * v, m, StageTimes(1.0, 1.0, 1.0), num_positions=p)
    assert found.bubbles == pytest.approx([(p - 1) / (v * m + p - 1)] * p)


@pytest.mark.parametrize(("k", "m"), SHAPES)
def test_memory_is_what_the_schedules_hold(k: int, m: int) -> None:
    stage = StageTimes(1.0, 1.0, 1.0, resident_bytes=1000, params_bytes=100, saved_bytes=10, input_bytes=1)
    held = {
        GPIPE: [m] * k,
        ONE_F_ONE_B: [min(m, k - p) for p in range(k)],
        ZERO_BUBBLE: [min(m, k)] * k,
    }
    for kind, counts in held.items():
        assert equal(kind, k, m, stage).memory_bytes == tuple(1000 + 10 * count for count in counts)
    again = StageTimes(1.0, 1.0, 1.0, resident_bytes=1000, saved_bytes=10, input_bytes=1, recompute=True)
    for kind in (GPIPE, ONE_F_ONE_B):  # inputs of all others, everything of the one that runs backward
        assert equal(kind, k, m, again).memory_bytes == tuple(1000 + (count - 1) + 10 for count in held[kind])


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_memory_in_cycles(k: int) -> None:
    stage = StageTimes(1.0, 1.0, 1.0, resident_bytes=1000, params_bytes=100, saved_bytes=10)
    flights = [2 * (k - 1 - i) + 1 for i in range(k)]
    assert equal(ScheduleKind.STALE, k, 1, stage).memory_bytes == tuple(1000 + 10 * n for n in flights)
    stashed = tuple(1000 + 10 * n + 100 * (n - 1) for n in flights)
    assert equal(ScheduleKind.PIPEDREAM, k, 1, stage).memory_bytes == stashed


def test_recompute_runs_forward_twice() -> None:
    for kind in (GPIPE, ONE_F_ONE_B, ZERO_BUBBLE):
        plain = equal(kind, 3, 5, StageTimes(1.0, 2.0 + 1.0, 4.0))
        again = equal(kind, 3, 5, StageTimes(1.0, 2.0, 4.0, recompute=True))
        assert again.step_s == plain.step_s
        assert again.bubbles == plain.bubbles


def test_two_unequal_stages_by_hand() -> None:
    stages = [StageTimes(1.0, 1.0, 1.0, update_s=1.0, sync_s=3.0), StageTimes(2.0, 1.0, 3.0, update_s=0.5, sync_s=1.0)]
    found = simulate_pipeline(GPIPE, stages, [StageLink(2.0, 2.0)], 2)
    spans = {(e.stream, e.name): (e.start_s, e.stop_s) for e in found.events}
    assert spans == {
        ("position 0", "0F0"): (0, 1),
        ("position 0", "0F1"): (1, 2),
        ("link 0-1", "0F0"): (1, 3),
        ("link 0-1", "0F1"): (3, 5),
        ("position 1", "1F0"): (3, 5),
        ("position 1", "1F1"): (5, 7),
        ("position 1", "1B0"): (7, 11),
        ("position 1", "1B1"): (11, 15),
        ("link 1-0", "1B0"): (11, 13),
        ("link 1-0", "1B1"): (15, 17),
        ("position 0", "0B0"): (13, 15),
        ("position 0", "0B1"): (17, 19),
        ("sync 0", "sync 0"): (19, 22),
        ("sync 1", "sync 1"): (15, 16),
        ("position 0", "update 0"): (22, 23),
        ("position 1", "update 1"): (16, 16.5),
    }
    assert found.step_s == 23
    assert found.bubbles == pytest.approx([1 - 7 / 23, 1 - 12.5 / 23])


def test_gradients_of_two_stages_at_a_position_are_reduced_one_after_the_other() -> None:
    stages = [StageTimes(1.0, 1.0, 1.0, update_s=0.5, sync_s=4.0), StageTimes(2.0, 2.0, 2.0, update_s=0.5, sync_s=5.0)]
    found = simulate_pipeline(ScheduleKind.INTERLEAVED, stages, [StageLink()], 1, num_positions=1)
    assert found.step_s == (1 + 2 + 4) + max(2, 5) + 4 + (0.5 + 0.5)


def test_messages_that_processors_handle_cost_both_ends() -> None:
    link = StageLink(2.0, 2.0, forward_bytes=100, backward_bytes=200)
    stages = [StageTimes(1.0, 1.0, 1.0)] * 2
    found = simulate_pipeline(GPIPE, stages, [link], 1, cpu_s_per_byte=0.01)
    # 0F0 1 s, 2 s on the way, received in 1 s, 1F0 1 s, 1B0 2 s, 2 s on the way, received in 2 s, 0B0 2 s
    assert found.step_s == pytest.approx(1 + 2 + (1 + 1) + 2 + 2 + (2 + 2))
    assert found.bubbles == pytest.approx([1 - (1 + 1 + 2 + 2) / 13, 1 - (1 + 1 + 2 + 2) / 13])
    alone = simulate_pipeline(ScheduleKind.INTERLEAVED, stages, [link], 1, num_positions=1, cpu_s_per_byte=0.01)
    assert alone.step_s == 6.0


def test_a_full_pipeline_in_cycles_is_as_fast_as_its_slowest_stage() -> None:
    stages = [StageTimes(1.0, 1.0, 1.0), StageTimes(2.0, 2.0, 1.0, update_s=0.5, sync_s=1.5), StageTimes(1.0, 0.5, 0.5)]
    links = [StageLink(3.0, 3.0), StageLink(1.0, 2.0)]
    for kind in (ScheduleKind.STALE, ScheduleKind.PIPEDREAM):
        found = simulate_pipeline(kind, stages, links, 1)
        assert found.step_s == 7.0
        assert found.bubbles == pytest.approx([1 - 3 / 7, 1 - 5.5 / 7, 1 - 2 / 7])
    for slow in (StageLink(8.0, 1.0), StageLink(1.0, 8.0)):  # one direction of a link is the slowest
        assert simulate_pipeline(ScheduleKind.STALE, stages, [slow, links[1]], 1).step_s == 8.0
    # there and back between the last two stages, in three cycles: forward 2, sent 7,
    # forward 1, backward 1, sent 7, and backward, reduction and update 5
    far = simulate_pipeline(ScheduleKind.STALE, stages, [StageLink(), StageLink(7.0, 7.0)], 1)
    assert far.step_s == pytest.approx((2 + 7 + 1 + 1 + 7 + 5) / 3)


def test_the_limit_of_the_hybrid() -> None:
    n, pipelined = 100, 40
    for k in range(5):
        assert hybrid_limit(n, pipelined, k) == pytest.approx(n / (pipelined / (2 * k + 1) + n - pipelined))
    assert hybrid_limit(n, n, 3) == pytest.approx(7)
    assert hybrid_limit(n, 0, 3) == 1
    # ResNet-56 [Zhang & Abdelrahman 2021, table 5]: 6,745 s, pipelined 4,090 s, hybrid 5,429 s, so half was pipelined
    assert hybrid_speedup(100, 50, 6745 / 4090) == pytest.approx(6745 / 5429, rel=0.01)
    with pytest.raises(UsageError, match="between 0 and all"):
        hybrid_limit(10, 11, 1)


def test_numbers_that_do_not_belong_together() -> None:
    stages = [StageTimes(1.0, 1.0, 1.0)] * 2
    with pytest.raises(UsageError, match="2 stages have 1 links between them, not 2"):
        simulate_pipeline(GPIPE, stages, [StageLink()] * 2, 2)
    with pytest.raises(UsageError, match="has no micro-batches: pass 1, not 4"):
        simulate_pipeline(ScheduleKind.STALE, stages, [StageLink()], 4)
