"""What a report says, against the plan that it is about."""

import functools
import json
import re
from pathlib import Path
from typing import Any

import pytest

from planner.api import Machine, Options, Origin, example_inputs, machine_of, prepare
from planner.api.reporting import report
from planner.cost.overlap import Event
from planner.errors import MismatchError
from planner.frontend.source import load_model
from planner.plan.measured import LAYER_PHASES, Measured, layers_of
from planner.plan.measured_stages import MeasuredPipeline, MeasuredStage, read_measured_pipeline
from planner.plan.schema import Plan


@functools.cache
def planned(pipelined: bool) -> tuple[Plan, Machine]:
    loaded, machine = load_model("lenet5"), machine_of("2x2-a100-eth10")
    options = Options(stages=2, schedule="gpipe", microbatches=4) if pipelined else Options(solver="conv-data-fc-model")
    inputs = example_inputs(loaded.input_shapes, 64)
    return prepare(loaded.module, inputs, machine, options, Origin("lenet5", "lenet5")).plan(), machine


def content(text: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    document = json.loads(found[1])
    assert isinstance(document, dict)
    return document


@functools.cache
def plain(pipelined: bool) -> dict[str, Any]:
    return content(report(*planned(pipelined)))


@pytest.mark.parametrize("pipelined", [False, True])
def test_layers_are_those_of_the_plan(pipelined: bool) -> None:
    plan, found = planned(pipelined)[0], plain(pipelined)["layers"]
    parts = [(s, layer) for s, stage in enumerate(plan.stages) for layer in stage.layers]
    assert found["id"] == [layer.id for _, layer in parts]
    assert found["stage"] == [s for s, _ in parts]
    names = [found["splits"][k]["name"] for k in found["split"]]
    assert names == [str(layer.assigned()) for _, layer in parts]
    for key, cost in (
        ("compute", "compute_s"),
        ("transfer", "transfer_s"),
        ("sync", "sync_s"),
        ("exposed", "exposed_s"),
    ):
        assert found[key] == [pytest.approx(getattr(layer.cost, cost), rel=1e-5) for _, layer in parts]
    assert found["memory"] == [layer.memory_bytes for _, layer in parts]
    if not pipelined:
        assert sum(found["params"]) == plan.model.num_params
        assert len(found["next"]) == len(parts)


@pytest.mark.parametrize("pipelined", [False, True])
def test_the_predicted_timeline_is_the_planned_step(pipelined: bool) -> None:
    steps = plain(pipelined)["timeline"]["steps"]
    assert len(steps) == len(planned(pipelined)[0].stages)
    assert all(step["name"].startswith("predicted, ") for step in steps)
    length = max(step["length"] for step in steps)
    assert length == pytest.approx(planned(pipelined)[0].totals.step_s * 1e9, abs=1)


@pytest.mark.parametrize("pipelined", [False, True])
def test_the_busiest_device_sends_what_the_plan_says(pipelined: bool) -> None:
    causes = plain(pipelined)["traffic"]["causes"]
    rows = [
        [sum(each) for each in zip(*senders, strict=True)]
        for senders in zip(*(c["bytes"] for c in causes), strict=True)
    ]
    sent = planned(pipelined)[0].totals.communication_bytes
    assert max(map(sum, rows)) == pytest.approx(sent, rel=1e-2)  # 10 classes and 4 samples: pieces of unequal size
    assert max(map(sum, rows)) <= sent * (1 + 1e-6) + 4 * len(rows)  # whole bytes


def test_memory_grows_to_a_peak_below_the_bound() -> None:
    memory, plan = plain(False)["memory"], planned(False)[0]
    totals = [sum(moment[1:]) for moment in memory["moments"]]
    assert max(totals) <= memory["bound"] == plan.totals.memory_bytes
    times = [moment[0] for moment in memory["moments"]]
    assert times == sorted(times)
    assert times[-1] <= memory["length"]
    assert plain(True)["memory"]["positions"] == [
        stage.cost.memory_bytes for stage in planned(True)[0].stages if stage.cost
    ]


def test_a_pipeline_is_one_picture() -> None:
    found = plain(True)
    ids, edges = found["layers"]["id"], found["graph"]["edges"]
    (crossing,) = [edge for edge in edges if found["layers"]["stage"][edge[0]] != found["layers"]["stage"][edge[1]]]
    assert ids[crossing[0]] == f"{ids[crossing[1]]}:sent"
    assert crossing[3] > 0
    assert found["stages"]["rows"]


def measured(plan: Plan, seconds: float) -> Measured:
    layers = {layer.id: dict.fromkeys(LAYER_PHASES, (seconds, 0.0)) for layer in plan.stages[0].layers}
    return Measured(
        plan_sha256=plan.digest, model=plan.model.name, batch=plan.batch, num_ranks=4, environment={"cpu": "test"},
        rank=1, steps_s=[0.2], step_s=0.2, step_iqr_s=0.0, compute_only_s=0.1, instrumented_steps_s=[0.25],
        instrumented_step_s=0.25, gathering_s=0.01, exposed_sync_s=0.02, optimizer_s=0.03, other_s=0.0,
        layers=layers_of(plan, layers),
    )  # fmt: skip


def test_a_run_stands_beside_the_prediction() -> None:
    plan, machine = planned(False)
    ranks = {f"measured, rank {r}": [Event("conv1 forward", "compute", 0.0, 0.1 * (r + 1))] for r in range(2)}
    found = content(report(plan, machine, measured=measured(plan, 0.001), trace=ranks, alternatives=False))
    assert [step["name"] for step in found["timeline"]["steps"]] == ["predicted, every rank", *ranks]
    assert [step["length"] for step in found["timeline"]["steps"][1:]] == [10**8, 2 * 10**8]
    count = len(found["layers"]["id"])
    assert found["layers"]["measured"] == [pytest.approx(0.002)] * count
    steps, parts = found["accuracy"]["tables"]
    assert ["measured", "200 ms"] in [row[:2] for row in steps["rows"]]
    assert [row[2] for row in parts["rows"] if row[0] == "forward"] == [f"{count} ms"]
    assert all(point[2] == pytest.approx(0.002) for point in found["accuracy"]["points"])
    assert "next" not in found["layers"]


def test_without_a_trace_the_medians_of_a_run_are_laid_end_to_end() -> None:
    plan, machine = planned(False)
    found = content(report(plan, machine, measured=measured(plan, 0.001), alternatives=False))
    step = found["timeline"]["steps"][1]
    assert step["name"] == "measured, rank 1"
    assert step["length"] == round(1e9 * (0.001 * 4 * len(plan.stages[0].layers) + 0.01 + 0.02 + 0.03))


def pipeline_run(plan: Plan, digest: str) -> MeasuredPipeline:
    stages = [MeasuredStage(rank=r, forward_s=0.1, backward_s=0.2, tail_s=0.0, bubble_share=0.1) for r in range(2)]
    return MeasuredPipeline(
        plan_sha256=digest, model=plan.model.name, batch=plan.batch, num_ranks=2, environment={}, steps_s=[1.0],
        step_s=1.0, step_iqr_s=0.0, instrumented_step_s=1.1, stages=stages,
    )  # fmt: skip


def test_a_run_of_a_pipeline_is_read_and_shown_by_stages(tmp_path: Path) -> None:
    plan, machine = planned(True)
    pipeline_run(plan, plan.digest).save(tmp_path / "run.json")
    run = read_measured_pipeline(tmp_path / "run.json", plan)
    tables = content(report(plan, machine, measured=run))["accuracy"]["tables"]
    assert ["measured", "1 s"] in [row[:2] for row in tables[0]["rows"]]
    assert len(tables[1]["rows"]) == 2
    pipeline_run(plan, "0" * 64).save(tmp_path / "other.json")
    with pytest.raises(MismatchError, match="is of another plan"):
        read_measured_pipeline(tmp_path / "other.json", plan)


def test_another_machine_is_said_to_be_one() -> None:
    plan, _ = planned(False)
    found = content(report(plan, machine_of("2x2-a100-eth1"), alternatives=False))
    assert found["timeline"]["steps"][0]["length"] > plan.totals.step_s * 1e9
    assert any("are predicted for 2x2-a100-eth1" in sentence for sentence in found["sentences"])
    assert not any("predicted for" in sentence for sentence in plain(False)["sentences"])
