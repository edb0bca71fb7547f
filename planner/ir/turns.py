"""Who hands over which samples in which turn: one weird trick's schemes for the linear layers [OWT14, Section 4].

Workers run the convolutions on samples of their own; the linear layers are split over all of them and need the samples
of all. They work through a batch in turns, so that the samples of the next turn travel behind the work on this one:

(a) one turn: everyone hands over everything;
(b) workers take turns in handing over;
(c) in each turn every worker hands over its share.
"""

from collections.abc import Sequence
from typing import Literal

from planner.ir.layout import Interval, balanced_pieces

Scheme = Literal["a", "b", "c"]


def turns(scheme: Scheme, samples: Sequence[int], count: int) -> tuple[tuple[Interval, ...], ...]:
    """Return, for every turn, the interval of its own samples that each worker hands over.

    Every sample is handed over once. Turns in which nobody has one are left out.

    Args:
        scheme: a, b or c.
        samples: of each worker.
        count: of turns: 1 in (a), a multiple of the workers in (b), any number in (c).

    Raises:
        ValueError: the scheme has no such number of turns.
    """
    workers = len(samples)
    if count < 1 or (scheme == "a" and count != 1):
        raise ValueError(f"scheme (a) has one turn and the others at least one; {count} were asked of ({scheme})")
    if scheme == "b" and count % workers:
        raise ValueError(
            f"in scheme (b) {workers} workers take turns, so the number of turns is a multiple of {workers}, not "
            f"{count}; scheme (c) takes any number"
        )
    if scheme == "b":
        each = count // workers
        pieces = [balanced_pieces(n, each) for n in samples]
        found = [
            tuple(pieces[w][turn % each] if w == turn // each else (0, 0) for w in range(workers))
            for turn in range(count)
        ]
    else:
        found = list(zip(*(balanced_pieces(n, count) for n in samples), strict=True))
    return tuple(turn for turn in found if any(a < b for a, b in turn))
