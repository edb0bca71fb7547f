"""The other splits of one layer of a strategy, and what each would cost."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from planner.cost.resimulate import Resimulation
from planner.cost.simulate import simulated_step_s
from planner.cost.table import CostTable
from planner.ir.split import LayerId, Split
from planner.search.elimination import solve_dp
from planner.search.formulate import Formulation
from planner.search.problem import Choice


@dataclass(frozen=True, slots=True)
class Handover:
    """What it takes to hand tensors, and their gradients back, between a layer and a neighbour.

    Attributes:
        neighbour: the layer on the other side, under the plan's split.
        seconds: of a step, both directions, halos included.
        halo_s: the part of it that is a halo exchange.
    """

    neighbour: LayerId
    seconds: float
    halo_s: float


@dataclass(frozen=True, slots=True)
class Alternative:
    """One legal split of a layer, in seconds of a step on the busiest device.

    Attributes:
        split: what each mesh axis would split.
        is_planned: it is the plan's.
        compute_s: forward, backward and update of the layer.
        sums_s: partial sums and batch norm statistics.
        handovers: with every neighbour as the plan splits it.
        sync_s: gradient reductions, whether or not they are hidden.
        memory_bytes: what a device keeps of the layer through the step.
        kept_s: the simulated step if no other layer changes.
        followed_s: the simulated step if all other layers are planned around it (exact minimum of the sum of costs,
            memory limit kept); inf where nothing fits in memory.
    """

    split: Split
    is_planned: bool
    compute_s: float
    sums_s: float
    handovers: tuple[Handover, ...]
    sync_s: float
    memory_bytes: int
    kept_s: float
    followed_s: float

    @property
    def transfer_s(self) -> float:
        """Handovers but for halos."""
        return math.fsum(each.seconds - each.halo_s for each in self.handovers)

    @property
    def halo_s(self) -> float:
        """Halo exchanges of the handovers."""
        return math.fsum(each.halo_s for each in self.handovers)

    @property
    def own_s(self) -> float:
        """What the layer costs by itself, whatever its neighbours do."""
        return self.compute_s + self.sums_s + self.sync_s


@dataclass(frozen=True, slots=True)
class Flip:
    """A change of the problem under which another split of the layer is the better one.

    Attributes:
        what: ``links`` (all bandwidths multiplied) or ``batch``.
        factor: the smallest power of two, up or down, that was found to do it.
        split: the one that wins then.
        gain: share of the step that it saves then.
    """

    what: str
    factor: float
    split: Split
    gain: float


@dataclass(frozen=True, slots=True)
class Place:
    """A coordinate of a mesh axis, and what it computes alone of a region.

    Attributes:
        where: axis and coordinate, such as ``gpu=0``.
        branches: their first layers.
        layers: of all of them.
        compute_s: of a step.
        idle_s: how much less that is than the busiest coordinate's.
    """

    where: str
    branches: tuple[LayerId, ...]
    layers: tuple[LayerId, ...]
    compute_s: float
    idle_s: float


@dataclass(frozen=True, slots=True)
class Placed:
    """A region whose branches run at the same time.

    Attributes:
        region: in words.
        places: by coordinate.
        step_s: of the strategy.
        spread_s: the simulated step if all devices compute every layer of the region together, and all other layers
            are planned around it; inf where nothing fits in memory.
    """

    region: str
    places: tuple[Place, ...]
    step_s: float
    spread_s: float

    def place_of(self, layer: LayerId) -> Place | None:
        """Return where a layer is computed alone; None where all devices do."""
        return next((place for place in self.places if layer in place.layers), None)


@dataclass(frozen=True, slots=True)
class Explanation:
    """The alternatives of one layer of a plan.

    Attributes:
        layer, op: which one.
        tied: other layers that take the same split, because they share a parameter.
        step_s: of the plan, on the machine that it is explained for.
        alternatives: the planned one first, then by what the step would be at best.
        flips: what would have to change; empty where nothing that was tried does it.
        placed: regions whose branches run at the same time, the layer on some of the devices.
    """

    layer: LayerId
    op: str
    tied: tuple[LayerId, ...]
    step_s: float
    alternatives: tuple[Alternative, ...]
    flips: tuple[Flip, ...]
    placed: tuple[Placed, ...] = ()

    @property
    def planned(self) -> Alternative:
        """The plan's own split."""
        return self.alternatives[0]


@dataclass(frozen=True, slots=True)
class Standing:
    """A layer of a plan and its runner-up, if only this layer changed.

    Attributes:
        layer, op: which one.
        split: the plan's.
        other: the split of the shortest step beside it; None where there is no other.
        more_s: by how much that step is longer (negative: shorter).
    """

    layer: LayerId
    op: str
    split: Split
    other: Split | None
    more_s: float


