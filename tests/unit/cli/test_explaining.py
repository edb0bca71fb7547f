"""``layerwise explain`` and ``layerwise diff``."""

import json
from pathlib import Path

import pytest

from planner.errors import UsageError
from planner.plan import Plan
from support.command_line import layerwise

ASKED = ("lenet5", "--cluster", "2x1-a100-eth1", "--batch", "64", "--mesh", "node=2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plans")
    for name, solver in (("auto", "auto"), ("data", "data")):
        ran = layerwise("plan", *ASKED, "--solver", solver, "-o", path / f"{name}.json")
        assert ran.code == 0, ran.err
    return path


def test_a_layer_s_splits_are_listed_with_the_reason_for_the_planned_one(folder: Path) -> None:
    ran = layerwise("explain", folder / "auto.json", "features.3", "--no-flips", "--all")
    assert ran.code == 0, ran.err
    planned = Plan.load(folder / "auto.json").stages[0].layers[3]
    rows = [line.split() for line in ran.out.splitlines() if line.startswith("node=")]
    assert rows[0][0] == f"node={planned.split['node']}"
    assert rows[0][-4:] == ["the", "same", "the", "same"]
    assert {row[0] for row in rows} == {
        f"node={name}" for name in ("sample", "out_channel", "in_channel", "in_channel_scatter", "replicate")
    }
    assert "by itself" in ran.out.lower()


def test_without_a_layer_every_layer_has_its_next_best_split(folder: Path) -> None:
    ran = layerwise("explain", folder / "auto.json")
    assert ran.code == 0, ran.err
    for layer in Plan.load(folder / "auto.json").stages[0].layers:
        assert f"\n{layer.id} " in ran.out


def test_json_has_all_digits_and_what_would_have_to_change(folder: Path) -> None:
    ran = layerwise("explain", folder / "auto.json", "features.3", "--json")
    found = json.loads(ran.out)
    assert found["step_s"] == pytest.approx(Plan.load(folder / "auto.json").totals.step_s)
    assert found["alternatives"][0]["is_planned"] is True
    assert {flip["what"] for flip in found["flips"]} <= {"links", "batch"}
    assert found["flips"]


@pytest.mark.parametrize(
    ("layer", "message"),
    [("features.33", "Did you mean 'features.3'"), ("nothing-like-it", "(`layerwise show` lists them)")],
)
def test_an_unknown_layer_is_refused(folder: Path, layer: str, message: str) -> None:
    ran = layerwise("explain", folder / "auto.json", layer)
    assert ran.code == UsageError.exit_code
    assert message in ran.error


def test_two_plans_are_held_against_each_other(folder: Path) -> None:
    ran = layerwise("diff", folder / "auto.json", folder / "data.json")
    assert ran.code == 0, ran.err
    first, second = Plan.load(folder / "auto.json"), Plan.load(folder / "data.json")
    changed = {layer for layer in first.strategy if first.strategy[layer] != second.strategy[layer]}
    assert changed
    listed = {line.split()[0] for line in ran.out.partition("Layers")[2].splitlines() if line.count("node=") == 2}
    assert listed == changed
    ratio = second.totals.step_s / first.totals.step_s
    assert f"The first is predicted to be {ratio:.4g} times as fast." in ran.out


def test_a_plan_does_not_differ_from_itself(folder: Path) -> None:
    ran = layerwise("diff", folder / "auto.json", folder / "auto.json")
    assert ran.out == "Both make the ranks do the same.\n"


def test_plans_that_differ_and_take_the_same_are_not_called_faster(folder: Path, tmp_path: Path) -> None:
    plan = Plan.load(folder / "auto.json")
    plan.model_copy(update={"bucket_bytes": 2 * plan.bucket_bytes}).save(tmp_path / "other.json")
    ran = layerwise("diff", folder / "auto.json", tmp_path / "other.json")
    assert "Both are predicted to take the same." in ran.out
    assert "buckets" in ran.out


TOWERS = """
from torch import nn


class Towers(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = (nn.Sequential(*(nn.Conv2d(256, 256, 3, padding=1) for _ in range(3))) for _ in range(2))

    def forward(self, x):
        return self.one(x) + self.two(x)


def build():
    return Towers()
"""


def test_branches_at_the_same_time_are_explained_with_the_devices_that_are_idle(tmp_path: Path) -> None:
    (tmp_path / "towers.py").write_text(TOWERS)
    plan, asked = tmp_path / "plan.json", ("--input", "256,16,16", "--cluster", "2xk20-pcie", "--batch", "1")
    assert layerwise("plan", f"{tmp_path}/towers.py:build", *asked, "--all-devices", "-o", plan).code == 0
    ran = layerwise("explain", plan)
    assert "At the same time: 2 branches from x to add" in ran.out
    rows = {line.split()[0]: line.split()[1:] for line in ran.out.splitlines() if line.startswith("gpu=")}
    assert {where: row[:2] for where, row in rows.items()} == {"gpu=0": ["one.0", "3"], "gpu=1": ["two.0", "3"]}
    assert "with every layer of them on all devices" in ran.out.lower()
    ran = layerwise("explain", plan, "two.1", "--all")
    assert "Only gpu=1 computes it; gpu=0: other branches at the same time (2 branches from x to add)." in ran.out
    assert "gpu=out_channel" in ran.out
    found = json.loads(layerwise("explain", plan, "two.1", "--json").out)
    assert [place["where"] for place in found["placed"][0]["places"]] == ["gpu=0", "gpu=1"]
    assert found["placed"][0]["spread_s"] > found["step_s"]
    assert [(flip["what"], flip["split"]) for flip in found["flips"]] == [("links", "gpu=replicate")]
    assert found["flips"][0]["factor"] < 1  # behind slow links both devices compute all of it


def test_a_plan_for_one_device_has_nothing_to_explain(tmp_path: Path) -> None:
    assert layerwise("plan", "lenet5", "--devices", "1", "-o", tmp_path / "plan.json").code == 0
    assert "The plan is for one device: no layer has another split." in layerwise("explain", tmp_path / "plan.json").out
