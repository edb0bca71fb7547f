"""A search that is stopped, by Ctrl-C or by its time limit, at any moment: a sound plan or none, and nothing half."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from planner import deadline
from planner.api.pipelines import search
from planner.errors import NoPlanError
from planner.plan import Plan
from support.command_line import ROOT, layerwise
from support.fuzz.stops import PLAN, stopped

FULL = bool(os.environ.get("LAYERWISE_FULL"))
STOPS = 60 if FULL else 2
LIMITS = 60 if FULL else 2


@pytest.mark.parametrize("number", range(1, STOPS + 1))
def test_ctrl_c_leaves_a_whole_plan_or_none(number: int, tmp_path: Path) -> None:
    assert stopped(tmp_path, number / STOPS) == ""


class _Counted:
    """A clock that goes on by one second each time that somebody looks at it."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def perf_counter(self) -> float:
        self.now_s += 1.0
        return self.now_s


@pytest.fixture(scope="module", autouse=True)
def whole() -> tuple[Plan, int]:
    """The plan without a limit, and how often the clock is looked at on the way.

    It comes first, so that Ctrl-C never falls into the import of a library, which cannot be imported again then.
    """
    clock = _Counted()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deadline, "time", clock)
        ran = layerwise(*PLAN, "--time-limit", "1e9s")
    assert ran.code == 0, ran.err
    return Plan.from_json(ran.out), int(clock.now_s)


@pytest.mark.parametrize("part", [k / LIMITS for k in range(LIMITS)])
def test_a_time_limit_anywhere_gives_a_sound_plan_or_says_that_there_is_none_yet(
    part: float, whole: tuple[Plan, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    best, looks = whole
    assert looks > 100
    monkeypatch.setattr(deadline, "time", _Counted())
    ran = layerwise(*PLAN, "--time-limit", f"{1 + looks * part}s")
    assert ran.code in {0, NoPlanError.exit_code}, ran.err
    if ran.code:
        assert part < 0.5
        assert "Raise --time-limit" in ran.error
        return
    found = Plan.from_json(ran.out)
    assert found.totals.step_s >= best.search.lower_bound_s * (1 - 1e-9)
    assert found.search.lower_bound_s <= found.totals.step_s * (1 + 1e-9)  # of the meshes that were searched


def test_halos_that_are_told_to_be_recomputed_are_so_in_a_plan_that_the_time_limit_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cut = "--all-devices", "--dims", "height", "--pin", "features.*=height"
    asked = "plan", "lenet5", "--devices", "2", "--batch", "1", *cut, "--halo-recompute", "always"
    clock = _Counted()
    monkeypatch.setattr(deadline, "time", clock)
    whole = Plan.from_json(layerwise(*asked, "--time-limit", "1e9s").out)
    monkeypatch.setattr(deadline, "time", _Counted())
    ran = layerwise(*asked, "--time-limit", f"{clock.now_s * 0.7}s")
    assert "this is the best plan until then" in ran.err
    recomputing = whole.only_stage.recomputing()
    assert recomputing == Plan.from_json(ran.out).only_stage.recomputing() == {"features.0", "features.2", "features.3"}


def test_a_time_limit_ends_the_search_for_pipelines_within_a_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    def planned(limit: str) -> tuple[Plan, float]:
        clock = _Counted()
        monkeypatch.setattr(deadline, "time", clock)
        monkeypatch.setattr(search, "time", clock)
        ran = layerwise(*PLAN[:2], "--cluster", "2xt4-pcie", "--stages", "2", "--time-limit", limit, "-q")
        assert ran.code == 0, ran.err
        return Plan.from_json(ran.out), clock.now_s

    (best, all_looks), (first, few) = planned("1e9s"), planned("1s")
    assert len(first.stages) == 2
    assert first.totals.step_s >= best.totals.step_s
    assert few < 0.7 * all_looks


WRITER = """
import json, sys
from pathlib import Path
from planner.profile.file import read_profile, write_profile
path, own = Path(sys.argv[1]), Path(sys.argv[2])
profile = read_profile(own)
for count in range(int(sys.argv[3])):
    write_profile(path, profile.model_copy(update={"environment": {"writer": own.name, "count": str(count)}}))
    found = read_profile(path)
    assert found.layers == profile.layers and set(found.environment) == {"writer", "count"}
print("done")
"""


def test_processes_that_write_and_read_one_profile_at_the_same_time_see_whole_files(tmp_path: Path) -> None:
    from support.fuzz.targets import TARGETS

    shared, environment = tmp_path / "shared" / "profile.json", {**os.environ, "PYTHONPATH": str(ROOT)}
    shared.parent.mkdir()
    started = []
    for number in range(8 if FULL else 2):
        own = tmp_path / f"{number}.json"
        own.write_bytes(TARGETS["device profile"].good()[0])
        command = [sys.executable, "-c", WRITER, str(shared), str(own), "200" if FULL else "30"]
        started.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    said = [process.communicate(timeout=600)[0].decode() for process in started]
    assert [text.strip() for text in said] == ["done"] * len(started)
    assert [path.name for path in shared.parent.iterdir()] == ["profile.json"]
    assert json.loads(shared.read_text())["environment"]["writer"]