@dataclass(frozen=True)
class Around:
    """A strategy among all others of its space.

    Attributes:
        table: all costs.
        choice: the position of every layer's split.
        formulation: additive, under the memory limit.
        bucket_bytes: of the gradient reductions.
    """

    table: CostTable
    choice: Choice
    formulation: Formulation
    bucket_bytes: int

    def standings(self) -> Iterator[Standing]:
        """Yield every layer with the best other split while no other layer changes."""
        resimulated = Resimulation(self.table, self.choice, self.bucket_bytes)
        step_s = resimulated.step_s()
        for j, layer in enumerate(self.table.space.graph.layers):
            splits, own = self.table.space.splits[layer.id], self.choice[j]
            steps = [(resimulated.step_s(changes), c) for c, changes in self._changes(j) if c != own]
            best_s, best = min(steps, default=(step_s, own))
            other = splits[best] if steps else None
            yield Standing(layer.id, layer.op.kind, splits[own], other, best_s - step_s)

    def alternatives(self, layer: LayerId, progress: Callable[[str], None]) -> tuple[Alternative, ...]:
        """Return the splits of a layer, the strategy's own first, then by what the step would be at best."""
        j = self.table.space.graph.index[layer]
        resimulated = Resimulation(self.table, self.choice, self.bucket_bytes)
        found = []
        for c, changes in self._changes(j):
            progress(f"planning around {self.table.space.splits[layer][c]}")
            kept_s = resimulated.step_s(changes)
            followed = least(self.table, self.formulation, {j: (c,)}, self.bucket_bytes)
            followed_s = math.inf if followed is None else followed[0]
            if self._fits(changes):
                followed_s = min(followed_s, kept_s)
            found.append(self._alternative(j, c, kept_s, followed_s))
        found.sort(key=lambda each: (not each.is_planned, each.followed_s, each.kept_s))
        return tuple(found)

    def tied(self, layer: LayerId) -> tuple[LayerId, ...]:
        """Return the other layers that take the split of a layer."""
        j, layers = self.table.space.graph.index[layer], self.table.space.graph.layers
        members = self.formulation.members()[self.formulation.variable_of[j]]
        return tuple(layers[member].id for member in members if member != j)

    def _changes(self, j: int) -> Iterator[tuple[int, dict[int, int]]]:
        """Yield the positions of a layer's splits that are options, and what changes with each: tied layers too."""
        members = self.formulation.members()[self.formulation.variable_of[j]]
        for option, c in enumerate(self.formulation.options[j]):
            yield c, {member: self.formulation.options[member][option] for member in members}

    def _fits(self, changes: Mapping[int, int]) -> bool:
        choice = [changes.get(j, c) for j, c in enumerate(self.choice)]
        return self.formulation.problem.fits(self.formulation.options_of(choice))

    def _alternative(self, j: int, c: int, kept_s: float, followed_s: float) -> Alternative:
        table, choice = self.table, self.choice
        layer, cost = table.space.graph.layers[j], table.layers[j][c]
        sync_s = math.fsum(table.model.sync(axes, num_bytes).seconds for axes, num_bytes in cost.sync.items())
        sync_s += math.fsum(table.model.pricer.all_reduce(axes, b).seconds for axes, b in cost.whole.items())
        return Alternative(
            table.space.splits[layer.id][c],
            c == choice[j],
            cost.forward_s + cost.backward_s + cost.collect_s + cost.update_s,
            cost.blocking_forward.seconds + cost.blocking_backward.seconds,
            tuple(self._handovers(j, c)),
            sync_s,
            cost.memory.resident,
            kept_s,
            followed_s,
        )

    def _handovers(self, j: int, c: int) -> Iterator[Handover]:
        layers, choice = self.table.space.graph.layers, self.choice
        for (producer, consumer, _), edge in self.table.edges.items():
            if j not in {producer, consumer}:
                continue
            pair = c if producer == j else choice[producer], c if consumer == j else choice[consumer]
            seconds = float(edge.forward_s[pair] + edge.backward_s[pair])
            neighbour = layers[consumer if producer == j else producer].id
            yield Handover(neighbour, seconds, seconds if edge.halos.get(pair) is not None else 0.0)


def least(
    table: CostTable, formulation: Formulation, pinned: Mapping[int, Sequence[int]], bucket_bytes: int
) -> tuple[float, tuple[int, ...]] | None:
    """Return the simulated step and the splits of the least sum of costs with some layers pinned; None: none fits."""
    smaller, problem = formulation.pinned(pinned)
    solution = solve_dp(problem)
    if solution.choice is None:
        return None
    choice = smaller.layer_choice(solution.choice)
    return simulated_step_s(table, choice, bucket_bytes), choice
