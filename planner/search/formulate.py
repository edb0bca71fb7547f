"""From a table of costs to a problem of numbers, and from a solution back to a strategy."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from planner.cost.model import Axes, LayerCost
from planner.cost.sharding import ParameterSharding
from planner.cost.table import CostTable, EdgeCost
from planner.errors import InfeasibleError
from planner.ir.split import Split
from planner.search.problem import Bytes, Chain, Choice, Costs, Pair, Problem

Objective = Literal["additive", "chain"]
"""How what overlaps is counted (``formulate``)."""


@dataclass(frozen=True, slots=True)
class Formulation:
    """A problem and the layers behind its variables.

    Layers that share a parameter are one variable: they take the same split on every axis.

    Attributes:
        problem: additive, or with a chain.
        variable_of: for every layer its variable.
        options: for every layer the position of each of its variable's options among its own splits.
    """

    problem: Problem
    variable_of: tuple[int, ...]
    options: tuple[tuple[int, ...], ...]

    def layer_choice(self, choice: Choice) -> Choice:
        """Return the position of every layer's split for a choice of options."""
        return tuple(options[choice[v]] for options, v in zip(self.options, self.variable_of, strict=True))

    def members(self) -> list[list[int]]:
        """Return the layers of every variable, those tied to each other; none is empty."""
        found: list[list[int]] = [[] for _ in self.problem.node_s]
        for layer, v in enumerate(self.variable_of):
            found[v].append(layer)
        return found

    def options_of(self, choice: Sequence[int]) -> Choice:
        """Return the option of every variable in a choice of splits."""
        return tuple(self.options[layers[0]].index(choice[layers[0]]) for layers in self.members())

    def pinned(self, allowed: Mapping[int, Sequence[int]]) -> tuple["Formulation", Problem]:
        """Return the formulation and problem in which some layers keep only these of their splits."""
        keep = [np.arange(len(costs)) for costs in self.problem.node_s]
        for layer, positions in allowed.items():
            v = self.variable_of[layer]
            keep[v] = np.array([o for o in keep[v] if self.options[layer][o] in positions], dtype=np.int64)
        smaller = self.problem.restricted(keep)
        options = tuple(tuple(own[o] for o in keep[v]) for own, v in zip(self.options, self.variable_of, strict=True))
        return replace(self, problem=smaller, options=options), smaller


def formulate(
    table: CostTable,
    *,
    sync_weight: float = 1.0,
    limit_bytes: int | None = None,
    objective: Objective = "additive",
    least_of_bucket: int | None = None,
) -> Formulation:
    """Return the problem of a table: compute, blocking transfers, updates and gradient sync.

    Layers and edges that share their costs share their arrays. What only some of the ranks do counts in their share of
    all ranks: costs are then means over the ranks, and no rank that is last has done less. Ranks that compute different
    branches at the same time are counted no finer; the simulator does that.

    Args:
        table: the costs.
        sync_weight: share of the gradient reductions that counts; 1 is the additive cost of
            [OptCNN18], 0 a bound that no overlap can undercut.
        limit_bytes: memory of the smallest device.
        objective: ``additive``: everything follows each other. ``chain``: gradient reductions run behind backward
            (``planner.search.problem.Chain``), each layer's own, not in buckets; a variable of several tied layers is
            where the last of them is reached.
        least_of_bucket: with a chain: what reductions take at least in the simulator's buckets of up to so many bytes,
            instead of each layer's alone. No simulated step is then shorter than the chain's: of tied layers only the
            reductions of the last one reached count, since those of the others may have ended before.

    Raises:
        InfeasibleError: layers that share a parameter have no split in common.
    """
    variable_of, options = _variables(table)
    sums = _Sums(table, variable_of, options)
    layer_sync = objective == "additive"
    node_s = sums.nodes(lambda c: _blocking_s(c) + (sync_weight * _sync_s(table, c) if layer_sync else 0.0))
    edge_s, diagonal = sums.edges(lambda edge: edge.forward_s + edge.backward_s)
    resident, transient = sums.bytes()
    chain = None
    if objective == "chain":
        transfer_s, between_tied = sums.transfers(lambda edge: edge.backward_s)
        backward_s = sums.nodes(lambda c: c.backward_s + c.collect_s + c.blocking_backward.seconds)
        order = tuple(reversed(range(len(node_s))))
        chain = Chain(
            order, _with(backward_s, between_tied), sums.nodes(lambda c: c.update_s), transfer_s,
            sums.levels(_sync_of(table, sync_weight, least_of_bucket), last_reached=least_of_bucket is not None),
        )  # fmt: skip
    problem = Problem(_with(node_s, diagonal), edge_s, resident, transient, limit_bytes, chain)
    return Formulation(problem, variable_of, options)


