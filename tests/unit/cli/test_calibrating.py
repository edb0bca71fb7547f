"""``layerwise calibrate``: a measured run in a profile, and the prediction that follows from it."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from planner.api import Machine, local_layers, machine_of, price_plan
from planner.cli.calibrating import merged, share_of_inputs
from planner.errors import MismatchError
from planner.plan import Plan
from planner.plan.measured import LAYER_PHASES, Measured, layers_of
from planner.profile.demand import Phase, demands
from planner.profile.file import profile_of, read_profile
from planner.profile.table import Measurement, Source
from support.command_line import layerwise
from support.pieces import conv, fit_of

STEPS_S = [1.0, 1.5, 1.25]


def measured(plan: Plan) -> Measured:
    """Return a run in which the k-th layer of n took k ms forward, 3k ms backward and 0.5 ms to and fro."""
    seconds = {"forward": 1.0, "backward": 3.0, "transfer_forward": 0.25, "transfer_backward": 0.25}
    rows = {
        layer.id: {phase: (seconds[phase] * k * 1e-3, 1e-4) for phase in LAYER_PHASES}
        for k, layer in enumerate(plan.stages[0].layers)
    }
    return Measured(
        plan_sha256=plan.digest, model=plan.model.name, batch=plan.batch, num_ranks=plan.mesh.size,
        environment={"device": "cpu", "cpu": "Abacus 9", "torch": "2"}, rank=0, steps_s=STEPS_S, step_s=1.25,
        step_iqr_s=0.5, compute_only_s=1.0, instrumented_steps_s=STEPS_S, instrumented_step_s=1.25, gathering_s=0.0,
        exposed_sync_s=0.0, optimizer_s=0.0, other_s=0.0, layers=layers_of(plan, rows),
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a plan and a run of it."""
    place = tmp_path_factory.mktemp("calibrate")
    ran = layerwise("plan", "lenet5", "--devices", "2", "--batch", "16", "--solver", "data", "-o", place / "plan.json")
    assert ran.code == 0, ran.err
    measured(Plan.load(place / "plan.json")).save(place / "run.json")
    return place


def calibrate(folder: Path, *more: str | Path, output: str = "profile.json") -> Any:
    return layerwise(
        "calibrate", folder / "plan.json", "--measured", folder / "run.json", "-o", folder / output, *more
    )  # fmt: skip


def test_a_plan_priced_with_the_profile_is_predicted_as_it_was_measured(folder: Path) -> None:
    ran = calibrate(folder)
    assert ran.code == 0, ran.err
    profile = read_profile(folder / "profile.json")
    assert (profile.device, profile.environment["torch"]) == ("Abacus 9", "2")
    assert {entry.num_repeats for entry in profile.layers} == {len(STEPS_S)}
    plan = Plan.load(folder / "plan.json")
    run = {row.id: row for row in measured(plan).layers}
    machine = machine_of(devices=2)
    table = dataclasses.replace(machine.profile, layers=profile.measurements())
    priced = price_plan(plan, Machine(machine.graph, table))
    pieces = dict(zip(run, local_layers(plan), strict=True))
    costs = {str(x.id): cost for x, cost in zip(priced.table.space.graph.layers, priced.costs, strict=True)}
    with_kernel = [name for name, piece in pieces.items() if piece.has_kernel]
    assert len(with_kernel) >= 5
    for name in with_kernel:
        assert costs[name].source is Source.MEASURED
        assert costs[name].forward_s == pytest.approx(run[name].forward_s)
        backward_s = run[name].backward_s if pieces[name].piece.input_gradient or pieces[name].params else 0.0
        assert costs[name].backward_s == pytest.approx(backward_s)
    left_s = sum(row.compute_s for name, row in run.items() if name not in with_kernel)
    assert f"{1e3 * left_s:.3g} ms in layers that a profile has no entry for" in ran.err


