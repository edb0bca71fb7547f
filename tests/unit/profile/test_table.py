"""Looking layers up: what comes first, and what a piece with other samples takes."""

import math
from dataclasses import replace

import pytest

from planner.ir.graph import Layer, Parameter
from planner.ir.ops import BatchNorm, PerSample
from planner.ir.split import LayerId
from planner.ir.tensor import DType, TensorSpec
from planner.profile.calibrated import FORM, CalibratedRoofline, ConditionFit
from planner.profile.demand import Phase
from planner.profile.file import profile_of
from planner.profile.key import LocalLayer, PieceKey
from planner.profile.roofline import Roofline
from planner.profile.shipped import with_profiles
from planner.profile.table import LayerTime, Measurement, ProfileTable, Ratios, Source, scaled
from support.pieces import conv, fit_of, local_conv

SHEET = Roofline.of_data_sheet(10e12, 1e12)
MEASURED = Measurement(1e-3, 2e-3, 3e-3, 1e-5, 7)


def test_the_exact_entry_comes_before_everything_else() -> None:
    local = local_conv(8)
    other = conv(4)
    table = ProfileTable("x", SHEET, {local.key: MEASURED, other.text: Measurement(1, 1, 1, 0, 1)}, fit_of(1e12))
    assert table.time(local) == LayerTime(1e-3, 5e-3, Source.MEASURED)


def test_a_piece_with_other_samples_counts_as_measured() -> None:
    table = ProfileTable("x", SHEET, {conv(4).text: MEASURED})
    assert table.time(local_conv(8)) == LayerTime(2e-3, 10e-3, Source.MEASURED)


def test_a_family_needs_everything_else_to_be_equal() -> None:
    table = ProfileTable("x", SHEET, {conv(4).text: MEASURED})
    for local in (local_conv(4, out_channels=65), local_conv(4, size=15), local_conv(4, input_gradient=False)):
        assert table.time(local).source is Source.DATA_SHEET
    assert table.time(replace(local_conv(4), precision="tf32")).source is Source.DATA_SHEET
    assert table.time(replace(local_conv(4), memory_format="channels_last")).source is Source.DATA_SHEET


def test_without_an_entry_the_fit_counts_and_without_a_fit_the_roofline() -> None:
    local = local_conv(8)
    flop = 2 * 8 * 64 * 14 * 14 * 32 * 9
    fitted = ProfileTable("x", SHEET, fit=fit_of(1e12)).time(local)
    assert fitted.source is Source.FITTED
    assert fitted.forward_s == pytest.approx(1e-6 + flop / 1e12)
    assert fitted.backward_s == pytest.approx(2 * (1e-6 + flop / 1e12))
    sheet = ProfileTable("x", SHEET).time(local)
    assert sheet.source is Source.DATA_SHEET
    assert sheet.forward_s == pytest.approx(flop / 7e12 + 7e-6)
    rates = Roofline({"": 5e12}, 1e12, 0.0, 1e12, measured=True)
    assert ProfileTable("x", rates).time(local) == LayerTime(flop / 5e12, 2 * flop / 5e12, Source.FITTED)


def test_a_fit_of_another_precision_does_not_count() -> None:
    table = ProfileTable("x", SHEET, fit=fit_of(1e12, precision="bf16"))
    assert table.time(local_conv(8)).source is Source.DATA_SHEET
    assert table.time(replace(local_conv(8), precision="bf16")).source is Source.FITTED


def test_between_two_measured_numbers_of_samples_times_are_on_a_line() -> None:
    family = [(4, Measurement(4.0, 8.0, 2.0, 0.1, 5)), (16, Measurement(10.0, 14.0, 8.0, 0.2, 3))]
    # 7 is a quarter of the way: 4 + 6/4, 8 + 6/4, 2 + 6/4
    assert scaled(family, 7) == Measurement(5.5, 9.5, 3.5, 0.2, 3)
    assert scaled(family, 4) is family[0][1]
    assert scaled(family, 16) is family[1][1]


def test_beyond_the_measured_numbers_of_samples_times_are_in_proportion() -> None:
    family = [(4, Measurement(4.0, 8.0, 2.0, 0.1, 5)), (16, Measurement(10.0, 14.0, 8.0, 0.2, 3))]
    assert scaled(family, 2) == Measurement(2.0, 4.0, 1.0, 0.1, 5)
    assert scaled(family, 48) == Measurement(30.0, 42.0, 24.0, 0.2, 3)


