"""What every solver takes and returns: arrays in, a choice and its certificate out."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

Costs = NDArray[np.float64]
Bytes = NDArray[np.int64]
Indices = NDArray[np.int64]
Choice = tuple[int, ...]
Pair = tuple[int, int]

ROUNDING: Final = 1e-9
"""Relative; sums in another order differ by less."""


@dataclass(frozen=True, slots=True)
class Chain:
    """Gradient reductions that run behind backward, one stream per link level of the machine.

    Backward goes through the variables in ``order``. After a variable's own backward its reductions are posted, then
    its transfers follow. Reductions of a level run one after the other beside backward; what of them is left when
    backward ends is waited for. Levels do not wait for each other: a reduction that uses several levels takes its
    whole time on each of them, but may end on one before it has begun on another.

    Attributes:
        order: every variable once, consumers before producers.
        backward_s: float64[n_i], part of ``Problem.node_s``.
        update_s: float64[n_i], part of ``Problem.node_s``; after everything.
        transfer_s: by (producer, consumer) float64[n_producer, n_consumer], the part of the edge that is moved
            backward; after the consumer's own backward.
        sync_s: float64[levels, n_i] of every variable; not part of ``Problem.node_s``.
    """

    order: tuple[int, ...]
    backward_s: tuple[Costs, ...]
    update_s: tuple[Costs, ...]
    transfer_s: Mapping[Pair, Costs]
    sync_s: tuple[Costs, ...]

    @property
    def num_levels(self) -> int:
        """Levels of the machine."""
        return len(self.sync_s[0]) if self.sync_s else 0

    def transfers_of(self) -> list[list[tuple[int, Costs]]]:
        """Return for every variable as consumer its producers and matrices, in the order of the mapping."""
        found: list[list[tuple[int, Costs]]] = [[] for _ in self.backward_s]
        for (producer, consumer), costs in self.transfer_s.items():
            found[consumer].append((producer, costs))
        return found

    def exposed_s(self, choice: Sequence[int]) -> float:
        """Return how long reductions run on after backward has ended."""
        left = [0.0] * self.num_levels
        transfers = self.transfers_of()
        for v in self.order:
            own = choice[v]
            passed_s = float(self.backward_s[v][own])
            left = [max(s - passed_s, 0.0) + float(sync) for s, sync in zip(left, self.sync_s[v][:, own], strict=True)]
            passed_s = math.fsum(float(costs[choice[producer], own]) for producer, costs in transfers[v])
            left = [max(s - passed_s, 0.0) for s in left]
        return max(left, default=0.0)

    def problems(self, nodes: Sequence[Costs], edges: Mapping[Pair, Costs]) -> list[str]:
        """Return what does not fit to the nodes and edges whose parts these are."""
        sizes = [len(costs) for costs in nodes]
        found = []
        if sorted(self.order) != list(range(len(sizes))):
            found.append("the order of backward must name every variable once")
        for name, per_variable in (("backward_s", self.backward_s), ("update_s", self.update_s)):
            if [costs.shape for costs in per_variable] != [(n,) for n in sizes]:
                found.append(f"{name} does not have the shapes of node_s")
        if [costs.shape for costs in self.sync_s] != [(self.num_levels, n) for n in sizes]:
            found.append("sync_s needs one row per level for every variable")
        for (i, j), costs in self.transfer_s.items():
            if i == j or (min(i, j), max(i, j)) not in edges or costs.shape != (sizes[i], sizes[j]):
                found.append(f"transfer {(i, j)} does not fit to an edge")
        return found or self._parts_above(nodes, edges)

    def _parts_above(self, nodes: Sequence[Costs], edges: Mapping[Pair, Costs]) -> list[str]:
        """Return which parts are above their whole by more than sums are rounded."""
        found = [
            f"backward and update of variable {v} cost more than the variable"
            for v, own in enumerate(nodes)
            if (self.backward_s[v] + self.update_s[v] > own * (1 + ROUNDING)).any()
        ]
        for (i, j), costs in self.transfer_s.items():
            whole = edges[i, j] if i < j else edges[j, i].T
            if (costs > whole * (1 + ROUNDING)).any():
                found.append(f"transfer {(i, j)} costs more than its edge")
        return found

    def restricted(self, keep: Sequence[Indices]) -> "Chain":
        """Return the chain in which every variable has only these of its options, strictly increasing."""
        pick = _Pick(keep)
        return Chain(
            self.order, tuple(map(pick.vector, range(len(keep)), self.backward_s)),
            tuple(map(pick.vector, range(len(keep)), self.update_s)),
            {pair: pick.matrix(pair, costs) for pair, costs in self.transfer_s.items()},
            tuple(costs[:, k] for costs, k in zip(self.sync_s, keep, strict=True)),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Problem:
    """Choose one option per variable at the least sum of node and edge costs.

    Arrays may be shared: solvers do equal work on one array once.

    Attributes:
        node_s: float64[n_i] of every variable.
        edge_s: float64[n_i, n_j] of pairs i < j of variables.
        resident_bytes, transient_bytes: int64[n_i] of every variable; the sum of the first plus the
            largest of the second must not exceed the limit.
        limit_bytes: of the smallest device; None where memory does not matter.
        chain: reductions behind backward; what of them is exposed is added to the cost.
    """

    node_s: tuple[Costs, ...]
    edge_s: Mapping[Pair, Costs]
    resident_bytes: tuple[Bytes, ...] = ()
    transient_bytes: tuple[Bytes, ...] = ()
    limit_bytes: int | None = None
    chain: Chain | None = None

    def __post_init__(self) -> None:
        sizes = self.sizes
        if not all(sizes):
            raise ValueError("a variable has no options")
        for (i, j), costs in self.edge_s.items():
            if not 0 <= i < j < len(sizes) or costs.shape != (sizes[i], sizes[j]):
                raise ValueError(f"edge {(i, j)} has shape {costs.shape}, its variables {sizes[i], sizes[j]} options")
        arrays = [*self.node_s, *self.edge_s.values()]
        if self.chain is not None:
            if wrong := self.chain.problems(self.node_s, self.edge_s):
                raise ValueError("; ".join(wrong))
            chain = self.chain
            arrays += [*chain.backward_s, *chain.update_s, *chain.transfer_s.values(), *chain.sync_s]
        for costs in {id(costs): costs for costs in arrays}.values():
            if costs.size and not (costs.min() >= 0 and costs.max() < math.inf):
                raise ValueError("costs must be finite and non-negative")
        if self.limit_bytes is not None and not (
            [len(b) for b in self.resident_bytes] == [len(b) for b in self.transient_bytes] == sizes
        ):
            raise ValueError("a memory limit needs the bytes of every option")

    @property
    def sizes(self) -> list[int]:
        """Options of every variable."""
        return [len(costs) for costs in self.node_s]

    def cost_s(self, choice: Sequence[int]) -> float:
        """Return the cost of a choice, added up in a fixed order.

        Without a chain the sum of nodes and edges. With one, the length of the step whose backward is overlapped by
        the chain's reductions: forward, then backward in the chain's order, then the reductions that are left, then
        the updates, which is the sum of nodes and edges and ``Chain.exposed_s``.
        """
        nodes = math.fsum(float(costs[c]) for costs, c in zip(self.node_s, choice, strict=True))
        edges = math.fsum(float(costs[choice[i], choice[j]]) for (i, j), costs in self.edge_s.items())
        return nodes + edges + (self.chain.exposed_s(choice) if self.chain is not None else 0.0)

    def memory_bytes(self, choice: Sequence[int]) -> int:
        """Return the safe bound of the peak: all resident bytes and the largest transient ones."""
        if not self.resident_bytes:
            return 0
        resident = sum(int(b[c]) for b, c in zip(self.resident_bytes, choice, strict=True))
        return resident + max(int(b[c]) for b, c in zip(self.transient_bytes, choice, strict=True))

    def fits(self, choice: Sequence[int]) -> bool:
        """Return whether a choice obeys the memory limit."""
        return self.limit_bytes is None or self.memory_bytes(choice) <= self.limit_bytes

    def restricted(self, keep: Sequence[Indices]) -> "Problem":
        """Return the problem in which every variable has only these of its options.

        Args:
            keep: for every variable positions of options, strictly increasing; arrays that stay whole stay shared.
        """
        pick = _Pick(keep)
        numbers = range(len(keep))
        return Problem(
            tuple(map(pick.vector, numbers, self.node_s)),
            {pair: pick.matrix(pair, costs) for pair, costs in self.edge_s.items()},
            tuple(pick.held(v, b) for v, b in enumerate(self.resident_bytes)),
            tuple(pick.held(v, b) for v, b in enumerate(self.transient_bytes)),
            self.limit_bytes,
            self.chain.restricted(keep) if self.chain is not None else None,
        )

    def additive(self) -> "Problem":
        """Return the sum of nodes and edges alone: no chain, no memory limit."""
        return replace(self, limit_bytes=None, chain=None)


class _Pick:
    """Takes options out of arrays; equal cuts of one array are one array."""

    def __init__(self, keep: Sequence[Indices]) -> None:
        self._keep, self._names = keep, [k.tobytes() for k in keep]
        self._found: dict[tuple[int, bytes, bytes], Costs] = {}

    def vector(self, v: int, costs: Costs) -> Costs:
        return costs if len(self._keep[v]) == len(costs) else costs[self._keep[v]]

    def held(self, v: int, held: Bytes) -> Bytes:
        return held if len(self._keep[v]) == len(held) else held[self._keep[v]]

    def matrix(self, pair: Pair, costs: Costs) -> Costs:
        rows, columns = self._keep[pair[0]], self._keep[pair[1]]
        if (len(rows), len(columns)) == costs.shape:
            return costs
        key = id(costs), self._names[pair[0]], self._names[pair[1]]
        if key not in self._found:
            self._found[key] = costs[np.ix_(rows, columns)]
        return self._found[key]


class Status(StrEnum):
    """How a solver ended; the value is the sentence shown to the user."""

    OPTIMAL = "optimal"
    FEASIBLE = "feasible"
    INFEASIBLE = "infeasible"
    NO_INCUMBENT = "stopped before a solution was found"
    FAILED = "failed"

    @property
    def has_solution(self) -> bool:
        """Whether a choice comes with it."""
        return self in {Status.OPTIMAL, Status.FEASIBLE}


@dataclass(frozen=True, slots=True)
class Limits:
    """When a solver has to stop.

    Attributes:
        time_s: a finite one makes the answer depend on the clock, if it is reached.
        max_nodes: of the integer program's branch and bound; None for no limit.
    """

    time_s: float = math.inf
    max_nodes: int | None = None


@dataclass(frozen=True, slots=True)
class Solution:
    """What a solver found.

    Attributes:
        status: a choice is there exactly where it says so.
        choice: an option per variable.
        cost_s: of the choice; inf without one.
        lower_bound_s: proven; no choice costs less.
        stats: what the solver counted, for logs.
    """

    status: Status
    choice: Choice | None
    cost_s: float
    lower_bound_s: float
    stats: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.choice is not None) != self.status.has_solution:
            raise ValueError(f"status {self.status} does not go with choice {self.choice}")

    @property
    def gap(self) -> float:
        """How much less a better choice could at most cost, relative to this one; 1 without a choice."""
        if self.choice is None:
            return 1.0
        return max(1 - self.lower_bound_s / self.cost_s, 0.0) if self.cost_s > 0 else 0.0


class Solver(Protocol):
    """Anything that solves problems."""

    def __call__(self, problem: Problem, limits: Limits) -> Solution:
        """Return the best choice found within the limits."""
        ...
