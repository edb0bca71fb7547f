"""Batches in turns on real processes: their definition, checkpoints, failures."""

from pathlib import Path
from typing import Any

import pytest
import torch

from planner.api import Options, Origin, machine_of, prepare
from runtime.launch import run_local
from support.variable_ranks import batches, build

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def plan() -> str:
    x: torch.Tensor = batches()[0][0]
    planner = prepare(build(), (x,), machine_of(devices=2), Options(all_devices=True), Origin("lenet5", "lenet5"))
    search = planner.search(planner.meshes()[0])
    return planner.plan_of(search, search.fixed("conv-data-fc-model")).to_json()


def test_every_scheme_is_its_definition_over_a_checkpoint(plan: str, tmp_path: Path) -> None:
    argument: Any = {"plan": plan, "folder": str(tmp_path)}
    everyone: Any = run_local("support.variable_ranks:check", argument, num_ranks=2, timeout_s=120.0)
    for worst in everyone:
        assert worst.keys() == {"a", "b", "c"}
        assert max(worst.values()) < 1e-9


def test_a_rank_that_hangs_is_an_error_that_names_what_was_on_its_way(plan: str) -> None:
    argument: Any = {"plan": plan, "timeout_s": 2.0}
    message, _ = run_local("support.variable_ranks:fail", argument, num_ranks=2, timeout_s=90.0)
    assert "rank 0: all_gather of the samples of a turn failed" in str(message)
