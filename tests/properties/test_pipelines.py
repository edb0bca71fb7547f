"""The pipeline simulator against longest paths, and cycles against their definition, on random stages."""

import os
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import networkx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.cost.pipeline import StageLink, StageTimes, simulate_pipeline
from planner.ir.schedule import Action, ActionKind, ScheduleKind, orders

SCALE = 10 if os.environ.get("LAYERWISE_FULL") else 1
MANY = settings(max_examples=150 * SCALE, deadline=None)

SECONDS = st.integers(0, 12).map(float)
RECOMPUTE = st.booleans()
STAGES = st.builds(StageTimes, SECONDS, SECONDS, SECONDS, SECONDS, SECONDS, recompute=RECOMPUTE)
LINKS = st.builds(StageLink, SECONDS, SECONDS, SECONDS, SECONDS)
CPU = st.sampled_from([0.0, 0.25])
SYNCHRONOUS = [kind for kind in ScheduleKind if kind.is_synchronous and kind is not ScheduleKind.SINGLE]


@dataclass(frozen=True)
class Case:
    """What a synchronous step takes, said once more."""

    kind: ScheduleKind
    stages: list[StageTimes]
    links: list[StageLink]
    count: int
    positions: int
    cpu_s_per_byte: float

    def receiver(self, a: Action) -> int | None:
        to = a.stage + 1 if a.kind is ActionKind.FORWARD else a.stage - 1
        return to if a.kind is not ActionKind.BACKWARD_WEIGHT and 0 <= to < len(self.stages) else None

    def message(self, a: Action) -> tuple[float, float]:
        to = self.receiver(a)
        if to is None or self.positions == 1:
            return 0.0, 0.0
        link = self.links[min(a.stage, to)]
        return (link.forward_s, link.forward_bytes) if to > a.stage else (link.backward_s, link.backward_bytes)

    def result_s(self, a: Action) -> float:
        stage = self.stages[a.stage]
        again = stage.forward_s * stage.recompute
        sender = replace(a, stage=a.stage - 1 if a.kind is ActionKind.FORWARD else a.stage + 1)
        received = (
            self.message(sender)[1] if self.receiver(sender) == a.stage and sender.stage < len(self.stages) else 0
        )
        received = 0 if sender.stage < 0 or a.kind is ActionKind.BACKWARD_WEIGHT else received
        own = {
            ActionKind.FORWARD: stage.forward_s,
            ActionKind.BACKWARD: again + stage.backward_input_s + stage.backward_weight_s,
            ActionKind.BACKWARD_INPUT: again + stage.backward_input_s,
            ActionKind.BACKWARD_WEIGHT: stage.backward_weight_s,
        }
        return received * self.cpu_s_per_byte + own[a.kind]

    def busy_s(self, a: Action) -> float:
        return self.result_s(a) + self.message(a)[1] * self.cpu_s_per_byte


def longest_path_s(case: Case) -> float:
    """The step as the longest path through everything that waits for something; edges weigh what their source takes."""
    graph: networkx.DiGraph[Hashable] = networkx.DiGraph()
    for position, order in enumerate(orders(case.kind, len(case.stages), case.positions, case.count)):
        update, end = ("update", position), ("end", position)
        for a, after in zip(order, (*order[1:], update), strict=True):
            graph.add_edge(a, after, weight=case.busy_s(a))
        graph.add_edge(update, end, weight=sum(stage.update_s for stage in case.stages[position :: case.positions]))
        add_reductions(graph, case, position, order)
        add_messages(graph, case, order)
    return float(networkx.dag_longest_path_length(graph))


def add_reductions(graph: "networkx.DiGraph[Hashable]", case: Case, position: int, order: Sequence[Action]) -> None:
    """One after the other, each from the end of its stage's last backward."""
    last = {a.stage: a for a in order if a.kind in {ActionKind.BACKWARD, ActionKind.BACKWARD_WEIGHT}}
    ended = sorted(last.values(), key=order.index)
    for a in ended:
        graph.add_edge(a, ("sync", a.stage), weight=case.result_s(a))
    afters = [*(("sync", a.stage) for a in ended[1:]), ("update", position)]
    for a, after in zip(ended, afters, strict=True):
        graph.add_edge(("sync", a.stage), after, weight=case.stages[a.stage].sync_s)


