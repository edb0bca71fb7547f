"""Orders of work against torch's own; what is in flight, counted, against the papers' formulas."""

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed.pipelining import schedules

from planner.errors import UsageError
from planner.ir.schedule import (
    Action,
    ActionKind,
    ScheduleKind,
    cycle,
    held,
    in_flight,
    orders,
    staleness,
    weight_versions,
)

CLASSES: dict[ScheduleKind, Any] = {
    ScheduleKind.GPIPE: schedules.ScheduleGPipe,
    ScheduleKind.ONE_F_ONE_B: schedules.Schedule1F1B,
    ScheduleKind.INTERLEAVED: schedules.ScheduleInterleaved1F1B,
    ScheduleKind.ZERO_BUBBLE: schedules.ScheduleInterleavedZeroBubble,
}
LOOPED = (ScheduleKind.INTERLEAVED, ScheduleKind.ZERO_BUBBLE)
SYNCHRONOUS = tuple(CLASSES)


class RecordingStage(SimpleNamespace):
    """A stage that torch's schedules take for one; it notes what they ask of it."""

    def __init__(self, index: int, num_stages: int, num_positions: int) -> None:
        super().__init__(num_stages=num_stages, stage_index=index, group_size=num_positions, group_rank=0)
        self.submod, self.is_last = None, False
        self.asked: list[str] = []

    def forward_one_chunk(self, microbatch: int, *_: object, **__: object) -> None:
        self.asked.append(f"{self.stage_index}F{microbatch}")

    def backward_one_chunk(self, microbatch: int, **_: object) -> None:
        self.asked.append(f"{self.stage_index}B{microbatch}")

    def no_transfers(self, _: int) -> list[Any]:
        return []

    get_fwd_recv_ops = get_fwd_send_ops = get_bwd_recv_ops = get_bwd_send_ops = no_transfers

    def perform_reduce_grad(self, _: int) -> None: ...


def orders_of_torch(kind: ScheduleKind, num_stages: int, num_positions: int, num_microbatches: int) -> list[list[str]]:
    """The compute actions of every rank: what torch runs, or for schedules that it runs from a list, the list.

    (The list that ``Schedule1F1B`` shows is not what it runs: on the last rank it begins with micro-batch 1.)
    """
    stages: list[Any] = [RecordingStage(index, num_stages, num_positions) for index in range(num_stages)]
    if kind in LOOPED:
        schedule = CLASSES[kind](stages[::num_positions], num_microbatches)
        lists = [schedule.pipeline_order[rank] for rank in range(num_positions)]
        return [[str(a) for a in actions if a is not None and a.is_compute_op] for actions in lists]
    for stage in stages:
        schedule = CLASSES[kind](stage, num_microbatches)
        schedule._initialize_stage = lambda *_: None
        schedule._step_microbatches()
    return [stage.asked for stage in stages]


