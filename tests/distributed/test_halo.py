"""Halo exchanges on real gloo processes equal one device in float64, overlapped or not."""

import math
from typing import Any

import pytest

from runtime.launch import run_local
from support.halos import CASES, planner_for, spatial_plan


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_cut_convolutions_equal_one_device(num_ranks: int) -> None:
    sizes = {name: math.prod(map(int, case.mesh.partition("=")[2].split("x"))) for name, case in CASES.items()}
    chosen = [name for name, size in sizes.items() if size == num_ranks and "padding" not in name]
    assert chosen
    planners = {name: planner_for(CASES[name]) for name in chosen}
    cases = [
        {"case": name, "plan": spatial_plan(planner, CASES[name].cut, overlapped).to_json()}
        for name, planner in planners.items()
        for overlapped in (False, True)
    ]
    ranks: Any = run_local("support.halos:on_process", {"cases": cases}, num_ranks=num_ranks, timeout_s=300.0)
    wrong = [(case["case"], found) for each in ranks for case, found in zip(cases, each, strict=True) if found]
    assert wrong == []
