"""What the stages of a pipelined plan take on synthetic data; what the ranks of ``layerwise run`` do.

A step of a synchronous schedule begins on all ranks together and ends with nothing in flight. A pipeline in cycles is
filled first; then its cycles follow each other freely, as in training: a barrier would make every rank wait for the
slowest of each cycle. Their length on a rank is that of the pipeline, because a stage waits for its neighbours.
"""

import functools
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from planner.ir.schedule import ScheduleKind
from planner.plan.measured import median_and_iqr
from planner.plan.measured_stages import MeasuredPipeline, MeasuredStage
from planner.plan.schema import Plan
from runtime.agreement import start_together
from runtime.launch import Process
from runtime.pipeline.build import StagePlan, build, cut
from runtime.pipeline.cycles import CyclePipeline, cycle_pipeline
from runtime.pipeline.module import Pipeline, assembled
from runtime.timing import EXPOSED_SYNC, GATHERING, OPTIMIZER, OTHER, Phase, Span, Tape, marked
from runtime.training import (
    MAX_INSTRUMENTED_STEPS,
    Step,
    build_model,
    default_loss,
    environment_of,
    make_optimizer,
    meet,
    timed_steps,
    whole_batch,
)

TIMEOUT_S = 60.0

_OF_FORWARD = {Phase.FORWARD, Phase.TRANSFER_FORWARD}
_OF_BACKWARD = {Phase.BACKWARD, Phase.TRANSFER_BACKWARD}


@dataclass
class Found:
    """What a rank found out.

    Attributes:
        plain_s: steps without marks.
        steps: the marks of others.
        shown: those of a step that began on all ranks together, and reductions beside it.
    """

    plain_s: list[float] = field(default_factory=list)
    steps: list[tuple[Span, ...]] = field(default_factory=list)
    shown: tuple[Span, ...] = ()


def measured_pipeline(plan: Plan, process: Process, count: int, warmup: int) -> dict[str, Any]:
    """Run a pipelined plan on synthetic data; plain steps and steps with marks take turns.

    Args:
        plan: of several stages.
        process: of this rank.
        count: plain steps, or cycles of the full pipeline; of those with marks, at most ``MAX_INSTRUMENTED_STEPS``.
        warmup: steps in front of them, or cycles after the pipeline is full.

    Returns:
        ``pipeline`` and ``spans``, as of ``runtime.training.measure_plan``.
    """
    model = build_model(plan, process.device)
    if ScheduleKind(plan.schedule.kind).is_synchronous:
        stages = start_together("run", model, plan, lambda: cut(model, plan))
        found = _steps(model, stages, plan, process, count, warmup)
    else:
        start_together("run", model, plan, lambda: None)
        found = _cycles(model, plan, process, count, warmup)
    return gathered(plan, process, found, {**environment_of(process), "precision": plan.precision})


def _steps(
    model: nn.Module, stages: Sequence[StagePlan], plan: Plan, process: Process, count: int, warmup: int
) -> Found:
    tape, found = Tape(process.device), Found()
    modules = build(model, stages, plan, process.rank, TIMEOUT_S, tape)
    net = assembled(model, plan, stages, modules, default_loss, TIMEOUT_S)
    parameters = list(net.parameters())
    optimizer = make_optimizer(plan.optimizer, parameters) if parameters else None
    feed = _feeding(net, plan, process)

    def step() -> None:
        if optimizer is not None:
            optimizer.zero_grad()
        feed()
        if optimizer is not None:
            with marked(tape, OPTIMIZER):
                optimizer.step()

    timed_steps(step, warmup, process.device)
    for k in range(count):
        found.plain_s += timed_steps(step, 1, process.device)
        if k < MAX_INSTRUMENTED_STEPS:
            meet()
            found.steps.append(_marked_step(net, step, tape))
    found.shown = (*found.steps[-1], *tape.reductions())
    return found


