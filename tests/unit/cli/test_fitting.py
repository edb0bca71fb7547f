"""``profile fit``, ``profile import`` and plans priced with ``--profile``, as a user meets them."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from planner import api
from planner.frontend.source import load_model
from planner.plan import Plan
from planner.profile.file import from_entries, profile_of, read_profile, write_profile
from planner.profile.roofline import Roofline
from planner.profile.table import Measurement, ProfileTable
from support.command_line import layerwise
from support.pieces import conv, fit_of, timed

SHIPPED = Path(__file__).parents[3] / "profiles" / "foreign" / "convnet-benchmarks-vgg.csv"
LENET = ("lenet5", "--devices", "2", "--batch", "64", "--solver", "data")


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    pieces = [conv(4, 2**i, 2**j, 14) for i in range(4, 8) for j in range(4, 8)]
    path = tmp_path / "lab.json"
    write_profile(path, from_entries("lab", {}, [timed(p, lambda _, f, __: 1e-6 + f / 1e12) for p in pieces]))
    return path


def lenet_profile(path: Path, seconds: float, count: int | None = None) -> Path:
    """A profile in which every piece of LeNet-5 for two devices, or some, takes equally long in each phase."""
    options = api.Options(solver="data")
    model = load_model("lenet5", {})
    inputs = api.example_inputs(model.input_shapes, 64)
    planner = api.prepare(model.module, inputs, api.machine_of(devices=2), options, api.Origin("lenet5"))
    keys: Sequence[str] = planner.layer_keys()[:count]
    write_profile(path, profile_of("accelerator", {}, {k: Measurement(seconds, seconds, seconds, 0, 5) for k in keys}))
    return path


def test_fit_prints_errors_and_writes_the_fit_into_the_file(profile: Path) -> None:
    before = read_profile(profile)
    ran = layerwise("profile", "fit", profile)
    assert ran.code == 0, ran.err
    assert "Errors of the fit of lab" in ran.out
    assert ran.out.count("conv") == 3
    assert "left out: one entry at a time" in ran.out
    after = read_profile(profile)
    assert after.layers == before.layers
    assert after.fit is not None
    assert [r.num_entries for r in after.fit.conditions[0].residuals] == [16, 16, 16]
    again = layerwise("profile", "fit", profile)
    assert again.out == ran.out
    assert read_profile(profile) == after


def test_fit_can_leave_the_file_as_it_is(profile: Path, tmp_path: Path) -> None:
    before = profile.read_bytes()
    assert layerwise("profile", "fit", profile, "-o", tmp_path / "fitted.json").code == 0
    assert profile.read_bytes() == before
    assert read_profile(tmp_path / "fitted.json").fit is not None


def test_the_holdout_predicts_half_of_the_shapes_and_writes_nothing(profile: Path) -> None:
    before = profile.read_bytes()
    ran = layerwise("profile", "fit", profile, "--holdout")
    assert ran.code == 0, ran.err
    assert [line.split()[-3] for line in ran.out.splitlines() if " all " in line and line.split()[3] == "all"] == ["24"]
    assert profile.read_bytes() == before
    refused = layerwise("profile", "fit", profile, "--holdout", "-o", "x.json")
    assert refused.code == 2
    assert "nothing to write" in refused.error


def test_a_damaged_profile_is_refused_and_left_alone(profile: Path) -> None:
    profile.write_text(profile.read_text().replace('"forward_s"', '"forward"', 1))
    before = profile.read_bytes()
    ran = layerwise("profile", "fit", profile)
    assert ran.code == 2
    assert "$.layers[0].forward_s: Field required" in ran.error
    assert profile.read_bytes() == before


def test_import_and_fit_of_a_published_benchmark(tmp_path: Path) -> None:
    output = tmp_path / "titan.json"
    ran = layerwise("profile", "import", SHIPPED, "--device", "titanblack-cudnn", "-o", output)
    assert ran.code == 0, ran.err
    assert f"wrote {output}: 9 layers of titanblack-cudnn" in ran.err
    assert "MIT licence" in read_profile(output).environment["notes"]
    assert layerwise("profile", "fit", output).code == 0


def test_nothing_is_imported_unless_all_rows_are_right(tmp_path: Path) -> None:
    table, output = tmp_path / "t.csv", tmp_path / "p.json"
    table.write_text("op,batch,in_channels,out_channels,forward_s\nlinear,1,2,3,1\nlinear,0,2,3,1\n")
    output.write_text("kept")
    ran = layerwise("profile", "import", table, "--device", "lab", "-o", output)
    assert ran.code == 2
    assert "line 3, column batch: '0' is no whole number from 1" in ran.error
    assert output.read_text() == "kept"
    table.write_text("op,batch,in_channels,out_channels,forward_s\nlinear,1,2,3,1\n")
    nameless = layerwise("profile", "import", table, "-o", output)
    assert nameless.code == 2
    assert "name it with --device" in nameless.error
    assert output.read_text() == "kept"


def test_a_plan_is_priced_with_the_profile_and_says_so(tmp_path: Path) -> None:
    plain = Plan.from_json(layerwise("plan", *LENET).out)
    assert plain.totals.measured_s == 0
    path = lenet_profile(tmp_path / "p.json", 0.25)
    ran = layerwise("plan", *LENET, "--profile", path)
    assert ran.code == 0, ran.err
    found = Plan.from_json(ran.out)
    assert found.totals.data_sheet_s == 0
    # every layer that computes anything takes 0.25 s forward and 0.5 s backward
    num_layers = round(found.totals.measured_s / 0.75)
    assert found.totals.measured_s == pytest.approx(0.75 * num_layers)
    assert 5 <= num_layers <= 9
    assert found.provenance.profile_sha256 != plain.provenance.profile_sha256
    slower = Plan.from_json(layerwise("plan", *LENET, "--profile", lenet_profile(tmp_path / "q.json", 0.5)).out)
    assert slower.totals.measured_s == pytest.approx(2 * found.totals.measured_s)
    assert slower.provenance.profile_sha256 != found.provenance.profile_sha256


def test_layers_that_were_not_measured_are_priced_by_the_data_sheet(tmp_path: Path) -> None:
    found = Plan.from_json(layerwise("plan", *LENET, "--profile", lenet_profile(tmp_path / "p.json", 0.25, 2)).out)
    assert found.totals.measured_s > 0
    assert found.totals.data_sheet_s > 0


def test_a_profile_of_another_device_is_used_with_a_warning(profile: Path) -> None:
    ran = layerwise("plan", *LENET, "--profile", profile)
    assert ran.code == 0, ran.err
    assert "was measured on lab, this machine has accelerator" in ran.error
    missing = layerwise("plan", *LENET, "--profile", profile.parent / "none.json")
    assert missing.code == 2
    assert "No such file" in missing.error


def test_compare_takes_a_profile(tmp_path: Path) -> None:
    path = lenet_profile(tmp_path / "p.json", 0.25)
    rows = json.loads(layerwise("compare", *LENET, "--profile", path, "--json").out)["strategies"]
    assert all(row["step_s"] > 0.75 for row in rows)


# From Python


def test_shipped_profiles_of_a_cluster_s_device_are_used_without_being_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "devices").mkdir()
    write_profile(
        tmp_path / "devices" / "h100.json", profile_of("h100", {}, {conv(4).text: Measurement(1, 1, 1, 0, 5)})
    )
    write_profile(tmp_path / "devices" / "t4.json", profile_of("t4", {}, {conv(8).text: Measurement(1, 1, 1, 0, 5)}))
    before = api.machine_of("4xh100-nvlink")
    monkeypatch.setattr("planner.api.machine.profiles_path", lambda: tmp_path)
    found = api.machine_of("4xh100-nvlink").profile
    assert found.layers.keys() - before.profile.layers.keys() == {conv(4).text} - before.profile.layers.keys()
    assert conv(8).text not in found.layers
    assert api.machine_of(devices=4).profile.layers == {}


def test_a_profile_goes_over_the_measured_rates_of_this_host(profile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = Roofline({"": 1e9}, 1e9, 1e-6, 3e9, measured=True)
    graph = api.machine_of(devices=2).graph
    monkeypatch.setattr("planner.measure.host.local_machine", lambda *_: (graph, ProfileTable("cpu", rates)))
    write_profile(profile, read_profile(profile).model_copy(update={"fit": fit_of(5e12)}))
    plain, found = api.machine_of("local-2").profile, api.machine_of("local-2", profile=profile).profile
    assert plain.layers == {}
    assert found.roofline == rates  # for the optimizer and what cannot be fitted
    assert found.layers == read_profile(profile).measurements()
    assert found.fit == fit_of(5e12)


@pytest.mark.parametrize(
    ("device", "processor", "warns"),
    [
        ("h200", "NVIDIA H200", True),
        ("cpu-core", "Abacus 9", False),
        ("cpu-core", "Abacus 8", True),
        ("cpu", "", False),
    ],
)
def test_a_profile_of_something_else_than_the_machine_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, device: str, processor: str,
    warns: bool,
) -> None:  # fmt: skip
    rates = Roofline({"": 1e9}, 1e9, 1e-6, 3e9, measured=True)
    graph = api.machine_of(devices=2).graph
    graph = dataclasses.replace(graph, devices=tuple(dataclasses.replace(d, kind="cpu") for d in graph.devices))
    monkeypatch.setattr("planner.measure.host.local_machine", lambda *_: (graph, ProfileTable("cpu", rates)))
    monkeypatch.setattr("planner.measure.host.cpu_name", lambda: "Abacus 9")
    write_profile(tmp_path / "p.json", profile_of(device, {"processor": processor}, {}))
    for cluster in ("local-2", graph):
        caplog.clear()
        api.machine_of(cluster, profile=tmp_path / "p.json")
        assert (f"was measured on {device}, this machine has cpu" in caplog.text) == warns


def test_import_of_a_pipedream_profile(tmp_path: Path) -> None:
    source, output = SHIPPED.parents[1] / "pipedream" / "vgg16.txt", tmp_path / "p.json"
    nameless = layerwise("profile", "import", source, "--format", "pipedream", "-o", output)
    assert (nameless.code, output.exists()) == (2, False)
    assert "name it with --device" in nameless.error
    ran = layerwise("profile", "import", source, "--format", "pipedream", "--device", "theirs", "-o", output)
    assert ran.code == 0, ran.err
    assert f"wrote {output}: 23 layers of theirs" in ran.err
    assert "Backward is one time in the file" in read_profile(output).environment["notes"]
    as_table = layerwise("profile", "import", source, "--device", "theirs", "-o", output)
    assert as_table.code == 2
    assert read_profile(output).device == "theirs"
