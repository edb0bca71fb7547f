"""`layerwise run`: what it prints, and what happens where it cannot run or a rank dies."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from planner.plan import Plan
from planner.plan.measured import read_measured
from planner.plan.measured_stages import MeasuredPipeline
from planner.report.tracks import COMPUTE, SYNC
from support.command_line import ROOT, layerwise

pytestmark = [pytest.mark.dist, pytest.mark.slow]

EXIT_USAGE, EXIT_RUN_FAILED = 2, 5
MORTAL = """
import os, signal
from pathlib import Path
from torch import nn

STEPS = 2  # that rank 1 lives to see


def net(folder: str):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    seen = []

    def count(gradient):
        seen.append(gradient)
        if os.environ["RANK"] == "1" and len(seen) > STEPS:
            Path(folder, "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    if "RANK" in os.environ:
        Path(folder, os.environ["RANK"] + ".pid").write_text(str(os.getpid()))
        model[0].weight.register_hook(count)
    return model
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a plan for two ranks."""
    place = tmp_path_factory.mktemp("run")
    plan = place / "plan.json"
    done = layerwise("plan", "lenet5", "--devices", "2", "--batch", "8", "--all-devices", "-o", plan)
    assert done.code == 0, done.err
    return place


@pytest.fixture(autouse=True)
def _inside(folder: Path, host_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands run in the folder; measurements of this host are kept apart from the user's."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(host_cache))
    monkeypatch.syspath_prepend(ROOT)  # for the ranks


def test_it_measures_every_layer_and_holds_step_layers_and_parts_against_the_prediction(folder: Path) -> None:
    files = ("--measured", "run.json", "--trace", "trace.json")
    command = [sys.executable, "-m", "planner", "run", "plan.json", "--steps", "3", "--warmup", "1", *files]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if "s " in line]
    for name in ("predicted for 2xaccelerator-nvlink", "predicted for local-2", "measured", "measured, compute only",
                 "forward", "exposed gradient sync", "optimizer", "step"):  # fmt: skip
        assert any(row.startswith(name) for row in rows), done.stdout
    assert "this is another machine" in done.stderr
    plan = Plan.load(folder / "plan.json")
    found = read_measured(folder / "run.json", plan)
    assert len(found.steps_s) == len(found.instrumented_steps_s) == 3
    assert (found.environment["ranks"], found.num_ranks, found.batch) == ("2", 2, 8)
    for row, layer in zip(found.layers, plan.stages[0].layers, strict=True):
        assert row.compute_s > 0 or layer.op in {"input", "output", "redistribute"}
    parts_s = sum(row.compute_s + row.transfer_s for row in found.layers)
    parts_s += found.gathering_s + found.exposed_sync_s + found.optimizer_s + found.other_s
    assert parts_s == pytest.approx(found.instrumented_step_s)
    trace = json.loads((folder / "trace.json").read_text())["traceEvents"]
    spans = [e for e in trace if e["ph"] == "X" and e["pid"] == found.rank]
    in_turn = [e for e in spans if e["cat"] != SYNC]  # reductions run beside the rest
    assert sum(e["dur"] for e in in_turn) == pytest.approx(found.instrumented_steps_s[-1] * 1e6)
    both = layerwise("trace", "plan.json", "--beside", "trace.json", "-o", "both.json")
    assert both.code == 0, both.err
    assert "another plan" not in both.err
    joined = json.loads((folder / "both.json").read_text())["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in joined if e["name"] == "process_name"}
    assert names == {0: "predicted, every rank", 1: "measured, rank 0", 2: "measured, rank 1"}
    predicted, measured = ({e["name"] for e in joined if e.get("cat") == COMPUTE and e["pid"] == p} for p in (0, 1))
    assert predicted <= measured
    calibrated = layerwise("calibrate", "plan.json", "--measured", "run.json", "-o", "profile.json")
    assert calibrated.code == 0, calibrated.err


@pytest.mark.parametrize(("schedule", "count", "unit"), [("1f1b", 2, "step"), ("stale", 1, "cycle")])
def test_it_measures_every_stage_of_a_pipeline_and_holds_it_against_both_predictions(
    folder: Path, schedule: str, count: int, unit: str
) -> None:
    asked = ["--stages", "2", "--schedule", schedule, *(["--microbatches", str(count)] if count > 1 else [])]
    planned = layerwise("plan", "lenet5", "--devices", "2", "--batch", "8", *asked, "-o", f"{schedule}.json")
    assert planned.code == 0, planned.err
    files = ("--measured", f"{schedule}-run.json", "--trace", f"{schedule}-trace.json")
    done = layerwise("run", f"{schedule}.json", "--steps", "3", "--warmup", "1", *files)
    assert done.code == 0, done.err
    assert "this is another machine" in done.err
    lines = [line.strip() for line in done.out.splitlines()]
    name, part = (f"{schedule}, 2 micro-batches", "micro-batch") if count > 1 else (schedule, "batch")
    assert f"lenet5, batch 8, 2 ranks, {name}" in lines
    assert f"Stages, predicted for local-2: seconds of a {part}, and of the end of the {unit}" in lines
    assert lines[1].split() == [unit, "samples/s", "against", "measured"]
    rows = [line for line in lines if "s " in line]
    for start in ("predicted for 2xaccelerator-nvlink", "predicted for local-2", "measured", "0", "1"):
        assert any(row.startswith(f"{start} ") for row in rows), done.out

    plan = Plan.load(folder / f"{schedule}.json")
    found = MeasuredPipeline.model_validate_json((folder / f"{schedule}-run.json").read_text())
    assert (found.plan_sha256, found.num_ranks, len(found.steps_s)) == (plan.digest, 2, 3)
    assert [stage.rank for stage in found.stages] == [0, 1]
    assert all(min(stage.forward_s, stage.backward_s, stage.tail_s) > 0 for stage in found.stages)
    trace = json.loads((folder / f"{schedule}-trace.json").read_text())["traceEvents"]
    for rank in (0, 1):
        spans = [e for e in trace if e["ph"] == "X" and e["pid"] == rank]
        for phase in ("forward", "backward"):  # of every micro-batch one
            assert sum(e["name"] == f"stage {rank} {phase}" for e in spans) == count
        assert [e["name"] for e in spans].count("optimizer") == 1
        assert sum(e["dur"] for e in spans) == pytest.approx(max(e["ts"] + e["dur"] for e in spans))

    for name, said in ((schedule, "timed stage by stage"), ("plan", "with the seconds of stages and not of layers")):
        refused = layerwise("calibrate", f"{name}.json", "--measured", f"{schedule}-run.json", "-o", "none.json")
        assert refused.code == EXIT_USAGE
        assert said in refused.error
    assert not (folder / "none.json").exists()


def test_a_pipeline_is_refused_by_another_number_of_ranks_and_by_compare(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ("lenet5", "--devices", "2", "--batch", "8", "--stages", "2", "--schedule", "gpipe")
    assert layerwise("plan", *asked, "-o", "gpipe.json").code == 0
    compared = layerwise("compare", *asked, "--measure")
    assert (compared.code, compared.out) == (EXIT_USAGE, "")
    assert "compare holds plans of one stage against each other" in compared.error
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    done = layerwise("run", "gpipe.json")
    assert (done.code, done.out) == (EXIT_USAGE, "")
    assert "for 2 ranks, but 3 are running" in done.error


def test_compare_runs_every_strategy_that_can_be_run_and_says_of_the_others_why_not() -> None:
    asked = ("compare", "lenet5", "--cluster", "local-2", "--batch", "8", "--dims", "sample,height", "--json")
    done = layerwise(*asked, "--scale", "1,2", "--all-devices", "--solver", "dp", "--measure", "--steps", "3")
    assert done.code == 0, done.err
    alone, found = json.loads(done.out)["cases"]
    assert [case["devices"] for case in (alone, found)] == [1, 2]
    assert all(row["measured_s"] > 0 for row in alone["measured"]["strategies"] if not row["note"])
    rows = {(row["name"], row["is_planned"]): row for row in found["measured"]["strategies"]}
    assert [row["name"] for row in found["strategies"]] == [name for name, _ in rows]
    data = rows["data", False]
    assert data["measured_s"] > 0
    assert data["error"] == pytest.approx(data["predicted_s"] / data["measured_s"] - 1)
    ran = [row for row in rows.values() if row["measured_s"] is not None]
    assert all(row["note"].startswith("not run: ") for row in rows.values() if row["measured_s"] is None)
    correlation = found["measured"]["rank_correlation"]
    assert (correlation is None) == (len({row["predicted_s"] for row in ran}) < 2)


def test_a_plan_for_another_number_of_ranks_is_refused_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    done = layerwise("run", "plan.json")
    assert done.code == EXIT_USAGE
    assert "for 2 ranks, but 3 are running" in done.err
    assert done.out == ""


def test_what_is_no_plan_or_a_broken_one_is_refused(folder: Path) -> None:
    broken = (folder / "plan.json").read_text().replace('"batch": 8', '"batch": -8')
    (folder / "broken.json").write_text(broken)
    for name, message in [("absent.json", "absent.json"), ("broken.json", "$.batch")]:
        done = layerwise("run", name)
        assert done.code == EXIT_USAGE
        assert message in done.err
        assert "Traceback" not in done.err


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_rank_that_is_killed_ends_the_run_within_seconds_and_is_named(folder: Path) -> None:
    (folder / "mortal.py").write_text(MORTAL)
    model = ["mortal.py:net", "--model-args", f"folder={folder}", "--input", "8"]
    how = ["--devices", "2", "--batch", "8", "--solver", "data", "-o", "mortal.json"]
    planned = layerwise("plan", *model, *how)
    assert planned.code == 0, planned.err
    assert Plan.load(folder / "mortal.json").model.arguments == {"folder": str(folder)}
    done = layerwise("run", "mortal.json")
    (folder / "ended").touch()
    died_s, ended_s = ((folder / name).stat().st_mtime for name in ("died", "ended"))
    assert ended_s - died_s < 10  # the timeouts of the groups are 60 s and more
    assert done.code == EXIT_RUN_FAILED, done.err
    assert f"rank 1 was killed by {signal.SIGKILL.name}" in done.err
    pids = [int(file.read_text()) for file in folder.glob("*.pid")]
    assert len(pids) == 2
    assert not any(map(is_alive, pids))
