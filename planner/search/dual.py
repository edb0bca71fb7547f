"""A lower bound of the ``chain`` objective, and good choices on the way, by Lagrangian relaxation.

The length of an overlapped step is the largest of many sums: the compute chain alone, and for every variable p
and level l of the machine

    V[l, p] = forward + backward up to p's own + gradient reductions on l of p and all behind it + update.

The largest of them is at least any weighted mean of them, and a weighted mean is a sum of node and edge costs, whose
exact minimum variable elimination finds. So for all weights w >= 0 of sum 1

    min over choices of sum w V  <=  min over choices of max V,

[Geoffrion74]. The weights are raised by line searches towards the sum that is largest for the choice at hand: the
left side is concave in w, and each evaluation gives its slope.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from planner.search.elimination import solve_dp
from planner.search.problem import Chain, Choice, Costs, Limits, Problem

ENOUGH: Final = 1e-3
"""Relative gap below which the search for better weights ends."""


@dataclass(frozen=True, slots=True)
class Bounded:
    """What is known after the last evaluation.

    Attributes:
        lower_bound_s: no choice has a shorter step.
        choices: that some weights made optimal, in the order of discovery.
    """

    lower_bound_s: float
    choices: tuple[Choice, ...]


def bound_chain(problem: Problem, limits: Limits | None = None, *, evaluations: int = 12) -> Bounded:
    """Return a lower bound of a problem's chain objective, its memory limit left out.

    Args:
        problem: with a chain.
        limits: of each elimination.
        evaluations: eliminations that may be made; at least the bound without any reduction takes one.
    """
    game = _Game(problem, limits or Limits())
    weights = game.alone()
    here = game.evaluate(weights)
    while game.num_evaluations < evaluations:
        towards = game.worst(here)
        if here.sums[towards] <= here.bound_s * (1 + ENOUGH):
            break  # the choice at hand is as long as its bound
        low, high = 0.0, 1.0
        best = here
        for _ in range(min(3, evaluations - game.num_evaluations)):
            share = (low + high) / 2
            trial_weights = weights * (1 - share)
            trial_weights[towards] += share
            trial = game.evaluate(trial_weights)
            slope = trial.sums[towards] - float(weights @ trial.sums)
            low, high = (share, high) if slope > 0 else (low, share)
            if trial.bound_s > best.bound_s:
                best = trial
        if best is here:
            break
        weights, here = best.weights, best
    return Bounded(game.bound_s, tuple(game.choices))


@dataclass(frozen=True, slots=True)
class _Evaluation:
    """The minimum of a weighted mean.

    Attributes:
        weights: float64[1 + levels * variables]: of the compute chain alone, then of every V[l, p], level by level,
            p in the order of backward.
        bound_s: of every choice's step.
        sums: of the choice that is optimal for the weights, what they weigh.
    """

    weights: Costs
    bound_s: float
    sums: Costs


class _Game:
    def __init__(self, problem: Problem, limits: Limits) -> None:
        assert problem.chain is not None
        self._problem, self._chain, self._limits = problem, problem.chain, limits
        self._additive = problem.additive()
        self._transfers = problem.chain.transfers_of()
        self.num_evaluations = 0
        self.bound_s = 0.0
        self.choices: list[Choice] = []

    def alone(self) -> Costs:
        """Return the weights that count the compute chain only."""
        weights = np.zeros(1 + self._chain.num_levels * len(self._chain.order))
        weights[0] = 1.0
        return weights

    def worst(self, found: _Evaluation) -> int:
        """Return the position of the largest sum; the first of equal ones."""
        return int(found.sums.argmax())

    def evaluate(self, weights: Costs) -> _Evaluation:
        """Return the minimum of the mean of these weights."""
        self.num_evaluations += 1
        solution = solve_dp(_mean(self._additive, self._chain, weights), self._limits)
        self.bound_s = max(self.bound_s, solution.lower_bound_s)
        assert solution.choice is not None
        if solution.choice not in self.choices:
            self.choices.append(solution.choice)
        return _Evaluation(weights, solution.lower_bound_s, self._sums(solution.choice))

    def _sums(self, choice: Sequence[int]) -> Costs:
        """Return the sums of a choice, as ``_Evaluation.sums``."""
        chain = self._chain
        own = np.array([chain.backward_s[v][choice[v]] for v in chain.order])
        moved = np.array([sum(c[choice[p], choice[v]] for p, c in self._transfers[v]) for v in chain.order])
        sync_s = np.array([chain.sync_s[v][:, choice[v]] for v in chain.order]).reshape(len(chain.order), -1)
        whole_s = self._additive.cost_s(choice)
        done_s = whole_s - own.sum() - moved.sum() + np.cumsum(own + moved) - moved
        behind_s = np.cumsum(sync_s[::-1], axis=0)[::-1]
        return np.concatenate(([whole_s], (done_s[:, None] + behind_s).T.ravel()))


def _mean(problem: Problem, chain: Chain, weights: Costs) -> Problem:
    """Return the additive problem whose cost is the weighted mean of a chain's sums."""
    by_level = weights[1:].reshape(chain.num_levels, len(chain.order))
    reduced = np.cumsum(by_level, axis=1)  # of a variable's reductions: V of it and of all before it
    behind = weights[0] + by_level.sum(axis=0)[::-1].cumsum()[::-1]  # of its backward: V of it and of all behind it
    after = behind - by_level.sum(axis=0)  # of the transfers behind its backward
    node_s, edge_s = list(problem.node_s), dict(problem.edge_s)
    for q, v in enumerate(chain.order):
        if behind[q] < 1:
            node_s[v] = node_s[v] - (1 - behind[q]) * chain.backward_s[v]
        if reduced[:, q].any():
            node_s[v] = node_s[v] + reduced[:, q] @ chain.sync_s[v]
    position = {v: q for q, v in enumerate(chain.order)}
    for (producer, consumer), costs in chain.transfer_s.items():
        if (hidden := 1 - after[position[consumer]]) > 0:
            pair, matrix = ((producer, consumer), costs) if producer < consumer else ((consumer, producer), costs.T)
            edge_s[pair] = edge_s[pair] - hidden * matrix
    return replace(
        problem,
        node_s=tuple(np.maximum(costs, 0.0) for costs in node_s),
        edge_s={pair: np.maximum(costs, 0.0) for pair, costs in edge_s.items()},
    )
