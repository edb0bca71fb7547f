"""What is said of a plan beside its figures: rounding is not news."""

import pytest

from planner.plan.schema import SchedulePart
from planner.report.tables import StrategyRow, bound_sentence, source_sentence, strategies
from planner.units import format_seconds
from support.plans import document, plan_of


@pytest.mark.parametrize(
    ("bound_s", "said"),
    [
        (0.0099, "a better plan could save at most 1 %."),
        (0.01, "this one reaches it."),
        (0.01 * (1 - 1e-15), "this one reaches it."),
    ],
)
def test_the_bound_says_what_is_left_unless_that_is_rounding(bound_s: float, said: str) -> None:
    assert bound_sentence(0.01, bound_s).endswith(said)


def test_exposed_communication_that_is_rounding_is_none() -> None:
    rows = [
        StrategyRow("data", 1e-4, 1e4, 1.0, 0.0, exposed_s, 1, 0, fits=True, is_planned=False)
        for exposed_s in (2.7e-20, 3e-6)
    ]
    table = strategies(rows)
    column = table.columns.index("exposed")
    assert [row[column] for row in table.rows] == ["0 s", "3 µs"]


def test_a_pipeline_says_what_would_measure_the_pieces_that_are_fitted() -> None:
    plan = plan_of(document())
    totals = plan.totals.model_copy(update={"measured_s": 3e-3, "fitted_s": 1e-3, "data_sheet_s": 0.0})
    alone = plan.model_copy(update={"totals": totals, "batch": 32})
    said = "Compute: 75 % measured layer by layer, 25 % from a roofline fitted to measurements."
    assert source_sentence(alone) == said
    schedule = SchedulePart(kind="gpipe", num_microbatches=8)
    staged = alone.model_copy(update={"stages": plan.stages * 2, "schedule": schedule})
    assert source_sentence(staged) == (
        f"{said} Pieces of stages, of 4 samples at a time, are fitted where they were not measured: `layerwise profile "
        "layers --microbatches 8` measures them."
    )
    measured = staged.model_copy(update={"totals": totals.model_copy(update={"fitted_s": 0.0})})
    assert source_sentence(measured) == "Compute: 100 % measured layer by layer."


def test_what_is_left_of_a_sum_by_rounding_is_no_time() -> None:
    assert [format_seconds(value) for value in (0.0, 1.73e-18, -1.73e-18)] == ["0 s"] * 3
    assert format_seconds(1.5e-12) == "1.5e-06 µs"
