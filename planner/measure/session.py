"""Measuring many pieces into a file: which are missing, which samples are left out, what came of it."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from planner.ir.ops import describe
from planner.measure.recording import Recording
from planner.measure.sizing import Rates, sized
from planner.profile.key import PieceKey
from planner.profile.table import Measurement

Found = Callable[[str, Measurement | None], None]
Progress = Callable[[float], None]
"""Is told the share that is done, from 0 to 1, by the estimated seconds of what was asked."""


class TimeLayers(Protocol):
    """Times layers by their keys and hands on each; None for one without a kernel (``planner.api.time_layers``)."""

    def __call__(self, keys: Sequence[str], found: Found) -> None:
        """Time them."""


@dataclass
class Summary:
    """What came of a session.

    Attributes:
        num_pieces: that a search can ask for.
        num_timed: keys that were timed.
        num_known: pieces that the file had already.
        num_shortened: pieces for which one with fewer samples was timed, now or before.
        num_left: keys for which there was no time.
        without_kernel: pieces that have none of their own, by operator; the roofline prices them.
    """

    num_pieces: int = 0
    num_timed: int = 0
    num_known: int = 0
    num_shortened: int = 0
    num_left: int = 0
    without_kernel: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class Limits:
    """How long a session may take.

    Attributes:
        target_s: of one repeat; pieces that take longer are timed with fewer samples.
        budget_s: of the whole session; None: until all is timed. Pieces then come in an order that has nothing to do
            with the model's, so that what was timed is a sample of all.
    """

    target_s: float
    budget_s: float | None = None


class _TimeIsUp(Exception):  # noqa: N818  # no error
    """Ends a session."""


def measure_pieces(
    pieces: Iterable[PieceKey],
    recording: Recording,
    time_layers: TimeLayers,
    rates: Rates,
    limits: Limits,
    progress: Progress,
) -> Summary:
    """Time what a file does not have of some pieces, and record it as it comes.

    Args:
        pieces: that a search can ask for.
        recording: of the file.
        time_layers: times them.
        rates: of the device, for the sizes.
        limits: on the time.
        progress: is told how far it is.

    Raises:
        UsageError: the file cannot be written, or a layer cannot be timed.
    """
    asked = list(dict.fromkeys(pieces))
    summary = Summary(len(asked))
    timed_for = {piece: sized(piece, rates, limits.target_s) for piece in asked}
    summary.num_shortened = sum(piece != timed for piece, timed in timed_for.items())
    known = _Known(recording.layers)
    missing = {p: timed for p, timed in timed_for.items() if not known.covers(p, timed)}
    summary.num_known = len(asked) - len(missing)
    by_key = {timed.text: timed for timed in missing.values()}
    keys = list(by_key) if limits.budget_s is None else sorted(by_key, key=_scattered)
    seconds = {key: rates.seconds(piece) for key, piece in by_key.items()}
    whole_s, done_s, start_s = sum(seconds.values()), 0.0, recording.clock()
    waiting = dict.fromkeys(keys)

    def found(key: str, measurement: Measurement | None) -> None:
        nonlocal done_s
        waiting.pop(key)
        if measurement is None:
            summary.without_kernel[describe(by_key[key].op)] += 1
        else:
            summary.num_timed += 1
            recording.add(key, measurement)
        done_s += seconds[key]
        progress(done_s / whole_s)
        if waiting and limits.budget_s is not None and recording.clock() - start_s > limits.budget_s:
            raise _TimeIsUp

    with recording:
        try:
            if keys:
                time_layers(keys, found)
        except _TimeIsUp:
            summary.num_left = len(waiting)
    return summary


class _Known:
    """What a file has, exactly or by family."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._keys = set(keys)
        self._samples: dict[str, list[int]] = {}
        for key in self._keys:
            family = PieceKey.of_text(key).family
            if family is not None:
                self._samples.setdefault(family[0], []).append(family[1])

    def covers(self, piece: PieceKey, timed: PieceKey) -> bool:
        """Return whether nothing is to be timed for a piece.

        A shortened piece is covered by another of its family of about its size: how many samples are enough is an
        estimate, which may come out otherwise the next time.
        """
        if piece.text in self._keys or timed.text in self._keys:
            return True
        family, wanted = piece.family, timed.family
        if piece == timed or family is None or wanted is None:
            return False
        return any(wanted[1] <= 2 * n and n <= family[1] for n in self._samples.get(family[0], ()))


def _scattered(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
