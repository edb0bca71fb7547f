r"""Stages of a chain of layers on a row of devices [Alpa, OSDI 2022, section 5]: where to cut, how many devices each.

Over all ways to cut n units into intervals in a row, each on the next devices, and over numbers M of micro-batches, the
least

.. math:: \sum_i t_i + (M - 1) \max_j t_j

where :math:`t_i` is forward and backward of one micro-batch in stage i. Any other objective serves that grows with the
sum and with the maximum. Alpa enumerates the maximum and minimises the sum for each. Here the suffixes of stages that
begin at one unit and device, of one number of stages, keep sum and maximum of each that fewer than k others equal or
beat in both. Whatever the stages in front add, what is dropped has k others that are no worse, so the best k are found
in one pass, exactly, for every objective of that kind.

How much a stage holds depends on the stages behind it (1F1B: it has one micro-batch in flight for each of them and
itself), so the price of a stage knows their number, as in Alpa. **Deviation**: it also knows which devices, so that
rows of unlike devices and links are priced as they are.
"""

import bisect
import heapq
import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from planner.deadline import look
from planner.errors import InfeasibleError, UsageError


class Part(NamedTuple):
    """A stage: units ``first`` to ``stop - 1`` on devices ``first_device`` to ``stop_device - 1``."""

    first: int
    stop: int
    first_device: int
    stop_device: int

    @property
    def num_devices(self) -> int:
        """Of the stage."""
        return self.stop_device - self.first_device


class Seconds(NamedTuple):
    """Of a micro-batch in a stage, where what waits for it is longer than what it keeps the stage's devices busy.

    Attributes:
        through_s: that it adds to the sum: with its way to the stage and back.
        busy_s: that count for the maximum.
    """

    through_s: float
    busy_s: float


Price = Callable[[Part, int, int], float | Seconds | None]
"""Seconds of a micro-batch in a stage, from the stage, the number of stages behind it and that of micro-batches.

None where the stage does not fit in memory, or is forbidden. Called once for each of them.
"""
Objective = Callable[[float, float, int], float]
"""Of the sum and the maximum of the stages' seconds and the number of micro-batches; grows with the first two."""


def step_s(sum_s: float, slowest_s: float, num_microbatches: int) -> float:
    """Return the step of a synchronous pipeline [Alpa]."""
    return sum_s + (num_microbatches - 1) * slowest_s


def cycle_s(sum_s: float, slowest_s: float, num_microbatches: int) -> float:  # noqa: ARG001
    """Return the cycle of a pipeline that is never emptied: its slowest stage [PipeDream]."""
    return slowest_s


@dataclass(frozen=True, slots=True)
class Cuts:
    """A way to divide units and devices into stages.

    Attributes:
        cost_s: the objective.
        parts: the stages, first to last.
        num_microbatches: of a step.
        sum_s: of the stages' seconds for a micro-batch.
        slowest_s: their maximum.
    """

    cost_s: float
    parts: tuple[Part, ...]
    num_microbatches: int
    sum_s: float
    slowest_s: float


@dataclass(frozen=True, slots=True)
class StageSpace:
    """What may become of a chain of units and a row of devices.

    Attributes:
        num_units: what cuts may lie between.
        num_devices: all of which are used.
        sizes: numbers of devices that a stage may have.
        max_stages: at most so many; None for no limit.
    """

    num_units: int
    num_devices: int
    sizes: tuple[int, ...]
    max_stages: int | None = None

    def __post_init__(self) -> None:
        if min(self.num_units, self.num_devices, *self.sizes, self.most_stages) < 1 or not self.sizes:
            raise UsageError(
                f"stages of {self.num_units} units on {self.num_devices} devices, {self.sizes} devices each, at most "
                f"{self.max_stages} stages: every number must be at least 1."
            )

    @property
    def most_stages(self) -> int:
        """That there can be."""
        return min(self.num_units, self.num_devices, self.num_units if self.max_stages is None else self.max_stages)


