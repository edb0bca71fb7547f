"""The calibrated roofline against synthetic devices whose rates are known, and against refits by hand."""

import functools
import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.errors import UsageError
from planner.ir.ops import BatchNorm, Elementwise, Linear, Pool
from planner.profile import fit as fitting
from planner.profile.calibrated import CalibratedRoofline
from planner.profile.demand import Phase, demands
from planner.profile.file import Entry
from planner.profile.fit import hold_out, predict_unseen
from planner.profile.key import AbsorbedKey, PieceKey
from planner.profile.regression import Rows, fit_rows
from support.pieces import conv, entry, timed


def shapes(count: int = 40) -> Iterator[PieceKey]:
    """Convolutions of many sizes, the same ones every time."""
    random = np.random.default_rng(7)
    found: set[tuple[int, ...]] = set()
    while len(found) < count:
        samples, before, after, size = (int(2 ** random.integers(*r)) for r in ((0, 5), (3, 9), (3, 9), (2, 6)))
        found.add((samples, before, after, size))
    yield from (conv(*each) for each in sorted(found))


def fit_profile(entries: list[Entry]) -> CalibratedRoofline:
    """The fit alone, without errors on entries left out."""
    return fitting.fit_profile(entries, max_refits=0)


def predicted(fit: CalibratedRoofline, piece: PieceKey, phase: Phase = Phase.FORWARD) -> float:
    found = fit.seconds(piece)
    assert found is not None
    return found[phase]


@settings(max_examples=8, derandomize=True)  # at 13.5 FLOP a byte and backward at 2.0, for one, the median is 4.7 %
@given(
    flop_per_s=st.floats(1e10, 1e14), intensity=st.floats(1, 100), launch_share=st.floats(0.01, 0.5),
    backward=st.floats(0.3, 3),
)  # fmt: skip
def test_rates_of_a_synthetic_device_are_recovered(
    flop_per_s: float, intensity: float, launch_share: float, backward: float
) -> None:
    bytes_per_s = flop_per_s / intensity
    pieces = list(shapes())
    launch_s = launch_share * float(np.median([demands(p)[Phase.FORWARD].flop for p in pieces])) / flop_per_s

    def device(phase: Phase, flop: float, num_bytes: float) -> float:
        speed = 1.0 if phase is Phase.FORWARD else backward
        return launch_s + max(flop / (speed * flop_per_s), num_bytes / bytes_per_s)

    fit = fit_profile([timed(piece, device) for piece in pieces[::2]])
    for phase in Phase:
        errors = []
        for piece in pieces[1::2]:  # not seen by the fit
            d = demands(piece)[phase]
            errors.append(abs(predicted(fit, piece, phase) / device(phase, d.flop, d.num_bytes) - 1))
        assert np.median(errors) < 0.03, phase
        assert max(errors) < 0.25, phase


def test_an_efficiency_that_grows_with_channels_is_recovered() -> None:
    def seconds(piece: PieceKey) -> float:
        return 5e-6 + demands(piece)[Phase.FORWARD].flop / (1e12 * (piece.output[1] / 512) ** 0.4)

    pieces = list(shapes(60))
    fit = fit_profile([entry(p, (seconds(p), None, None)) for p in pieces[::2]])
    errors = [abs(predicted(fit, p) / seconds(p) - 1) for p in pieces[1::2]]
    assert np.median(errors) < 0.03
    assert np.quantile(errors, 0.9) < 0.1


def test_the_rate_of_absorbed_operators_is_recovered() -> None:
    """Behind a convolution of known time, batch norms move 3 times the output at 1e11 B/s, ReLUs twice at 4e11."""
    absorbed = {
        (): 0.0,
        (AbsorbedKey(BatchNorm(1)),): 3 / 1e11,
        (AbsorbedKey(Elementwise("relu")),): 2 / 4e11,
        (AbsorbedKey(BatchNorm(1)), AbsorbedKey(Elementwise("relu"))): 3 / 1e11 + 2 / 4e11,
    }
    small = {
        conv(p.output[0], 8, p.output[1], p.output[2], kernel=1) for p in shapes(64)
    }  # tails take most of their time
    entries = []
    for i, plain in enumerate(sorted(small, key=lambda p: p.text)):
        tail, per_byte = list(absorbed.items())[i % 4]
        piece = replace(plain, absorbed=tail, synchronised=False)
        own = (1 + len(tail)) * 2e-6 + demands(plain)[Phase.FORWARD].flop / 1e12
        entries.append(entry(piece, (own + per_byte * 4 * math.prod(piece.output), None, None)))
    fit, plain = fit_profile(entries), conv(16, 8, 128, 32, kernel=1)
    for tail, per_byte in absorbed.items():
        more = predicted(fit, replace(plain, absorbed=tail, synchronised=False)) - predicted(fit, plain)
        assert more == pytest.approx(len(tail) * 2e-6 + per_byte * 4 * math.prod(plain.output), rel=0.2)