def _cycles(model: nn.Module, plan: Plan, process: Process, count: int, warmup: int) -> Found:
    tape, found = Tape(process.device), Found()
    optimizer = functools.partial(make_optimizer, plan.optimizer)
    net = cycle_pipeline(model, plan, default_loss, optimizer, timeout_s=TIMEOUT_S, tape=tape)
    cycle = _feeding(net, plan, process)
    for _ in range(2 * (len(plan.stages) - 1) + warmup):  # the first ones fill the pipeline
        cycle()
    for k in range(count):
        start = time.perf_counter()
        cycle()
        if process.device.type == "cuda":
            torch.cuda.synchronize(process.device)
        found.plain_s.append(time.perf_counter() - start)
        if k < MAX_INSTRUMENTED_STEPS:
            found.steps.append(_marked_step(net, cycle, tape))
    meet()
    found.shown = _marked_step(net, cycle, tape)
    found.shown += tape.reductions()
    net.drain()
    return found


def _feeding(net: Pipeline | CyclePipeline, plan: Plan, process: Process) -> Step:
    """Return a function that feeds a random batch."""
    batch, device = whole_batch(plan, process.device), process.device.type

    def feed() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=plan.precision == "bf16"):
            net.step(*batch.inputs, **batch.keywords)  # type: ignore[arg-type]  # names of the model's inputs

    return feed


def _marked_step(net: Pipeline | CyclePipeline, step: Step, tape: Tape) -> tuple[Span, ...]:
    with _watching(net, tape):
        tape.start()
        step()
        return tape.stop()


@contextmanager
def _watching(net: Pipeline | CyclePipeline, tape: Tape) -> Iterator[None]:
    """Let steps in this context leave marks on a tape."""
    net._steps.watch(tape)
    try:
        yield
    finally:
        net._steps.watch(None)


def stage_seconds(plan: Plan, rank: int, steps: Sequence[Sequence[Span]]) -> dict[int, MeasuredStage]:
    """Return what every stage of a rank took, by number.

    Args:
        plan: that was run.
        rank: of the marks.
        steps: marks of several steps.
    """
    found: dict[int, MeasuredStage] = {}
    count = plan.schedule.num_microbatches
    own = [s for s, stage in enumerate(plan.stages) if rank in stage.mesh.ranks]
    tails = [_seconds(spans, {GATHERING.phase, EXPOSED_SYNC.phase, OPTIMIZER.phase}) for spans in steps]
    idle = [_seconds(spans, {OTHER.phase}) / spans[-1].stop_s for spans in steps]
    for s in own:
        name = f"stage {s}"
        found[s] = MeasuredStage(
            rank=rank,
            forward_s=statistics.median(_seconds(spans, _OF_FORWARD, name) / count for spans in steps),
            backward_s=statistics.median(_seconds(spans, _OF_BACKWARD, name) / count for spans in steps),
            tail_s=statistics.median(tails) / len(own),
            bubble_share=min(1.0, max(0.0, statistics.median(idle))),
        )
    return found


def _seconds(spans: Sequence[Span], phases: set[Phase], name: str | None = None) -> float:
    return sum(
        span.stop_s - span.start_s
        for span in spans
        if span.part.phase in phases and name in {None, span.part.layer}
    )  # fmt: skip


def gathered(plan: Plan, process: Process, found: Found, environment: dict[str, str]) -> dict[str, Any]:
    """Return the measurements of all ranks: of every stage those of the rank that computes most."""
    spans = [[s.part.phase.value, s.part.layer, s.start_s, s.stop_s] for s in found.shown]
    marked_s = statistics.median(each[-1].stop_s for each in found.steps)
    mine = process.rank, stage_seconds(plan, process.rank, found.steps), spans, marked_s, found.plain_s
    everyones: list[Any] = [mine]
    if process.world_size > 1:
        everyones = [None] * process.world_size
        dist.all_gather_object(everyones, mine)
    everyones.sort(key=lambda each: each[0])
    stages = [
        max((each[1][s] for each in everyones if s in each[1]), key=lambda stage: stage.forward_s + stage.backward_s)
        for s in range(len(plan.stages))
    ]
    *_, marked_s, plain_s = max(everyones, key=lambda each: (sum(each[4]), each[3]))  # the slowest rank
    step_s, iqr_s = median_and_iqr(plain_s)
    measured = MeasuredPipeline(
        plan_sha256=plan.digest, model=plan.model.name, batch=plan.batch, num_ranks=plan.num_ranks,
        environment=environment, steps_s=plain_s, step_s=step_s, step_iqr_s=iqr_s,
        instrumented_step_s=marked_s, stages=stages,
    )  # fmt: skip
    return {"pipeline": measured.model_dump(mode="json"), "spans": [each[2] for each in everyones]}