def test_beyond_the_measured_numbers_a_fit_keeps_launches_from_being_multiplied() -> None:
    fit = fit_of(1e12, launch_s=1e-3)
    one = 2 * 64 * 14 * 14 * 32 * 9 / 1e12
    found = scaled([(4, Measurement(4.0, 8.0, 2.0, 0.1, 5))], 8, Ratios(fit, conv(8)))
    ratio = (1e-3 + 8 * one) / (1e-3 + 4 * one)
    assert ratio < 1.2  # in proportion, it would be 2
    assert [found.forward_s, found.backward_data_s, found.backward_weight_s] == pytest.approx(
        [4 * ratio, 8 * ratio, 2 * ratio]
    )


def test_equal_pieces_of_different_layers_are_looked_up_once() -> None:
    table = ProfileTable("x", SHEET, fit=fit_of(1e12))
    first = table.time(local_conv(8))
    again = local_conv(8)
    assert table.time(replace(again, layer=replace(again.layer, id=LayerId("another")))) is first


def test_the_digest_covers_entries_and_fit() -> None:
    local = local_conv(8)
    table = ProfileTable("x", SHEET, {local.key: MEASURED})
    later = ProfileTable("x", SHEET, {local.key: replace(MEASURED, backward_data_s=2.1e-3)})
    digests = {t.digest for t in (ProfileTable("x", SHEET), table, later, replace(table, fit=fit_of(1e12)))}
    assert len(digests) == 4
    assert replace(table, fit=fit_of(1e12)).digest != replace(table, fit=fit_of(2e12)).digest


def test_profiles_are_laid_over_a_table_and_the_first_of_them_counts() -> None:
    key, other = conv(8).text, conv(8, out_channels=128).text
    low, high = Measurement(1, 1, 1, 0, 1), Measurement(2, 2, 2, 0, 1)
    below = ProfileTable("x", SHEET, {key: MEASURED, "kept": MEASURED})
    first = profile_of("x", {}, {key: low}).model_copy(update={"fit": fit_of(1e12)})
    second = profile_of("x", {}, {key: high, other: high}).model_copy(update={"fit": fit_of(2e12, precision="bf16")})
    found = with_profiles(below, [first, second])
    assert found.layers == {key: low, other: high, "kept": MEASURED}
    assert found.fit is not None
    assert [c.precision for c in found.fit.conditions] == ["bf16", "fp32"]
    assert with_profiles(below, []) == below


def test_phases_of_a_fit_add_up_to_a_finite_time() -> None:
    found = fit_of(1e12).seconds(conv(8))
    assert found is not None
    assert set(found) == set(Phase)
    assert all(math.isfinite(value) and value > 0 for value in found.values())


def test_a_phase_that_a_fit_lacks_grows_like_the_other_backward_phase() -> None:
    norm = PieceKey(BatchNorm(64), (), ((8, 64, 56, 56),), (8, 64, 56, 56), weight_gradient=True, synchronised=False)
    kind = fit_of(1e12).conditions[0].phases[Phase.FORWARD]["conv"].model_copy(update={"bytes_per_s": 1e10})
    condition = ConditionFit(
        precision="fp32", memory_format="contiguous", phases={p: {"norm": kind} for p in Phase}, residuals=[]
    )
    fit = CalibratedRoofline(form=FORM, left_out="", conditions=[condition])
    assert Phase.BACKWARD_WEIGHT not in (fit.seconds(norm) or {})
    found = scaled([(8, Measurement(8e-3, 10e-3, 6e-3, 0.0, 5))], 256, Ratios(fit, norm.with_samples(256)))
    assert found.backward_weight_s / 6e-3 == pytest.approx(found.backward_data_s / 10e-3)
    assert found.backward_weight_s == pytest.approx(32 * 6e-3, rel=0.2)  # it moves 32 times as many bytes


def test_all_backward_flop_of_a_layer_without_input_gradient_are_priced() -> None:
    op = PerSample("f", 10**9, 2 * 10**9)
    shape, weight = (8, 4), Parameter("w", TensorSpec((4, 4), DType.FLOAT32))
    layer = Layer(LayerId("f"), op, (LayerId("x"),), TensorSpec(shape, DType.FLOAT32), (weight,))
    table = ProfileTable("x", SHEET, fit=fit_of(1e12, launch_s=1e-9))
    both = LocalLayer(layer, (shape,), shape, ((4, 4),), DType.FLOAT32, input_gradient=True)
    for local in (both, replace(both, input_gradient=False)):
        found = table.time(local)
        assert found.source is Source.FITTED
        assert [found.forward_s, found.backward_s] == pytest.approx([1e-3, 2e-3], rel=1e-3)
