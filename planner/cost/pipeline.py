"""One step of a pipeline in time: the orders of ``planner.ir.schedule`` played through, stage by stage.

A position does one action after the other. An action starts when its position is free and what it needs has arrived.
Messages between stages are sent behind computation as soon as they are there, one after the other on a link, and a link
is one direction between two positions. Messages may cost the processors of both ends time (``cpu_s_per_byte``).

- Recompute runs a stage's forward again in front of its backward, in front of the inputs' part where that is apart.
- A stage's gradients are reduced once, from the end of its last backward on, beside what its position still does; then
  the position updates. The step ends with its last update.
- Kinds in cycles do all that in every cycle. Their step is a cycle of the full pipeline (``planner.cost.cycles``).

A stage of several ranks is one position here; its times are those of its slowest rank for its piece of the
(micro-)batch. So PipeDream's replicated stages (1F1B-RR) are stages that split the samples: r replicas that take turns
with whole batches do as much in a cycle as r that share each.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from planner.cost.cycles import Taken, steady_cycle_s
from planner.cost.overlap import Event
from planner.errors import UsageError
from planner.ir.schedule import (
    LAST_BACKWARD,
    SENDS_GRADIENTS,
    Action,
    ActionKind,
    Order,
    ScheduleKind,
    held,
    orders,
    weight_versions,
)

Bytes = Sequence[Any]
"""Of several stages: of each an int, or an array of what it may be, float64."""
SHOWN_BATCHES: Final = 4
"""Times the number of stages: batches of a run in cycles that are played through, enough to be full for a while."""


@dataclass(frozen=True, slots=True)
class StageTimes:
    """What a stage takes for one micro-batch (of kinds in cycles, one batch), and what it holds.

    Attributes:
        forward_s: on its slowest rank, with all communication inside the stage.
        backward_input_s: gradients of what it received; of the first stage, of what its own layers pass back.
        backward_weight_s: gradients of its parameters; a whole backward takes both.
        update_s: optimizer, once a step.
        sync_s: reduction of its gradients, once a step: what does not hide behind its last backward.
        resident_bytes: on its fullest rank, whatever is in flight: parameters, gradients, optimizer state, buffers.
        params_bytes: of them, one version of the parameters.
        saved_bytes: what forward keeps for backward, with the stage's input and output.
        input_bytes: what it keeps with recompute.
        recompute: forward keeps its input only, and runs again in front of backward.
    """

    forward_s: float
    backward_input_s: float
    backward_weight_s: float
    update_s: float = 0.0
    sync_s: float = 0.0
    resident_bytes: int = 0
    params_bytes: int = 0
    saved_bytes: int = 0
    input_bytes: int = 0
    recompute: bool = False

    def seconds(self, kind: ActionKind) -> float:
        """Return what an action takes, without messages."""
        again_s = self.forward_s if self.recompute else 0.0
        match kind:
            case ActionKind.FORWARD:
                return self.forward_s
            case ActionKind.BACKWARD:
                return again_s + self.backward_input_s + self.backward_weight_s
            case ActionKind.BACKWARD_INPUT:
                return again_s + self.backward_input_s
            case ActionKind.BACKWARD_WEIGHT:
                return self.backward_weight_s


@dataclass(frozen=True, slots=True)
class StageLink:
    """What a stage and the next one send each other for a micro-batch (of kinds in cycles, a batch).

    Attributes:
        forward_s: activations on their way, on their own.
        backward_s: their gradients.
        forward_bytes: that a processor handles, sent by the busiest rank; for ``cpu_s_per_byte``.
        backward_bytes: of their gradients.
    """

    forward_s: float = 0.0
    backward_s: float = 0.0
    forward_bytes: float = 0.0
    backward_bytes: float = 0.0


@dataclass(frozen=True, slots=True)
class PipelineTimeline:
    """A simulated step; of kinds in cycles, a cycle of the full pipeline.

    Attributes:
        step_s: its length.
        bubbles: of every position, the share of the step in which it does not compute.
        memory_bytes: of every position, the most that its fullest rank holds.
        events: of positions, links and reductions, in order of their start; an action is named as torch names it, such
            as ``2F0`` for forward of stage 2 for micro-batch 0. Of kinds in cycles: a short run, filled and emptied.
    """

    step_s: float
    bubbles: tuple[float, ...]
    memory_bytes: tuple[int, ...]
    events: tuple[Event, ...]

    @property
    def bubble(self) -> float:
        """Share of all positions' time in which they do not compute."""
        return sum(self.bubbles) / len(self.bubbles)