def add_messages(graph: "networkx.DiGraph[Hashable]", case: Case, order: Sequence[Action]) -> None:
    """To every receiver, and on every link one behind the other."""
    queues: dict[int, list[Action]] = {}
    for a in order:
        to = case.receiver(a)
        if to is not None:
            graph.add_edge(a, ("message", a), weight=case.result_s(a))
            graph.add_edge(("message", a), replace(a, stage=to), weight=case.message(a)[0])
            queues.setdefault(to % case.positions, []).append(a)
    for queue in queues.values():
        for a, b in pairwise(queue):
            graph.add_edge(("message", a), ("message", b), weight=case.message(a)[0])


@MANY
@given(st.data())
def test_a_step_is_the_longest_path(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(SYNCHRONOUS))
    positions = data.draw(st.integers(1, 4))
    looped = kind in {ScheduleKind.INTERLEAVED, ScheduleKind.ZERO_BUBBLE}
    num_stages = positions * data.draw(st.integers(1, 3 if looped else 1))
    rounds = data.draw(st.integers(1, 3))
    count = rounds * positions if rounds > 1 else data.draw(st.integers(1, positions))
    stages = data.draw(st.lists(STAGES, min_size=num_stages, max_size=num_stages))
    links = data.draw(st.lists(LINKS, min_size=num_stages - 1, max_size=num_stages - 1))
    cpu = data.draw(CPU)
    found = simulate_pipeline(kind, stages, links, count, num_positions=positions, cpu_s_per_byte=cpu)
    assert found.step_s == pytest.approx(longest_path_s(Case(kind, stages, links, count, positions, cpu)), rel=1e-12)
    for position in range(positions):  # a position is either computing or in its bubble
        busy = sum(e.stop_s - e.start_s for e in found.events if e.stream == f"position {position}")
        assert found.bubbles[position] * found.step_s == pytest.approx(found.step_s - busy, abs=1e-9)
    assert all(-1e-12 <= bubble <= 1 for bubble in found.bubbles)


def played_s(stages: list[StageTimes], links: list[StageLink], num_batches: int) -> float:
    """In cycle c of a run stage i does the forward of batch c - i and the backward of batch c - (2K - i)."""
    k = len(stages) - 1
    free = [0.0] * (k + 1)
    there, back = [0.0] * k, [0.0] * k  # when the links are free
    forward_in: dict[tuple[int, int], float] = {}
    backward_in: dict[tuple[int, int], float] = {}
    for c in range(num_batches + 2 * k):
        for i, stage in enumerate(stages):
            again = stage.forward_s if stage.recompute else 0.0
            batch = c - i
            if 0 <= batch < num_batches:
                free[i] = max(free[i], forward_in.get((i, batch), 0.0)) + stage.forward_s
                if i < k:
                    there[i] = max(there[i], free[i]) + links[i].forward_s
                    forward_in[i + 1, batch] = there[i]
            batch = c - (2 * k - i)
            if 0 <= batch < num_batches:
                free[i] = max(free[i], backward_in.get((i, batch), 0.0))
                free[i] += again + stage.backward_input_s + stage.backward_weight_s
                if i > 0:
                    back[i - 1] = max(back[i - 1], free[i]) + links[i - 1].backward_s
                    backward_in[i - 1, batch] = back[i - 1]
                free[i] += stage.sync_s + stage.update_s
    return max(free)


@settings(max_examples=60 * SCALE, deadline=None)
@given(st.data())
def test_a_full_pipeline_in_cycles_keeps_its_rhythm(data: st.DataObject) -> None:
    num_stages = data.draw(st.integers(1, 4))
    stages = data.draw(st.lists(STAGES, min_size=num_stages, max_size=num_stages))
    links = data.draw(st.lists(LINKS, min_size=num_stages - 1, max_size=num_stages - 1))
    found = simulate_pipeline(ScheduleKind.STALE, stages, links, 1)
    ends = [event.stop_s for event in found.events if not event.stream.startswith("link")]
    assert max(ends, default=0.0) == played_s(stages, links, 4 * num_stages)
    # long after the start, and over a number of cycles that a rhythm of up to 9 cycles divides
    rhythm_s = (played_s(stages, links, 1200 + 2520) - played_s(stages, links, 1200)) / 2520
    assert found.step_s == pytest.approx(rhythm_s, rel=1e-9)
