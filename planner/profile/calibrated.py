"""The calibrated roofline: what ``layerwise profile fit`` found, and the times that follow from it.

For each precision, memory format, phase and kind of operator::

    seconds = launches * launch_s + max(FLOP / flop_rate, bytes / byte_rate)
              + bytes of absorbed operators / their rate, apart for norms, norms over several ranks, others
              + bytes of large new tensors / fresh_rate

A rate is one number times a power of each size of the piece. The power of a size may change at fixed sizes, so the
logarithm of a rate is continuous and linear between them; sizes beyond those that were measured are priced at the rate
of the last one. Powers are bounded so that a piece with more samples, positions or channels never takes less time.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Final, Literal

from pydantic import FailFast, Field

from planner.ir.canonical import PositiveSeconds, Rate, Size, StrictModel
from planner.profile.demand import PRODUCTS, SIZES, Demand, Phase, demands, kind_of
from planner.profile.key import PieceKey

POOLED: Final = ("products", "movers")
"""Fits over all kinds of one sort: for kinds without entries."""
FORM: Final = 1
"""Of the terms below; a fit of another form has to be made again."""


@dataclass(frozen=True, slots=True)
class Term:
    """A factor of a rate: a size to some power, between two sizes.

    Attributes:
        size: one of ``SIZES``.
        low, high: outside of these sizes the factor stays what it is there.
        reference: size at which the factor is 1.
        least, most: bounds of the power; together they are at most 1 for everything that work grows with.
    """

    size: str
    low: float
    high: float
    reference: float
    least: float
    most: float


def _between(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


def _term(size: str, low: float, high: float, reference: float, least: float, most: float) -> Term:
    return Term(size, math.log(low), math.log(high), math.log(reference), least, most)


_NO_END: Final = math.inf
FLOP_TERMS: Final = (
    _term("outputs", 1, 16, 64, -0.5, 1),
    _term("outputs", 16, 128, 64, -0.5, 1),
    _term("outputs", 128, _NO_END, 64, -0.5, 1),
    _term("rows", 1, 256, 4096, -0.5, 0.8),
    _term("rows", 256, 8192, 4096, -0.5, 0.8),
    _term("rows", 8192, _NO_END, 4096, -0.5, 0.8),
    _term("sum", 1, 64, 512, -0.5, 0.7),
    _term("sum", 64, 512, 512, -0.5, 0.7),
    _term("sum", 512, _NO_END, 512, -0.5, 0.7),
    _term("samples", 1, _NO_END, 8, -0.2, 0.2),
    _term("groups", 1, _NO_END, 1, -0.5, 1),
    _term("window", 1, _NO_END, 9, -0.5, 0.3),
    _term("stride", 1, _NO_END, 1, -1, 0.5),
    Term("winograd", 0, 1, 0, -0.7, 1.4),
)
"""Of the rate of arithmetic."""
BYTE_TERMS: Final = (
    _term("bytes", 1, 2**18, 2**22, -0.5, 0.9),
    _term("bytes", 2**18, 2**22, 2**22, -0.5, 0.9),
    _term("bytes", 2**22, _NO_END, 2**22, -0.5, 0.9),
    _term("channels", 1, _NO_END, 64, -0.3, 0),
    _term("window", 1, _NO_END, 1, -1, 0),
)
"""Of the rate of moving memory."""


_Factor = tuple[int, float, float, float, float]
"""Place of a size in ``Demand.sizes``, limits of its logarithm, reference, power."""


def _factors(
    terms: Sequence[Term], powers: Sequence[float], low: Sequence[float], high: Sequence[float]
) -> tuple[_Factor, ...]:
    """Return the terms that have a power, within the sizes that were measured."""
    found = []
    for term, power in zip(terms, powers, strict=True):
        place = SIZES.index(term.size)
        ends = (_between(max(term.low, low[place]), term.low, term.high), _between(high[place], term.low, term.high))
        if power:
            found.append((place, *ends, _between(term.reference, term.low, term.high), power))
    return tuple(found)


def _factor(factors: Sequence[_Factor], sizes: Sequence[float]) -> float:
    total = 0.0
    for place, low, high, reference, power in factors:
        size = sizes[place]
        total += power * ((low if size < low else min(size, high)) - reference)
    return math.exp(total)


_Power = Annotated[float, Field(ge=-1.5, le=1.5)]
"""A little beyond ``Term.least`` and ``Term.most``."""
_Logarithm = Annotated[float, Field(ge=-1, le=60)]


class KindFit(StrictModel):
    """Rates of one kind of operator in one phase.

    Attributes:
        launch_s: to start an operator.
        flop_per_s, bytes_per_s: at the reference sizes of the terms.
        flop_powers, byte_powers: of the terms, in order.
        norm_bytes_per_s, synchronised_bytes_per_s, elementwise_bytes_per_s: of absorbed operators.
        fresh_bytes_per_s: of getting memory for large tensors.
        low, high: logarithms of the smallest and largest sizes measured, in the order of ``SIZES``.
    """

    launch_s: PositiveSeconds
    flop_per_s: Rate
    flop_powers: Annotated[list[_Power], Field(min_length=len(FLOP_TERMS), max_length=len(FLOP_TERMS))]
    bytes_per_s: Rate
    byte_powers: Annotated[list[_Power], Field(min_length=len(BYTE_TERMS), max_length=len(BYTE_TERMS))]
    norm_bytes_per_s: Rate
    synchronised_bytes_per_s: Rate
    elementwise_bytes_per_s: Rate
    fresh_bytes_per_s: Rate
    low: Annotated[list[_Logarithm], Field(min_length=len(SIZES), max_length=len(SIZES))]
    high: Annotated[list[_Logarithm], Field(min_length=len(SIZES), max_length=len(SIZES))]

    @cached_property
    def _flop_factors(self) -> tuple[_Factor, ...]:
        return _factors(FLOP_TERMS, self.flop_powers, self.low, self.high)

    @cached_property
    def _byte_factors(self) -> tuple[_Factor, ...]:
        return _factors(BYTE_TERMS, self.byte_powers, self.low, self.high)

    def seconds(self, demand: Demand) -> float:
        """Return the time of one phase of a piece."""
        if not demand.launches:
            return 0.0
        compute = demand.flop / (self.flop_per_s * _factor(self._flop_factors, demand.sizes)) if demand.flop else 0.0
        move = demand.num_bytes / (self.bytes_per_s * _factor(self._byte_factors, demand.sizes))
        return (
            demand.launches * self.launch_s
            + max(compute, move)
            + demand.norm_bytes / self.norm_bytes_per_s
            + demand.synchronised_bytes / self.synchronised_bytes_per_s
            + demand.elementwise_bytes / self.elementwise_bytes_per_s
            + demand.fresh_bytes / self.fresh_bytes_per_s
        )


class Residual(StrictModel):
    """How far a fit is off, as a share of the measured time.

    Attributes:
        kind, phase: what was fitted.
        num_entries: measured.
        median, ninetieth: of the absolute errors on the entries that were fitted.
        left_out_median, left_out_ninetieth: of the absolute errors on entries that the fit had not seen; None where
            nothing was left to fit.
    """

    kind: str
    phase: Phase
    num_entries: Size
    median: float
    ninetieth: float
    left_out_median: float | None
    left_out_ninetieth: float | None


class ConditionFit(StrictModel):
    """Everything fitted for one precision and memory format: by phase and kind, with ``POOLED`` among the kinds."""

    precision: str
    memory_format: str
    phases: dict[Phase, dict[str, KindFit]]
    residuals: Annotated[list[Residual], FailFast()]


class CalibratedRoofline(StrictModel):
    """The fit of a device profile.

    Attributes:
        form: of the terms.
        left_out: how entries were left out for ``left_out_median``.
        conditions: each pair of precision and memory format once.
    """

    form: Literal[1]
    left_out: str
    conditions: Annotated[list[ConditionFit], Field(max_length=100)]

    @cached_property
    def _by_name(self) -> Mapping[tuple[str, str], ConditionFit]:
        return {(c.precision, c.memory_format): c for c in self.conditions}

    def _of(self, piece: PieceKey) -> list[ConditionFit]:
        """Return the fits of the piece's precision, that of its memory format first."""
        own = self._by_name.get((piece.precision, piece.memory_format))
        others = [c for c in self.conditions if c.precision == piece.precision and c is not own]
        return others if own is None else [own, *others]

    def seconds(self, piece: PieceKey, flop: tuple[int, int, int] | None = None) -> dict[Phase, float] | None:
        """Return the time of each phase of a piece, or None where its precision or its sort of operator has no fit.

        The first that there is counts: the piece's kind in its memory format, its kind in the other format, all kinds
        of its sort in its own format, in the other. A phase that was never measured is priced like forward.

        Args:
            piece: what is computed.
            flop: as of ``demands``.
        """
        conditions = self._of(piece)
        if not conditions:
            return None
        kind, found = kind_of(piece), {}
        for phase, demand in demands(piece, flop).items():
            tables = [c.phases.get(phase) or c.phases.get(Phase.FORWARD, {}) for c in conditions]
            sort = POOLED[0] if demand.flop or kind in PRODUCTS else POOLED[1]
            names = (kind, sort) if kind in PRODUCTS or not demand.flop else (sort,)
            fit = next((kinds[name] for name in names for kinds in tables if name in kinds), None)
            if fit is None:
                return None
            found[phase] = fit.seconds(demand)
        return found
