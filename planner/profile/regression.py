"""Least squares of one kind of operator in one phase: entries as columns, parameters, and the fit."""

import math
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from planner.profile.calibrated import BYTE_TERMS, FLOP_TERMS, KindFit, Term
from planner.profile.demand import SIZES, Demand

Array = NDArray[np.float64]

NOISE: Final = 0.1
"""Relative errors up to about this, and what the measurement itself is unsure of, count by their square, larger ones by
their size."""
RATE_SPREAD: Final = 1.0
POWER_SPREAD: Final = 0.25
"""Logarithms of rates, and powers, that stray so far from those of other kinds cost as much as one error of NOISE."""


@dataclass(frozen=True)
class Rows:
    """Entries of one phase as columns; the first axis of every array is the entry.

    Attributes:
        seconds: measured.
        unsure: standard error of the measurement, relative.
        flop, num_bytes, norm_bytes, synchronised_bytes, elementwise_bytes, fresh_bytes: see ``Demand``, and so
        launches, sizes.
    """

    seconds: Array
    unsure: Array
    flop: Array
    num_bytes: Array
    norm_bytes: Array
    synchronised_bytes: Array
    elementwise_bytes: Array
    fresh_bytes: Array
    launches: Array
    sizes: Array

    @staticmethod
    def of(found: Sequence[tuple[Demand, float, float]]) -> "Rows":
        """Return demands, measured seconds and their relative standard errors as columns."""
        seconds = np.array([seconds for _, seconds, _ in found], dtype=np.float64)
        unsure = np.array([unsure for _, _, unsure in found], dtype=np.float64)
        table = np.array([astuple(demand)[:-1] for demand, _, _ in found], dtype=np.float64).reshape(len(found), -1)
        flop, num_bytes, norm, synchronised, elementwise, fresh, launches = table.T
        sizes = np.array([demand.sizes for demand, _, _ in found], dtype=np.float64).reshape(len(found), len(SIZES))
        return Rows(seconds, unsure, flop, num_bytes, norm, synchronised, elementwise, fresh, launches, sizes)

    def __len__(self) -> int:
        return len(self.seconds)

    def take(self, which: NDArray[np.bool_] | NDArray[np.intp]) -> "Rows":
        """Return some of the entries."""
        return Rows(*(getattr(self, name)[which] for name in self.__dataclass_fields__))

    @staticmethod
    def join(parts: Sequence["Rows"]) -> "Rows":
        """Return the entries of all parts."""
        return Rows(*(np.concatenate([getattr(p, name) for p in parts]) for name in Rows.__dataclass_fields__))


# ---- parameters: logarithms of rates, and powers

_NUM_FLOP, _NUM_BYTE = len(FLOP_TERMS), len(BYTE_TERMS)
_LAUNCH, _FLOP = 0, 1
_FLOP_POWERS = slice(2, 2 + _NUM_FLOP)
_BYTE = 2 + _NUM_FLOP
_BYTE_POWERS = slice(_BYTE + 1, _BYTE + 1 + _NUM_BYTE)
_NORM, _SYNCHRONISED, _ELEMENTWISE, _FRESH = (_BYTE + 1 + _NUM_BYTE + i for i in range(4))
_COUNT = _FRESH + 1
_ALL_TERMS: Final = ((_FLOP_POWERS, FLOP_TERMS), (_BYTE_POWERS, BYTE_TERMS))


def _column(pick: Callable[[Term], float], rest: float) -> Array:
    found = np.full(_COUNT, rest)
    for where, terms in _ALL_TERMS:
        found[where] = [pick(term) for term in terms]
    return found


_LOWEST: Final = _column(lambda term: term.least, -np.inf)
_HIGHEST: Final = _column(lambda term: term.most, np.inf)
_SPREAD: Final = _column(lambda _: POWER_SPREAD, RATE_SPREAD)


@dataclass(frozen=True)
class Fitted:
    """Parameters of one kind in one phase, and the sizes they are good for.

    Attributes:
        values: launch, rate and powers of arithmetic, rate and powers of bytes, rates of absorbed operators and of
            new memory.
        low, high: smallest and largest sizes seen.
    """

    values: Array
    low: Array
    high: Array

    def seconds(self, rows: Rows) -> Array:
        """Return the predicted times."""
        found: Array = _Model(rows, self.low, self.high).parts(self.values).sum(axis=0)
        return found

    def stored(self) -> KindFit:
        """Return the form of the file, with nine digits."""
        values = _rounded(self.values)
        return KindFit(
            launch_s=_exp(values[_LAUNCH]), flop_per_s=_exp(values[_FLOP]), flop_powers=values[_FLOP_POWERS],
            bytes_per_s=_exp(values[_BYTE]), byte_powers=values[_BYTE_POWERS],
            norm_bytes_per_s=_exp(values[_NORM]), synchronised_bytes_per_s=_exp(values[_SYNCHRONISED]),
            elementwise_bytes_per_s=_exp(values[_ELEMENTWISE]), fresh_bytes_per_s=_exp(values[_FRESH]),
            low=_rounded(self.low), high=_rounded(self.high),
        )  # fmt: skip


def _exp(value: float) -> float:
    return float(f"{math.exp(value):.9g}")


def _rounded(values: Array) -> list[float]:
    return [float(f"{value:.9g}") for value in values]


