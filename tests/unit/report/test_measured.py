"""Predicted beside measured: every figure of the tables by hand, and whether an order was right."""

import math
from typing import Any

import pytest

from planner.plan.measured import Measured, layers_of
from planner.report.measured import (
    LayerSeconds,
    Raced,
    StepParts,
    layer_differences,
    marking_sentence,
    order_sentence,
    parts,
    predicted_parts,
    race,
    race_row,
    race_sentences,
    rank_correlation,
    steps,
    swaps,
)
from support.plans import document, plan_of

PLAN = plan_of(document())


def measured(**changes: Any) -> Measured:
    """Return a run of the plan of two layers: fc1 is slower than predicted, fc2 sends more."""
    figures: dict[str, Any] = {
        "plan_sha256": PLAN.digest, "model": "net", "batch": 8, "num_ranks": 2, "environment": {}, "rank": 1,
        "steps_s": [0.01], "step_s": 0.01, "step_iqr_s": 0.0, "compute_only_s": 0.008, "instrumented_steps_s": [0.0125],
        "instrumented_step_s": 0.0125, "gathering_s": 0.0005, "exposed_sync_s": 0.001, "optimizer_s": 0.0015,
        "other_s": 0.0005,
        "layers": layers_of(PLAN, {
            "fc1": {"forward": (0.002, 0.0), "backward": (0.004, 0.0)},
            "fc2": {"forward": (0.0005, 0.0), "backward": (0.0005, 0.0), "transfer_forward": (0.0015, 0.0),
                    "transfer_backward": (0.0005, 0.0)},
        }),
    }  # fmt: skip
    return Measured(**(figures | changes))


SAID = StepParts(
    forward_s=0.002, backward_s=0.003, transfer_s=0.001, gathering_s=0.0, exposed_sync_s=0.002, optimizer_s=0.001,
    layers={"input": LayerSeconds(0, 0), "fc1": LayerSeconds(0.003, 0), "fc2": LayerSeconds(0.002, 0.001),
            "output": LayerSeconds(0, 0)},
)  # fmt: skip


def test_the_steps_stand_below_each_other_with_the_error_of_each_prediction() -> None:
    table = steps(PLAN, [("2xa100-nvlink", 0.004), ("local-2", 0.011)], measured())
    assert table.rows == (
        ("predicted for 2xa100-nvlink", "4 ms", "2k", "-60.0%"),
        ("predicted for local-2", "11 ms", "727", "+10.0%"),
        ("measured", "10 ms", "800", ""),
        ("measured, compute only", "8 ms", "1k", "-20.0%"),
    )
    assert table.emphasis == 2


def test_layers_come_in_the_order_of_their_difference() -> None:
    table = layer_differences(PLAN, SAID, measured(), count=2)
    assert table.rows == (
        ("fc1", "linear", "out_channel", "3 ms", "6 ms", "0 s", "0 s", "+3 ms"),
        ("fc2", "linear", "out_channel", "2 ms", "1 ms", "1 ms", "2 ms", "0 s"),
    )
    assert "2 of 4" in table.title


def test_the_parts_add_up_to_the_step_on_both_sides() -> None:
    table = parts(measured(), SAID)
    assert table.rows == (
        ("forward", "2 ms", "2.5 ms", "+500 µs", "20 %"),
        ("backward", "3 ms", "4.5 ms", "+1.5 ms", "36 %"),
        ("transfers", "1 ms", "2 ms", "+1 ms", "16 %"),
        ("gradients into buckets", "0 s", "500 µs", "+500 µs", "4 %"),
        ("exposed gradient sync", "2 ms", "1 ms", "-1 ms", "8 %"),
        ("optimizer", "1 ms", "1.5 ms", "+500 µs", "12 %"),
        ("other", "0 s", "500 µs", "+500 µs", "4 %"),
        ("step", "9 ms", "12.5 ms", "+3.5 ms", "100 %"),
    )
    alone = parts(measured(), None)
    assert [row[:3] for row in alone.rows[:1]] == [("forward", "?", "2.5 ms")]
    assert "1 step on rank 1" in marking_sentence(measured())
    assert "+25.0%" in marking_sentence(measured())


