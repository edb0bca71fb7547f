"""Calibrates the roofline on measured layers, and says how far it is off, also on layers that it has not seen."""

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from threadpoolctl import threadpool_limits

from planner.errors import UsageError
from planner.ir.ops import Conv, Custom, PerSample
from planner.profile.calibrated import FORM, POOLED, CalibratedRoofline, ConditionFit, Residual
from planner.profile.demand import MOVERS, PRODUCTS, Demand, Phase, demands, is_product, kind_of
from planner.profile.file import Entry
from planner.profile.key import PieceKey
from planner.profile.regression import Array, Fitted, Rows, fit_rows

MAX_REFITS: Final = 3000
"""Fits for the errors on entries left out, shared by all kinds and phases: about half a minute."""
MIN_GROUPS: Final = 20
CONVOLUTIONS: Final = ("conv", "conv 1x1", "depthwise", "grouped")
"""Kinds whose shapes are halved by ``hold_out``."""

Condition = tuple[str, str]
"""Precision and memory format."""
Cells = Mapping[Phase, Mapping[str, Rows]]
"""What was measured under one condition, by phase and kind."""


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Errors on convolution shapes that the fit has not seen.

    Attributes:
        condition: precision and memory format.
        kind: of operator; ``all`` for every convolution.
        phase: forward, backward_data, backward_weight; ``all`` for every one.
        num_entries: predicted.
        median, ninetieth: of the absolute errors, as shares of the measured times.
    """

    condition: Condition
    kind: str
    phase: str
    num_entries: int
    median: float
    ninetieth: float


def fit_profile(entries: Sequence[Entry], max_refits: int = MAX_REFITS) -> CalibratedRoofline:
    """Fit every precision, memory format, phase and kind of operator that was measured.

    Args:
        entries: of a profile, in any order.
        max_refits: fits for the errors on entries left out; with fewer than there are entries, several are left out
            at a time. 0: none.

    Raises:
        UsageError: there is nothing to fit.
    """
    found = _cells(entries)
    if not found:
        raise UsageError("there is no measured time to fit: time layers first, or import measurements")
    num_cells = sum(len(kinds) for phases in found.values() for kinds in phases.values())
    limit = max(max_refits // num_cells, MIN_GROUPS) if max_refits else 0
    with _one_thread():
        conditions = [_condition(condition, phases, limit) for condition, phases in sorted(found.items())]
    return CalibratedRoofline(form=FORM, left_out=_how(found, limit), conditions=conditions)


def _how(found: Mapping[Condition, Cells], limit: int) -> str:
    if not limit:
        return "none"
    most = max(len(rows) for phases in found.values() for kinds in phases.values() for rows in kinds.values())
    if most <= limit:
        return "one entry at a time"
    return f"one entry at a time; of kinds with more than {limit} entries, one of {limit} groups at a time"


def hold_out(entries: Sequence[Entry]) -> list[HeldOut]:
    """Fit on all but one half of the convolution shapes, and predict that half.

    A shape is an operator with its size of input, whatever the samples and what is absorbed. Halves alternate in the
    order of the shapes' hashes, so they depend on the shapes alone.

    Raises:
        UsageError: there are fewer than two shapes.
    """
    hidden = _second_half(entries)
    seen = _cells(e for e in entries if _shape(e.layer.piece) not in hidden)
    asked = _cells(e for e in entries if _shape(e.layer.piece) in hidden)
    found: list[HeldOut] = []
    for condition, phases in sorted(asked.items()):
        errors: dict[tuple[str, str], list[float]] = defaultdict(list)
        for phase, kinds in phases.items():
            known = seen.get(condition, {}).get(phase, {})
            for kind, rows in kinds.items():
                with _one_thread():
                    fitted = _fit_kind(kind, known)
                if fitted is not None:
                    for name in ((kind, phase.value), ("all", phase.value), ("all", "all")):
                        errors[name].extend(_errors(fitted.seconds(rows), rows))
        found += [
            HeldOut(condition, kind, phase, len(values), *_quantiles(values))
            for (kind, phase), values in errors.items()
        ]  # fmt: skip
    order_of_kinds, order_of_phases = [*CONVOLUTIONS, "all"], [*Phase, "all"]
    return sorted(found, key=lambda h: (h.condition, order_of_kinds.index(h.kind), order_of_phases.index(h.phase)))


def _shape(piece: PieceKey) -> str | None:
    """Return what makes a convolution another shape; None for other operators."""
    return repr((piece.op, piece.inputs[0][2:])) if isinstance(piece.op, Conv) else None


def _second_half(entries: Iterable[Entry]) -> set[str | None]:
    shapes = {shape for entry in entries if (shape := _shape(entry.layer.piece)) is not None}
    if len(shapes) < 2:
        raise UsageError(f"two halves need at least two convolution shapes, the profile has {len(shapes)}")
    in_order = sorted(shapes, key=lambda shape: hashlib.sha256(shape.encode()).hexdigest())
    return set(in_order[1::2])


# ---- entries as columns


def _cells(entries: Iterable[Entry]) -> dict[Condition, dict[Phase, dict[str, Rows]]]:
    """Return what was measured, in the order of the keys, so that the order of the file does not matter."""
    found: dict[Condition, dict[Phase, dict[str, list[tuple[Demand, float, float]]]]] = {}
    for entry in sorted(entries, key=lambda e: e.layer.piece.text):
        piece = entry.layer.piece
        if isinstance(piece.op, PerSample | Custom):  # what they compute is not in their key
            continue
        asked = demands(piece)
        for phase, seconds in _measured(entry):
            if seconds > 0 and phase in asked and asked[phase].launches:
                cells = found.setdefault((piece.precision, piece.memory_format), {}).setdefault(phase, {})
                cells.setdefault(kind_of(piece), []).append((asked[phase], seconds, _unsure(entry)))
    return {
        condition: {phase: {kind: Rows.of(cells) for kind, cells in kinds.items()} for phase, kinds in phases.items()}
        for condition, phases in found.items()
    }


def _measured(entry: Entry) -> Iterator[tuple[Phase, float]]:
    """Yield the phases that were timed; of operators with one backward kernel, all of backward is one phase."""
    data_s, weight_s = entry.backward_data_s, entry.backward_weight_s
    if entry.forward_s is not None:
        yield Phase.FORWARD, entry.forward_s
    if is_product(entry.layer.piece):
        if data_s is not None:
            yield Phase.BACKWARD_DATA, data_s
        if weight_s is not None:
            yield Phase.BACKWARD_WEIGHT, weight_s
    elif data_s is not None or weight_s is not None:
        phase = Phase.BACKWARD_DATA if entry.layer.input_gradient else Phase.BACKWARD_WEIGHT
        yield phase, (data_s or 0.0) + (weight_s or 0.0)


def _unsure(entry: Entry) -> float:
    """Return the relative standard error of an entry: a median's is 0.93 inter-quartile ranges over sqrt(repeats).

    The range is of all phases together, 1.35 standard deviations; a median is 1.25 times as unsure as a mean.
    """
    times = (entry.forward_s, entry.backward_data_s, entry.backward_weight_s)
    total_s = sum(seconds for seconds in times if seconds is not None)
    return 0.93 * entry.iqr_s / total_s / math.sqrt(entry.num_repeats)


# ---- fits


def _one_thread() -> threadpool_limits:
    """Return a context in which small matrices are not spread over threads: faster, and the same sums everywhere."""
    return threadpool_limits(1)


def _condition(condition: Condition, cells: Cells, limit: int) -> ConditionFit:
    phases = {}
    residuals = []
    for phase, kinds in cells.items():
        fits = {}
        for sort, members in zip(POOLED, (PRODUCTS, MOVERS), strict=True):
            if any(kind in kinds for kind in members):
                fits[sort] = fit_rows(Rows.join([kinds[kind] for kind in members if kind in kinds]), None)
        for kind, rows in kinds.items():
            prior = _prior(kind, kinds)
            fits[kind] = fit_rows(rows, prior)
            unseen = predict_unseen(rows, prior, limit)
            residuals.append(_residual(kind, phase, rows, fits[kind].seconds(rows), unseen))
        phases[phase] = {kind: fit.stored() for kind, fit in fits.items()}
    return ConditionFit(precision=condition[0], memory_format=condition[1], phases=phases, residuals=residuals)


def _fit_kind(kind: str, known: Mapping[str, Rows]) -> Fitted | None:
    """Return the fit of a kind, from its own entries and those of its sort; None where neither has any."""
    prior = _prior(kind, known)
    if kind in known:
        return fit_rows(known[kind], prior)
    return prior


def _prior(kind: str, kinds: Mapping[str, Rows]) -> Fitted | None:
    """Return the fit of the other kinds of the same sort."""
    members = PRODUCTS if kind in PRODUCTS else MOVERS
    others = [kinds[other] for other in members if other in kinds and other != kind]
    return fit_rows(Rows.join(others), None) if others else None


def predict_unseen(rows: Rows, prior: Fitted | None, limit: int) -> Array:
    """Return the predicted time of every entry by a fit without it; NaN where nothing is left to fit.

    Args:
        rows: of one kind and phase.
        prior: of the other kinds.
        limit: with more entries, so many groups of entries are left out together; 0: nothing is predicted.
    """
    count = len(rows)
    num_groups = min(count, limit)
    groups = np.arange(count) % max(num_groups, 1)
    found = np.full(count, np.nan)
    for group in range(num_groups):
        hidden = groups == group
        if prior is not None or not hidden.all():
            found[hidden] = fit_rows(rows.take(~hidden), prior).seconds(rows.take(hidden))
    return found


def _errors(predicted: Array, rows: Rows) -> list[float]:
    off: Array = np.abs(predicted / rows.seconds - 1)
    return [float(value) for value in off if np.isfinite(value)]


def _residual(kind: str, phase: Phase, rows: Rows, predicted: Array, unseen: Array) -> Residual:
    seen, left_out = _errors(predicted, rows), _errors(unseen, rows)
    median, ninetieth = (round(value, 6) for value in _quantiles(seen))
    unseen_median, unseen_ninetieth = (round(value, 6) for value in _quantiles(left_out)) if left_out else (None, None)
    return Residual(
        kind=kind, phase=phase, num_entries=len(rows), median=median, ninetieth=ninetieth,
        left_out_median=unseen_median, left_out_ninetieth=unseen_ninetieth,
    )  # fmt: skip


def _quantiles(errors: Sequence[float]) -> tuple[float, float]:
    """Return the median and the 90th percentile."""
    return float(np.median(errors)), float(np.quantile(errors, 0.9))