def _blocking_s(c: LayerCost) -> float:
    blocking_s = c.blocking_forward.seconds + c.blocking_backward.seconds
    return c.forward_s + c.backward_s + c.collect_s + c.update_s + blocking_s


def _sync_s(table: CostTable, c: LayerCost) -> float:
    model = table.model
    whole_s = sum(model.pricer.all_reduce(axes, b).seconds for axes, b in c.whole.items())
    return whole_s + sum(model.sync(axes, b).seconds for axes, b in c.sync.items()) + model.gathers(c).seconds


def _sync_of(table: CostTable, weight: float, least_of_bucket: int | None) -> Callable[[Axes, int], float]:
    """Return what gives the seconds of a reduction over these axes of so many bytes; arguments as of ``formulate``."""
    model = table.model
    if least_of_bucket is None:
        return lambda axes, num_bytes: weight * model.sync(axes, num_bytes).seconds
    if model.settings.parameter_sharding is not ParameterSharding.NONE:
        return lambda axes, num_bytes: 0.0  # noqa: ARG005  # gathers and scatters: no rate is proven
    largest: dict[Axes, int] = {}  # of a layer
    whole: dict[Axes, int] = {}  # of all layers
    for layer in table.layers:
        own: dict[Axes, int] = {}
        for c in layer:
            for axes, num_bytes in c.sync.items():
                own[axes] = max(own.get(axes, 0), num_bytes)
        for axes, num_bytes in own.items():
            largest[axes] = max(largest.get(axes, 0), num_bytes)
            whole[axes] = whole.get(axes, 0) + num_bytes
    most = {axes: min(least_of_bucket + largest[axes], whole[axes]) for axes in whole}
    return lambda axes, num_bytes: weight * model.pricer.least_reduction_s(axes, num_bytes, most[axes])


def _with(vectors: Sequence[Costs], more: Mapping[int, Costs]) -> tuple[Costs, ...]:
    return tuple(own + more[v] if v in more else own for v, own in enumerate(vectors))


