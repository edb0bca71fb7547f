"""The streams of a step, with the arithmetic spelled out."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.cost.overlap import LEAST_SHARE, Streams
from planner.cost.transfer import Reduction

NODE, GPU = 1, 2


def streams() -> Streams:
    return Streams(("node", "gpu"), keeps_events=True)


def test_what_runs_alone_takes_its_time() -> None:
    step = streams()
    step.compute("a", 3.0)
    step.transfer("b", 2.0, NODE)
    assert step.now_s == 5.0
    assert [(e.name, e.stream, e.start_s, e.stop_s) for e in step.events()] == [
        ("a", "compute", 0.0, 3.0), ("b", "transfer", 3.0, 5.0)
    ]  # fmt: skip


def test_a_reduction_hides_behind_compute() -> None:
    step = streams()
    step.start("sync", Reduction(2.0, 2.0, 0.0, NODE))
    step.compute("a", 3.0)
    step.finish()
    assert step.now_s == 3.0


def test_what_is_left_of_a_reduction_is_waited_for() -> None:
    step = streams()
    step.start("sync", Reduction(5.0, 5.0, 0.0, NODE))
    step.compute("a", 3.0)
    step.finish()
    assert step.now_s == 5.0


def test_a_loaded_reduction_is_slower_behind_compute_and_takes_from_it() -> None:
    """Loaded it takes 8 s, of which compute loses 2: it keeps 3/4 of its speed.

    3 s of compute take 4 s; then half of the reduction is left, which takes 4 / 2 s alone.
    """
    step = streams()
    step.start("sync", Reduction(4.0, 8.0, 2.0, NODE))
    step.compute("a", 3.0)
    assert step.now_s == pytest.approx(4.0)
    step.finish()
    assert step.now_s == pytest.approx(4.0 + 2.0)


def test_compute_is_fast_again_when_the_reduction_has_ended() -> None:
    """The reduction ends at 2 s; until then compute has done 1 s of its 3."""
    step = streams()
    step.start("sync", Reduction(1.0, 2.0, 1.0, NODE))
    step.compute("a", 3.0)
    assert step.now_s == pytest.approx(2.0 + 2.0)


def test_a_transfer_shares_its_level_evenly() -> None:
    """Both at half speed until the transfer is done at 2 s; then 3 s of the reduction are left."""
    step = streams()
    step.start("sync", Reduction(4.0, 4.0, 0.0, NODE))
    step.transfer("move", 1.0, NODE)
    assert step.now_s == pytest.approx(2.0)
    step.finish()
    assert step.now_s == pytest.approx(2.0 + 3.0)


def test_a_transfer_on_another_level_is_not_disturbed() -> None:
    step = streams()
    step.start("sync", Reduction(4.0, 4.0, 0.0, NODE))
    step.transfer("move", 1.0, GPU)
    assert step.now_s == 1.0
    step.finish()
    assert step.now_s == 4.0


def test_reductions_of_one_level_run_one_after_the_other() -> None:
    step = streams()
    for name in ("first", "second"):
        step.start(name, Reduction(2.0, 2.0, 0.0, NODE))
    step.compute("a", 1.0)
    step.finish()
    assert [(e.name, e.start_s, e.stop_s) for e in step.events() if e.stream == "sync node"] == [
        ("first", 0.0, 2.0), ("second", 2.0, 4.0)
    ]  # fmt: skip


def test_reductions_of_different_levels_run_at_once() -> None:
    step = streams()
    step.start("between", Reduction(2.0, 2.0, 0.0, NODE))
    step.start("inside", Reduction(2.0, 2.0, 0.0, GPU))
    step.finish()
    assert step.now_s == 2.0


def test_none_overtakes_an_earlier_one_that_shares_a_level() -> None:
    step = streams()
    step.start("between", Reduction(2.0, 2.0, 0.0, NODE))
    step.start("both", Reduction(1.0, 1.0, 0.0, NODE | GPU))
    step.start("inside", Reduction(1.0, 1.0, 0.0, GPU))
    step.finish()
    assert {e.name: (e.start_s, e.stop_s) for e in step.events()} == {
        "between": (0.0, 2.0), "both": (2.0, 3.0), "inside": (3.0, 4.0)
    }  # fmt: skip


def test_compute_never_stops_altogether() -> None:
    step = streams()
    step.start("sync", Reduction(1.0, 1.0, 1.0, NODE))
    step.compute("a", LEAST_SHARE / 2)
    assert step.now_s == pytest.approx(0.5)


seconds = st.floats(0, 10)
reductions = st.builds(
    lambda alone, more, lost, levels: Reduction(alone, alone + more, lost * (alone + more), levels),
    seconds, seconds, st.floats(0, 0.8), st.sampled_from((NODE, GPU, NODE | GPU)),
)  # fmt: skip
actions = st.lists(
    st.one_of(
        st.tuples(st.just("compute"), seconds),
        st.tuples(st.just("transfer"), seconds, st.sampled_from((0, NODE, GPU, NODE | GPU))),
        st.tuples(st.just("start"), reductions),
    ),
    max_size=12,
)


@given(actions)
def test_a_step_is_never_shorter_than_what_blocks_nor_longer_than_everything_in_turn(
    found: list[tuple[Any, ...]],
) -> None:
    step = streams()
    blocking = total = 0.0
    busiest = {NODE: 0.0, GPU: 0.0}
    for kind, *what in found:
        getattr(step, kind)("x", *what)
        if isinstance(what[0], Reduction):
            total += what[0].loaded_s + what[0].lost_s / LEAST_SHARE
            for level in busiest:
                busiest[level] += what[0].seconds if what[0].levels & level else 0.0
        else:
            blocking += float(what[0])
    step.finish()
    assert step.now_s >= max(blocking, *busiest.values()) * (1 - 1e-9)
    assert step.now_s <= (blocking + total) * (1 + 1e-9) + 1e-9
    assert len([e for e in step.events() if e.stream.startswith("sync")]) <= sum(a[0] == "start" for a in found)
