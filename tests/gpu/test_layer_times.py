"""Layers on a real GPU: every precision and memory format, by the device's own clock."""

from pathlib import Path

import pytest
import torch

from planner.ir import ops as ir
from planner.ir.tensor import DType
from planner.measure.layers import LayerTimer
from planner.profile.file import read_profile
from planner.profile.key import AbsorbedKey, PieceKey
from runtime.measuring import norm_of_several_ranks
from support.command_line import layerwise

pytestmark = pytest.mark.gpu

CONV = ir.Conv(64, 64, (3, 3), (1, 1), (1, 1), (1, 1))
NORM = (AbsorbedKey(ir.BatchNorm(64), weight_gradient=True), AbsorbedKey(ir.Elementwise("relu")))


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", DType.FLOAT32), ("tf32", DType.FLOAT32), ("bf16", DType.BFLOAT16)]
)
@pytest.mark.parametrize("synchronised", [False, True])
def test_a_convolution_takes_time_in_every_phase(
    precision: str, dtype: DType, memory_format: str, synchronised: bool
) -> None:
    shape = (8, 64, 56, 56)
    key = PieceKey(
        CONV, NORM, (shape,), shape, dtype, precision, memory_format, bias=False, synchronised=synchronised
    )  # fmt: skip
    found = LayerTimer(torch.device("cuda"), norm_of_several_ranks).time(key)
    assert found is not None
    assert min(found.forward_s, found.backward_data_s, found.backward_weight_s) > 0


@pytest.mark.slow
def test_the_command_measures_a_gpu(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    ran = layerwise(
        "profile", "layers", "lenet5", "--devices", "2", "--device", "cuda", "--precision", "bf16", "-o", path
    )  # fmt: skip
    assert ran.code == 0, ran.err
    found = read_profile(path)
    assert found.environment["processor"] == torch.cuda.get_device_name()
    assert {entry.layer.precision for entry in found.layers} == {"bf16"}