def test_the_gradients_of_inputs_and_parameters_share_backward_as_the_profile_says(folder: Path) -> None:
    assert calibrate(folder).code == 0
    found = json.loads((folder / "profile.json").read_text())
    for entry in found["layers"]:
        if not entry["layer"]["input_gradient"]:
            assert entry["backward_data_s"] == 0
        elif entry["layer"]["weight_gradient"]:
            entry["backward_data_s"], entry["backward_weight_s"] = 0.03, 0.01
    found["environment"]["made"] = "by hand"
    found["layers"][0]["layer"]["output"][0] += 1  # a piece that the plan has not
    found["layers"][0]["layer"]["inputs"][0][0] += 1
    (folder / "edited.json").write_text(json.dumps(found))
    ran = calibrate(folder, "--profile", folder / "edited.json", output="again.json")
    assert ran.code == 0, ran.err
    count = len(found["layers"])
    assert f"{count} layers of this run, {count - 1} of them measured anew; {count} were there before" in ran.err
    again = read_profile(folder / "again.json")
    assert len(again.layers) == count + 1
    assert again.environment["made"] == "by hand"
    assert "lenet5, batch 16" in again.environment["calibrated"]
    plan = Plan.load(folder / "plan.json")
    rows, entries = measured(plan).layers, again.measurements()
    checked = 0
    for row, piece in zip(rows, local_layers(plan), strict=True):
        known = {entry["layer"]["op"] for entry in found["layers"][1:]}
        if piece.has_kernel and piece.piece.input_gradient and piece.piece.weight_gradient and piece.op.kind in known:
            entry = entries[piece.key]
            if entry.backward_data_s == pytest.approx(0.75 * row.backward_s):
                assert entry.backward_weight_s == pytest.approx(0.25 * row.backward_s)
                checked += 1
    assert checked >= 2


def test_without_a_profile_flop_decide_what_the_gradients_of_inputs_take(folder: Path) -> None:
    pieces = [x.piece for x in local_layers(Plan.load(folder / "plan.json")) if x.has_kernel]
    both = [piece for piece in pieces if piece.input_gradient and piece.weight_gradient]
    assert both
    for piece in both:
        flop = {phase: demand.flop for phase, demand in demands(piece).items()}
        total = flop[Phase.BACKWARD_DATA] + flop[Phase.BACKWARD_WEIGHT]
        assert share_of_inputs(piece, None, None) == pytest.approx(flop[Phase.BACKWARD_DATA] / total)
        assert share_of_inputs(piece, Measurement(1.0, 0.2, 0.6, 0.0, 1), None) == pytest.approx(0.25)
    first = next(piece for piece in pieces if piece.weight_gradient and not piece.input_gradient)
    pool = next(piece for piece in pieces if piece.input_gradient and not piece.weight_gradient)
    assert (share_of_inputs(first, None, None), share_of_inputs(pool, None, None)) == (0.0, 1.0)


@pytest.mark.parametrize("change", [{"processor": "Abacus 8"}, {"cpu": "Abacus 8"}, {"torch": "1"}, {"threads": "7"}])
def test_a_profile_of_another_environment_is_refused(folder: Path, change: dict[str, str]) -> None:
    run = measured(Plan.load(folder / "plan.json"))
    run = run.model_copy(update={"environment": run.environment | {"threads": "1"}})
    layers = {conv(4).text: Measurement(1.0, 1.0, 1.0, 0.0, 5)}
    with pytest.raises(MismatchError, match="the profile was measured with"):
        merged(profile_of("x", run.environment | change, layers), run, layers)
    unknown = {name: text for name, text in run.environment.items() if name not in change and name != "device"}
    assert merged(profile_of("x", unknown, layers), run, layers).measurements() == layers


def test_a_fit_is_dropped_because_it_is_not_of_the_new_entries(folder: Path) -> None:
    layers = {conv(4).text: Measurement(1.0, 1.0, 1.0, 0.0, 5)}
    before = profile_of("x", {}, layers).model_copy(update={"fit": fit_of(1e12)})
    assert merged(before, measured(Plan.load(folder / "plan.json")), layers).fit is None


def test_wrong_input_is_refused_before_anything_is_written(folder: Path) -> None:
    other = layerwise("plan", "lenet5", "--devices", "2", "--batch", "16", "--solver", "model", "-o", folder / "o.json")
    assert other.code == 0
    wrong = [
        (("o.json", "run.json", "p.json"), "is of another plan"),
        (("plan.json", "absent.json", "p.json"), "absent.json"),
        (("plan.json", "plan.json", "p.json"), "$.plan_sha256"),
        (("plan.json", "run.json", "nowhere/p.json"), "there is no folder"),
    ]
    for (plan, run, output), message in wrong:
        ran = layerwise("calibrate", folder / plan, "--measured", folder / run, "-o", folder / output)
        assert ran.code == 2
        assert message in ran.err
        assert not (folder / output).exists()
    ran = calibrate(folder, "--profile", folder / "run.json", output="p.json")
    assert ran.code == 2
    assert "device profile" in ran.err
