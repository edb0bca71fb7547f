"""Measured collectives between and beyond their points."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from planner.devices import cluster, read_cluster, write_cluster
from planner.devices.measured import CollectiveKind, CollectivePoint, MeasuredCollective
from planner.errors import FormatError

POINTS = (
    CollectivePoint(100, 1.0, 2.0, 0.1),
    CollectivePoint(200, 2.0, 3.0, 0.3),
    CollectivePoint(400, 1.5, 7.0, 0.3),
    CollectivePoint(800, 6.0, 5.0, 1.1),
)
MEASURED = MeasuredCollective(CollectiveKind.ALL_REDUCE, ("gpu",), POINTS)


@pytest.mark.parametrize(
    ("num_bytes", "seconds"),
    [
        (1, 1.0),  # the smallest
        (150, 1.5),  # halfway
        (300, 2.0),  # the third point is faster than the second: taken as equal
        (600, 4.0),
        (1000, 8.0),  # goes on with 1 s for 100 bytes
    ],
)
def test_times_between_and_beyond_the_points(num_bytes: int, seconds: float) -> None:
    assert MEASURED.seconds(num_bytes) == pytest.approx(seconds)


def test_a_noisy_last_point_does_not_make_more_bytes_free() -> None:
    """1 s for 100 bytes at the end, of which half counts beyond."""
    points = (CollectivePoint(50, 1.1, 1.1, 0.0), CollectivePoint(100, 1.0, 1.0, 0.0))
    noisy = dataclasses.replace(MEASURED, points=points)
    assert noisy.seconds(300) == pytest.approx(1.1 + 0.5 * 1.1 / 100 * 200)


def test_loaded_is_never_faster_than_alone() -> None:
    assert MEASURED.loaded_s(400) == 7.0
    assert MEASURED.loaded_s(2000) == pytest.approx(MEASURED.seconds(2000)) == 18.0


def test_what_compute_loses() -> None:
    assert MEASURED.lost_s(150) == pytest.approx(0.2)
    assert MEASURED.lost_s(600) == pytest.approx(0.7)


def test_a_cluster_file_keeps_them(tmp_path: Path) -> None:
    graph = dataclasses.replace(cluster("2xa100-nvlink"), collectives=(MEASURED,))
    write_cluster(graph, tmp_path / "lab.json")
    assert read_cluster(tmp_path / "lab.json") == graph


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ({"levels": ("rack",)}, "$.collectives[0].levels"),
        ({"points": POINTS[:1]}, "$.collectives[0].points"),
        ({"points": POINTS[::-1]}, "$.collectives[0].points"),
    ],
)
def test_contradictions_are_named(change: dict[str, Any], path: str) -> None:
    wrong = dataclasses.replace(MEASURED, **change)
    with pytest.raises(FormatError, match=path.replace("$", r"\$").replace("[", r"\[").replace("]", r"\]")):
        dataclasses.replace(cluster("2xa100-nvlink"), collectives=(wrong,))