class _Model:
    """Predictions for some rows and their derivatives."""

    def __init__(self, rows: Rows, low: Array, high: Array) -> None:
        sizes = np.clip(rows.sizes, low, high)
        self.rows = rows
        self.flop_logs, self.byte_logs = _logs(FLOP_TERMS, sizes), _logs(BYTE_TERMS, sizes)

    def parts(self, values: Array) -> Array:
        """Return the seconds of launches, arithmetic, bytes, absorbed operators (3 sorts), new memory: (7, entries).

        Of arithmetic and bytes the smaller is 0.
        """
        rows = self.rows
        compute = rows.flop * np.exp(-values[_FLOP] - self.flop_logs @ values[_FLOP_POWERS])
        move = rows.num_bytes * np.exp(-values[_BYTE] - self.byte_logs @ values[_BYTE_POWERS])
        return np.stack([
            rows.launches * np.exp(values[_LAUNCH]), np.where(compute >= move, compute, 0.0),
            np.where(compute >= move, 0.0, move), rows.norm_bytes * np.exp(-values[_NORM]),
            rows.synchronised_bytes * np.exp(-values[_SYNCHRONISED]),
            rows.elementwise_bytes * np.exp(-values[_ELEMENTWISE]), rows.fresh_bytes * np.exp(-values[_FRESH]),
        ])  # fmt: skip

    def derivatives(self, values: Array) -> Array:
        """Return the derivatives of the logarithm of the times: (entries, parameters)."""
        parts = self.parts(values)
        launches, compute, move, norm, synchronised, elementwise, fresh = parts / parts.sum(axis=0)
        found = np.empty((len(self.rows), _COUNT))
        found[:, _LAUNCH] = launches
        found[:, _FLOP], found[:, _BYTE] = -compute, -move
        found[:, _FLOP_POWERS] = -compute[:, None] * self.flop_logs
        found[:, _BYTE_POWERS] = -move[:, None] * self.byte_logs
        found[:, _NORM], found[:, _SYNCHRONISED], found[:, _ELEMENTWISE] = -norm, -synchronised, -elementwise
        found[:, _FRESH] = -fresh
        return found


def _logs(terms: Sequence[Term], sizes: Array) -> Array:
    return np.stack(
        [np.clip(sizes[:, SIZES.index(t.size)], t.low, t.high) - np.clip(t.reference, t.low, t.high) for t in terms],
        axis=1,
    )


def fit_rows(rows: Rows, prior: Fitted | None) -> Fitted:
    """Fit the parameters to entries.

    Robust least squares of the logarithms of the times; parameters are drawn towards those of the prior, which decides
    where the entries say nothing.

    Args:
        rows: at least one; without any, the prior is returned.
        prior: of the other kinds of the same sort; None for a plain guess from the entries themselves.
    """
    if not len(rows) and prior is not None:
        return prior
    centre = _guess(rows) if prior is None else prior.values
    low, high = rows.sizes.min(axis=0), rows.sizes.max(axis=0)
    if prior is not None:
        low, high = np.minimum(low, prior.low), np.maximum(high, prior.high)
    model, logs = _Model(rows, low, high), np.log(rows.seconds)
    noise = np.hypot(NOISE, rows.unsure)
    pull = np.diag(1 / _SPREAD)

    def residuals(values: Array) -> Array:
        errors = (np.log(model.parts(values).sum(axis=0)) - logs) / noise
        return np.concatenate([errors, (values - centre) / _SPREAD])

    def jacobian(values: Array) -> Array:
        return np.concatenate([model.derivatives(values) / noise[:, None], pull])

    begin = np.clip(centre, _LOWEST + 1e-6, _HIGHEST - 1e-6)
    found = least_squares(
        residuals, begin, jacobian, bounds=(_LOWEST, _HIGHEST), loss=_soft_then_square(len(rows)),
        ftol=1e-4, xtol=1e-4, gtol=1e-4, max_nfev=60,
    )  # fmt: skip
    return Fitted(np.asarray(found.x, dtype=np.float64), low, high)


def _soft_then_square(count: int) -> Callable[[Array], Array]:
    """Return the loss: scipy's ``soft_l1`` for the errors of entries, squares for the pull of the prior."""

    def loss(squares: Array) -> Array:
        found = np.stack([squares, np.ones_like(squares), np.zeros_like(squares)])
        root = np.sqrt(1 + squares[:count])
        found[:, :count] = 2 * (root - 1), 1 / root, -0.5 / root**3
        return found

    return loss


def _guess(rows: Rows) -> Array:
    """Return parameters from the entries' medians: constant rates, launches below the fastest entry."""
    found = np.zeros(_COUNT)
    moved = rows.num_bytes + rows.norm_bytes + rows.synchronised_bytes + rows.elementwise_bytes
    found[_LAUNCH] = math.log(0.3 * float((rows.seconds / np.maximum(rows.launches, 1)).min()))
    counted = rows.flop > 0
    found[_FLOP] = math.log(float(np.median(rows.flop[counted] / rows.seconds[counted]))) if counted.any() else 25.0
    byte_rate = math.log(float(np.quantile(moved / rows.seconds, 0.75)))
    found[[_BYTE, _NORM, _SYNCHRONISED, _ELEMENTWISE, _FRESH]] = byte_rate
    return found
