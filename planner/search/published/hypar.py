"""`hypar`: data or model parallelism for each layer and each level of a binary hierarchy [HyPar19].

At a level every group of devices splits in two, and every layer with weights is either **dp** (samples split) or
**mp** (input channels split: each half computes addends of the whole output). One level of one pair exchanges

    2 sum_l (intra_l + inter_{l,l+1})   elements, both directions,

    intra dp        W_l / k_l                        the gradient of the weights
    intra mp        F_l / b_l                        the output, behind its pools
    inter dp -> mp  1/4 F + 1/4 E = F_l / 2 / (b k)_{l+1}

where W_l are weights (no biases), F_l elements of the whole batch, b_l and k_l the parts into which the levels above
have cut layer l by samples and by channels. The paper [HyPar19, Table 2] also prints

    inter mp -> mp  1/2 E,    inter mp -> dp  1/2 E,

which is ``Model.TABLE2``. Its own plans and totals (Figs. 5 and 8) follow without these two, ``Model.FIGURES``: the
sum over the halves is then reduce-scattered (F) and its gradient gathered (E), which the intra term contains already.
The plan is greedy over levels, outermost first, and exact within one: [HyPar19, Algorithm 1] on a chain, variable
elimination on any other graph. The total counts each level once for every group that is split there.

**Axes of p parts.** A level of p = 2^k parts is k levels of two parts with the same decisions. Their reductions add up
to (p - 1) times that of a pair, as what a decision cuts is not what it reduces; their re-cuts dp -> mp to k times, as
each of the 2^(i-1) pairs of the i-th finds a tensor cut in 2^(i-1). A prime p has no such levels: it reduces to all
and exchanges all to all, (p - 1) W or F and (p - 1)/p F in all, which for p = 2 is the pair again; so in general

    reductions (p - 1),    re-cuts sum over the prime factors q of p of 2 (q - 1)/q     times the pair's.

**Joins** (sums, concatenations; the paper has none) move nothing themselves. Their tensor is cut by samples (dp) or
channels (mp), not scattered from addends, so both changes behind them cost a re-cut in either model.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import numpy as np

from planner.cost.table import CostTable
from planner.ir.dimension import Dimension
from planner.search.formulate import Formulation
from planner.search.problem import Choice, Costs, Problem
from planner.search.published.networks import Axes, Network, solve_decisions

DP: Final = 0
MP: Final = 1
DIMENSIONS: Final = ((Dimension.SAMPLE,), (Dimension.IN_CHANNEL_SCATTER, Dimension.IN_CHANNEL))
"""Of our splits, by decision."""

Level = tuple[int, ...]
"""DP or MP for every node."""


class Model(StrEnum):
    """Which communication between layers is counted."""

    FIGURES = "figures"
    TABLE2 = "table2"


@dataclass(frozen=True, slots=True)
class HyParPlan:
    """Decisions with what they move.

    Attributes:
        levels: outermost first.
        elements: exchanged per step by all devices, in both directions.
        by_level: of each level, all its groups together.
    """

    levels: tuple[Level, ...]
    elements: float
    by_level: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class _Parts:
    """Into how many parts the levels above have cut each node, and in how many groups they have cut the devices."""

    samples: tuple[int, ...]
    channels: tuple[int, ...]
    groups: int

    @staticmethod
    def none(network: Network) -> "_Parts":
        return _Parts((1,) * len(network.nodes), (1,) * len(network.nodes), 1)

    def behind(self, level: Level, size: int) -> "_Parts":
        samples = tuple(b * (size if d == DP else 1) for b, d in zip(self.samples, level, strict=True))
        channels = tuple(k * (size if d == MP else 1) for k, d in zip(self.channels, level, strict=True))
        return _Parts(samples, channels, self.groups * size)


def hypar(network: Network, sizes: Sequence[int] = (2, 2, 2, 2), model: Model = Model.FIGURES) -> HyParPlan:
    """Return the paper's plan: the best level after the other, outermost first.

    Args:
        network: layers with weights.
        sizes: parts of each level; 2 each in the paper.
        model: what is counted.
    """
    parts, levels = _Parts.none(network), []
    for size in sizes:
        problem = _level_problem(network, parts, size, model)
        level, _ = solve_decisions(problem, range(len(network.nodes)), [(DP, MP)] * len(network.nodes))
        levels.append(level)
        parts = parts.behind(level, size)
    return evaluate(network, levels, sizes, model)


def evaluate(
    network: Network, levels: Sequence[Level], sizes: Sequence[int] = (2, 2, 2, 2), model: Model = Model.FIGURES
) -> HyParPlan:
    """Return given decisions with what they move."""
    parts, by_level = _Parts.none(network), []
    for level, size in zip(levels, sizes, strict=True):
        by_level.append(parts.groups * _level_problem(network, parts, size, model).cost_s(level))
        parts = parts.behind(level, size)
    return HyParPlan(tuple(levels), math.fsum(by_level), tuple(by_level))


def uniform(network: Network, decision: int, sizes: Sequence[int] = (2, 2, 2, 2)) -> HyParPlan:
    """Return pure data parallelism (``DP``) or pure model parallelism (``MP``)."""
    return evaluate(network, [(decision,) * len(network.nodes)] * len(sizes), sizes)


def hypar_exhaustive(network: Network, sizes: Sequence[int], model: Model = Model.FIGURES) -> HyParPlan:
    """Return the least of all 2^(nodes x levels) assignments, not only of those that are best level by level.

    What a level costs depends on the levels above only by the parts they leave, so each such state is visited once.
    """
    reached: dict[_Parts, tuple[float, tuple[Level, ...]]] = {_Parts.none(network): (0.0, ())}
    choices = list(itertools.product((DP, MP), repeat=len(network.nodes)))
    for size in sizes:
        further: dict[_Parts, tuple[float, tuple[Level, ...]]] = {}
        for parts, (spent, levels) in reached.items():
            problem = _level_problem(network, parts, size, model)
            for level in choices:
                found = (spent + parts.groups * problem.cost_s(level), (*levels, level))
                state = parts.behind(level, size)
                further[state] = min(further.get(state, found), found)
        reached = further
    return evaluate(network, min(reached.values())[1], sizes, model)


def hypar_choice(table: CostTable, formulation: Formulation) -> Choice:
    """Return the plan of [HyPar19] on a mesh: axis by axis, outermost first, in ``Model.FIGURES``.

    dp is a split by samples, mp one by input channels in whichever form costs less; a layer where neither is legal on
    an axis replicates, and is counted as data-parallel. Layers without weights take what costs least.
    """
    axes = Axes(table, formulation)
    network, parts = axes.network, _Parts.none(axes.network)
    for axis, size in enumerate(table.space.mesh.shape):
        allowed = [
            [d for d in (DP, MP) if axes.allows(n, axis, DIMENSIONS[d])] or [DP] for n in range(len(network.nodes))
        ]
        problem = _level_problem(network, parts, size, Model.FIGURES)
        level, _ = solve_decisions(problem, axes.variable_of, allowed)
        for n, decision in enumerate(level):
            axes.decide(n, axis, DIMENSIONS[decision])
        parts = parts.behind(level, size)
    return axes.choice()


def _level_problem(network: Network, parts: _Parts, size: int, model: Model) -> Problem:
    """Return the decisions of one group at one level; costs are elements exchanged in both directions."""
    reduced, recut = 2.0 * (size - 1), 2.0 * _recuts(size)
    nodes = tuple(
        np.array([reduced * node.weights / k, 0.0 if node.is_join else reduced * node.outputs / b])
        for node, b, k in zip(network.nodes, parts.samples, parts.channels, strict=True)
    )
    edges: dict[tuple[int, int], Costs] = {}
    for i, j, elements in network.edges:
        half = recut * 0.5 * elements / (parts.samples[j] * parts.channels[j])  # of what the consumer sees
        matrix = np.array([[0.0, half], [0.0, 0.0]])
        if network.nodes[i].is_join:
            matrix[MP, DP] = half
        elif model is Model.TABLE2:
            matrix[MP] = half
        edges[i, j] = edges[i, j] + matrix if (i, j) in edges else matrix
    return Problem(nodes, edges)


def _recuts(size: int) -> float:
    """Return how many times a pair's re-cut a re-cut into so many parts is."""
    total, factor = 0.0, 2
    while size > 1:
        if size % factor:
            factor += 1
            continue
        total += 2 * (factor - 1) / factor
        size //= factor
    return total
