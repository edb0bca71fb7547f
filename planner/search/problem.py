"""What every solver takes and returns: arrays in, a choice and its certificate out."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Costs = NDArray[np.float64]
Bytes = NDArray[np.int64]
Choice = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Problem:
    """Choose one option per variable at the least sum of node and edge costs.

    Attributes:
        node_s: float64[n_i] of every variable.
        edge_s: float64[n_i, n_j] of pairs i < j of variables.
        resident_bytes, transient_bytes: int64[n_i] of every variable; the sum of the first plus the
            largest of the second must not exceed the limit.
        limit_bytes: of the smallest device; None where memory does not matter.
    """

    node_s: tuple[Costs, ...]
    edge_s: Mapping[tuple[int, int], Costs]
    resident_bytes: tuple[Bytes, ...] = ()
    transient_bytes: tuple[Bytes, ...] = ()
    limit_bytes: int | None = None

    def __post_init__(self) -> None:
        sizes = [len(costs) for costs in self.node_s]
        if not all(sizes):
            raise ValueError("a variable has no options")
        for (i, j), costs in self.edge_s.items():
            if not i < j < len(sizes) or costs.shape != (sizes[i], sizes[j]):
                raise ValueError(f"edge {(i, j)} has shape {costs.shape}, its variables {sizes[i], sizes[j]} options")
        for costs in (*self.node_s, *self.edge_s.values()):
            if not (np.isfinite(costs).all() and (costs >= 0).all()):
                raise ValueError("costs must be finite and non-negative")
        if self.limit_bytes is not None and [len(b) for b in self.resident_bytes] != sizes:
            raise ValueError("a memory limit needs the bytes of every option")

    def cost_s(self, choice: Sequence[int]) -> float:
        """Return the cost of a choice, added up in a fixed order."""
        nodes = math.fsum(float(costs[c]) for costs, c in zip(self.node_s, choice, strict=True))
        return nodes + math.fsum(float(costs[choice[i], choice[j]]) for (i, j), costs in self.edge_s.items())

    def memory_bytes(self, choice: Sequence[int]) -> int:
        """Return the safe bound of the peak: all resident bytes and the largest transient ones."""
        if not self.resident_bytes:
            return 0
        resident = sum(int(b[c]) for b, c in zip(self.resident_bytes, choice, strict=True))
        return resident + max(int(b[c]) for b, c in zip(self.transient_bytes, choice, strict=True))

    def fits(self, choice: Sequence[int]) -> bool:
        """Return whether a choice obeys the memory limit."""
        return self.limit_bytes is None or self.memory_bytes(choice) <= self.limit_bytes


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
    """When a solver has to stop."""

    time_s: float = math.inf


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


class Solver(Protocol):
    """Anything that solves problems."""

    def __call__(self, problem: Problem, limits: Limits) -> Solution:
        """Return the best choice found within the limits."""
        ...