def test_the_predicted_parts_add_up_to_the_simulated_step() -> None:
    from planner.api import Options, Origin, example_inputs, machine_of, prepare, price_plan
    from planner.frontend.source import load_model

    machine = machine_of("2x1-a100-eth10")
    loaded = load_model("lenet5")
    inputs = example_inputs(loaded.input_shapes, 16)
    plan = prepare(loaded.module, inputs, machine, Options(solver="data"), Origin("lenet5", "lenet5")).plan()
    priced = price_plan(plan, machine)
    ids = [layer.id for layer in priced.table.space.graph.layers]
    found = predicted_parts(ids, priced.costs, priced.timeline)
    assert found.step_s == pytest.approx(priced.timeline.step_s, rel=1e-12)
    assert found.exposed_sync_s > 0
    stage = plan.stages[0].layers
    assert list(found.layers) == [layer.id for layer in stage]
    compute_s = sum(layer.compute_s for layer in found.layers.values()) + found.gathering_s + found.optimizer_s
    assert compute_s == pytest.approx(sum(layer.cost.compute_s for layer in stage))


ROWS = (
    Raced("data", 4.0, 5.0, 0.1),
    Raced("model", 3.0, 2.0, 0.1),
    Raced("model-in", 9.0),
    Raced("conv-data-fc-model", 2.0, 2.5, 0.1),
    Raced("auto", 1.0, 1.0, 0.0, is_planned=True),
)


def test_the_race_shows_the_error_of_every_strategy_that_ran() -> None:
    rows = race(ROWS).rows
    assert rows[0] == ("data", "4 s", "5 s", "100 ms", "-20.0%", "")
    assert rows[2] == ("model-in", "9 s", "?", "?", "?", "not run")
    assert rows[4][0] == "planned (auto)"
    sentences = list(race_sentences((*ROWS[:2], Raced("model-in", 9.0, note="not run: it is split by height"))))
    assert sentences[1:] == [
        "Median absolute error of the prediction: 35 %.", "model-in: not run: it is split by height"
    ]  # fmt: skip


def test_the_rank_correlation_is_spearmans() -> None:
    # predicted ranks 4 3 2 1, measured ranks 4 2 3 1: 1 - 6 * (0 + 1 + 1 + 0) / (4 * (16 - 1)) = 0.8
    assert rank_correlation(ROWS) == pytest.approx(0.8)
    opposite = [Raced("a", 1, 3.0), Raced("b", 2, 2.0), Raced("c", 3, 1.0)]
    assert rank_correlation(opposite) == pytest.approx(-1)


@pytest.mark.parametrize("rows", [(), ROWS[:1], ROWS[2:3], (Raced("a", 1, 2.0), Raced("b", 1, 3.0))])
def test_where_nothing_can_be_compared_there_is_no_correlation(rows: tuple[Raced, ...]) -> None:
    assert rank_correlation(rows) is None
    assert "no order" in order_sentence(rows)


def test_a_wrong_order_is_said_with_its_largest_pair() -> None:
    (swap,) = swaps(ROWS)
    assert (swap.fast.name, swap.slow.name) == ("conv-data-fc-model", "model")
    assert swap.gap == pytest.approx(0.25)
    sentence = order_sentence(ROWS)
    assert "1 of 6 pairs the wrong way round (rank correlation 0.8)" in sentence
    assert "conv-data-fc-model was predicted faster than model by 33.3 % and measured slower by 25 %." in sentence
    noisy = (Raced("a", 1.0, 2.1, 0.2), Raced("b", 2.0, 2.0, 0.1))
    assert "less than the spread of the steps" in order_sentence(noisy)


def test_a_right_order_is_said_and_a_tie_of_predictions_is_no_order() -> None:
    assert "is the measured one" in order_sentence(ROWS[:2])
    tie = (Raced("a", 1.0, 3.0), Raced("b", 1.0, 2.0), Raced("c", 2.0, 4.0))
    assert swaps(tie) == ()


def test_a_row_of_samples_has_their_median_and_inter_quartile_range() -> None:
    row = race_row("data", 2.0, [1.0, 2.0, 3.0, 4.0, 100.0], "", is_planned=False)
    assert (row.measured_s, row.iqr_s) == (3.0, 50.5)  # quartiles at 1.5 and 52
    assert math.isclose(row.error or 0.0, 2 / 3 - 1)
    assert race_row("data", 2.0, [], "not run: no", is_planned=False).measured_s is None
