"""The memory limit by a multiplier: bytes get a price, and the cost with it bounds the cost under the limit.

For every choice x that obeys the limit, resident(x) <= R with R = limit - the least that the largest transient bytes
can be. So for every price >= 0 of a byte

    min over all x of cost(x) + price * (resident(x) - R)  <=  min over x within the limit of cost(x)

[Geoffrion74]. The left side is concave in the price: its maximum lies where the lines of two choices, one above and
one within R, meet. The largest transient bytes are divided into ranges, each with an R of its own, options that need
more left out; the least of the ranges' bounds holds for all choices. Options whose own bound at that price is above
the best cost are removed; what gap is left then is closed by the integer program, where it is small enough.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import numpy as np

from planner.search.descent import Descent
from planner.search.ilp import solve_ilp
from planner.search.minimum import DOMINANCE_WORK, ROUNDING, minimise
from planner.search.problem import Choice, Costs, Indices, Limits, Problem, Solution, Status
from planner.search.reduction import undominated
from planner.search.relaxation import SLACK, Relaxation

RANGES: Final = 4
"""Of the largest transient bytes."""
MAX_PRICES: Final = 12
"""Prices of a byte that are tried in each range."""
ENOUGH: Final = 1e-6
"""Of the cost: a bound that rises by less is left as it is."""
SWEEPS: Final = 5
"""That look for options that a better choice cannot have."""
MAX_COLUMNS: Final = 200_000
"""Of the integer program; more would take minutes to build."""


def solve_limited(problem: Problem, unlimited: Solution, limits: Limits) -> Solution:
    """Return the best choice within the memory limit.

    Args:
        problem: with a limit; a chain is not read.
        unlimited: of the same problem without the limit, which its choice breaks.
        limits: for the integer program.
    """
    plain = replace(problem, chain=None)
    smallest = least_memory(plain)
    if not plain.fits(smallest):
        return Solution(Status.INFEASIBLE, None, np.inf, np.inf)
    kept = undominated(plain, DOMINANCE_WORK)
    smaller = plain.restricted(kept)
    search = _Search(smaller, least_memory(smaller))
    bound_s = max(unlimited.lower_bound_s, search.run())
    status = _closed(search.cost_s, bound_s)
    if status is Status.FEASIBLE:
        keep = search.options()
        if sum(len(keep[i]) * len(keep[j]) for i, j in smaller.edge_s) <= MAX_COLUMNS:
            start = tuple(int(np.searchsorted(left, c)) for left, c in zip(keep, search.choice, strict=True))
            found = solve_ilp(smaller.restricted(keep), limits, start=start)
            if found.choice is not None:
                search.offer(tuple(int(left[c]) for left, c in zip(keep, found.choice, strict=True)))
            # nothing better has an option that was removed
            proven_s = search.cost_s if found.status is Status.OPTIMAL else min(found.lower_bound_s, search.cost_s)
            bound_s = max(bound_s, proven_s)
            status = _closed(search.cost_s, bound_s)
    choice = tuple(int(left[c]) for left, c in zip(kept, search.choice, strict=True))
    return Solution(status, choice, search.cost_s, min(bound_s, search.cost_s), {"prices": float(search.prices)})


def _closed(cost_s: float, bound_s: float) -> Status:
    return Status.OPTIMAL if cost_s - bound_s <= SLACK * cost_s else Status.FEASIBLE


def least_memory(problem: Problem) -> Choice:
    """Return the choice that needs least memory: the least sum of resident bytes for every limit of transient ones."""
    options = sorted(
        (int(needed), v, o) for v, held in enumerate(problem.transient_bytes) for o, needed in enumerate(held)
    )
    best: list[int | None] = [None] * len(problem.node_s)
    missing, total = len(best), 0
    least: tuple[int, int] | None = None  # bytes, transient bytes
    for needed, v, o in options:
        held = problem.resident_bytes[v]
        current = best[v]
        if current is not None and held[o] >= held[current]:
            continue
        missing -= current is None
        total += int(held[o]) - (int(held[current]) if current is not None else 0)
        best[v] = o
        if not missing and (least is None or total + needed < least[0]):
            least = total + needed, needed
    if least is None:
        return ()
    limit = least[1]
    return tuple(
        int(np.where(needed <= limit, held, np.iinfo(np.int64).max).argmin())
        for held, needed in zip(problem.resident_bytes, problem.transient_bytes, strict=True)
    )


class _Search:
    """The best choice within the limit, and a bound for every range of the largest transient bytes.

    Attributes:
        prices: that were tried.
    """

    def __init__(self, problem: Problem, smallest: Choice) -> None:
        assert problem.limit_bytes is not None
        self._problem, self._limit = problem, problem.limit_bytes
        self._descent = Descent(problem)
        self._transient = max(int(b[c]) for b, c in zip(problem.transient_bytes, smallest, strict=True))
        self.choice = self._descent(smallest)
        self.cost_s = problem.cost_s(self.choice)
        self._loosest: _Range | None = None
        self.prices = 0

    def run(self) -> float:
        """Go through the ranges of the largest transient bytes; return what is proven for all of them."""
        bound_s = math.inf
        floor = max(int(needed.min()) for needed in self._problem.transient_bytes)
        for ceiling in self._ceilings(floor):
            each = _Range(self._problem, floor, ceiling)
            if each.is_possible:
                found_s = each.run(self)
                if found_s < bound_s:
                    self._loosest = each
                bound_s = min(bound_s, found_s)
            floor = ceiling
        return min(bound_s, self.cost_s)

    def offer(self, choice: Choice) -> None:
        """Keep a choice if it is the best so far."""
        if self._problem.fits(choice):
            choice = self._descent(choice)
            if (cost_s := self._problem.cost_s(choice)) < self.cost_s:
                self.choice, self.cost_s = choice, cost_s

    def options(self) -> list[Indices]:
        """Return for every variable the options that a better choice can have."""
        least = max(int(needed.min()) for needed in self._problem.transient_bytes)
        price = self._loosest.price if self._loosest is not None else 0.0
        whole = _Range(self._problem, least, self._limit)
        dual = Relaxation(whole.priced(price))
        for _ in range(SWEEPS):
            dual.sweep(self.cost_s + price * whole.room)
        # those of the best choice are kept whatever sums are rounded to
        return [np.union1d(left, c) for left, c in zip(whole.among_all(dual.keep), self.choice, strict=True)]

    def _ceilings(self, floor: int) -> list[int]:
        """Return the upper ends of the ranges: few, closer to each other where memory is tight."""
        largest = min(max(int(needed.max()) for needed in self._problem.transient_bytes), self._limit)
        low = max(min(self._transient, largest), floor, 1)
        steps = [low * (largest / low) ** (k / RANGES) for k in range(RANGES)]
        return sorted({int(step) for step in steps if floor <= step < largest} | {largest})


class _Range:
    """The choices whose largest transient bytes lie in a range.

    Options that need more than the ceiling are left out; resident bytes have at most ``limit - floor``, and where they
    have ``limit - ceiling`` the limit holds for sure.

    Attributes:
        room: bytes above the smallest pieces' that resident bytes can have.
        price: of a byte, s; that of the best bound.
        is_possible: some choice may lie in the range.
    """

    def __init__(self, problem: Problem, floor: int, ceiling: int) -> None:
        assert problem.limit_bytes is not None
        self._keep = [np.flatnonzero(needed <= ceiling) for needed in problem.transient_bytes]
        self.price, self.room = 0.0, -1
        self.is_possible = all(len(left) for left in self._keep)
        if not self.is_possible:
            return
        self._problem = replace(problem, limit_bytes=None).restricted(self._keep)
        self._held = [held - held.min() for held in self._problem.resident_bytes]
        least = sum(int(held.min()) for held in self._problem.resident_bytes)
        self.room = problem.limit_bytes - floor - least
        sure = problem.limit_bytes - ceiling - least
        self._wanted = sure if sure >= 0 else self.room
        self.is_possible = self.room >= 0

    def among_all(self, keep: Sequence[Indices]) -> list[Indices]:
        """Return positions among the options of the whole problem."""
        return [mine[left] for mine, left in zip(self._keep, keep, strict=True)]

    def run(self, search: _Search) -> float:
        """Look for the best price, offering all choices on the way; return the proven bound of the range."""
        problem = self._problem
        within = tuple(int(held.argmin()) for held in self._held)
        above, bound_s = self._minimum(0.0, within, search)
        for _ in range(MAX_PRICES):
            more_s = problem.cost_s(within) - problem.cost_s(above)
            if bound_s >= search.cost_s * (1 - SLACK) or self._resident(above) <= self._wanted or more_s <= 0:
                break
            price = more_s / (self._resident(above) - self._resident(within))
            line_s = self._value_s(within, price)
            found, found_s = self._minimum(price, within, search)
            if found_s > bound_s:
                bound_s, self.price = found_s, price
            if self._value_s(found, price) >= line_s - ENOUGH * search.cost_s:
                break
            if self._resident(found) > self._wanted:
                above = found
            else:
                within = found
        return bound_s

    def _minimum(self, price: float, start: Choice, search: _Search) -> tuple[Choice, float]:
        search.prices += 1
        found = minimise(self.priced(price), start, max_dominance=0.0)
        assert found.choice is not None
        search.offer(tuple(int(left[c]) for left, c in zip(self._keep, found.choice, strict=True)))
        return found.choice, found.lower_bound_s * (1 - ROUNDING) - price * self.room * (1 + ROUNDING)

    def _value_s(self, choice: Choice, price: float) -> float:
        return self._problem.cost_s(choice) + price * (self._resident(choice) - self._wanted)

    def _resident(self, choice: Choice) -> int:
        """Return the resident bytes above those of the smallest pieces."""
        return sum(int(held[c]) for held, c in zip(self._held, choice, strict=True))

    def priced(self, price: float) -> Problem:
        """Return the problem without a limit in which a byte costs so much."""
        made: dict[tuple[int, int], Costs] = {}
        node_s = []
        for v, (costs, held) in enumerate(zip(self._problem.node_s, self._held, strict=True)):
            key = id(costs), id(self._problem.resident_bytes[v])  # equal layers stay equal
            if key not in made:
                made[key] = costs + price * held
            node_s.append(made[key])
        return Problem(tuple(node_s), self._problem.edge_s)
