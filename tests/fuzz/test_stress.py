"""The planner where the network, the machine or the limit is extreme; in full with LAYERWISE_FULL=1."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from planner.errors import InfeasibleError
from planner.plan import Plan
from support.command_line import ROOT, layerwise

FULL = bool(os.environ.get("LAYERWISE_FULL"))
LAYERS, NODES = (2000, 512) if FULL else (60, 64)
"""Eight devices a node: 4,096 in full."""
MOST_MIB = 2048
CHAIN = """
from torch import nn


def chain(layers: int):
    middle = [nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()) for _ in range(layers - 2)]
    last = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), *middle, *last)
"""
IN_BOUNDS = """
import resource, sys
from planner.cli.main import main
try:
    main(sys.argv[1:])
finally:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, file=sys.stderr)
"""


@pytest.mark.parametrize("options", [(), ("--solver", "data"), ("--stages", "2"), ("--stages", "auto")], ids=" ".join)
def test_what_cannot_fit_says_what_to_change_and_ends_with_its_own_code(
    options: tuple[str, ...], tmp_path: Path
) -> None:
    output = tmp_path / "plan.json"
    ran = layerwise("plan", "lenet5", "--cluster", "2xt4-pcie", "--memory-limit", "64KiB", *options, "-o", output)
    assert ran.code == InfeasibleError.exit_code
    assert "fits in" in ran.error or re.search(r"needs [\d.]+ [KMG]iB per device, but the limit is 64 KiB", ran.error)
    assert re.search(r"more devices, a smaller batch, .*(--memory-limit|memory limit)", ran.error)
    assert not output.exists()


def test_a_deep_chain_on_many_devices_is_planned_within_the_limit_of_memory(tmp_path: Path) -> None:
    tmp_path.joinpath("deep.py").write_text(CHAIN)
    command = [
        sys.executable, "-c", IN_BOUNDS, "plan", "deep.py:chain", "--model-args", f"layers={LAYERS}",
        "--input", "3,32,32", "--cluster", f"{NODES}x8-h100-ib400", "--batch", str(16 * NODES), "-o", "plan.json", "-q",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stderr.split()[-1]) < MOST_MIB
    plan = Plan.load(tmp_path / "plan.json")
    assert len([layer for layer in plan.only_stage.layers if layer.op == "conv"]) == LAYERS - 1
    assert plan.totals.memory_bytes <= plan.search.memory_limit_bytes
