"""The price of every pair of layouts on an edge, as matrices."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from planner.cost.moves import Move, Share, frame, moves_of_pairs, used_rank
from planner.cost.transfer import FREE, StepPricer
from planner.ir.layout import Index, Layout

_Key = tuple[tuple[Layout, ...], tuple[Layout, ...], bytes]


@dataclass(frozen=True, slots=True)
class Matrices:
    """Of every pair of layouts before and after, [before, after] each; attributes as of ``Price``."""

    seconds: NDArray[np.float64]
    num_bytes: NDArray[np.float64]
    levels: Index


@dataclass(frozen=True, slots=True)
class _Pattern:
    """What moves between pairs of layouts.

    Attributes:
        moves: all that occur.
        index: position of each pair's moves, in order, and one past the last for none: int64[moves of a pair, pairs].
    """

    moves: tuple[Move, ...]
    index: Index


@dataclass(frozen=True)
class EdgePricer:
    """Prices edges; works out once what moves between layouts that lie to each other alike."""

    pricer: StepPricer
    _patterns: dict[_Key, _Pattern] = field(default_factory=dict)

    def price(self, sources: Sequence[Layout], targets: Sequence[Layout], item_bytes: int) -> Matrices:
        """Return the prices of turning each of these layouts of a tensor into each of those.

        Args:
            sources: layouts before, at least one, that differ in their placements and shares only.
            targets: layouts after, likewise.
            item_bytes: of an element.
        """
        sources, targets = [x.value for x in sources], [x.value for x in targets]
        if any(x.shares for x in (*sources, *targets)):
            return self._one_by_one(sources, targets, item_bytes)
        return self._together(sources, targets, item_bytes)

    def _one_by_one(self, sources: Sequence[Layout], targets: Sequence[Layout], item_bytes: int) -> Matrices:
        """Return ``price`` of layouts some of which have shares; those without any are priced together."""
        shape = len(sources), len(targets)
        found = Matrices(np.zeros(shape), np.zeros(shape), np.zeros(shape, dtype=np.int64))
        rows, columns = ([k for k, x in enumerate(each) if not x.shares] for each in (sources, targets))
        if rows and columns:
            plain = self._together([sources[i] for i in rows], [targets[j] for j in columns], item_bytes)
            for whole, part in zip((found.seconds, found.num_bytes, found.levels),
                                   (plain.seconds, plain.num_bytes, plain.levels), strict=True):  # fmt: skip
                whole[np.ix_(rows, columns)] = part
        for i, source in enumerate(sources):
            for j, target in enumerate(targets):
                if source.shares or target.shares:
                    price = self.pricer.price(source, target, item_bytes)
                    found.seconds[i, j], found.num_bytes[i, j] = price.seconds, price.num_bytes
                    found.levels[i, j] = price.levels
        return found

    def _together(self, sources: Sequence[Layout], targets: Sequence[Layout], item_bytes: int) -> Matrices:
        """Return ``price`` of layouts without shares."""
        first, rank = sources[0], used_rank([*sources, *targets])
        found = frame(first.shape, first.mesh, first.cuts, targets[0].cuts)
        codes = found.codes(sources, targets)
        shape = codes.shape
        seconds, num_bytes, levels = np.zeros(shape), np.zeros(shape), np.zeros(shape, dtype=np.int64)
        for code in np.unique(codes).tolist():
            share = found.share(code, rank)
            here = codes == code
            pattern = self._pattern(share, sources, targets, here)
            prices = [
                *(self.pricer.move(m.kind, m.axes, share.elements(m) * item_bytes, share.copied(m) * item_bytes)
                  for m in pattern.moves), FREE,
            ]  # fmt: skip
            seconds[here] = np.array([p.seconds for p in prices])[pattern.index].sum(axis=0)
            num_bytes[here] = np.array([p.num_bytes for p in prices])[pattern.index].sum(axis=0)
            levels[here] = np.bitwise_or.reduce(np.array([p.levels for p in prices])[pattern.index], axis=0)
        return Matrices(seconds, num_bytes, levels)

    def _pattern(
        self, share: Share, sources: Sequence[Layout], targets: Sequence[Layout], here: NDArray[np.bool_]
    ) -> _Pattern:
        before = tuple(share.source.at(x.placements) for x in sources)
        after = tuple(share.target.at(x.placements) for x in targets)
        key = before, after, here.tobytes()
        if key not in self._patterns:
            numbers: dict[Move, int] = {}
            rows, columns = np.nonzero(here)
            found = moves_of_pairs(before, after, (rows.astype(np.int64), columns.astype(np.int64)))
            listed = [[numbers.setdefault(m, len(numbers)) for m in each] for each in found]
            length = max(map(len, listed), default=0)
            padded = [own + [len(numbers)] * (length - len(own)) for own in listed]
            index = np.array(padded, dtype=np.int64).reshape(len(listed), length).T
            self._patterns[key] = _Pattern(tuple(numbers), index)
        return self._patterns[key]
