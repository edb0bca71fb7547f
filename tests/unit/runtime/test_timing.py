"""Marks on a step: the numbers stay, the parts add up, and every second lands where it was spent."""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.nn import functional

from planner.frontend.lower import TracedModel
from planner.ir.count import gradient_flow
from planner.ir.ops import BatchNorm, Input
from planner.ir.rules import layouts, reduced_axes
from planner.ir.transfer import steps
from planner.plan import Plan
from planner.plan.measured import Measured, read_measured
from runtime.comm.communicator import Axes, Pending, ThreadCommunicator, ThreadWorld
from runtime.data import own_samples
from runtime.parallel import ParallelModule
from runtime.timing import (
    EXPOSED_SYNC,
    GATHERING,
    OPTIMIZER,
    OTHER,
    Part,
    PartSeconds,
    Phase,
    Span,
    Tape,
    TimedCommunicator,
    seconds_of,
    watched,
)
from support.equality import build, data, planner_for, random_plan, run_ranks

CPU = torch.device("cpu")
CASES = [("lenet5", 2, 0), ("alexnet", 4, 1), ("vgg", 4, 2), ("resnet20", 4, 3)]


@dataclass
class Clock:
    """Stands still unless it is told to go on."""

    now_s: float = 100.0

    def __call__(self) -> float:
        return self.now_s


class SlowCommunicator(ThreadCommunicator):
    """Every blocking collective takes 1 s of a rank's clock, and waiting for a reduction 10 s."""

    def __init__(self, world: ThreadWorld, position: int, clock: Clock) -> None:
        super().__init__(world, position)
        self.clock = clock

    def all_reduce(self, buffer: torch.Tensor, axes: Axes) -> None:
        super().all_reduce(buffer, axes)
        self.clock.now_s += 1

    def start_all_reduce(self, buffer: torch.Tensor, axes: Axes) -> Pending:
        ThreadCommunicator.all_reduce(self, buffer, axes)
        return SlowPending(self.clock)

    def all_gather(self, buffer: torch.Tensor, counts: Sequence[int], axes: Axes) -> torch.Tensor:
        self.clock.now_s += 1
        return super().all_gather(buffer, counts, axes)

    def reduce_scatter(self, buffer: torch.Tensor, counts: Sequence[int], axes: Axes) -> torch.Tensor:
        self.clock.now_s += 1
        return super().reduce_scatter(buffer, counts, axes)

    def exchange(
        self, buffer: torch.Tensor, send_counts: Sequence[int], receive_counts: Sequence[int], axes: Axes
    ) -> torch.Tensor:
        self.clock.now_s += 1
        return super().exchange(buffer, send_counts, receive_counts, axes)


@dataclass
class SlowPending:
    clock: Clock

    def wait(self) -> None:
        self.clock.now_s += 10


@dataclass
class Result:
    losses: list[float] = field(default_factory=list)
    gradients: list[dict[str, torch.Tensor]] = field(default_factory=list)
    spans: tuple[Span, ...] = ()
    num_buckets: int = 0


def watch(name: str, plan: Plan) -> list[Result]:
    """Run a plain step, one with marks and a plain one from the same weights, on every rank; clocks are slow ones."""
    x, target = data(name)
    tapes: dict[int, Tape] = {}

    def communicator(world: ThreadWorld, position: int) -> Any:
        clock = Clock()
        tapes[position] = Tape(CPU, clock)
        return TimedCommunicator(SlowCommunicator(world, position, clock), tapes[position])

    def work(net: ParallelModule, _traced: TracedModel, position: int) -> Result:
        tape, part = tapes[position], own_samples(plan, plan.mesh.ranks[position])
        optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
        found = Result(num_buckets=len(net._reducer._buckets))

        def step() -> None:
            optimizer.zero_grad()
            loss = functional.cross_entropy(net(x[part]), target[part])
            loss.backward()
            optimizer.step()
            found.losses.append(float(loss.detach()))
            found.gradients.append({n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None})

        step()
        with watched(net, optimizer, tape):
            tape.start()
            step()
            found.spans = tape.stop()
        step()
        return found

    return run_ranks(lambda: build(name), plan, work, communicator)


