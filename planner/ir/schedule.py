"""The order of work in a pipeline, decided once: the cost model simulates these lists and the runtime executes them.

A *position* is a group of ranks that holds one stage; interleaved, position p of P holds the stages p, p + P, p + 2P.
Two families:

**Synchronous kinds** divide the batch into micro-batches and end every step with nothing in flight, so their results
are those of one device. The orders are those of ``torch.distributed.pipelining.schedules`` without its empty slots
(``tests/unit/ir/test_schedule.py`` holds each against it). They follow the papers with two differences:

- ``gpipe`` [GPipe, NeurIPS 2019] runs backward in the order of forward; the paper's figure in the opposite one.
- ``interleaved`` [Megatron-LM, SC 2021] goes in rounds of ``M // max(1, M // P)`` micro-batches instead of P, so that
  M need not be a multiple of P, only of the number of rounds.

Ours differ from torch's where torch refuses: ``1f1b`` takes fewer micro-batches than stages, and with one stage at
every position, where rounds have no meaning, ``interleaved`` and ``zero-bubble`` take any number of micro-batches.

``zero-bubble`` [Zero Bubble, ICLR 2024] is ZB-H1, which torch calls ZB1P: the order of 1F1B with backward in two parts,
the weight's part later by as many micro-batches as there are positions in front, so that every position holds
as much as the first one of 1F1B. With several stages at a position, the parts are put off alike, in rounds as above.

**Kinds in cycles**, ``stale`` [Zhang & Abdelrahman 2021] and ``pipedream`` [PipeDream, SOSP 2019], have no
micro-batches and never empty: in cycle c, stage i of K + 1 (from 0) does the forward of batch c - i, the backward of
batch c - (2K - i), and updates. What a cycle sends is used one cycle later. ``Action.microbatch`` is then the number of
the batch. PipeDream's own 1F1B holds K + 1 - i batches at stage i (NOAM at the first), because a stage waits for what
others compute in the same cycle; in these cycles it is 2(K - i) + 1, as in the other paper's comparison with it.
"""

from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final, assert_never

from planner.errors import UsageError


class ScheduleKind(StrEnum):
    """How the stages of a plan take turns."""

    SINGLE = "single"
    """One stage; several micro-batches are gradient accumulation."""
    GPIPE = "gpipe"
    ONE_F_ONE_B = "1f1b"
    INTERLEAVED = "interleaved"
    ZERO_BUBBLE = "zero-bubble"
    STALE = "stale"
    """Current weights, stored activations; an update in every cycle."""
    PIPEDREAM = "pipedream"
    """As ``stale``, but backward with the weights that forward had: a version for every batch in flight."""

    @property
    def is_synchronous(self) -> bool:
        """Whether a step ends with nothing in flight, and so equals a step of one device."""
        return self not in CYCLIC

    @property
    def splits_backward(self) -> bool:
        """Whether gradients of inputs and of weights are computed apart."""
        return self is ScheduleKind.ZERO_BUBBLE


CYCLIC: Final = frozenset({ScheduleKind.STALE, ScheduleKind.PIPEDREAM})
"""Kinds without micro-batches, which update in every cycle."""
SEVERAL_STAGES: Final = frozenset({ScheduleKind.INTERLEAVED, ScheduleKind.ZERO_BUBBLE})
"""Kinds with any number of stages at a position; the others have one."""


class ActionKind(StrEnum):
    """What a position does; the letters are those of torch."""

    FORWARD = "F"
    BACKWARD = "B"
    """Of inputs and weights together."""
    BACKWARD_INPUT = "I"
    BACKWARD_WEIGHT = "W"


@dataclass(frozen=True, slots=True, order=True)
class Action:
    """One piece of work: of one stage, for one micro-batch, or for one batch of the kinds in cycles."""

    kind: ActionKind
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"


Order = tuple[Action, ...]
"""What one position does, first to last."""


def orders(kind: ScheduleKind, num_stages: int, num_positions: int, num_microbatches: int) -> tuple[Order, ...]:
    """Return what every position does in a step, in this order.

    Args:
        kind: of the schedule.
        num_stages: of the model; a multiple of the positions, and equal to them but for ``SEVERAL_STAGES``.
        num_positions: groups of ranks.
        num_microbatches: of a step. Of a kind in cycles: batches of a run, from filling the pipeline to emptying it.

    Raises:
        UsageError: The numbers do not belong together.
    """
    problem = problem_of(kind, num_stages, num_positions, num_microbatches)
    if problem is not None:
        raise UsageError(problem)
    positions = range(num_positions)
    match kind:
        case ScheduleKind.GPIPE:
            return tuple(_gpipe(p, num_microbatches) for p in positions)
        case ScheduleKind.SINGLE | ScheduleKind.ONE_F_ONE_B:
            return tuple(_Alternating(p, num_stages, num_positions, num_microbatches, 1).order() for p in positions)
        case ScheduleKind.INTERLEAVED:
            return tuple(_Alternating(p, num_stages, num_positions, num_microbatches, 2).order() for p in positions)
        case ScheduleKind.ZERO_BUBBLE:
            return tuple(
                _Alternating(p, num_stages, num_positions, num_microbatches, 1).split_order() for p in positions
            )
        case ScheduleKind.STALE | ScheduleKind.PIPEDREAM:
            cycles = range(num_microbatches + 2 * (num_stages - 1))
            return tuple(
                tuple(action for c in cycles for action in cycle(num_stages, stage, c, num_microbatches))
                for stage in positions
            )
    assert_never(kind)


