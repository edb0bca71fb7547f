"""``layerwise compare`` in full: solvers, cases side by side, JSON and CSV, and what it refuses."""

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest

from planner.cli.cases import WhatIf
from planner.report.figures import COLUMNS
from planner.search.auto import SEARCHING
from planner.search.fixed import FIXED
from support.command_line import layerwise

MODEL = ("lenet5", "--dims", "sample,out_channel")


def compared(*arguments: str) -> dict[str, Any]:
    ran = layerwise("compare", *MODEL, *arguments, "--json")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    assert isinstance(found, dict)
    return found


def steps(case: dict[str, Any]) -> dict[str, float]:
    return {row["name"]: row["step_s"] for row in case["strategies"]}


@pytest.fixture(scope="module")
def scaling(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """Return the same comparison as JSON and as CSV."""
    path = tmp_path_factory.mktemp("cases") / "cases.json"
    asked = ("--cluster", "2x2-a100-eth10", "--scale", "1,2,4", "--batch", "64", "--csv", "-o", path)
    ran = layerwise("compare", *MODEL, *asked)
    assert ran.code == 0, ran.err
    return json.loads(path.read_text()), list(csv.DictReader(io.StringIO(ran.out)))


def test_solvers_stand_between_the_fixed_strategies_and_the_plan() -> None:
    found = compared("--devices", "2", "--batch", "8", "--solvers", "dp,hypar,exhaustive,dp")
    names = [row["name"] for row in found["strategies"]]
    assert names == [*FIXED, "dp", "hypar", "exhaustive", "auto"]
    assert [row["is_planned"] for row in found["strategies"]] == [False] * (len(names) - 1) + [True]
    assert steps(found)["dp"] >= found["lower_bound_s"]
    assert found["found_nothing"] == {}


def test_a_solver_that_finds_nothing_is_said_and_does_not_stop_the_others() -> None:
    ran = layerwise("compare", "alexnet", "--devices", "2", "--solvers", "exhaustive,hypar", "--json")
    found = json.loads(ran.out)
    assert "note: exhaustive found nothing: exhaustive search over" in ran.err
    assert list(found["found_nothing"]) == ["exhaustive"]
    assert "hypar" in steps(found)


def test_all_stands_for_every_solver_that_searches() -> None:
    assert WhatIf(solvers="all").other_solvers() == SEARCHING
    assert WhatIf().other_solvers() == ()


def test_each_number_of_devices_is_what_compare_says_of_a_machine_of_that_size(
    scaling: tuple[dict[str, Any], list[dict[str, str]]],
) -> None:
    scaled, _ = scaling
    assert [(case["devices"], case["batch"]) for case in scaled["cases"]] == [(1, 64), (2, 64), (4, 64)]
    for case, name in zip(scaled["cases"][1:], ("2xa100-nvlink", "2x2-a100-eth10"), strict=True):
        alone = compared("--cluster", name, "--batch", "64")
        assert steps(case) == pytest.approx(steps(alone), rel=1e-12)
    one = scaled["cases"][0]
    assert all(row["communication_bytes"] == 0 for row in one["strategies"])


def test_the_batch_grows_with_the_devices_unless_it_is_given(tmp_path: Path) -> None:
    ran = layerwise("compare", *MODEL, "--devices", "4", "--scale", "1,4", "-o", tmp_path / "cases.json")
    cases = json.loads((tmp_path / "cases.json").read_text())["cases"]
    assert [case["batch"] for case in cases] == [32, 128]
    rows = [line.split() for line in ran.out.splitlines() if line.startswith(("1 ", "4 "))]
    first, last = (case["strategies"][-1]["samples_per_s"] for case in cases)
    assert rows[0][7:10] == ["1.00x", "100", "%"]
    assert rows[1][7:10] == [f"{last / first:.2f}x", f"{100 * last / first / 4:.0f}", "%"]


def test_rates_change_what_crosses_nodes_and_nothing_else() -> None:
    asked = ("--batch", "64", "--all-devices")
    slow, same = compared("--cluster", "2x2-a100-eth10", "--links", "1,10Gbit", *asked)["cases"]
    plain = compared("--cluster", "2x2-a100-eth10", *asked)
    assert (slow["link_bytes_per_s"], same["link_bytes_per_s"], plain["link_bytes_per_s"]) == (1.25e8, 1.25e9, None)
    assert steps(slow)["data"] > steps(same)["data"]
    assert steps(same) == steps(plain)


def test_an_epoch_takes_whole_steps_and_a_part_of_a_machine_a_part_of_its_price(tmp_path: Path) -> None:
    path = tmp_path / "cases.csv"
    ran = layerwise(
        "compare", *MODEL, "--clusters", "4xa100-nvlink,2x1-a100-eth10", "--scale", "1,2", "--batch", "64",
        "--price", "4xa100-nvlink=8", "--samples-per-epoch", "1000", "-o", path,
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert f"wrote {path}" in ran.err
    rows = list(csv.DictReader(io.StringIO(path.read_text())))
    assert tuple(rows[0]) == COLUMNS
    assert [row["strategy"] for row in rows if row["is_planned"] == "True"] == ["auto"] * 4
    for row in rows:
        epoch_s = float(row["step_s"]) * math.ceil(1000 / 64)
        assert float(row["epoch_s"]) == pytest.approx(epoch_s)
        if row["cluster"] == "4xa100-nvlink":
            assert float(row["epoch_cost"]) == pytest.approx(epoch_s / 3600 * 8 * int(row["devices"]) / 4)
        else:
            assert row["epoch_cost"] == ""
    assert "Cheapest: cluster 4xa100-nvlink, devices 1" in ran.out


def test_csv_on_stdout_has_the_figures_of_json(scaling: tuple[dict[str, Any], list[dict[str, str]]]) -> None:
    document, rows = scaling
    told = [(case["devices"], row["name"], row["step_s"]) for case in document["cases"] for row in case["strategies"]]
    assert [(int(row["devices"]), row["strategy"], float(row["step_s"])) for row in rows] == told


def test_a_case_without_a_plan_is_a_row_and_the_only_case_an_error() -> None:
    limit = ("--memory-limit", "3MiB", "--batch", "15,4097")
    ran = layerwise("compare", *MODEL, "--devices", "2", *limit)
    assert ran.code == 0, ran.err
    assert "no plan" in ran.out
    assert "batch 4097: no plan. " in ran.out
    assert [f"note: batch {batch} does not divide by 2" in ran.error for batch in (15, 4097)] == [True, True]
    alone = layerwise("compare", *MODEL, "--devices", "2", "--memory-limit", "3MiB", "--batch", "4096")
    assert alone.code == 3


def test_where_no_case_has_a_plan_a_script_learns_it_and_no_strategies_are_listed() -> None:
    ran = layerwise("compare", *MODEL, "--devices", "2", "--memory-limit", "1KiB", "--batch", "2,4", "--fail-if-lost")
    assert ran.code == 3
    assert [f"batch {batch}: no plan. no strategy fits in 1 KiB" in ran.out for batch in (2, 4)] == [True, True]
    assert "Samples per second" not in ran.out


def test_devices_that_the_only_plan_leaves_idle_are_said() -> None:
    asked = ("compare", *MODEL, "--cluster", "2x1-t4-eth10", "--batch", "8")
    assert "The planned strategy uses 1 of 2 devices." in layerwise(*asked).out
    assert "uses" not in layerwise(*asked, "--all-devices").out


def test_a_script_learns_that_the_plan_lost_in_one_of_the_cases() -> None:
    asked = ("compare", *MODEL, "--devices", "2", "--scale", "1,2", "--batch", "64", "--solver", "model")
    assert layerwise(*asked).code == 0
    ran = layerwise(*asked, "--fail-if-lost")
    assert ran.code == 6
    assert "devices 2: data is faster than the planned strategy by" in ran.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--devices", "2", "--clusters", "4xa100-nvlink"), "leave --cluster and --devices out"),
        (("--clusters", "4xa100-nvlink,"), "--clusters '4xa100-nvlink,'"),
        (("--clusters", "4xa100-nvlnk"), "Did you mean 'nvlink'"),
        (("--devices", "4", "--scale", "1,8"), "has 4 devices"),
        (("--devices", "4", "--scale", "1,two"), "--scale '1,two' is not a number"),
        (("--devices", "4", "--scale", "2", "--mesh", "gpu=4"), "--mesh is of one number of devices"),
        (("--devices", "4", "--links", "1,fast"), "link rate 'fast'"),
        (("--devices", "4", "--links", "1,10"), "link rate '10'"),
        (("--devices", "4", "--links", "0,10gbit"), "link rate '0gbit' is none"),
        (("--devices", "1", "--links", "1gbit"), "has one device"),
        (("--devices", "4", "--price", "4xaccelerator-nvlink=1"), "--samples-per-epoch"),
        (("--devices", "4", "--price", "x=1", "--samples-per-epoch", "9"), "unknown cluster 'x'"),
        (("--devices", "4", "--price", "1", "--samples-per-epoch", "9"), "--price '1' is not a cluster and"),
        (("--devices", "4", "--price", "x=-1", "--samples-per-epoch", "9"), "--price 'x=-1' is not a cluster and"),
        (("--devices", "2", "--solvers", "magic"), "unknown solver 'magic'"),
        (("--devices", "2", "--solvers", "data"), "unknown solver 'data'"),
        (("--devices", "2", "--json", "--csv"), "one of --json and --csv"),
        (("--devices", "2", "-o", "figures.txt"), "ends in .csv or .json"),
        (("--devices", "2", "-o", "no/such/figures.csv"), "there is no folder 'no/such'"),
        (("--devices", "2", "--links", "1gbit", "--measure"), "--measure runs on this host"),
        (("--devices", "999", "--measure"), "compare --measure needs 999 processes"),
    ],
)
def test_what_cannot_be_is_refused(arguments: tuple[str, ...], words: str) -> None:
    ran = layerwise("compare", "lenet5", *arguments)
    assert (ran.code, ran.out) == (2, "")
    assert words in ran.error
