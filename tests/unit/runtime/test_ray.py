"""Ranks on a Ray of this machine; errors without one."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from planner.errors import UsageError
from runtime.ray import run_on_ray
from support.command_line import ROOT, layerwise

EXIT_USAGE, EXIT_RUN_FAILED = 2, 5
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray: pip install '.[ray]'")
FAILING = """
import os, signal
from torch import nn


def net():
    if os.environ.get("RANK") == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
"""


def test_without_ray_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"pip install 'layerwise\[ray\]'"):
        run_on_ray("support.ranks:describe", None, num_ranks=2, timeout_s=1)


@needs_ray
def test_an_address_where_nobody_listens_is_refused_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(UsageError, match=rf"no Ray cluster at '127.0.0.1:{port}'"):
        run_on_ray("support.ranks:describe", None, num_ranks=2, timeout_s=1, address=f"127.0.0.1:{port}")


def test_options_that_contradict_each_other_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = layerwise("plan", "lenet5", "--devices", "2", "--batch", "8", "-o", tmp_path / "plan.json")
    assert planned.code == 0, planned.err
    done = layerwise("run", tmp_path / "plan.json", "--ray-address", "127.0.0.1:6379")
    assert (done.code, done.out) == (EXIT_USAGE, "")
    assert "--ray-address is for --launcher ray" in done.error
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = layerwise("run", tmp_path / "plan.json", "--launcher", "ray")
    assert (done.code, done.out) == (EXIT_USAGE, "")
    assert "has started this process as one" in done.error


def command(folder: Path, cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``layerwise`` in a process of its own: Ray keeps threads, and handlers of signals."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(cache)}
    line = [sys.executable, "-m", "planner", *arguments]
    return subprocess.run(line, env=environment, cwd=folder, capture_output=True, text=True, timeout=600, check=False)


@needs_ray
@pytest.mark.dist
@pytest.mark.slow
def test_a_plan_runs_on_a_local_ray_as_on_local_processes(tmp_path: Path, host_cache: Path) -> None:
    planned = layerwise("plan", "lenet5", "--devices", "2", "--batch", "8", "--all-devices", "-o", tmp_path / "p.json")
    assert planned.code == 0, planned.err
    found: list[tuple[list[str], Any]] = []
    for launcher in ("auto", "ray"):
        asked = ("run", "p.json", "--steps", "2", "--warmup", "1", "--launcher", launcher, "--measured", "run.json")
        done = command(tmp_path, host_cache, *asked)
        assert done.returncode == 0, done.stderr
        titles = [line.split("  ")[0] for line in done.stdout.splitlines() if line[:1].isalpha()]
        measured = json.loads((tmp_path / "run.json").read_text())
        assert measured["num_ranks"] == len(measured["steps_s"]) == 2
        found.append((titles[:3], measured))
    (titles, local), (titles_on_ray, on_ray) = found
    assert titles == titles_on_ray
    assert local.keys() == on_ray.keys()
    assert local["environment"].keys() == on_ray["environment"].keys()
    assert [row["id"] for row in local["layers"]] == [row["id"] for row in on_ray["layers"]]


@needs_ray
@pytest.mark.dist
@pytest.mark.slow
def test_a_rank_that_is_killed_on_ray_is_named(tmp_path: Path, host_cache: Path) -> None:
    (tmp_path / "failing.py").write_text(FAILING)
    planned = command(tmp_path, host_cache, "plan", "failing.py:net", "--input", "8", "--devices", "2", "--batch", "8",
                      "--solver", "data", "-o", "p.json")  # fmt: skip
    assert planned.returncode == 0, planned.stderr
    done = command(tmp_path, host_cache, "run", "p.json", "--launcher", "ray")
    assert done.returncode == EXIT_RUN_FAILED, done.stderr
    assert "rank 1 was killed by SIGKILL" in done.stderr
