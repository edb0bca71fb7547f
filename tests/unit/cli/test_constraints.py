"""Constraints, sharded parameters and parts of a machine on the command line."""

from dataclasses import replace
from pathlib import Path

import pytest

from planner.devices import cluster, write_cluster
from planner.plan import Plan
from planner.plan.schema import ConstraintPart
from support.command_line import layerwise

SMALL = ("lenet5", "--cluster", "2x2-a100-eth10", "--batch", "16")


def dimensions(plan: Plan) -> dict[str, dict[str, str]]:
    return {layer.id: {a: d.value for a, d in layer.split.items()} for layer in plan.stages[0].layers}


def test_pins_forbids_and_ties_reach_the_plan_and_are_written_in_it(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    asked = (
        "--pin", "classifier.[02]=out_channel", "--pin", "features.0=gpu:sample,node:height",
        "--forbid", "features.3=sample,in_channel", "--tie", "features.[25]",
    )  # fmt: skip
    ran = layerwise("plan", *SMALL, *asked, "--all-devices", "-o", path)
    assert ran.code == 0, ran.err
    plan = Plan.load(path)
    found = dimensions(plan)
    axes = [axis.name for axis in plan.mesh.axes]
    assert found["classifier.0"] == found["classifier.2"] == dict.fromkeys(axes, "out_channel")
    expected = {axis: "height" if axis.startswith("node") else "sample" for axis in axes}
    assert found["features.0"] == expected
    assert set(found["features.3"].values()) <= {"out_channel", "replicate"}
    assert found["features.2"] == found["features.5"]
    assert [(part.kind, part.text) for part in plan.search.constraints] == [
        ("pin", "classifier.[02]=out_channel"), ("pin", "features.0=gpu:sample,node:height"),
        ("forbid", "features.3=sample,in_channel"), ("tie", "features.[25]"),
    ]  # fmt: skip
    shown = " ".join(layerwise("show", path).out.split())
    assert "pin classifier.[02]=out_channel; pin features.0=" in shown


@pytest.mark.parametrize(
    ("option", "code", "words"),
    [
        (("--pin", "fc*=sample"), 2, "--pin 'fc*' matches none of the 8 layers of 'lenet5'"),
        (("--forbid", "feature.0=sample"), 2, "Near: 'features.0'"),
        (("--tie", "conv*"), 2, "--tie 'conv*' matches none"),
        (("--pin", "features.0=gpux:sample"), 2, "unknown mesh axis 'gpux'. Did you mean 'gpu'?"),
        (("--pin", "features.0=hight"), 2, "unknown dimension 'hight'. Did you mean 'height'"),
        (("--pin", "features.0"), 2, "not a pattern of layers and what it means"),
        (("--pin", "classifier.0=height"), 3, "layer 'classifier.0' (linear) has no legal split left"),
        (("--pin", "classifier.0=height"), 3, "Legal are node: sample, out_channel, in_channel"),
        (("--parameter-sharding", "all"), 2, "--parameter-sharding"),
        (("--solver", "fsdp", "--parameter-sharding", "none"), 2, "stands for --parameter-sharding full"),
        (("--mesh", "node=2,gpu=1", "--all-devices"), 2, "--mesh node=2,gpu=1 uses 2 of 4 devices"),
    ],
)
def test_what_means_nothing_or_is_illegal_is_refused(option: tuple[str, ...], code: int, words: str) -> None:
    ran = layerwise("plan", *SMALL, *option)
    assert (ran.code, ran.out) == (code, "")
    assert words in ran.error


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        ("pin", "classifier.0=out_channel", "layer 'classifier.0' is split as"),
        ("forbid", "features.*=sample", "layer 'features.0' is split as"),
        ("tie", "classifier.*", "layers 'classifier.0' and 'classifier.4' are split as"),
    ],
)
def test_check_holds_splits_against_the_constraints_of_the_plan(
    kind: str, text: str, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"
    asked = (
        "--solver",
        "data",
        "--mesh",
        "node=2,gpu=2",
        "--pin",
        "classifier.4=replicate",
        "--pin",
        "features.*=sample",
    )
    assert layerwise("plan", *SMALL, *asked, "-o", path).code == 0
    assert "every split is legal and as the constraints say" in layerwise("check", path).out
    plan = Plan.load(path)
    search = plan.search.model_copy(update={"constraints": [ConstraintPart(kind=kind, text=text)]})  # type: ignore[arg-type]  # one of three
    plan.model_copy(update={"search": search}).save(path)
    ran = layerwise("check", path)
    assert ran.code == 2
    assert words in ran.error
    assert f"made under --{kind} {text}" in ran.error


@pytest.fixture
def slow(tmp_path: Path) -> Path:
    """Return the file of a machine whose links all have 1 Mbit/s."""
    graph = cluster("2x2-a100-eth10")
    links = tuple(replace(link, bandwidth_bytes_per_s=1e6 / 8) for link in graph.links)
    write_cluster(replace(graph, name="slow", links=links), tmp_path / "slow.json")
    return tmp_path / "slow.json"


def test_slow_links_are_left_and_show_says_which_device_is_used(slow: Path, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    assert layerwise("plan", "lenet5", "--cluster", slow, "--batch", "16", "-o", path).code == 0
    plan = Plan.load(path)
    assert plan.mesh.ranks == (0,)
    assert plan.stages[0].devices == ["node0.gpu0"]
    assert "one device; uses 1 of 4 devices (node0.gpu0)" in " ".join(layerwise("show", path).out.split())
    assert layerwise("check", path, "--cluster", slow).code == 0
    every = layerwise("plan", "lenet5", "--cluster", slow, "--batch", "16", "--all-devices")
    assert Plan.from_json(every.out).mesh.size == 4
    some = layerwise("plan", "lenet5", "--cluster", slow, "--batch", "16", "--mesh", "node=1,gpu=2")
    assert Plan.from_json(some.out).stages[0].devices == ["node0.gpu0", "node0.gpu1"]


def test_show_says_what_of_the_parameters_is_sharded(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    assert layerwise("plan", "lenet5", "--devices", "2", "--solver", "fsdp", "-o", path).code == 0
    assert "parameter sharding: full" in " ".join(layerwise("show", path).out.split())


def test_compare_shows_every_fixed_strategy_and_which_were_not_allowed() -> None:
    ran = layerwise("compare", *SMALL, "--all-devices", "--fail-if-lost")
    assert ran.code == 0, ran.err
    rows = [line.split() for line in ran.out.splitlines()]
    found = {row[0]: row[-1] for row in rows if row and row[-1] in {"yes", "no"}}
    assert [name for name, allowed in found.items() if allowed == "no"] == ["spatial", "sample-spatial", "fsdp"]
    assert {"data", "model", "model-in", "conv-data-fc-model", "channel-filter", "planned"} <= found.keys()