def test_one_absurd_entry_does_not_move_the_fit() -> None:
    entries = [timed(p, lambda _, flop, __: flop / 1e12) for p in shapes()]
    absurd = entries[5].model_copy(update={"forward_s": 1000 * (entries[5].forward_s or 0.0)})
    fit = fit_profile([*entries[:5], absurd, *entries[6:]])
    errors = [abs(predicted(fit, e.layer.piece) / (e.forward_s or 0.0) - 1) for e in entries]
    assert np.median(errors) < 0.02


@functools.cache
def noisy_fit(seed: int) -> CalibratedRoofline:
    random = np.random.default_rng(seed)
    pieces = [*shapes(30), *(conv(p.output[0], p.output[1], p.output[1], p.output[2], kernel=1) for p in shapes(20))]
    distinct = {p.text: p for p in pieces}.values()

    def device(_: Phase, flop: float, num_bytes: float) -> float:
        return (5e-6 + max(flop / 1e12, num_bytes / 2e11)) * math.exp(random.normal(0, 0.7))

    return fit_profile([timed(p, device) for p in distinct])


@given(
    seed=st.integers(0, 1), samples=st.integers(1, 300), before=st.integers(1, 2000), after=st.integers(1, 2000),
    size=st.integers(3, 300), kernel=st.sampled_from([1, 3, 5]), more=st.integers(2, 9),
)  # fmt: skip
def test_more_of_anything_never_takes_less_time_even_with_a_fit_of_noise(
    seed: int, samples: int, before: int, after: int, size: int, kernel: int, more: int
) -> None:
    base, fit = conv(samples, before, after, size, kernel), noisy_fit(seed)
    for larger in (
        conv(samples * more, before, after, size, kernel),
        conv(samples, before * more, after, size, kernel),
        conv(samples, before, after * more, size, kernel),
        conv(samples, before, after, size * more, kernel),
    ):
        for phase in Phase:
            assert predicted(fit, larger, phase) >= predicted(fit, base, phase) * (1 - 1e-9)


def rows_of(entries: list[Entry]) -> Rows:
    return Rows.of([(demands(e.layer.piece)[Phase.FORWARD], e.forward_s or 0.0, 0.0) for e in entries])


def test_an_entry_that_is_left_out_does_not_change_its_own_prediction() -> None:
    entries = [timed(p, lambda _, flop, __: 1e-5 + flop / 1e12) for p in shapes(12)]
    rows = rows_of(entries)
    found = predict_unseen(rows, None, 12)
    for i in (0, 5, 11):
        changed = rows.seconds.copy()
        changed[i] *= 50
        again = predict_unseen(replace(rows, seconds=changed), None, 12)
        assert again[i] == found[i]
        assert not np.array_equal(np.delete(again, i), np.delete(found, i))


def test_leaving_one_out_is_a_fit_of_the_others() -> None:
    rows = rows_of([timed(p, lambda _, flop, __: 1e-5 + flop / 1e12) for p in shapes(8)])
    found = predict_unseen(rows, None, 8)
    for i in range(8):
        others = np.arange(8) != i
        assert found[i] == fit_rows(rows.take(others), None).seconds(rows.take(~others))[0]


def test_large_kinds_are_left_out_in_groups() -> None:
    rows = rows_of([timed(p, lambda _, flop, __: 1e-5 + flop / 1e12) for p in shapes(9)])
    found = predict_unseen(rows, None, 3)
    kept = np.arange(9) % 3 != 1
    assert found[[1, 4, 7]].tolist() == fit_rows(rows.take(kept), None).seconds(rows.take(~kept)).tolist()