def blocking_collectives(traced: TracedModel, plan: Plan) -> Counter[Part]:
    """Return how often a rank has to wait for others in each layer, from layouts and rules alone."""
    graph, strategy = traced.layers, plan.strategy
    flows = gradient_flow(graph)
    of = {x.id: layouts(x, graph.inputs_of(x), plan.mesh, strategy[x.id]) for x in graph.layers}
    found: Counter[Part] = Counter()

    def note(phase: Phase, layer: str, have: Any, need: Any) -> None:
        found[Part(phase, layer)] += sum(step.kind.communicates for step in steps(have, need))

    for layer in graph.layers:
        mine = of[layer.id]
        for producer, need in zip(layer.inputs, mine.inputs, strict=True):
            have = of[producer].output
            note(Phase.TRANSFER_FORWARD, layer.id, have, need)
            if flows[producer] and not isinstance(graph[producer].op, Input):
                note(Phase.TRANSFER_BACKWARD, layer.id, need.gradient, have.gradient)
        note(Phase.TRANSFER_FORWARD, layer.id, mine.computed, mine.output)
        note(Phase.TRANSFER_BACKWARD, layer.id, mine.output.gradient, mine.computed.gradient)
        norms = sum(isinstance(op, BatchNorm) for op in (layer.op, *(a.op for a in layer.absorbed)))
        if norms and reduced_axes(layer.output, mine.output):
            found[Part(Phase.TRANSFER_FORWARD, layer.id)] += norms
            found[Part(Phase.TRANSFER_BACKWARD, layer.id)] += norms
    return +found


@pytest.mark.parametrize(("name", "num_ranks", "seed"), CASES)
def test_marks_change_no_number_and_every_wait_is_that_of_its_layer(name: str, num_ranks: int, seed: int) -> None:
    planner = planner_for(name, num_ranks)
    plan = random_plan(planner, seed)
    expected = blocking_collectives(planner.traced, plan)
    assert sum(expected.values()) > 0
    for found in watch(name, plan):
        plain, marked, after = found.gradients
        assert found.losses == [found.losses[0]] * 3
        assert plain.keys() == marked.keys() == after.keys()
        for parameter, gradient in plain.items():
            assert torch.equal(gradient, marked[parameter])
            assert torch.equal(gradient, after[parameter])
        seconds = {part: median for part, (median, _) in seconds_of([found.spans]).parts.items() if median}
        sync = {EXPOSED_SYNC: 10.0 * found.num_buckets} if found.num_buckets else {}
        assert seconds == {**{part: float(n) for part, n in expected.items()}, **sync}


def test_spans_meet_and_cover_the_step_and_every_layer_with_work_has_its_own() -> None:
    planner = planner_for("lenet5", 2, solver="data")
    plan = planner.plan()
    for found in watch("lenet5", plan):
        spans = found.spans
        assert spans[0].start_s == 0
        assert all(a.stop_s == b.start_s for a, b in itertools.pairwise(spans))
        assert sum(s.stop_s - s.start_s for s in spans) == spans[-1].stop_s
        computed = {part.layer for part in (s.part for s in spans) if part.phase in {Phase.FORWARD, Phase.BACKWARD}}
        own = {layer.id for layer in planner.traced.layers.layers if layer.params}
        assert own <= computed
        assert {OTHER, GATHERING, OPTIMIZER} <= {s.part for s in spans}


def test_all_reductions_but_the_last_are_under_way_before_backward_ends() -> None:
    """The order of what the tape of a step saw; every look at this clock is later than the one before."""
    plan = planner_for("vgg", 2, solver="data").plan()
    plan = plan.model_copy(update={"bucket_bytes": 2**16})
    x, target = data("vgg")
    tapes: dict[int, Tape] = {}

    def communicator(world: ThreadWorld, position: int) -> Any:
        ticks = itertools.count()
        tapes[position] = Tape(CPU, lambda: float(next(ticks)))
        return TimedCommunicator(ThreadCommunicator(world, position), tapes[position])

    def work(net: ParallelModule, _traced: TracedModel, position: int) -> tuple[tuple[Span, ...], tuple[Span, ...]]:
        tape, part = tapes[position], own_samples(plan, plan.mesh.ranks[position])
        optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
        with watched(net, optimizer, tape):
            tape.start()
            functional.cross_entropy(net(x[part]), target[part]).backward()
            return tape.stop(), tape.reductions()

    for spans, reductions in run_ranks(lambda: build("vgg"), plan, work, communicator):
        assert len(reductions) >= 4
        backward_ends = max(s.stop_s for s in spans if s.part.phase is Phase.BACKWARD)
        waiting_begins = min(s.start_s for s in spans if s.part == EXPOSED_SYNC)
        *others, last = reductions
        assert all(r.start_s < backward_ends for r in others)
        assert backward_ends <= waiting_begins
        assert all(r.stop_s > backward_ends for r in reductions)
        assert last.start_s < waiting_begins
        behind = {s.part.layer for s in spans if s.part.phase is Phase.BACKWARD and s.start_s > others[0].start_s}
        assert len(behind) > 3


