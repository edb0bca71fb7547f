"""What is said of a plan beside its figures: rounding is not news."""

import pytest

from planner.report.tables import StrategyRow, bound_sentence, strategies


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
