"""Who hands over which samples in which turn: every sample once, and what each scheme promises of a turn."""

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.ir.turns import Scheme, turns


@given(
    scheme=st.sampled_from(get_args(Scheme)), samples=st.lists(st.integers(1, 20), min_size=1, max_size=6),
    each=st.integers(1, 5),
)  # fmt: skip
def test_every_sample_is_handed_over_once(scheme: Scheme, samples: list[int], each: int) -> None:
    count = {"a": 1, "b": each * len(samples), "c": each}[scheme]
    found = turns(scheme, samples, count)
    for worker, size in enumerate(samples):
        handed = [i for turn in found for i in range(*turn[worker])]
        assert handed == list(range(size))
    senders = [{w for w, (a, b) in enumerate(turn) if a < b} for turn in found]
    assert all(senders)  # no turn is empty
    if scheme == "a":
        assert found == (tuple((0, n) for n in samples),)
    if scheme == "b":
        assert all(len(who) == 1 for who in senders)
        assert [min(who) for who in senders] == sorted(min(who) for who in senders)
    if scheme == "c":
        assert len(found) <= count
        for worker, size in enumerate(samples):  # shares as equal as they can be
            assert {b - a for a, b in (turn[worker] for turn in found)} <= {0, size // count, -(-size // count)}


@pytest.mark.parametrize(
    ("scheme", "count", "message"), [("a", 2, "one turn"), ("b", 3, "multiple of 2"), ("c", 0, "0")]
)
def test_numbers_of_turns_that_a_scheme_has_not(scheme: Scheme, count: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        turns(scheme, (4, 4), count)