@pytest.mark.parametrize("kind", SYNCHRONOUS)
def test_the_orders_are_those_of_torch(kind: ScheduleKind) -> None:
    compared = 0
    for positions, stages_each, count in itertools.product(range(1, 6), (1, 2, 3), range(1, 13)):
        if stages_each > 1 and kind not in LOOPED:
            continue
        if kind is ScheduleKind.ONE_F_ONE_B and count < positions:
            continue  # refused by torch
        shape = positions * stages_each, positions, count
        try:
            wanted = orders_of_torch(kind, *shape)
        except ValueError:
            rounds = max(1, count // positions)
            assert count % rounds
            if stages_each > 1:
                with pytest.raises(UsageError, match="rounds, which do not divide them"):
                    orders(kind, *shape)
            continue
        assert [[str(a) for a in order] for order in orders(kind, *shape)] == wanted, shape
        compared += 1
    assert compared >= (40 if kind not in LOOPED else 100)


def test_one_micro_batch_at_a_time_on_one_stage_accumulates() -> None:
    assert [str(a) for a in orders(ScheduleKind.SINGLE, 1, 1, 2)[0]] == ["0F0", "0B0", "0F1", "0B1"]


@pytest.mark.parametrize("kind", ScheduleKind)
def test_every_position_does_all_of_its_work_once_in_an_order_that_never_waits_for_itself(kind: ScheduleKind) -> None:
    backward = (
        {ActionKind.BACKWARD_INPUT, ActionKind.BACKWARD_WEIGHT} if kind.splits_backward else {ActionKind.BACKWARD}
    )
    sizes = range(1, 2 if kind is ScheduleKind.SINGLE else 6)
    for positions, each, count in itertools.product(sizes, (1, 2) if kind in LOOPED else (1,), range(1, 9)):
        if each > 1 and count % max(1, count // positions):
            continue
        num_stages = positions * each
        found = orders(kind, num_stages, positions, count)
        wanted = {
            Action(k, s, m) for k in {ActionKind.FORWARD, *backward} for s in range(num_stages) for m in range(count)
        }
        assert sorted(itertools.chain(*found)) == sorted(wanted)
        assert all(a.stage % positions == p for p, order in enumerate(found) for a in order)
        assert completes(found, num_stages)


def completes(found: tuple[tuple[Action, ...], ...], num_stages: int) -> bool:
    """Whether positions that wait for each other's results get to the end."""
    done: set[Action] = set()
    todo = [list(order) for order in found]
    moved = True
    while moved:
        moved = False
        for order in todo:
            while order and all(need in done for need in needs(order[0], num_stages)):
                done.add(order.pop(0))
                moved = True
    return not any(todo)


def needs(action: Action, num_stages: int) -> list[Action]:
    stage, m = action.stage, action.microbatch
    match action.kind:
        case ActionKind.FORWARD:
            return [Action(ActionKind.FORWARD, stage - 1, m)] if stage else []
        case ActionKind.BACKWARD_WEIGHT:
            return [Action(ActionKind.BACKWARD_INPUT, stage, m)]
        case kind:
            after = [Action(kind, stage + 1, m)] if stage + 1 < num_stages else []
            return [Action(ActionKind.FORWARD, stage, m), *after]


@pytest.mark.parametrize("positions", range(1, 7))
@pytest.mark.parametrize("count", [1, 3, 8])
def test_what_is_in_flight_is_what_the_papers_say(positions: int, count: int) -> None:
    stages = range(positions)
    shape = positions, positions, count
    assert in_flight(ScheduleKind.GPIPE, *shape) == (count,) * positions
    assert in_flight(ScheduleKind.ONE_F_ONE_B, *shape) == tuple(min(count, positions - p) for p in stages)
    # ZB-H1 holds at every position what 1F1B holds at the first
    assert in_flight(ScheduleKind.ZERO_BUBBLE, *shape) == (min(count, positions),) * positions


@pytest.mark.parametrize(("positions", "each"), [(2, 2), (4, 2), (4, 3)])
def test_interleaved_holds_what_megatron_says(positions: int, each: int) -> None:
    """(v - 1) P + 2 (P - 1 - p) warm-up forwards, and one: in units of a stage's activations."""
    shape = positions * each, positions, 4 * positions
    for p, order in enumerate(orders(ScheduleKind.INTERLEAVED, *shape)):
        most = max(sum(now.stored.values()) + sum(now.open.values()) for now in held(order))
        assert most == (each - 1) * positions + 2 * (positions - 1 - p) + 1


@pytest.mark.parametrize("num_stages", range(1, 6))
def test_staleness_and_versions_are_those_of_the_papers(num_stages: int) -> None:
    k = num_stages - 1
    delays = tuple(2 * (k + 1 - i) for i in range(1, num_stages + 1))  # the paper counts stages from 1
    for kind in (ScheduleKind.STALE, ScheduleKind.PIPEDREAM):
        assert staleness(kind, num_stages) == delays
        assert in_flight(kind, num_stages, num_stages, 5 * num_stages) == tuple(delay + 1 for delay in delays)
    assert weight_versions(ScheduleKind.PIPEDREAM, num_stages) == tuple(delay + 1 for delay in delays)
    assert weight_versions(ScheduleKind.STALE, num_stages) == (1,) * num_stages
    for kind in SYNCHRONOUS:
        assert staleness(kind, num_stages) == (0,) * num_stages
        assert weight_versions(kind, num_stages) == (1,) * num_stages


def test_a_cycle_of_a_run_without_an_end() -> None:
    forward, backward = ActionKind.FORWARD, ActionKind.BACKWARD
    assert cycle(3, 0, 3) == (Action(forward, 0, 3),)
    assert cycle(3, 0, 100) == (Action(forward, 0, 100), Action(backward, 0, 96))
    assert cycle(3, 2, 100) == (Action(forward, 2, 98), Action(backward, 2, 98))
    assert cycle(3, 0, 100, num_batches=100) == (Action(backward, 0, 96),)
    assert cycle(3, 2, 1) == ()


@pytest.mark.parametrize(
    ("kind", "shape", "says"),
    [
        (ScheduleKind.GPIPE, (4, 2, 4), "one stage for each group"),
        (ScheduleKind.INTERLEAVED, (5, 2, 4), "Use a multiple of 2 stages"),
        (ScheduleKind.INTERLEAVED, (4, 2, 5), "Use 4 or 6 micro-batches"),
        (ScheduleKind.SINGLE, (2, 2, 1), "has one stage, not 2"),
        (ScheduleKind.STALE, (2, 2, 0), "at least 1"),
    ],
)
def test_numbers_that_do_not_belong_together(kind: ScheduleKind, shape: tuple[int, int, int], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        orders(kind, *shape)
