"""Messages of two ranks on gloo: what arrives is what was sent, however large each direction is."""

import pytest

from runtime.launch import run_local

pytestmark = pytest.mark.dist


def test_every_collective_of_two_ranks_gives_the_right_elements_on_both_sides_of_the_threshold() -> None:
    for wrong in run_local("support.messages:check", {}, num_ranks=2, timeout_s=120.0):
        assert wrong == {"exchange": 0, "gather": 0, "scatter": 0, "beside": 0, "sum": 0, "interrupting": 0}