def test_an_entry_alone_in_its_sort_cannot_be_predicted_without_itself() -> None:
    (residual,) = fitting.fit_profile([entry(conv(4), (1e-3, None, None))]).conditions[0].residuals
    assert residual.num_entries == 1
    assert residual.left_out_median is None


def test_residuals_are_the_errors_of_the_stored_fit_and_of_leaving_one_out() -> None:
    entries = [timed(p, lambda _, flop, b: 1e-5 + flop / 1e12 + b / 1e10) for p in shapes(10)]
    fit = fitting.fit_profile(entries)
    assert fit.left_out == "one entry at a time"
    for residual in fit.conditions[0].residuals:
        measured = {e.layer.piece: (e.forward_s, e.backward_data_s, e.backward_weight_s) for e in entries}
        place = list(Phase).index(residual.phase)
        errors = [abs(predicted(fit, p, residual.phase) / (t[place] or 0.0) - 1) for p, t in measured.items()]
        assert residual.num_entries == 10
        assert residual.median == pytest.approx(np.median(errors), abs=1e-6)
        assert residual.ninetieth == pytest.approx(np.quantile(errors, 0.9), abs=1e-6)
        assert residual.left_out_median is not None
    rows = rows_of(sorted(entries, key=lambda e: e.layer.piece.text))
    unseen = np.abs(predict_unseen(rows, None, 10) / rows.seconds - 1)
    assert fit.conditions[0].residuals[0].left_out_median == pytest.approx(np.median(unseen), abs=1e-6)


def test_a_kind_without_entries_is_priced_like_the_others_of_its_sort() -> None:
    fit = fit_profile([timed(p, lambda _, flop, __: 1e-6 + flop / 3e12) for p in shapes()])
    linear = PieceKey(Linear(512, 1024), (), ((256, 512),), (256, 1024), bias=False)
    flop = 2 * 256 * 512 * 1024
    assert predicted(fit, linear) == pytest.approx(flop / 3e12, rel=0.3)
    assert fit.seconds(PieceKey(Pool("max", (2, 2), (2, 2), (0, 0), (1, 1)), (), ((1, 8, 4, 4),), (1, 8, 2, 2))) is None


def slower_when_narrow(piece: PieceKey, _: Phase, flop: float, __: float) -> float:
    return flop / 1e12 * 512 / piece.output[1]


def test_a_kind_with_few_entries_leans_on_the_others() -> None:
    entries = [timed(p, functools.partial(slower_when_narrow, p)) for p in shapes()]
    slow = conv(8, 64, 64, 16, kernel=1)
    fit = fit_profile([*entries, entry(slow, (demands(slow)[Phase.FORWARD].flop / 1e11, None, None))])
    wide, narrow = (conv(8, 64, channels, 16, kernel=1) for channels in (256, 32))
    # its one entry sets the rate; that rates grow with output channels it has from the convolutions
    growth = (predicted(fit, narrow) / 32) / (predicted(fit, wide) / 256)
    assert growth > 3
    assert predicted(fit, slow) == pytest.approx(demands(slow)[Phase.FORWARD].flop / 1e11, rel=0.5)


def test_a_phase_that_was_never_measured_is_priced_like_forward() -> None:
    fit = fit_profile([entry(p, (demands(p)[Phase.FORWARD].flop / 1e12, None, None)) for p in shapes()])
    found = fit.seconds(conv(4))
    assert found is not None
    assert found[Phase.BACKWARD_WEIGHT] == pytest.approx(found[Phase.FORWARD])


def test_conditions_are_fitted_apart_and_the_other_memory_format_stands_in() -> None:
    fast = [timed(p, lambda _, flop, __: flop / 4e12) for p in shapes()]
    slow = [timed(replace(p, memory_format="channels_last"), lambda _, flop, __: flop / 1e12) for p in shapes()]
    both, one = fit_profile([*fast, *slow]), fit_profile(slow)
    piece = next(shapes())
    last = replace(piece, memory_format="channels_last")
    assert predicted(both, last) == pytest.approx(4 * predicted(both, piece), rel=0.02)
    assert predicted(one, piece) == predicted(one, last)
    assert one.seconds(replace(piece, precision="tf32")) is None