class _Sums:
    """Sums over the layers of each variable; what is the same for several is computed, and kept, once."""

    def __init__(self, table: CostTable, variable_of: Sequence[int], options: Sequence[tuple[int, ...]]) -> None:
        self._table, self._variable_of, self._options = table, variable_of, options
        self._whole = [len(own) == len(costs) for own, costs in zip(options, table.layers, strict=True)]
        self._members: dict[int, list[int]] = {}
        for layer, v in enumerate(variable_of):
            self._members.setdefault(v, []).append(layer)

    def _sum(
        self, rows: Callable[[Sequence[LayerCost]], NDArray[Any]], last_reached: bool = False
    ) -> list[NDArray[Any]]:
        """Return for every variable the sum over its layers of arrays with the splits as last axis.

        Args:
            rows: the array of a layer.
            last_reached: instead of the sum that of the layer which backward reaches last.
        """
        made: dict[int, NDArray[Any]] = {}
        found = []
        for layers in self._members.values():
            parts = []
            for layer in layers[:1] if last_reached else layers:
                costs = self._table.layers[layer]
                if id(costs) not in made:
                    made[id(costs)] = rows(costs)
                own = made[id(costs)]
                parts.append(own if self._whole[layer] else own[..., list(self._options[layer])])
            found.append(parts[0] if len(parts) == 1 else np.sum(parts, axis=0))
        return found

    def nodes(self, seconds: Callable[[LayerCost], float]) -> tuple[Costs, ...]:
        return tuple(self._sum(lambda costs: np.array([c.busy * seconds(c) for c in costs], dtype=np.float64)))

    def levels(self, sync_s: Callable[[Axes, int], float], last_reached: bool) -> tuple[Costs, ...]:
        """Return the gradient sync on each level of the machine, float64[levels, options] per variable."""
        model = self._table.model
        num_levels = len(model.machine.levels)

        def rows(costs: Sequence[LayerCost]) -> Costs:
            found = np.zeros((num_levels, len(costs)))
            for o, c in enumerate(costs):
                for axes, num_bytes in c.sync.items():
                    seconds, levels = c.busy * sync_s(axes, num_bytes), model.pricer.levels(axes)
                    for level in range(num_levels):
                        found[level, o] += seconds * (levels >> level & 1)
            return found

        return tuple(self._sum(rows, last_reached))

    def bytes(self) -> tuple[tuple[Bytes, ...], tuple[Bytes, ...]]:
        """Return resident and transient bytes; those of tied layers are held together, needed one at a time."""
        resident = self._sum(lambda costs: np.array([c.memory.resident for c in costs], dtype=np.int64))
        made: dict[int, Bytes] = {}
        transient = []
        for layers in self._members.values():
            parts = []
            for layer in layers:
                costs = self._table.layers[layer]
                if id(costs) not in made:
                    made[id(costs)] = np.array([c.memory.transient for c in costs], dtype=np.int64)
                own = made[id(costs)]
                parts.append(own if self._whole[layer] else own[list(self._options[layer])])
            transient.append(parts[0] if len(parts) == 1 else np.max(parts, axis=0))
        return tuple(resident), tuple(transient)

    def _busy(self, layer: int) -> Costs:
        return np.array([c.busy for c in self._table.layers[layer]])

    def transfers(self, seconds: Callable[[EdgeCost], Costs]) -> tuple[dict[Pair, Costs], dict[int, Costs]]:
        """Return the sums of edges by (producer, consumer), and those within a variable by variable."""
        made: dict[object, Costs] = {}
        found: dict[Pair, Costs] = {}
        within: dict[int, Costs] = {}
        for (i, j, _), edge in self._table.edges.items():
            cuts = tuple(None if self._whole[x] else self._options[x] for x in (i, j))
            key = (id(edge), *cuts)
            if key not in made:
                made[key] = seconds(edge)
                if self._table.has_idle:
                    made[key] = made[key] * np.minimum.outer(*map(self._busy, (i, j)))
                if any(cuts):
                    made[key] = made[key][np.ix_(self._options[i], self._options[j])]
            a, b = self._variable_of[i], self._variable_of[j]
            if a == b:
                within[a] = within.get(a, 0.0) + np.diagonal(made[key])
            else:
                found[a, b] = found[a, b] + made[key] if (a, b) in found else made[key]
        return found, within

    def edges(self, seconds: Callable[[EdgeCost], Costs]) -> tuple[dict[Pair, Costs], dict[int, Costs]]:
        """Return the sums of edges by (smaller, larger variable), and those within a variable by variable."""
        directed, within = self.transfers(seconds)
        turned: dict[int, Costs] = {}
        found: dict[Pair, Costs] = {}
        for (a, b), costs in directed.items():
            key, matrix = ((a, b), costs) if a < b else ((b, a), turned.setdefault(id(costs), costs.T))
            found[key] = found[key] + matrix if key in found else matrix
        return found, within


def _variables(table: CostTable) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    layers = table.space.graph.layers
    splits = table.space.splits
    leader = table.space.leaders
    numbers: dict[int, int] = {}
    variable_of = tuple(numbers.setdefault(leader[i], len(numbers)) for i in range(len(layers)))
    common: dict[int, tuple[Split, ...]] = {}
    for layer, v in zip(layers, variable_of, strict=True):
        mine = splits[layer.id]
        common[v] = tuple(s for s in common[v] if s in mine) if v in common else mine
        if not common[v]:
            raise InfeasibleError(
                f"layer {layer.id!r} shares a parameter with a layer, or is tied to one, that has no split in common "
                "with it"
            )
    options = tuple(
        tuple(range(len(splits[layer.id]))) if common[v] == splits[layer.id]
        else tuple(splits[layer.id].index(s) for s in common[v])
        for layer, v in zip(layers, variable_of, strict=True)
    )  # fmt: skip
    return variable_of, options