def best_cuts(
    space: StageSpace,
    price: Price,
    num_microbatches: Iterable[int],
    *,
    count: int = 1,
    objective: Objective = step_s,
) -> tuple[Cuts, ...]:
    """Return the best ways to divide units and devices into stages, best first, none twice.

    With n units, D devices and S stages at most there are O(n^2 D S) prices for every size and number of micro-batches.

    Args:
        space: of what is searched.
        price: of a stage.
        num_microbatches: to choose from.
        count: of ways, or fewer where there are no more.
        objective: to minimise.

    Raises:
        InfeasibleError: Every way has a stage without a price.
        UsageError: ``count`` is not at least 1.
    """
    if count < 1:
        raise UsageError(f"the number of candidates must be at least 1, not {count}.")
    found = [
        Cuts(objective(suffix.sum_s, suffix.slowest_s, m), suffix.parts(), m, suffix.sum_s, suffix.slowest_s)
        for m in dict.fromkeys(num_microbatches)
        for suffix in _Chain(space, price, m, count).whole()
    ]
    if not found:
        raise InfeasibleError(
            f"no way to divide {space.num_units} units into stages on {space.num_devices} devices fits in memory. "
            "Use more devices, a smaller batch, other numbers of micro-batches, recompute, or a higher memory limit."
        )
    return tuple(heapq.nsmallest(count, found, key=lambda cuts: (cuts.cost_s, cuts.sum_s, len(cuts.parts))))


_Extended = tuple[float, float, Part, "_Suffix"]
"""A suffix before it is known whether it is kept: most are not."""


class _Suffix(NamedTuple):
    """The last stages; the first of them, and what is behind it."""

    sum_s: float
    slowest_s: float
    part: Part | None = None
    behind: "_Suffix | None" = None

    def parts(self) -> tuple[Part, ...]:
        return tuple(self._parts())

    def _parts(self) -> Iterator[Part]:
        suffix: _Suffix | None = self
        while suffix is not None and suffix.part is not None:
            yield suffix.part
            suffix = suffix.behind


@dataclass(frozen=True, slots=True)
class _Chain:
    """The dynamic program for one number of micro-batches."""

    space: StageSpace
    price: Price
    num_microbatches: int
    count: int

    def whole(self) -> list[_Suffix]:
        """Return the best divisions of everything, for every number of stages."""
        space = self.space
        behind = {(space.num_units, space.num_devices): [_Suffix(0.0, 0.0)]}
        found: list[_Suffix] = []
        for num_behind in range(space.most_stages):
            behind = self._prepend(behind, num_behind)
            found += behind.get((0, 0), ())
        return found

    def _prepend(
        self, behind: dict[tuple[int, int], list[_Suffix]], num_behind: int
    ) -> dict[tuple[int, int], list[_Suffix]]:
        """Return the suffixes with one stage more, by their first unit and device."""
        longer: dict[tuple[int, int], list[_Extended]] = {}
        for (stop, stop_device), suffixes in behind.items():
            look()
            for size, first in itertools.product(sorted(set(self.space.sizes)), range(stop)):
                first_device = stop_device - size
                if not self._can_begin(first, first_device, num_behind + 1):
                    continue
                part = Part(first, stop, first_device, stop_device)
                seconds = self.price(part, num_behind, self.num_microbatches)
                if seconds is None:
                    continue
                through_s, busy_s = seconds if isinstance(seconds, Seconds) else (seconds, seconds)
                longer.setdefault((first, first_device), []).extend(
                    (suffix[0] + through_s, max(suffix[1], busy_s), part, suffix) for suffix in suffixes
                )
        return {start: _undominated(suffixes, self.count) for start, suffixes in longer.items()}

    def _can_begin(self, first: int, first_device: int, num_stages: int) -> bool:
        """Whether everything is in a stage, or something is left for stages in front, and they are allowed."""
        if (first, first_device) == (0, 0):
            return True
        return first > 0 and first_device > 0 and num_stages < self.space.most_stages


def _undominated(suffixes: Sequence[_Extended], count: int) -> list[_Suffix]:
    """Return those that fewer than so many others are at least as good as, in sum and maximum."""
    kept: list[_Suffix] = []
    least: list[float] = []  # the smallest maxima so far
    for suffix in sorted(suffixes, key=operator.itemgetter(0, 1)):
        if len(least) < count or suffix[1] < least[-1]:
            kept.append(_Suffix(*suffix))
            bisect.insort(least, suffix[1])
            del least[count:]
    return kept
