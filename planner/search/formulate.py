"""From a table of costs to a problem of numbers, and from a solution back to a strategy."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from planner.cost.model import LayerCost
from planner.cost.table import CostTable
from planner.errors import InfeasibleError
from planner.ir.graph import tied_layers
from planner.ir.split import Split
from planner.search.problem import Choice, Costs, Problem


@dataclass(frozen=True, slots=True)
class Formulation:
    """A problem and the layers behind its variables.

    Layers that share a parameter are one variable: they take the same split on every axis.

    Attributes:
        problem: the additive problem.
        variable_of: for every layer its variable.
        options: for every layer the position of each of its variable's options among its own splits.
    """

    problem: Problem
    variable_of: tuple[int, ...]
    options: tuple[tuple[int, ...], ...]

    def layer_choice(self, choice: Choice) -> Choice:
        """Return the position of every layer's split for a choice of options."""
        return tuple(options[choice[v]] for options, v in zip(self.options, self.variable_of, strict=True))

    def pinned(self, allowed: Mapping[int, Sequence[int]]) -> tuple["Formulation", Problem]:
        """Return the formulation and problem in which some layers keep only these of their splits."""
        keep = [np.arange(len(costs)) for costs in self.problem.node_s]
        for layer, positions in allowed.items():
            v = self.variable_of[layer]
            keep[v] = np.array([o for o in keep[v] if self.options[layer][o] in positions], dtype=np.int64)
        problem = self.problem
        node_s = tuple(costs[k] for costs, k in zip(problem.node_s, keep, strict=True))
        edge_s = {(i, j): costs[np.ix_(keep[i], keep[j])] for (i, j), costs in problem.edge_s.items()}
        resident = tuple(b[k] for b, k in zip(problem.resident_bytes, keep, strict=True))
        transient = tuple(b[k] for b, k in zip(problem.transient_bytes, keep, strict=True))
        smaller = Problem(node_s, edge_s, resident, transient, problem.limit_bytes)
        options = tuple(tuple(own[o] for o in keep[v]) for own, v in zip(self.options, self.variable_of, strict=True))
        return replace(self, problem=smaller, options=options), smaller


def formulate(table: CostTable, *, sync_weight: float = 1.0, limit_bytes: int | None = None) -> Formulation:
    """Return the additive problem of a table: compute, blocking transfers, updates and gradient sync.

    Args:
        table: the costs.
        sync_weight: share of the gradient reductions that counts; 1 is the additive cost of
            [OptCNN18], 0 a bound that no overlap can undercut.
        limit_bytes: memory of the smallest device.

    Raises:
        InfeasibleError: layers that share a parameter have no split in common.
    """
    variable_of, options = _variables(table)
    count = max(variable_of) + 1
    sizes = [0] * count
    for v, own in zip(variable_of, options, strict=True):
        sizes[v] = len(own)
    node_s: list[Costs] = [np.zeros(n) for n in sizes]
    resident = [np.zeros(n, dtype=np.int64) for n in sizes]
    transient = [np.zeros(n, dtype=np.int64) for n in sizes]
    vectors: dict[int, Costs] = {}
    for v, own, costs in zip(variable_of, options, table.layers, strict=True):
        if id(costs) not in vectors:
            vectors[id(costs)] = _node_vector(table, costs, sync_weight)
        index = list(own)
        node_s[v] += vectors[id(costs)][index]
        resident[v] += np.array([c.memory.resident for c in costs])[index]
        transient[v] = np.maximum(transient[v], np.array([c.memory.transient for c in costs])[index])
    edge_s: dict[tuple[int, int], Costs] = {}
    for (i, j, _), edge in table.edges.items():
        a, b = variable_of[i], variable_of[j]
        both = (edge.forward_s + edge.backward_s)[np.ix_(options[i], options[j])]
        if a == b:
            node_s[a] += np.diagonal(both)
        else:
            key, matrix = ((a, b), both) if a < b else ((b, a), both.T)
            edge_s[key] = edge_s[key] + matrix if key in edge_s else matrix
    problem = Problem(tuple(node_s), edge_s, tuple(resident), tuple(transient), limit_bytes)
    return Formulation(problem, variable_of, options)


def _node_vector(table: CostTable, costs: Sequence[LayerCost], sync_weight: float) -> Costs:
    return np.array([
        c.forward_s + c.backward_s + c.collect_s + c.update_s + c.blocking_forward.seconds + c.blocking_backward.seconds
        + sync_weight * sum(table.model.pricer.all_reduce(axes, b).seconds for axes, b in c.sync.items())
        for c in costs
    ])  # fmt: skip


def _variables(table: CostTable) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    layers = table.space.graph.layers
    splits = table.space.splits
    leader = tied_layers(table.space.graph)
    numbers: dict[int, int] = {}
    variable_of = tuple(numbers.setdefault(leader[i], len(numbers)) for i in range(len(layers)))
    common: dict[int, tuple[Split, ...]] = {}
    for layer, v in zip(layers, variable_of, strict=True):
        mine = splits[layer.id]
        common[v] = tuple(s for s in common[v] if s in mine) if v in common else mine
        if not common[v]:
            raise InfeasibleError(
                f"layer {layer.id!r} shares a parameter with a layer that has no split in common with it"
            )
    options = tuple(
        tuple(range(len(splits[layer.id]))) if common[v] == splits[layer.id]
        else tuple(splits[layer.id].index(s) for s in common[v])
        for layer, v in zip(layers, variable_of, strict=True)
    )  # fmt: skip
    return variable_of, options