def simulate_pipeline(
    kind: ScheduleKind,
    stages: Sequence[StageTimes],
    links: Sequence[StageLink],
    num_microbatches: int,
    *,
    num_positions: int | None = None,
    cpu_s_per_byte: float = 0.0,
) -> PipelineTimeline:
    """Return the timeline of one step.

    Args:
        kind: of the schedule.
        stages: of the model, first to last.
        links: between a stage and the next one; one less than stages.
        num_microbatches: of a step; kinds in cycles have one.
        num_positions: groups of ranks; as many as stages where None.
        cpu_s_per_byte: that a message takes from the computation of both its ends; 0 where other hardware moves it.

    Raises:
        UsageError: The numbers do not belong together.
    """
    if len(links) != len(stages) - 1:
        raise UsageError(f"{len(stages)} stages have {len(stages) - 1} links between them, not {len(links)}.")
    if not kind.is_synchronous and num_microbatches != 1:
        raise UsageError(f"schedule {kind.value!r} has no micro-batches: pass 1, not {num_microbatches}.")
    costs = _Costs(kind, tuple(stages), tuple(links), cpu_s_per_byte)
    lists = played(kind, len(stages), len(stages) if num_positions is None else num_positions, num_microbatches)
    run = _Run(costs, lists)
    run.play()
    if kind.is_synchronous:
        step_s, busy_s = run.finish(), run.busy_s
    else:
        step_s, busy_s = costs.cycle_s(), [costs.busy_in_cycle_s(stage) for stage in range(len(stages))]
    return PipelineTimeline(
        step_s,
        tuple(1 - busy / step_s if step_s else 0.0 for busy in busy_s),
        tuple(position_bytes(stages, InFlight.of(kind, len(stages), order)) for order in lists),
        tuple(sorted(run.events, key=lambda event: (event.start_s, event.stop_s, event.stream))),
    )


def played(kind: ScheduleKind, num_stages: int, num_positions: int, num_microbatches: int) -> tuple[Order, ...]:
    """Return what every position does in a step; of kinds in cycles, in a run that is full for a while."""
    count = num_microbatches if kind.is_synchronous else SHOWN_BATCHES * num_stages
    return orders(kind, num_stages, num_positions, count)


@dataclass(frozen=True, slots=True)
class InFlight:
    """What a schedule has the stages of a position hold at once, whatever they are.

    PipeDream keeps a further version of the parameters for every batch in flight but the newest.

    Attributes:
        stages: of the position.
        moments: that differ; of each of these stages, the micro-batches that wait for their backward, and those whose
            backward has begun.
        versions: of the parameters of each.
    """

    stages: tuple[int, ...]
    moments: tuple[tuple[tuple[int, int], ...], ...]
    versions: tuple[int, ...]

    @staticmethod
    def of(kind: ScheduleKind, num_stages: int, order: Order) -> "InFlight":
        """Return what a position holds while it works through its order."""
        here = tuple(sorted({action.stage for action in order}))
        moments = {tuple((now.stored.get(s, 0), now.open.get(s, 0)) for s in here) for now in held(order)}
        versions = weight_versions(kind, num_stages)
        return InFlight(here, tuple(sorted(moments)), tuple(versions[s] for s in here))

    @staticmethod
    def by_position(
        kind: ScheduleKind, num_stages: int, num_positions: int, num_microbatches: int
    ) -> tuple["InFlight", ...]:
        """Return what every position holds."""
        lists = played(kind, num_stages, num_positions, num_microbatches)
        return tuple(InFlight.of(kind, num_stages, order) for order in lists)

    def at(self, stage: int) -> "InFlight":
        """Return what one of the stages holds."""
        i = self.stages.index(stage)
        return InFlight((stage,), tuple(sorted({moment[i : i + 1] for moment in self.moments})), (self.versions[i],))

    @property
    def most_begun(self) -> int:
        """The most micro-batches of a stage whose backward has begun."""
        return max(begun for moment in self.moments for _, begun in moment)

    @property
    def most(self) -> int:
        """The most micro-batches of a stage, in either state."""
        return max(sum(each) for moment in self.moments for each in moment)

    def held_bytes(self, fixed: Bytes, params: Bytes, waiting: Bytes, saved: Bytes) -> NDArray[Any]:
        """Return the most that is held, int64 or float64 of the shape of a stage's bytes.

        Args:
            fixed: of each stage, held whatever is in flight, with one version of the parameters.
            params: of each, a version of the parameters.
            waiting: of each, of a micro-batch that waits for its backward: with recompute, what it received.
            saved: of each, of one whose backward has begun.
        """
        always = sum(f + (v - 1) * p for f, v, p in zip(fixed, self.versions, params, strict=True))
        moments = (
            sum(w * x + b * y for (w, b), x, y in zip(moment, waiting, saved, strict=True)) for moment in self.moments
        )
        return np.asarray(always + functools.reduce(np.maximum, moments))


