"""The length of a step after a few layers changed their splits, without simulating the whole step again.

Local search changes one variable of hundreds and asks for the new step. Of ``planner.cost.simulate`` that changes

- the terms of the layers that changed and of their readers: compute, transfers, partial sums;
- the buckets of the gradients whose bytes changed, from the changed one on;
- backward from the first of these on, until no reduction runs both here and in the step before: from there the two
  differ by a shift in time only.

Everything else is kept from the step before: the sum of forward, the state of the streams as backward reached each
layer, the times at which they were idle. It is what [FlexFlow19] calls delta simulation, for one device's step.

Where parameters are sharded, streams are busy in forward too, and where ranks may be idle in some layers, each part has
streams of its own: such steps are simulated whole.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from planner.cost.model import Axes
from planner.cost.overlap import State, Streams
from planner.cost.sharding import ParameterSharding
from planner.cost.simulate import NO_GRADIENTS, LayerBackward, simulated_step_s
from planner.cost.table import CostTable, EdgeCost
from planner.cost.transfer import Reduction
from planner.ir.bucket import fill_buckets

Changes = Mapping[int, int]
"""By the position of a layer, the position of its new split."""


class _Terms(NamedTuple):
    """What one layer adds to a step.

    Before backward begins and after the reductions have ended (``unhidden_s``), time is a plain sum.
    """

    unhidden_s: float
    backward: LayerBackward


class _Trial(NamedTuple):
    """A step with some layers changed.

    Attributes:
        terms: of every layer.
        unhidden_s: of all layers.
        sync: of every group of ranks, bytes by layer; only groups that changed.
        completed: of every group that changed, bytes of its buckets by the layer that completes them.
        launches: of every layer that posts reductions, all groups.
        first, last: where backward first differs from the step before, and below which layer it does no more.
    """

    terms: list[_Terms]
    unhidden_s: float
    sync: Mapping[Axes, Mapping[int, int]]
    completed: Mapping[Axes, Mapping[int, int]]
    launches: Mapping[int, Sequence[Reduction]]
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class _Passage:
    """How backward went: its end, and what the streams did when it reached each layer (counted from its start)."""

    states: list[tuple[float, State]]
    idle_s: list[float | None]
    end_s: float


class Resimulation:
    """The simulated step of a strategy, and of strategies that differ from it in a few layers.

    Args:
        table: the costs.
        choice: the position of every layer's split.
        bucket_bytes: that close a bucket.
    """

    def __init__(self, table: CostTable, choice: Sequence[int], bucket_bytes: int) -> None:
        self._table, self._bucket_bytes = table, bucket_bytes
        self._is_whole = table.has_idle or table.model.settings.parameter_sharding is not ParameterSharding.NONE
        self._level_names = tuple(level.name for level in table.model.machine.levels)
        count = len(table.layers)
        self._in_edges: list[list[tuple[int, EdgeCost]]] = [[] for _ in range(count)]
        self._readers: list[list[int]] = [[] for _ in range(count)]
        for (i, j, _), edge in table.edges.items():
            self._in_edges[j].append((i, edge))
            self._readers[i].append(j)
        self._priced: dict[tuple[Axes, int], Reduction] = {}
        self._choice = list(choice)
        self._terms = [_Terms(0.0, LayerBackward(0.0, 0, 0.0, NO_GRADIENTS))] * count
        self._unhidden_s = 0.0
        self._sync: dict[Axes, Mapping[int, int]] = defaultdict(dict)
        self._completed: dict[Axes, Mapping[int, int]] = defaultdict(dict)
        self._launches: dict[int, Sequence[Reduction]] = {}
        self._passage = _Passage([(0.0, ((), ()))] * count, [0.0] * count, 0.0)
        self._apply(self._trial(self._choice, range(count)))

    @property
    def choice(self) -> tuple[int, ...]:
        """The position of every layer's split."""
        return tuple(self._choice)

    def step_s(self, changes: Changes | None = None) -> float:
        """Return the length of the step with some layers changed, in seconds; nothing is kept of it."""
        choice = self._changed(changes or {})
        if self._is_whole:
            return simulated_step_s(self._table, choice, self._bucket_bytes)
        changed = [j for j in changes or () if choice[j] != self._choice[j]]
        if not changed:
            return self._unhidden_s + self._passage.end_s
        trial = self._trial(choice, changed)
        return trial.unhidden_s + self._backward(trial)

    def apply(self, changes: Changes) -> float:
        """Change some layers for good; return the length of the step."""
        choice = self._changed(changes)
        changed = [j for j in changes if choice[j] != self._choice[j]]
        if changed and not self._is_whole:
            self._apply(self._trial(choice, changed))
        self._choice = choice
        return self.step_s()

    def _changed(self, changes: Changes) -> list[int]:
        choice = list(self._choice)
        for j, position in changes.items():
            choice[j] = position
        return choice

    def _terms_of(self, j: int, choice: Sequence[int]) -> _Terms:
        cost = self._table.layers[j][choice[j]]
        forward_s, gradients = 0.0, NO_GRADIENTS
        for i, edge in self._in_edges[j]:
            pair = choice[i], choice[j]
            forward_s += float(edge.forward_s[pair])
            gradients = gradients.with_edge(edge, pair)
        return _Terms(
            forward_s + cost.forward_s + cost.blocking_forward.seconds + cost.update_s,
            LayerBackward.of(cost, gradients),
        )

    def _trial(self, choice: Sequence[int], changed: Iterable[int]) -> _Trial:
        """Return the step of a choice that differs from ours in some layers."""
        terms = list(self._terms)
        touched = sorted({j for c in changed for j in (c, *self._readers[c])})
        unhidden_s = self._unhidden_s
        for j in touched:
            terms[j] = self._terms_of(j, choice)
            unhidden_s += terms[j].unhidden_s - self._terms[j].unhidden_s
        sync: dict[Axes, dict[int, int]] = {}
        for j in changed:
            before, after = (self._table.layers[j][c].sync for c in (self._choice[j], choice[j]))
            for axes in {**before, **after}:
                if self._sync[axes].get(j) == after.get(axes):
                    continue
                own = sync.setdefault(axes, dict(self._sync[axes]))
                own.pop(j, None)
                if axes in after:
                    own[j] = after[axes]
        top = max(touched, default=-1)
        completed = {axes: self._buckets(members, self._completed[axes], top) for axes, members in sync.items()}
        moved = sorted({
            j for axes, buckets in completed.items() for j in {**buckets, **self._completed[axes]}
            if buckets.get(j) != self._completed[axes].get(j)
        })  # fmt: skip
        launches = dict(self._launches)
        groups = sorted({*self._completed, *completed}) if moved else []
        for j in moved:
            found = ((axes, completed.get(axes, self._completed[axes]).get(j)) for axes in groups)
            launches[j] = [self._reduction(axes, num_bytes) for axes, num_bytes in found if num_bytes is not None]
        places = [*touched, *moved]
        return _Trial(terms, unhidden_s, sync, completed, launches, max(places, default=-1), min(places, default=0))

    def _buckets(self, members: Mapping[int, int], before: Mapping[int, int], top: int) -> dict[int, int]:
        """Return the bytes of the buckets of one group of ranks by the layer that completes them.

        Args:
            members: bytes by layer.
            before: the buckets before the change.
            top: last layer whose bytes may have changed; full buckets that were complete before it stay.
        """
        kept = {j: num_bytes for j, num_bytes in before.items() if j > top and num_bytes >= self._bucket_bytes}
        lowest = min(kept, default=len(self._terms))
        order = sorted((j for j in members if j < lowest), reverse=True)
        buckets = fill_buckets([(None, members[j]) for j in order], self._bucket_bytes)
        kept.update((order[bucket.items[-1]], sum(members[order[i]] for i in bucket.items)) for bucket in buckets)
        return kept

    def _reduction(self, axes: Axes, num_bytes: int) -> Reduction:
        key = axes, num_bytes
        if key not in self._priced:
            self._priced[key] = self._table.model.reduction(axes, num_bytes)
        return self._priced[key]

    def _backward(self, trial: _Trial) -> float:
        """Return the length of backward and of what is left of the reductions behind it."""
        before = self._passage
        streams = self._resumed(trial.first)
        for j in range(trial.first, -1, -1):
            idle_s = before.idle_s[j]
            if j < trial.last and streams.is_idle and idle_s is not None:
                return before.end_s + (streams.now_s - idle_s)
            trial.terms[j].backward.run(streams, trial.launches.get(j, ()))
        streams.finish()
        return streams.now_s

    def _apply(self, trial: _Trial) -> None:
        """Make a trial ours, and note how the streams get through it."""
        self._terms = trial.terms
        self._unhidden_s = math.fsum(terms.unhidden_s for terms in trial.terms)
        self._launches = dict(trial.launches)
        self._sync.update(trial.sync)
        self._completed.update(trial.completed)
        states, idle_s = list(self._passage.states), list(self._passage.idle_s)
        streams = self._resumed(trial.first)
        for j in range(trial.first, -1, -1):
            states[j] = streams.now_s, streams.state()
            idle_s[j] = streams.now_s if streams.is_idle else None
            trial.terms[j].backward.run(streams, trial.launches.get(j, ()))
        streams.finish()
        self._passage = _Passage(states, idle_s, streams.now_s)

    def _resumed(self, first: int) -> Streams:
        streams = Streams(self._level_names, keeps_events=False)
        streams.resume(*self._passage.states[first])
        return streams