def test_a_kind_of_the_other_memory_format_comes_before_other_kinds_of_its_own() -> None:
    """Channels-last profiles have contiguous entries too: those of linear layers, which have no space."""
    linears = [PieceKey(Linear(n, m), (), ((64, n),), (64, m), bias=False) for n in (64, 256) for m in (128, 512)]
    convs = [timed(replace(p, memory_format="channels_last"), lambda _, flop, __: flop / 1e12) for p in shapes()]
    fit = fit_profile([*convs, *(timed(p, lambda _, flop, __: flop / 1e10) for p in linears)])
    piece = next(shapes())
    assert predicted(fit, piece) == predicted(fit, replace(piece, memory_format="channels_last"))
    assert predicted(fit, linears[0]) == pytest.approx(demands(linears[0])[Phase.FORWARD].flop / 1e10, rel=0.1)


def test_the_order_of_entries_does_not_matter_and_a_second_fit_is_the_same() -> None:
    entries = [timed(p, lambda _, flop, b: 1e-6 + flop / 1e12 + b / 1e11) for p in shapes(15)]
    assert fit_profile(entries) == fit_profile(entries[::-1])


def test_half_of_the_shapes_is_predicted_from_the_other_half() -> None:
    exact = [timed(p, lambda _, flop, __: 1e-6 + flop / 1e12) for p in shapes()]
    more = [timed(conv(2 * p.output[0], p.inputs[0][1], *p.output[1:3]), lambda *_: 1.0) for p in shapes(1)]
    found = {(h.kind, h.phase): h for h in hold_out(exact)}
    everything = found["all", "all"]
    assert everything.num_entries == 3 * found["conv", "forward"].num_entries
    assert everything.median < 0.03
    # a shape is hidden with all its numbers of samples
    hidden = {(h.kind, h.phase): h.num_entries for h in hold_out([*exact, *more])}
    assert hidden["conv", "forward"] - found["conv", "forward"].num_entries in {0, 1}


def test_what_is_hidden_has_no_say_in_how_it_is_predicted() -> None:
    """Of sizes 9 and 16, 9 is in the half that is predicted: the same prediction, whatever it took."""

    def prediction(measured_s: float) -> float:
        entries = [timed(conv(4, 32, 64, size), lambda *_: measured_s if size == 9 else 1.0) for size in (9, 16)]  # noqa: B023
        error = hold_out(entries)[0].median
        return measured_s * (1 - error)

    assert prediction(3.0) == pytest.approx(prediction(5.0))
    assert prediction(3.0) < 1.0  # less work than size 16, which took 1 second


def test_nothing_to_fit_is_refused() -> None:
    with pytest.raises(UsageError, match="no measured time"):
        fit_profile([])
    with pytest.raises(UsageError, match="at least two convolution shapes, the profile has 1"):
        hold_out([entry(conv(4), (1.0, 1.0, 1.0)), entry(conv(8), (1.0, 1.0, 1.0))])


def test_all_of_backward_counts_as_one_phase_where_it_is_one_kernel() -> None:
    norm = PieceKey(BatchNorm(8), (), ((4, 8, 5, 5),), (4, 8, 5, 5), synchronised=False)
    assert set(demands(norm)) == {Phase.FORWARD, Phase.BACKWARD_DATA}
    fit = fit_profile([entry(norm, (1e-3, 2e-3, 3e-3))])
    assert predicted(fit, norm, Phase.BACKWARD_DATA) == pytest.approx(5e-3, rel=0.01)


def test_the_stored_fit_predicts_what_the_fit_did() -> None:
    pieces = list(shapes(30))
    rows = rows_of([timed(p, lambda _, flop, b: 1e-5 + flop / 1e12 + b / 1e11) for p in pieces])
    fitted = fit_rows(rows, None)
    beyond = [*pieces, conv(1, 1, 1, 3, 1), conv(512, 4096, 4096, 300, 5), conv(3, 24, 24, 9, 3, 2, 24)]
    found = [fitted.stored().seconds(demands(p)[Phase.FORWARD]) for p in beyond]
    wanted = fitted.seconds(Rows.of([(demands(p)[Phase.FORWARD], 1.0, 0.0) for p in beyond]))
    assert found == pytest.approx(wanted.tolist())
