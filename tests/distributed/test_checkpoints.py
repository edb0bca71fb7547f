"""A checkpoint of two processes, loaded by four and by one that knows nothing of plans."""

from pathlib import Path
from typing import Any

import pytest
import torch

from planner.ir.dimension import Dimension
from planner.plan import Plan
from runtime import checkpoint
from runtime.checkpoint.whole import Part
from runtime.launch import run_local
from support.checkpoints import OPTIMIZERS, any_plan, assert_equal, build, difference, groups, reference, train


def ranks_of(function: str, plan: Plan, folder: Path) -> list[Any]:
    """Return what the ranks of a plan find, each a process."""
    argument = {"plan": plan.to_json(), "folder": str(folder)}
    found: list[Any] = run_local(f"support.checkpoints:{function}", argument, num_ranks=plan.mesh.size, timeout_s=200.0)
    return found


@pytest.mark.dist
@pytest.mark.slow
def test_saved_by_two_ranks_loaded_by_four_and_by_one(tmp_path: Path) -> None:
    before, after = any_plan(2, 5, "full"), any_plan(4, 6, "optimizer")
    for plan in (before, after):  # weights are cut, not samples only
        assert any(Dimension.OUT_CHANNEL in split.dimensions for split in plan.strategy.values())
    first, second = ranks_of("save_part", before, tmp_path)
    for found in (first, second):
        assert (found["step"], found["changed"]) == (6, True)
        assert found["files"] == [".checksums", ".metadata", "__0_0.distcp", "__1_0.distcp"]
        assert found["no folder"].startswith(f"RunError: saving {tmp_path / 'file' / 'c'} failed: rank 0: NotADirector")
        assert found["one rank"] == f"RunError: saving {tmp_path / 'a'} failed: rank 1: OSError: no space left"
    assert first["extra"] == f"RunError: saving {tmp_path / 'd'} failed on rank 1; its message says why"
    assert second["extra"].startswith("UsageError: extra is a builtin_function_or_method")
    ranks = ranks_of("load_part", after, tmp_path)
    expected, theirs = reference()
    for rank, found in enumerate(ranks):
        assert (found["step"], found["extra"]) == (3, {"epoch": 1})
        assert found["error"].startswith("MismatchError" if rank == 1 else "RunError: loading")
        total = sum(tensor.double().sum() for tensor in expected.state_dict().values())
        assert found["sum"] == pytest.approx(float(total), rel=1e-9)
        assert found["unwritable"].startswith("RunError" if rank else "FileNotFoundError")
    alone = build(seed=9)
    optimizer = OPTIMIZERS["amsgrad"](groups(alone))
    checkpoint.load(alone, optimizer, tmp_path / "a")
    train(alone, optimizer)
    assert_equal(Part.of(alone), optimizer, expected, theirs)
    plain = build(seed=9)
    plain.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    for name, tensor in expected.state_dict().items():
        assert difference(plain.state_dict()[name], tensor) < 1e-9