def position_bytes(stages: Sequence[StageTimes], in_flight: InFlight) -> int:
    """Return the most that a position holds.

    With recompute a stage keeps the inputs of what is in flight, and everything of the micro-batches whose backward has
    begun.

    Args:
        stages: all of them.
        in_flight: what the position holds.
    """
    here = [stages[s] for s in in_flight.stages]
    waiting = [stage.input_bytes if stage.recompute else stage.saved_bytes for stage in here]
    return int(
        in_flight.held_bytes(
            [stage.resident_bytes for stage in here], [stage.params_bytes for stage in here], waiting,
            [stage.saved_bytes for stage in here],
        )
    )  # fmt: skip


class _Message(NamedTuple):
    """What an action sends to another stage."""

    stage: int
    seconds: float
    num_bytes: float


@dataclass(frozen=True, slots=True)
class _Costs:
    """What actions and messages take."""

    kind: ScheduleKind
    stages: tuple[StageTimes, ...]
    links: tuple[StageLink, ...]
    cpu_s_per_byte: float

    def message(self, action: Action) -> _Message | None:
        """Return what an action sends; None where it sends nothing."""
        stage = action.stage
        if action.kind is ActionKind.FORWARD and stage + 1 < len(self.stages):
            return _Message(stage + 1, self.links[stage].forward_s, self.links[stage].forward_bytes)
        if action.kind in SENDS_GRADIENTS and stage:
            return _Message(stage - 1, self.links[stage - 1].backward_s, self.links[stage - 1].backward_bytes)
        return None

    def source(self, action: Action) -> Action | None:
        """Return the action of another stage that sends what an action needs."""
        if action.kind is ActionKind.FORWARD and action.stage:
            return Action(action.kind, action.stage - 1, action.microbatch)
        if action.kind in SENDS_GRADIENTS and action.stage + 1 < len(self.stages):
            return Action(action.kind, action.stage + 1, action.microbatch)
        return None

    def taken(self, action: Action, *, is_local: bool = False) -> Taken:
        """Return what an action takes of its position; messages within one position are free."""
        result_s = self.stages[action.stage].seconds(action.kind)
        sent_s = 0.0
        if self.cpu_s_per_byte and not is_local:
            source, sent = self.source(action), self.message(action)
            received = self.message(source) if source is not None else None
            result_s += received.num_bytes * self.cpu_s_per_byte if received is not None else 0.0
            sent_s = sent.num_bytes * self.cpu_s_per_byte if sent is not None else 0.0
        return Taken(result_s, result_s + sent_s)

    def busy_in_cycle_s(self, stage: int) -> float:
        """Return what a stage computes in a cycle."""
        both = Action(ActionKind.FORWARD, stage, 0), Action(ActionKind.BACKWARD, stage, 0)
        return sum(self.taken(action).busy_s for action in both) + self.stages[stage].update_s

    def cycle_s(self) -> float:
        """Return a cycle of the full pipeline."""
        forward, backward = [], []
        for i, stage in enumerate(self.stages):
            forward.append(self.taken(Action(ActionKind.FORWARD, i, 0)))
            taken = self.taken(Action(ActionKind.BACKWARD, i, 0))
            backward.append(Taken(taken.result_s, taken.busy_s + stage.sync_s + stage.update_s))
        there, back = [link.forward_s for link in self.links], [link.backward_s for link in self.links]
        return steady_cycle_s(forward, backward, there, back)


