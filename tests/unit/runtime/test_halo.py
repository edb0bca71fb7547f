"""Convolutions that fetch rows of their neighbours, overlapped or not, equal one device."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from planner.ir.ops import Conv
from planner.ir.region import Region
from planner.ir.tensor import DType, TensorSpec
from runtime.comm.communicator import Axes, ThreadCommunicator
from runtime.lowering import halo
from runtime.lowering.halo import Geometry
from runtime.lowering.pieces import Piece
from support.halos import CASES, NETWORKS, num_halos, on_threads, planner_for, spatial_plan


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("way", ["small", "blocking", "overlapped"])
@pytest.mark.parametrize("name", CASES)
def test_a_cut_convolution_equals_one_device(monkeypatch: pytest.MonkeyPatch, name: str, way: str) -> None:
    overlapped = way == "overlapped"
    if way == "blocking":
        monkeypatch.setattr(halo, "_SMALL", 0)
    planner = planner_for(CASES[name])
    plan = spatial_plan(planner, CASES[name].cut, overlapped)
    assert num_halos(planner, plan) > 0 or "channels" in name
    assert on_threads(CASES[name], plan) == [{}] * plan.mesh.size


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_cut_by_samples_and_space_equals_one_device(name: str) -> None:
    planner = planner_for(NETWORKS[name])
    plan = spatial_plan(planner, NETWORKS[name].cut, overlapped=True)
    assert num_halos(planner, plan) >= 3
    assert on_threads(NETWORKS[name], plan) == [{}] * plan.mesh.size


class Noting(ThreadCommunicator):
    """Notes on every rank when an exchange starts, and when it is waited for."""

    def start_exchange(
        self, buffer: torch.Tensor, send_counts: Sequence[int], receive_counts: Sequence[int], axes: Axes
    ) -> Callable[[], torch.Tensor]:
        note("start")
        arrived = super().start_exchange(buffer, send_counts, receive_counts, axes)

        def wait() -> torch.Tensor:
            note("wait")
            return arrived()

        return wait


NOTES: dict[int, list[str]] = {}
FOR_INPUT, FOR_WEIGHT = "gradient [True, False]", "gradient [False, True]"


def note(what: str) -> None:
    NOTES.setdefault(threading.get_ident(), []).append(what)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(
    ("name", "overlapped", "forward", "backward"),
    [
        ("corners, uneven", None, ["start", "wait", "conv"], ["start", "wait"]),
        ("corners, uneven", False, ["start", "wait", "conv"], ["gradient [True, True]", "start", "wait"]),
        (
            "corners, uneven", True, ["start", "conv", "wait", *["conv"] * 3],
            [*[FOR_INPUT] * 3, "start", "gradient [True, True]", *[FOR_WEIGHT] * 3, "wait"],
        ),
        (
            "padding on one side more", True, ["start", "conv", "wait", *["conv"] * 4],
            [FOR_INPUT, "start", FOR_WEIGHT, "wait"],
        ),
    ],
    ids=["small", "blocking", "overlapped, in place", "overlapped, elsewhere"],
)  # fmt: skip
def test_what_is_overlapped_is_computed_between_start_and_wait(
    monkeypatch: pytest.MonkeyPatch, name: str, overlapped: bool | None, forward: list[str], backward: list[str]
) -> None:
    convolved, gradients = Geometry.convolved, Geometry.gradients

    def convolve(*args: Any) -> Any:
        note("conv")
        return convolved(*args)

    def differentiate(*args: Any) -> Any:
        note(f"gradient {[*args[4]][:2]}")
        return gradients(*args)

    monkeypatch.setattr(Geometry, "convolved", convolve)
    monkeypatch.setattr(Geometry, "gradients", differentiate)
    if overlapped is False:
        monkeypatch.setattr(halo, "_SMALL", 0)
    NOTES.clear()
    case = CASES[name]
    plan = spatial_plan(planner_for(case), case.cut, overlapped is True)
    assert on_threads(case, plan, Noting) == [{}] * plan.mesh.size
    assert list(NOTES.values()) == [(forward + backward) * len(case.batches())] * plan.mesh.size


def piece(outputs: tuple[int, int], own: tuple[int, int]) -> Piece:
    """Rows of 12, of which a window of 5 with stride 2 makes 6."""
    x, y = (TensorSpec((1, 1, n), DType.FLOAT32) for n in (12, 6))
    return Piece((x,), (Region((0, 0, own[0]), (1, 1, own[1])),), y, Region((0, 0, outputs[0]), (1, 1, outputs[1])))


@pytest.mark.parametrize(
    ("outputs", "own", "interior"),
    [
        ((0, 3), (0, 6), (1, 2)),  # output 0 reads padding, output 2 rows 2 to 6
        ((2, 5), (3, 10), (3, 4)),  # outputs read rows 2-6, 4-8, 6-10
        ((3, 4), (4, 9), None),  # everything: nothing is left for later
        ((2, 3), (4, 6), None),  # nothing
    ],
)
def test_the_interior_needs_own_rows_only(
    outputs: tuple[int, int], own: tuple[int, int], interior: tuple[int, int] | None
) -> None:
    geometry = Geometry.of(Conv(1, 1, (5,), (2,), (2,), (1,)), piece(outputs, own))
    found = geometry.interior((own,))
    assert found == (None if interior is None else (interior,))
    if found is not None:
        rows = [range(*outputs)[i] for i in range(outputs[1] - outputs[0])]
        strips = [row for box in geometry.strips(found) for row in range(*box[0])]
        assert sorted([*strips, *range(*found[0])]) == rows