def problem_of(kind: ScheduleKind, num_stages: int, num_positions: int, num_microbatches: int) -> str | None:
    """Return why these numbers do not belong together, as a sentence with a way out; None where they do."""
    if min(num_stages, num_positions, num_microbatches) < 1:
        counts = f"{num_stages} stages, {num_positions} positions and {num_microbatches} micro-batches"
        return f"schedule {kind.value!r}: {counts}; each must be at least 1."
    if kind is ScheduleKind.SINGLE and num_stages != 1:
        return f"schedule 'single' has one stage, not {num_stages}. Choose another schedule or remove the cuts."
    if num_stages % num_positions:
        return (
            f"schedule {kind.value!r}: {num_stages} stages cannot be dealt evenly to {num_positions} groups of ranks. "
            f"Use a multiple of {num_positions} stages."
        )
    if kind not in SEVERAL_STAGES and num_stages != num_positions:
        return (
            f"schedule {kind.value!r} has one stage for each group of ranks, not {num_stages} for {num_positions}. "
            "Use 'interleaved' or 'zero-bubble', or as many groups as stages."
        )
    rounds = _rounds(num_positions, num_microbatches)
    if kind in SEVERAL_STAGES and num_stages > num_positions and num_microbatches % rounds:
        return (
            f"schedule {kind.value!r}: {num_microbatches} micro-batches on {num_positions} groups of ranks go in "
            f"{rounds} rounds, which do not divide them. Use {num_microbatches - num_microbatches % num_positions} or "
            f"{num_microbatches + -num_microbatches % num_positions} micro-batches."
        )
    return None


def cycle(num_stages: int, stage: int, index: int, num_batches: int | None = None) -> Order:
    """Return what a stage does in a cycle of ``stale`` or ``pipedream``, before it updates where there was a backward.

    Args:
        num_stages: of the model, K + 1.
        stage: from 0.
        index: of the cycle, from 0.
        num_batches: of the whole run; None where it has no end.
    """
    last = num_stages - 1
    planned = (
        Action(ActionKind.FORWARD, stage, index - stage),
        Action(ActionKind.BACKWARD, stage, index - (2 * last - stage)),
    )
    return tuple(a for a in planned if a.microbatch >= 0 and (num_batches is None or a.microbatch < num_batches))


@dataclass(frozen=True, slots=True)
class Held:
    """The micro-batches whose activations a position holds while it does an action, counted by stage.

    Attributes:
        stored: forward has begun, backward has not.
        open: backward has begun; the micro-batch is released at the end of its last part.
    """

    stored: Mapping[int, int]
    open: Mapping[int, int]

    def count(self, stage: int) -> int:
        """Return the micro-batches of a stage."""
        return self.stored.get(stage, 0) + self.open.get(stage, 0)


def held(order: Sequence[Action]) -> Iterator[Held]:
    """Yield for every action what is held while it runs.

    Until the weight's part of backward has run all of a micro-batch's activations count, though some are read by the
    other part only.
    """
    stored: Counter[int] = Counter()
    opened: Counter[int] = Counter()
    for action in order:
        if action.kind is ActionKind.FORWARD:
            stored[action.stage] += 1
        elif action.kind is not ActionKind.BACKWARD_WEIGHT:
            stored[action.stage] -= 1
            opened[action.stage] += 1
        yield Held(dict(stored), dict(opened))
        if action.kind in LAST_BACKWARD:
            opened[action.stage] -= 1


LAST_BACKWARD: Final = frozenset({ActionKind.BACKWARD, ActionKind.BACKWARD_WEIGHT})
"""What ends the backward of a micro-batch at a stage: its gradients of weights are there."""
SENDS_GRADIENTS: Final = frozenset({ActionKind.BACKWARD, ActionKind.BACKWARD_INPUT})
"""What computes the gradients for the stage before."""


