"""FLOP, bytes and launches of pieces, with the arithmetic spelled out."""

import math
from dataclasses import replace

import pytest

from planner.ir.ops import BatchNorm, Concat, Conv, Elementwise, GroupNorm, Linear, Op, Pool, Reshape, Softmax
from planner.ir.tensor import DType
from planner.profile.demand import SIZES, Phase, demands, kind_of
from planner.profile.key import AbsorbedKey, PieceKey
from support.pieces import conv

PIECE = conv(4, 32, 64, size=14)
MOVED = 4 * 32 * 14 * 14 + 4 * 64 * 14 * 14 + 64 * 32 * 9


def test_each_phase_of_a_convolution_is_a_product_of_the_same_size() -> None:
    found = demands(PIECE)
    assert list(found) == list(Phase)
    for demand in found.values():
        assert demand.flop == 2 * 4 * 64 * 14 * 14 * 32 * 9
        assert demand.num_bytes == 4 * MOVED
        assert demand.launches == 1


def test_phases_that_backward_does_not_need_are_left_out() -> None:
    assert set(demands(replace(PIECE, input_gradient=False))) == {Phase.FORWARD, Phase.BACKWARD_WEIGHT}
    assert set(demands(replace(PIECE, weight_gradient=False))) == {Phase.FORWARD, Phase.BACKWARD_DATA}


def test_absorbed_operators_go_with_the_gradient_of_the_inputs_if_there_is_one() -> None:
    tail = (AbsorbedKey(BatchNorm(64), weight_gradient=True), AbsorbedKey(Elementwise("relu")))
    output = 4 * 64 * 14 * 14
    found = demands(replace(PIECE, absorbed=tail))
    for phase, demand in found.items():
        absorbs = phase is not Phase.BACKWARD_WEIGHT
        assert demand.norm_bytes == (4 * 3 * output if absorbs else 0)
        assert demand.elementwise_bytes == (4 * 2 * output if absorbs else 0)
        assert demand.launches == (3 if absorbs else 1)
    first = demands(replace(PIECE, absorbed=tail, input_gradient=False))
    assert first[Phase.BACKWARD_WEIGHT].norm_bytes == 4 * 3 * output
    shared = demands(replace(PIECE, absorbed=tail, synchronised=True))[Phase.FORWARD]
    assert (shared.norm_bytes, shared.synchronised_bytes) == (0, 4 * 3 * output)


def test_only_large_results_and_gradients_get_new_memory() -> None:
    """64 samples of 16 channels, 90 x 90, are 33,177,600 bytes, 32 MiB are 33,554,432; 17 channels are more."""
    at_most, more = conv(64, 16, 17, size=90), conv(64, 17, 16, size=90)
    large = 4 * 64 * 17 * 90 * 90
    assert {p: d.fresh_bytes for p, d in demands(at_most).items()} == dict(zip(Phase, (large, 0, 0), strict=True))
    assert {p: d.fresh_bytes for p, d in demands(more).items()} == dict(zip(Phase, (0, large, 0), strict=True))
    tail = (AbsorbedKey(BatchNorm(17)), AbsorbedKey(Elementwise("relu")))
    assert demands(replace(at_most, absorbed=tail))[Phase.FORWARD].fresh_bytes == 3 * large
    assert demands(replace(at_most, absorbed=tail))[Phase.BACKWARD_DATA].fresh_bytes == 2 * large


def test_absorbed_operators_behind_a_partial_sum_work_on_what_it_is_reduced_to() -> None:
    piece = replace(PIECE, absorbed=(AbsorbedKey(Elementwise("relu")),), resolved=(4, 16, 14, 14))
    assert demands(piece)[Phase.FORWARD].elementwise_bytes == 4 * 2 * 4 * 16 * 14 * 14


def test_half_precision_moves_half_the_bytes() -> None:
    found = demands(replace(PIECE, dtype=DType.BFLOAT16, precision="bf16"))
    assert found[Phase.FORWARD].num_bytes == 2 * MOVED


def test_sizes_are_logarithms_of_the_matrix_product() -> None:
    sizes = dict(zip(SIZES, demands(conv(4, 32, 64, 14, stride=2, groups=4))[Phase.FORWARD].sizes, strict=True))
    wanted = {"outputs": 16, "rows": 4 * 7 * 7, "sum": 8 * 9, "samples": 4, "groups": 4, "window": 9, "stride": 4}
    assert {name: round(math.exp(sizes[name]), 6) for name in wanted} == wanted
    assert sizes["winograd"] == 0
    assert dict(zip(SIZES, demands(PIECE)[Phase.FORWARD].sizes, strict=True))["winograd"] == 1


def test_views_ask_for_nothing() -> None:
    piece = PieceKey(Reshape(((0, 1, 0, 1),)), (), ((4, 2, 3),), (4, 6))
    demand = demands(piece)[Phase.FORWARD]
    assert (demand.launches, demand.num_bytes, demand.flop) == (0, 0, 0)


@pytest.mark.parametrize(
    ("op", "kind"),
    [
        (Conv(8, 8, (3, 3), (1, 1), (1, 1), (1, 1)), "conv"),
        (Conv(8, 8, (1, 1), (1, 1), (0, 0), (1, 1)), "conv 1x1"),
        (Conv(8, 16, (3, 3), (1, 1), (1, 1), (1, 1), 8), "depthwise"),
        (Conv(8, 16, (3, 3), (1, 1), (1, 1), (1, 1), 2), "grouped"),
        (Linear(8, 8), "linear"),
        (Pool("max", (2, 2), (2, 2), (0, 0), (1, 1)), "max pool"),
        (GroupNorm(2, 8), "norm"),
        (Elementwise("add"), "element-wise"),
        (Concat(1), "concat"),
        (Softmax(1), "other"),
    ],
)
def test_kinds(op: Op, kind: str) -> None:
    assert kind_of(PieceKey(op, (), ((2, 8, 4, 4),), (2, 8, 4, 4))) == kind


def test_batch_norms_over_several_ranks_are_a_kind_of_their_own() -> None:
    piece = PieceKey(BatchNorm(8), (), ((2, 8, 4, 4),), (2, 8, 4, 4), synchronised=True)
    assert kind_of(piece) == "synchronised norm"