def test_a_tape_gives_the_time_between_marks_to_the_earlier_one_and_ignores_marks_while_it_is_stopped() -> None:
    clock = Clock()
    tape = Tape(CPU, clock)
    forward, backward = Part(Phase.FORWARD, "conv"), Part(Phase.BACKWARD, "conv")
    tape.switch(forward)
    tape.start()
    clock.now_s += 1
    assert tape.switch(forward) == OTHER
    clock.now_s += 2
    assert tape.transfer() == forward
    clock.now_s += 4
    assert tape.switch(backward) == Part(Phase.TRANSFER_FORWARD, "conv")
    clock.now_s += 8
    spans = tape.stop()
    tape.switch(OPTIMIZER)
    assert spans == (
        Span(OTHER, 0, 1), Span(forward, 1, 3), Span(Part(Phase.TRANSFER_FORWARD, "conv"), 3, 7), Span(backward, 7, 15)
    )  # fmt: skip


def test_the_parts_of_several_steps_are_medians_and_what_they_leave_is_other(tmp_path: Any) -> None:
    planner = planner_for("lenet5", 2)
    plan = planner.plan()
    first = plan.stages[0].layers[1].id
    forward = Part(Phase.FORWARD, first)

    def step(*seconds: float) -> tuple[Span, ...]:
        stops = list(itertools.accumulate(seconds))
        return tuple(
            Span(part, stop - s, stop)
            for part, s, stop in zip((OTHER, forward, OPTIMIZER), seconds, stops, strict=True)
        )

    found = seconds_of([step(1, 10, 3), step(2, 30, 4), step(6, 20, 8)])
    assert list(found.steps_s) == [14, 36, 34]
    assert found.parts == {OTHER: (2, 5), forward: (20, 20), OPTIMIZER: (4, 5)}  # quartiles of 3 are the extremes
    assert found.compute_s == 20
    measured = found.measured(plan, 1, [30.0, 50.0, 40.0, 20.0], 12.5, {"torch": "2"})
    assert (measured.step_s, measured.step_iqr_s, measured.instrumented_step_s) == (35, 25, 34)
    assert (measured.optimizer_s, measured.gathering_s, measured.exposed_sync_s) == (4, 0, 0)
    assert measured.other_s == 34 - 20 - 4
    row = next(layer for layer in measured.layers if layer.id == first)
    assert (row.forward_s, row.forward_iqr_s, row.backward_s, row.transfer_s) == (20, 20, 0, 0)
    measured.save(tmp_path / "run.json")
    assert read_measured(tmp_path / "run.json", plan) == measured


def test_a_part_that_a_step_lacks_counts_as_no_time() -> None:
    spans = [(Span(OTHER, 0, 1),), (Span(OTHER, 0, 1), Span(EXPOSED_SYNC, 1, 5)), (Span(OTHER, 0, 1),)]
    assert seconds_of(spans).parts[EXPOSED_SYNC] == (0, 4)
    assert isinstance(seconds_of(spans), PartSeconds)


def test_measured_rows_add_up_to_the_instrumented_step() -> None:
    planner = planner_for("vgg", 2)
    plan = planner.plan()
    (found, *_) = watch("vgg", plan)
    measured: Measured = seconds_of([found.spans]).measured(plan, 0, [1.0], 1.0, {})
    layers = sum(row.compute_s + row.transfer_s for row in measured.layers)
    rest = measured.gathering_s + measured.exposed_sync_s + measured.optimizer_s + measured.other_s
    assert layers + rest == pytest.approx(measured.instrumented_step_s, rel=1e-12)