def in_flight(kind: ScheduleKind, num_stages: int, num_positions: int, num_microbatches: int) -> tuple[int, ...]:
    """Return for every stage the most micro-batches (or batches) whose activations it holds at once.

    Raises:
        UsageError: The numbers do not belong together.
    """
    most = [0] * num_stages
    for order in orders(kind, num_stages, num_positions, num_microbatches):
        for action, now in zip(order, held(order), strict=True):
            most[action.stage] = max(most[action.stage], now.count(action.stage))
    return tuple(most)


def staleness(kind: ScheduleKind, num_stages: int) -> tuple[int, ...]:
    """Return for every stage by how many updates its weights change between forward and backward of a batch.

    The gradient that an update applies comes from a forward with weights that are so many updates old: 2(K - i) at
    stage i of K + 1, from 0 [Zhang & Abdelrahman 2021: 2(K + 1 - i) cycles at stage i, from 1], with stashed weights
    too; 0 for synchronous kinds.
    """
    if kind.is_synchronous:
        return (0,) * num_stages
    return tuple(
        max(now - min(versions.values(), default=now) for now, versions in _updates(kind, num_stages, stage))
        for stage in range(num_stages)
    )


def weight_versions(kind: ScheduleKind, num_stages: int) -> tuple[int, ...]:
    """Return for every stage the versions of its weights that exist at once, the current one included.

    One but for ``pipedream``, which keeps the weights of the forward of every batch in flight [PipeDream].
    """
    if kind is not ScheduleKind.PIPEDREAM:
        return (1,) * num_stages
    return tuple(
        max(len({now, *versions.values()}) for now, versions in _updates(kind, num_stages, stage))
        for stage in range(num_stages)
    )


def _updates(kind: ScheduleKind, num_stages: int, stage: int) -> Iterator[tuple[int, dict[int, int]]]:
    """Yield at each action of a kind in cycles the updates so far, and those before each forward in flight."""
    updates, versions = 0, dict[int, int]()
    for action in orders(kind, num_stages, num_stages, 4 * num_stages)[stage]:  # long enough to be full for a while
        if action.kind is ActionKind.FORWARD:
            versions[action.microbatch] = updates
        yield updates, dict(versions)
        if action.kind is ActionKind.BACKWARD:
            del versions[action.microbatch]
            updates += 1


def _gpipe(position: int, num_microbatches: int) -> Order:
    kinds = ActionKind.FORWARD, ActionKind.BACKWARD
    return tuple(Action(kind, position, m) for kind in kinds for m in range(num_microbatches))


def _rounds(num_positions: int, num_microbatches: int) -> int:
    return max(1, num_microbatches // num_positions)


@dataclass(frozen=True, slots=True)
class _Alternating:
    """1F1B and what follows from it: some forwards, then forward and backward in turn, then the other backwards.

    Attributes:
        warmup_per_hop: forwards that a position starts with for every position behind it.
    """

    position: int
    num_stages: int
    num_positions: int
    num_microbatches: int
    warmup_per_hop: int

    @property
    def _stages_here(self) -> int:
        return self.num_stages // self.num_positions

    def _sequence(self, kind: ActionKind) -> list[Action]:
        """Return the position's forwards or backwards: stage by stage for a round of micro-batches, then the next."""
        stages = range(self.position, self.num_stages, self.num_positions)
        if kind is not ActionKind.FORWARD:
            stages = stages[::-1]
        size = self._round
        starts = range(0, self.num_microbatches, size)
        return [
            Action(kind, stage, microbatch)
            for start in starts
            for stage in stages
            for microbatch in range(start, min(start + size, self.num_microbatches))
        ]

    @property
    def _round(self) -> int:
        return self.num_microbatches // _rounds(self.num_positions, self.num_microbatches)

    @property
    def _warmup(self) -> int:
        hops = self.num_positions - 1 - self.position
        wanted = (self._stages_here - 1) * self._round + self.warmup_per_hop * hops
        return min(wanted, self._stages_here * self.num_microbatches)

    def order(self) -> Order:
        """Return the order with whole backwards."""
        forwards, backwards = self._sequence(ActionKind.FORWARD), self._sequence(ActionKind.BACKWARD)
        warmup = self._warmup
        order = forwards[:warmup]
        for forward, backward in zip(forwards[warmup:], backwards, strict=False):
            order += (forward, backward)
        return (*order, *backwards[len(forwards) - warmup :])

    def split_order(self) -> Order:
        """Return the order with backward in two parts.

        The weight's part follows that of the inputs as many parts later as there are positions in front.
        """
        order: list[Action] = []
        weights: deque[Action] = deque()
        for action in self.order():
            if action.kind is ActionKind.FORWARD:
                order.append(action)
                continue
            order.append(replace(action, kind=ActionKind.BACKWARD_INPUT))
            weights.append(replace(action, kind=ActionKind.BACKWARD_WEIGHT))
            if len(weights) > self.position:
                order.append(weights.popleft())
        return (*order, *weights)
