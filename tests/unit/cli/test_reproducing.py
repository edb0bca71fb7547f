"""``layerwise reproduce`` as a user meets it."""

from pathlib import Path

import pytest

import planner.reproduce
from planner.reproduce import PAPERS, Figure, Reproduction
from support.command_line import layerwise

FIGURES = (Figure("bytes", 16.9e9, 17.2e9, "B", remark="so"),)
FOUND = Reproduction("[X] a paper", "layerwise reproduce pase", (("Totals", FIGURES),), ("all",))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []

    def reproduce(name: str) -> Reproduction:
        names.append(name)
        return FOUND

    monkeypatch.setattr(planner.reproduce, "reproduce", reproduce)
    return names


def test_it_prints_both_values_their_difference_and_the_remarks(asked: list[str]) -> None:
    ran = layerwise("reproduce", "pase")
    assert (ran.code, ran.err, asked) == (0, "", ["pase"])
    lines = [line.split() for line in ran.out.splitlines()]
    assert ["bytes", "16.9", "GB", "17.20", "GB", "+1.8", "%"] in lines
    assert ["bytes:", "so."] in lines
    assert lines[-1] == ["-", "all"]


def test_it_writes_the_figures_too(asked: list[str], tmp_path: Path) -> None:
    ran = layerwise("reproduce", "owt", "-o", tmp_path / "found.csv")
    assert (ran.code, asked) == (0, ["owt"])
    assert (tmp_path / "found.csv").read_text().splitlines()[1].startswith("Totals,bytes,16900000000,17200000000,B,")


def test_an_unknown_paper_is_refused_with_the_known_ones(asked: list[str]) -> None:
    ran = layerwise("reproduce", "alpa")
    assert (ran.code, asked, ran.out) == (2, [], "")
    assert "unknown paper 'alpa'" in ran.error
    assert all(name in ran.error for name in PAPERS) or "Did you mean" in ran.error


@pytest.mark.parametrize(("name", "said"), [("found.json", "ends in .csv"), ("missing/found.csv", "no folder")])
def test_a_place_that_does_not_do_is_refused_before_anything_is_computed(
    asked: list[str], tmp_path: Path, name: str, said: str
) -> None:
    ran = layerwise("reproduce", "owt", "-o", tmp_path / name)
    assert (ran.code, asked) == (2, [])
    assert said in ran.error


def test_the_help_names_every_paper() -> None:
    assert all(name in layerwise("reproduce", "--help").out for name in PAPERS)
