"""What a timed repeat goes through, and what is made of its seconds."""

import dataclasses
import functools
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from planner.errors import UsageError
from planner.ir import ops as ir
from planner.ir.tensor import DType
from planner.measure import clock, kernels, layers
from planner.measure.kernels import Kernel
from planner.measure.layers import LayerTimer, products_in, time_keys
from planner.profile.key import AbsorbedKey, PieceKey
from planner.profile.table import Measurement
from runtime.measuring import norm_of_several_ranks

CPU = torch.device("cpu")
CONV = ir.Conv(2, 3, (3, 3), (1, 1), (1, 1), (1, 1))
FORWARD_S, DATA_S, JOINT_S = 1.0, 2.0, 5.0


def conv(*, input_gradient: bool = True, weight_gradient: bool = True) -> PieceKey:
    return PieceKey(
        CONV, (AbsorbedKey(ir.Elementwise("relu")),), ((2, 2, 4, 4),), (2, 3, 4, 4), bias=True,
        input_gradient=input_gradient, weight_gradient=weight_gradient,
    )  # fmt: skip


@pytest.fixture
def timer() -> LayerTimer:
    return LayerTimer(CPU, norm_of_several_ranks)


@pytest.fixture
def phases(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let every phase take a second or more of its own, and say which there were."""
    seen: list[str] = []
    seconds = {"forward": FORWARD_S, "backward_of_inputs": DATA_S, "backward": JOINT_S}

    def elapsed(call: functools.partial[None], device: torch.device) -> float:
        assert device == CPU
        call()
        seen.append(call.func.__name__)
        return seconds[seen[-1]]

    monkeypatch.setattr(layers, "elapsed", elapsed)
    return seen


def test_the_gradient_of_weights_is_what_the_joint_backward_takes_beyond_that_of_inputs(
    timer: LayerTimer, phases: list[str]
) -> None:
    found = timer.time(conv())
    assert found is not None
    assert (found.forward_s, found.backward_data_s, found.backward_weight_s) == (1.0, 2.0, 3.0)
    assert (found.backward_s, found.iqr_s) == (JOINT_S, 0.0)
    assert phases[:3] == ["forward", "backward_of_inputs", "backward"]
    assert len(phases) == 3 * (found.num_repeats + 1)  # one to warm up


@pytest.mark.parametrize(("cache_bytes", "passes"), [(2**20, ["twin", "timed"]), (0, ["timed"])])
def test_the_code_of_layers_that_fit_the_caches_has_just_run_when_they_are_timed(
    monkeypatch: pytest.MonkeyPatch, cache_bytes: int, passes: list[str]
) -> None:
    made: list[str] = []
    ran: list[str] = []

    def kernel_of(*arguments: Any) -> Kernel | None:
        kernel = kernels.kernel_of(*arguments)
        assert kernel is not None
        made.append("twin" if made else "timed")

        def forward(name: str = made[-1]) -> list[torch.Tensor]:
            ran.append(name)
            return kernel.forward()

        return dataclasses.replace(kernel, forward=forward)

    monkeypatch.setattr(clock, "cache_bytes", lambda _: cache_bytes)
    monkeypatch.setattr(layers, "kernel_of", kernel_of)
    found = LayerTimer(CPU, norm_of_several_ranks).time(conv())
    assert found is not None
    assert ran == passes * (found.num_repeats + 1)


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (conv(input_gradient=False), (FORWARD_S, 0.0, JOINT_S)),
        (conv(weight_gradient=False), (FORWARD_S, JOINT_S, 0.0)),
        (conv(input_gradient=False, weight_gradient=False), (FORWARD_S, 0.0, 0.0)),
    ],
)
def test_backward_computes_only_what_is_asked(
    timer: LayerTimer, phases: list[str], key: PieceKey, expected: tuple[float, float, float]
) -> None:
    found = timer.time(key)
    assert found is not None
    assert (found.forward_s, found.backward_data_s, found.backward_weight_s) == expected
    assert "backward_of_inputs" not in phases


@pytest.mark.usefixtures("phases")
def test_a_resolved_partial_sum_goes_back_through_both_parts(timer: LayerTimer) -> None:
    key = PieceKey(CONV, (), ((2, 2, 4, 4),), (2, 3, 4, 4), bias=True, resolved=(2, 3, 4, 4))
    found = timer.time(key)
    assert found is not None
    assert found.backward_s == JOINT_S


@pytest.mark.parametrize(
    "key",
    [
        conv(),
        PieceKey(ir.BatchNorm(3), (), ((4, 3, 2, 2),), (4, 3, 2, 2), synchronised=True),
        PieceKey(ir.Concat(1), (), ((2, 3), (2, 4)), (2, 7), weight_gradient=False),
        PieceKey(CONV, (), ((2, 2, 4, 4),), (2, 3, 4, 4), bias=True, memory_format="channels_last"),
        PieceKey(CONV, (), ((2, 2, 4, 4),), (2, 3, 4, 4), DType.BFLOAT16, "bf16", bias=True),
    ],
)
def test_the_clock_of_the_host_gives_whole_measurements(timer: LayerTimer, key: PieceKey) -> None:
    found = timer.time(key)
    assert found is not None
    assert found.num_repeats >= clock.FEW_REPEATS
    assert found.forward_s > 0
    assert found.backward_s > 0
    assert min(found.backward_data_s, found.backward_weight_s, found.iqr_s) >= 0


def test_a_layer_without_a_kernel_is_handed_on_as_none(timer: LayerTimer) -> None:
    odd = PieceKey(ir.PerSample("attention"), (), ((2, 3),), (2, 3), weight_gradient=False)
    found: list[tuple[str, Measurement | None]] = []
    time_keys([odd.text, odd.text], timer, lambda *row: found.append(row))
    assert found == [(odd.text, None)] * 2


def test_processes_start_every_phase_together_and_repeat_equally_often(phases: list[str]) -> None:
    class Others(clock.Alone):
        starts = 0

        def start(self) -> None:
            self.starts += 1

        def largest(self, seconds: float) -> float:
            return seconds + 1000.0  # another process is much slower

    others = Others()
    found = LayerTimer(CPU, norm_of_several_ranks, others).time(conv())
    assert found is not None
    assert found.num_repeats == clock.FEW_REPEATS
    assert others.starts == len(phases) == 3 * (clock.FEW_REPEATS + 1)


def test_tf32_needs_a_gpu(timer: LayerTimer) -> None:
    key = PieceKey(CONV, (), ((2, 2, 4, 4),), (2, 3, 4, 4), bias=True, precision="tf32")
    with pytest.raises(UsageError, match="tf32 is a mode of NVIDIA GPUs"):
        timer.time(key)


@pytest.mark.parametrize(
    "error",
    [MemoryError(), torch.OutOfMemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")],
)
def test_too_large_a_piece_is_an_error_of_the_request(
    timer: LayerTimer, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr(layers, "kernel_of", full)
    with pytest.raises(UsageError, match="no memory left to time"):
        timer.time(conv())


def test_other_errors_stay_what_they_are(timer: LayerTimer, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(layers, "kernel_of", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        timer.time(conv())


@pytest.mark.parametrize(("precision", "expected"), [("fp32", False), ("tf32", True), ("bf16", False)])
def test_the_precision_of_products_is_set_for_a_while(precision: str, expected: bool) -> None:
    flags = (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
    with products_in(precision):
        assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (expected, expected)
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == flags


def test_medians_and_quartiles() -> None:
    found = clock.summarize([5.0, 1.0, 3.0, 2.0, 4.0])
    assert (found.median_s, found.num_samples) == (3.0, 5)
    low, _, high = statistics.quantiles([1.0, 2.0, 3.0, 4.0, 5.0], n=4)
    assert found.iqr_s == high - low


@pytest.mark.parametrize(
    ("seconds", "repeats"),
    [(1e-6, 30), (0.01, 30), (0.02, 15), (0.06, 5), (0.5, 5), (0.8, 5), (0.9, 4), (1.2, 3), (100.0, 3)],
)
def test_the_longer_it_takes_the_fewer_repeats_there_are(seconds: float, repeats: int) -> None:
    assert clock.repeats_of(seconds) == repeats


def test_the_evicted_cache_is_the_largest_of_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index, size in enumerate(("32K", "1024K", "8M", "?")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(f"{size}\n")
    monkeypatch.setattr(clock, "_CACHE", tmp_path)
    assert clock.cache_bytes(CPU) == 8 * 2**20
    monkeypatch.setattr(clock, "_CACHE", tmp_path / "none")
    assert clock.cache_bytes(CPU) == 32 * 2**20
