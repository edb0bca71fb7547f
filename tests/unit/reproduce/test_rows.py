"""How a published figure and ours are compared and printed."""

import csv
import io

import pytest

from planner.errors import UnknownNameError
from planner.reproduce import PAPERS, Figure, Reproduction, reproduce
from planner.reproduce.figures import paragraphs
from planner.reproduce.rows import COLUMNS, as_csv, difference, tables


@pytest.mark.parametrize(
    ("figure", "said"),
    [
        (Figure("", 16.9e9, 16.88666e9, "B"), "equal"),  # rounds to the printed digits
        (Figure("", 2.00e9, 1.99496e9, "B"), "-0.25 %"),  # does not: 1.99
        (Figure("", 2.76, 2.7648599), "equal"),
        (Figure("", 2.2, 2.249, digits=2), "equal"),
        (Figure("", 2.2, 2.251, digits=2), "+2.3 %"),
        (Figure("", 0.1, 0.3), "3 times"),
        (Figure("", 200.0, 50.0), "-75 %"),
        (Figure("", 200.0, 1.0), "1/200"),
        (Figure("", 200.0, 0.0), "0 times"),
        (Figure("", 9.996, 10.0), "equal"),  # both round to 10.0
        (Figure("", 0.0, 0.0), "equal"),
        (Figure("", 0.0, 1.0), "differs"),
        (Figure("", "0011", "0011"), "equal"),
        (Figure("", "0011", "0010"), "differs"),
        (Figure("", None, 1.5), ""),
        (Figure("", 1.5, None), "not reproduced"),
    ],
)
def test_ours_is_equal_where_it_rounds_to_what_is_printed(figure: Figure, said: str) -> None:
    assert difference(figure) == said


FOUND = Reproduction(
    "[X] a paper",
    "layerwise reproduce x",
    (
        ("Totals", (Figure("a", 0.0121e9, 12_060_000.0, "B"), Figure("b", 1.47e9, 1.4908e9, "B", remark="a slip"))),
        (
            "Plans",
            (Figure("c", "01", "01"), Figure("d", 3.05, 2.9, remark="why"), Figure("e", None, 2.9, "s", 3, "why")),
        ),
    ),
)


def test_a_part_is_a_table_with_units_that_suit_the_paper_and_its_remarks_below() -> None:
    (totals, slip), (plans, why) = tables(FOUND)
    assert totals.columns == ("figure", "paper", "ours", "difference")
    assert totals.rows == (("a", "12.1 MB", "12.06 MB", "equal"), ("b", "1.47 GB", "1.491 GB", "+1.4 %"))
    assert plans.rows == (("c", "01", "01", "equal"), ("d", "3.05", "2.900", "-4.9 %"), ("e", "", "2.900 s", ""))
    assert slip == ("b: a slip.",)
    assert why == ("d; e: why.",)


def test_seconds_and_rates_have_no_large_prefixes() -> None:
    figures = (Figure("a", 2880.0, 0.0016, "s", digits=2), Figure("b", 3305.0, 4282.1, "images/s"))
    ((table, _),) = tables(Reproduction("", "", (("", figures),)))
    assert [row[1:3] for row in table.rows] == [("2880 s", "0.00160 s"), ("3305 images/s", "4282 images/s")]


def test_a_remark_on_many_figures_names_the_first() -> None:
    figures = tuple(Figure(name, 1.0, 1.0, remark="why") for name in "abcde")
    ((_, notes),) = tables(Reproduction("", "", (("", figures),)))
    assert notes == ("a, and 4 more: why.",)


def test_the_file_has_si_values_with_all_digits() -> None:
    header, *rows = csv.reader(io.StringIO(as_csv(FOUND)))
    assert tuple(header) == COLUMNS
    assert rows[0] == ["Totals", "a", "12100000", "12060000", "B", f"{12.06 / 12.1 - 1:.6g}", ""]
    assert rows[2] == ["Plans", "c", "01", "01", "", "", ""]
    assert rows[4] == ["Plans", "e", "", "2.9", "s", "", "why"]


def test_remarks_are_paragraphs() -> None:
    assert paragraphs("\none\n  two\n\nthree\n") == ("one two", "three")


def test_an_unknown_paper_is_told_the_closest() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown paper 'hyper'.*'hypar'"):
        reproduce("hyper")


def test_the_papers_are_sorted() -> None:
    assert list(PAPERS) == sorted(PAPERS)
