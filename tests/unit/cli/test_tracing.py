"""``layerwise trace``, and what ``run`` and ``compare --measure`` refuse before anything runs."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from planner.api import machine_of
from planner.cli.tracing import is_as_planned
from planner.plan import Plan
from planner.profile.file import profile_of, write_profile
from planner.profile.table import Measurement
from support.command_line import layerwise
from support.pieces import conv
from support.plans import Json, document, plan_of


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plans") / "plan.json"
    ran = layerwise("plan", "lenet5", "--cluster", "2x1-a100-eth10", "--batch", "64", "--solver", "data", "-o", path)
    assert ran.code == 0, ran.err
    return path


def last_ns(path: Path) -> int:
    """Return when the last event of a trace ends."""
    events = json.loads(path.read_text())["traceEvents"]
    return max(round((event["ts"] + event["dur"]) * 1e3) for event in events if event["ph"] == "X")


def test_the_trace_ends_with_the_predicted_step(plan: Path, tmp_path: Path) -> None:
    ran = layerwise("trace", plan, "-o", tmp_path / "trace.json")
    assert (ran.code, ran.out) == (0, ""), ran.err
    assert f"wrote {tmp_path / 'trace.json'}" in ran.err
    assert "another machine" not in ran.err
    assert last_ns(tmp_path / "trace.json") == round(Plan.load(plan).totals.step_s * 1e9)
    facts = json.loads((tmp_path / "trace.json").read_text())["otherData"]
    assert (facts["model"], facts["plan_sha256"]) == ("lenet5", Plan.load(plan).digest)


def test_another_machine_gives_another_step_and_is_noted(plan: Path, tmp_path: Path) -> None:
    ran = layerwise("trace", plan, "-o", tmp_path / "trace.json", "--cluster", "2x1-a100-eth1")
    assert ran.code == 0, ran.err
    assert "was made for 2x1-a100-eth10; this is another machine" in ran.err
    assert last_ns(tmp_path / "trace.json") > round(Plan.load(plan).totals.step_s * 1e9)


def test_another_profile_is_noted(plan: Path, tmp_path: Path) -> None:
    write_profile(tmp_path / "a100.json", profile_of("a100", {}, {conv(4).text: Measurement(1.0, 1.0, 1.0, 0.0, 5)}))
    ran = layerwise("trace", plan, "-o", tmp_path / "trace.json", "--profile", tmp_path / "a100.json")
    assert ran.code == 0, ran.err
    assert "made with another device profile" in ran.error
    assert "another machine" not in ran.err


def test_a_run_is_held_against_the_plan_s_own_prediction_too_where_layers_are_priced_anew() -> None:
    machine = machine_of(devices=2)
    found = document()
    found["cluster"]["sha256"] = machine.graph.digest
    assert not is_as_planned(plan_of(found), machine)
    found["provenance"]["profile_sha256"] = machine.profile.digest
    assert is_as_planned(plan_of(found), machine)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("local-2", "give --cluster local-2"),
        ("lab/two.json", "give --cluster lab/two.json"),
        ("moon", "--cluster FILE"),
    ],
)
def test_a_plan_cannot_choose_files_or_measurements(tmp_path: Path, name: str, message: str) -> None:
    found = document()
    found["cluster"]["name"] = name
    (tmp_path / "plan.json").write_text(json.dumps(found))
    ran = layerwise("trace", tmp_path / "plan.json", "-o", tmp_path / "trace.json")
    assert ran.code == 2
    assert message in ran.error
    assert not (tmp_path / "trace.json").exists()


def refused(arguments: tuple[str | Path, ...], message: str) -> None:
    ran = layerwise(*arguments)
    assert (ran.code, ran.out) == (2, "")
    assert message in ran.error


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("something was run")

    for place in ("runtime.launch.run_local", "planner.api.prepare", "planner.api.machine.measure_host"):
        monkeypatch.setattr(place, fail)


@pytest.mark.usefixtures("nothing_runs")
def test_places_that_cannot_be_written_are_refused_before_anything_runs(plan: Path, tmp_path: Path) -> None:
    for option in ("--measured", "--trace"):
        refused(("run", plan, option, tmp_path / "nowhere" / "x.json"), "there is no folder")
        refused(("run", plan, option, tmp_path), "it is a folder")
    refused(("trace", plan, "-o", tmp_path / "nowhere" / "x.json"), "there is no folder")


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize(
    "machine", [("--devices", "4"), ("--cluster", "local-4"), ("--cluster", "4xa100-nvlink")], ids=str
)
def test_more_ranks_than_the_cores_can_stand_for_are_refused(
    machine: tuple[str, str], monkeypatch: pytest.MonkeyPatch, edit: Callable[[Callable[[Json], object]], Path]
) -> None:
    monkeypatch.setattr("planner.cli.racing.RANKS_PER_CORE", 0)
    refused(("compare", "lenet5", *machine, "--measure"), "compare --measure needs 4 processes")
    refused(("run", edit(lambda _: None)), "the plan needs 2 processes")


@pytest.mark.usefixtures("nothing_runs")
def test_a_machine_that_is_none_is_refused_before_it_is_raced() -> None:
    refused(("compare", "lenet5", "--cluster", "local-many", "--measure"), "local-N needs a number")
    refused(("compare", "lenet5", "--cluster", "4xa100-string", "--measure"), "unknown")
    refused(("compare", "lenet5", "--measure"), "give exactly one of --devices N and --cluster NAME")


@pytest.fixture
def edit(tmp_path: Path) -> Callable[[Callable[[Json], object]], Path]:
    def edit_document(change: Callable[[Json], object]) -> Path:
        found, path = document(), tmp_path / "edited.json"
        change(found)
        path.write_text(json.dumps(found))
        return path

    return edit_document