@dataclass
class _Run:
    """Positions and links on their way through a step.

    Attributes:
        events: so far.
        busy_s: what every position has computed.
    """

    costs: _Costs
    lists: tuple[Order, ...]
    events: list[Event] = field(default_factory=list)
    busy_s: list[float] = field(init=False)
    _free_s: list[float] = field(init=False)
    _link_free_s: dict[tuple[int, int], float] = field(default_factory=dict)
    _arrived_s: dict[Action, float] = field(default_factory=dict)
    _backward_ended_s: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.busy_s, self._free_s = [0.0] * len(self.lists), [0.0] * len(self.lists)

    def play(self) -> None:
        """Go through all orders.

        Positions are visited in turn, each as far as it gets. When it is visited changes no time: what an action needs
        has the time of its arrival, and a link carries messages of one position only, in that position's order.
        """
        at, moved = [0] * len(self.lists), True
        while moved:
            moved = False
            for position, order in enumerate(self.lists):
                while at[position] < len(order) and self._has_arrived(order[at[position]]):
                    self._do(position, order[at[position]])
                    at[position] += 1
                    moved = True
        assert at == [len(order) for order in self.lists], "the orders wait for each other"

    def finish(self) -> float:
        """Reduce gradients and update; return the end of the step."""
        for position, order in enumerate(self.lists):
            reduced_s = 0.0
            here = {action.stage for action in order}
            for stage in sorted(here, key=lambda stage: (self._backward_ended_s[stage], stage)):
                start_s = max(reduced_s, self._backward_ended_s[stage])
                reduced_s = self._event(f"sync {stage}", f"sync {position}", start_s, self.costs.stages[stage].sync_s)
            self._free_s[position] = max(self._free_s[position], reduced_s)
            for stage in sorted(here):
                self._update(position, stage)
        return max(self._free_s)

    def _has_arrived(self, action: Action) -> bool:
        source = self.costs.source(action)
        return source is None or source in self._arrived_s

    def _do(self, position: int, action: Action) -> None:
        source = self.costs.source(action)
        start_s = max(self._free_s[position], self._arrived_s[source] if source is not None else 0.0)
        taken = self.costs.taken(action, is_local=len(self.lists) == 1)
        result_s = start_s + taken.result_s
        self.busy_s[position] += taken.busy_s
        self._free_s[position] = self._event(str(action), f"position {position}", start_s, taken.busy_s)
        self._send(position, action, result_s)
        if action.kind in LAST_BACKWARD:
            self._backward_ended_s[action.stage] = result_s
        if action.kind is ActionKind.BACKWARD and not self.costs.kind.is_synchronous:
            stage, sync_s = action.stage, self.costs.stages[action.stage].sync_s
            self._free_s[position] = self._event(f"sync {stage}", f"sync {position}", self._free_s[position], sync_s)
            self._update(position, stage)

    def _send(self, position: int, action: Action, now_s: float) -> None:
        message = self.costs.message(action)
        if message is None:
            return
        to = message.stage % len(self.lists)
        if to != position:
            start_s = max(now_s, self._link_free_s.get((position, to), 0.0))
            now_s = self._event(str(action), f"link {position}-{to}", start_s, message.seconds)
            self._link_free_s[position, to] = now_s
        self._arrived_s[action] = now_s

    def _update(self, position: int, stage: int) -> None:
        update_s = self.costs.stages[stage].update_s
        self.busy_s[position] += update_s
        start_s = self._free_s[position]
        self._free_s[position] = self._event(f"update {stage}", f"position {position}", start_s, update_s)

    def _event(self, name: str, stream: str, start_s: float, seconds: float) -> float:
        """Note what happened; return its end."""
        if seconds > 0:
            self.events.append(Event(name, stream, start_s, start_s + seconds))
        return start_s + seconds
