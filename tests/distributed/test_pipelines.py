"""Synchronous pipelines on real processes equal one device that trains the micro-batches one after the other."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from planner.errors import RunError
from runtime.launch import run_local
from support.pipeline_ranks import CHECKPOINTED, Case, build

pytestmark = [pytest.mark.dist, pytest.mark.slow]

CASES: dict[int, list[Case]] = {
    2: [
        Case("resnet8", ((1,), (1,)), "1f1b", 4),
        Case("skips", ((1,), (1,)), "interleaved", 4, cuts=4),
        Case("skips", ((1,), (1,)), "zero-bubble", 4, cuts=4, frozen=("stem", "norm")),
        Case("resnet8", ((1,), (1,)), "1f1b", 2, recompute=True),
        Case("unet", ((2,),), "interleaved", 2, cuts=2, seed=3),
        Case("resnet8", ((2,),), "interleaved", 2, cuts=2, sharding="optimizer"),
        Case("asks", ((1,), (1,)), "1f1b", 4, cuts=("late",)),
    ],
    3: [
        Case("unet", ((1,), (2,)), "gpipe", 4, seed=1),
        Case("skips", ((2,), (1,)), "zero-bubble", 2, seed=2),
        Case("resnet8", ((1,), (1,), (1,)), "zero-bubble", 4, cuts=3, recompute=True),
        Case("unet", ((1,), (2,)), "1f1b", 4, sharding="full"),
        Case("asks", ((2,), (1,)), "gpipe", 2, cuts=("late",), seed=1),
    ],
    4: [
        Case("resnet8", ((2,), (2,)), "1f1b", 1, seed=None),
        Case("unet", ((2,), (2,)), "zero-bubble", 2, seed=4),
        Case("skips", ((2,), (2,)), "interleaved", 4, cuts=4, seed=None),
        Case("skips", ((2,), (2,)), "gpipe", 2, recompute=True, sharding="full"),
    ],
}


def refuse_differences(cases: list[Case], ranks: Any) -> None:
    for case, found in zip(cases, zip(*ranks, strict=True), strict=True):
        assert [each["worst"] for each in found] == [{}] * len(ranks), case
        names = [name for each in found for name in each["names"]]
        assert set(names) == set(build(case).state_dict()), case


@pytest.mark.parametrize("num_ranks", [3, 4])
def test_pipelines_equal_one_device(num_ranks: int) -> None:
    cases = CASES[num_ranks]
    argument: Any = [asdict(case) for case in cases]
    ranks = run_local("support.pipeline_ranks:check", argument, num_ranks=num_ranks, timeout_s=200.0)
    refuse_differences(cases, ranks)


def test_two_stages_their_checkpoints_and_errors(tmp_path: Path) -> None:
    """A checkpoint goes from stages to a plan without and back; a stage that hangs is an error after the timeout."""
    argument: Any = {"cases": [asdict(case) for case in CASES[2]], "folder": str(tmp_path)}
    ranks: Any = run_local("support.pipeline_ranks:check_all", argument, num_ranks=2, timeout_s=200.0)
    refuse_differences(CASES[2], [found["cases"] for found in ranks])
    for found in ranks:
        resumed = found["checkpoint"]
        assert resumed["worst"] == {}
        assert resumed["names"] == [True, True]
        assert resumed["resumed"] == [1, {"rank": 0}]
        assert resumed["wrong"] == "MismatchError: the state is of SGD, the optimizer is Adam"
        assert [each["worst"] for each in found["scaled"]] == [{}, {}]
        assert [each["scales"] for each in found["scaled"]] == [[64.0, 32.0, 32.0]] * 2
        assert found["autocast"]["worst"] < 1e-6
        assert found["autocast"]["float32"] > 0
        assert found["copied"] == dict.fromkeys(found["copied"], True)
        odd, mixed, training, called, stale, count = found["misused"]
        assert odd.startswith("MismatchError: a batch of 7 samples does not divide into 2 micro-batches")
        assert mixed.startswith("MismatchError: inputs and targets have [7, 8] samples")
        assert training.startswith("MismatchError: 3 samples do not divide into micro-batches of 4")
        assert called.startswith("UsageError: a pipeline has no forward()")
        assert stale.startswith("UsageError: with schedule 'stale' the optimizer steps in every cycle")
        assert count.startswith("UsageError: the plan is for 3 ranks, but 2 are running")
    assert [found["scaled"][1]["count"] for found in ranks] == [2, 0]
    build(CHECKPOINTED).load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    hung = ranks[0]["hung"]
    assert hung.startswith("RunError: rank 0: receiving the gradient of ")
    assert "of micro-batch 0, stage 0, from rank 1 failed" in hung


def test_a_stage_that_dies_is_an_error_elsewhere_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.launch._SETTLE_S", 30.0)  # the other stage ends by itself, on a slow machine too
    argument: Any = {"how": "die", "timeout_s": 60.0, "folder": str(tmp_path)}
    start_s = time.perf_counter()
    with pytest.raises(RunError, match="rank 1"):
        run_local("support.pipeline_ranks:lose_a_stage", argument, num_ranks=2, timeout_s=60.0)
    assert time.perf_counter() - start_s < argument["timeout_s"]
    assert (tmp_path / "0").read_text().startswith("RunError: rank 0: ")
