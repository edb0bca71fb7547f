"""The examples, run by the very commands that their texts give."""

import csv
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from planner.frontend import zoo
from planner.plan import Plan

pytestmark = [pytest.mark.dist, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
SCRIPTS = {
    "layerwise": [sys.executable, "-m", "planner"],
    "torchrun": [sys.executable, "-m", "torch.distributed.run"],
    "python": [sys.executable],
}
COVERAGE = ["python", "-m", "examples.benchmarks.coverage"]
ENVIRONMENT = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def commands_of(file: str) -> list[list[str]]:
    """Return the commands in the text on top of an example: its indented lines."""
    text = (ROOT / file).read_text().split('"""')[1]
    return [shlex.split(line) for line in text.splitlines() if line.startswith("    ")]


@pytest.fixture
def folder(tmp_path: Path, host_cache: Path) -> Path:
    """A folder in which the examples can be named as from the repository root."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "cache").symlink_to(host_cache)
    return tmp_path


def run(command: list[str], folder: Path, exit_code: int = 0) -> str:
    """Return what a command prints."""
    name, *arguments = command
    environment = os.environ | ENVIRONMENT | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]), "XDG_CACHE_HOME": str(folder / "cache"),
    }  # fmt: skip
    done = subprocess.run(
        [*SCRIPTS[name], *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert done.returncode == exit_code, (
        f"{shlex.join(command)} exited with {done.returncode}\n{done.stdout}\n{done.stderr}"
    )
    return done.stdout


def test_the_training_script_learns_the_digits_under_a_plan_made_for_it(folder: Path) -> None:
    plan_it, train_it = commands_of("examples/train.py")
    run(plan_it, folder)
    assert Plan.load(folder / "plan.json").mesh.size == 2
    kept = [*train_it, "--checkpoint", "digits"]
    printed = run([*kept, "--epochs", "2"], folder) + run([*kept, "--export", "digits.pt"], folder)
    epochs = re.findall(r"^epoch (\d): loss ([\d.]+), test accuracy ([\d.]+)%$", printed, re.MULTILINE)
    assert [int(epoch) for epoch, _, _ in epochs] == [1, 2, 3, 4, 5]
    losses, accuracies = zip(*((float(loss), float(share)) for _, loss, share in epochs), strict=True)
    assert losses[-1] < losses[0] / 5
    assert accuracies[-1] > 95
    build_model = runpy.run_path(str(ROOT / "examples/train.py"))["build_model"]
    build_model().load_state_dict(torch.load(folder / "digits.pt", weights_only=True))


def test_a_plan_made_in_python_says_what_the_saved_file_says(folder: Path) -> None:
    (command,) = commands_of("examples/plan_in_python.py")
    printed = run(command, folder)
    plan = Plan.load(folder / "alexnet.json")
    assert plan.mesh.size == 16
    assert plan.model.source == "alexnet"
    for name in (*(baseline.name for baseline in plan.baselines), *plan.strategy):
        assert f"\n  {name} " in printed


@pytest.mark.zoo
def test_coverage_chooses_every_model_of_torchvision_and_every_family_of_timm(folder: Path) -> None:
    listed = [line.split() for line in run([*COVERAGE, "--list"], folder).splitlines()]
    (torchvision, timm) = ([row for row in listed if row[0].startswith(name)] for name in ("torchvision:", "timm:"))
    assert [row[0] for row in torchvision] == sorted(f"torchvision:{name}" for name in zoo.families("torchvision"))
    assert {family for _, family, _ in timm} == set(zoo.families("timm").values())
    assert len(timm) >= 250
    assert {kind for *_, kind in timm} == {"cnn", "hybrid", "transformer"}


@pytest.mark.zoo
def test_coverage_has_a_row_for_a_model_that_works_and_for_one_that_ran_out_of_memory(folder: Path) -> None:
    works = [*COVERAGE, "--only", "torchvision:squeezenet1_1", "--numbers", "-o", "rows.csv"]
    assert "100.0%" in run(works, folder)
    (row,) = csv.DictReader((folder / "rows.csv").read_text().splitlines())
    assert (row["family"], row["kind"], row["result"], row["reason"]) == ("squeezenet", "classification", "ok", "")
    assert int(row["layers"]) > 26  # convolutions
    assert all(float(row[name]) > 0 for name in ("trace_s", "count_s", "plan_s", "peak_mib", "forward_flop"))
    run([*COVERAGE, "--only", "torchvision:regnet_y_32gf", "--memory", "1MiB", "-o", "rows.csv"], folder, exit_code=1)
    (row,) = csv.DictReader((folder / "rows.csv").read_text().splitlines())
    assert row["result"] != "ok"
    assert "emory" in row["reason"]
