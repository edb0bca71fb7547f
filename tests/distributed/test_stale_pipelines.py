"""Pipelines in cycles on real processes: their definition, constant memory, stages of several ranks, failures."""

from pathlib import Path
from typing import Any

import pytest

from runtime.launch import run_local
from runtime.pipeline.transfers import MANY_SENT

pytestmark = pytest.mark.dist

PLANS: dict[int, list[dict[str, Any]]] = {
    2: [{"meshes": [[1], [1]], "kind": "pipedream", "pipelined": 4}],
    3: [
        {"meshes": [[2], [1]], "kind": "stale", "pipelined": None},
        {"meshes": [[1], [2]], "kind": "pipedream", "pipelined": None},
        {"meshes": [[1], [1], [1]], "kind": "stale", "pipelined": 3},
    ],
}


RESUMED: dict[int, dict[str, Any]] = {  # after three batches: amid the pipelined ones of a hybrid, and behind them
    2: {"meshes": [[1], [1]], "onto": [[1], [1]], "kind": "stale", "pipelined": 4},
    3: {"meshes": [[2], [1]], "onto": [[1], [2]], "kind": "pipedream", "pipelined": 2},
}


@pytest.mark.parametrize("num_ranks", PLANS)
def test_every_cycle_and_every_checkpoint_is_that_of_the_definition_in_constant_memory(
    num_ranks: int, tmp_path: Path
) -> None:
    argument: Any = {"plans": PLANS[num_ranks], "resumed": RESUMED[num_ranks], "folder": str(tmp_path / "saved")}
    everyone: Any = run_local("support.stale_ranks:check", argument, num_ranks=num_ranks, timeout_s=120.0)
    if num_ranks == 2:  # a last stage without parameters
        assert [found["bare"] for found in everyone] == [
            {"weights": True, "has none": False, "momentum": True}, {"weights": True, "has none": True}
        ]  # fmt: skip
        assert [found["under way"] for found in everyone] == [MANY_SENT, 0]
    for found in everyone:
        assert max(found["off"].values()) < 1e-12
        for middle, end in found["bytes"].values():
            assert middle == end
        for planned in found["planned"]:
            assert planned["worst"] < 1e-9
            assert len(planned["names"]) > 1
        resumed = found["resumed"]
        assert resumed["worst"] < 1e-9
        assert len(resumed["names"]) > 1
        assert ("call drain() before its weights are saved" in resumed["early"]) == (num_ranks == 2)


def test_a_stage_that_hangs_or_dies_is_an_error_on_every_rank(tmp_path: Path) -> None:
    argument: Any = {"folder": str(tmp_path), "timeout_s": {"hang": 2.0, "death": 60.0}}
    found: Any = run_local("support.stale_ranks:fail", argument, num_ranks=3, timeout_s=90.0)
    for rank in (0, 1):
        for kind, limit_s in (("hang", 30.0), ("death", 30.0)):  # below the group's timeout of a death
            message, seconds = found[rank][kind]
            assert seconds < limit_s
            assert f"rank {rank}: " in message
            assert "If a peer died" in message
            assert f"rank {rank + 1}" in message
