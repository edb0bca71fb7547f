"""``layerwise profile layers`` as a user meets it: its file, going on after a kill, and every wrong input."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from planner.api import Machine, Options, Origin, data_sheet_profile, example_inputs, measure_layers, prepare
from planner.devices.library import equal_devices
from planner.frontend.source import load_model
from planner.profile.file import read_profile
from planner.profile.table import Source
from support.command_line import ROOT, layerwise

LENET = ("profile", "layers", "lenet5", "--devices", "2", "--batch", "8", "--threads", "1")


@pytest.mark.dist
@pytest.mark.slow
def test_a_killed_command_leaves_a_file_and_the_same_command_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    command = [sys.executable, "-m", "planner", *LENET, "-o", str(path)]
    running = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL
    )
    deadline_s = time.monotonic() + 120
    while not path.exists() and running.poll() is None and time.monotonic() < deadline_s:
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.wait()
    kept = set(read_profile(path).measurements())
    assert kept
    ran = layerwise(*LENET, "-o", path)
    assert ran.code == 0, ran.err
    found = read_profile(path)
    assert kept < set(found.measurements())
    assert f"{len(found.layers)} pieces: {len(found.layers) - len(kept)} timed now, {len(kept)} known before" in ran.err
    assert (found.device, found.environment["threads"]) == ("mine", "1")
    again = layerwise(*LENET, "-o", path)
    assert f"{path} has it all already" in again.err


@pytest.mark.dist
@pytest.mark.slow
def test_several_processes_time_one_file_together(tmp_path: Path) -> None:
    path = tmp_path / "two.json"
    small = ("profile", "layers", "lenet5", "--devices", "1", "--batch", "2", "--ranks-at-once", "2", "--threads", "1")
    ran = layerwise(*small, "--memory-format", "channels_last", "--precision", "bf16", "-o", path)
    assert ran.code == 0, ran.err
    found = read_profile(path)
    assert found.environment["ranks_at_once"] == "2"
    assert {entry.layer.precision for entry in found.layers} == {"bf16"}
    assert "channels_last" in {entry.layer.memory_format for entry in found.layers}


@pytest.mark.dist
@pytest.mark.slow
def test_every_piece_of_a_measured_planner_has_a_measured_time() -> None:
    loaded, graph = load_model("lenet5"), equal_devices(2)
    machine = Machine(graph, data_sheet_profile(graph, "fp32"))
    planner = prepare(loaded.module, example_inputs(loaded.input_shapes, 8), machine, Options(), Origin("lenet5"))
    measured = measure_layers(planner)
    assert set(measured.machine.profile.layers) == set(planner.layer_keys())  # all are small enough as they are
    (mesh,) = measured.meshes()
    model, space = measured.cost_model(mesh), measured.space(mesh)
    for layer in measured.traced.layers.layers:
        for split in space.splits[layer.id]:
            local = model.local(layer, split)
            assert not local.has_kernel or measured.machine.profile.time(local).source is Source.MEASURED
    assert measure_layers(measured) is measured


WRONG: dict[str, tuple[tuple[str, ...], str]] = {
    "unknown model": (("lenet6", "--devices", "1"), "unknown model 'lenet6'. Did you mean 'lenet5'"),
    "no machine": (("lenet5",), "say whose pieces: --devices N or --cluster NAME"),
    "two machines": (("lenet5", "--devices", "1", "--cluster", "4xa100-nvlink"), "exactly one of --devices"),
    "unknown mesh": (("lenet5", "--devices", "4", "--mesh", "gpu=5"), "mesh"),
    "unknown dimension": (("lenet5", "--devices", "2", "--dims", "smaple"), "unknown dimension 'smaple'"),
    "a mode of GPUs": (("lenet5", "--devices", "1", "--precision", "tf32"), "tf32 is a mode of NVIDIA GPUs"),
    "no time": (("lenet5", "--devices", "1", "--budget", "soon"), "'soon'"),
    "inputs of all models": (("all", "--devices", "1", "--input", "3,8,8"), "of one model, not of `all`"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_requests_are_refused_before_anything_is_measured(tmp_path: Path, what: str) -> None:
    arguments, message = WRONG[what]
    ran = layerwise("profile", "layers", *arguments, "-o", tmp_path / "p.json")
    assert (ran.code, ran.out) == (2, "")
    assert message in ran.error
    assert not list(tmp_path.iterdir())


def test_a_missing_gpu_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    ran = layerwise(*LENET, "--device", "cuda", "--ranks-at-once", "2", "-o", tmp_path / "p.json")
    assert ran.code == 2
    assert "--device cuda needs a CUDA device for each of --ranks-at-once 2, found 1" in ran.error


def test_a_missing_library_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    ran = layerwise("profile", "layers", "torchvision:mobilenet_v2", "--devices", "1", "-o", tmp_path / "p.json")
    assert ran.code == 2
    assert "layerwise[zoo]" in ran.error


@pytest.mark.parametrize(
    ("place", "message"),
    [(".", "it is a folder"), ("missing/p.json", "there is no folder")],
)
def test_a_place_that_cannot_be_written_is_refused_at_once(tmp_path: Path, place: str, message: str) -> None:
    ran = layerwise(*LENET, "-o", tmp_path / place)
    assert ran.code == 2
    assert message in ran.error


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "device profile"),
        (json.dumps({"schema_version": 1, "device": "d", "environment": {"processor": "abacus"}, "layers": []}),
         "measured with processor 'abacus'"),
    ],
)  # fmt: skip
def test_a_file_of_something_else_is_kept(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "p.json"
    path.write_text(text)
    ran = layerwise(*LENET, "-o", path)
    assert ran.code == 2
    assert message in ran.error
    assert path.read_text() == text
