"""What the stages of a pipelined plan take on synthetic data; what the ranks of ``layerwise run`` do."""

import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from planner.plan.measured import median_and_iqr
from planner.plan.measured_stages import MeasuredPipeline, MeasuredStage
from planner.plan.schema import Plan
from runtime.launch import Process
from runtime.parallel import agree
from runtime.pipeline.build import cut, everyone, joined, stage_module
from runtime.pipeline.module import Pipeline, assembled
from runtime.timing import EXPOSED_SYNC, GATHERING, OPTIMIZER, OTHER, Part, Phase, Span, Tape, TimedCommunicator

TIMEOUT_S = 60.0

_OF_FORWARD = {Phase.FORWARD, Phase.TRANSFER_FORWARD}
_OF_BACKWARD = {Phase.BACKWARD, Phase.TRANSFER_BACKWARD}


def watched_pipeline(model: torch.nn.Module, plan: Plan, loss_fn: Any, tape: Tape) -> Pipeline:
    """Return this rank's stages, whose communicators leave marks on a tape while it runs."""
    rank, stages = dist.get_rank(), cut(model, plan)
    seed = agree(model, everyone(plan, TIMEOUT_S))
    modules = [
        stage_module(model, stages, s, TimedCommunicator(communicator, tape), seed)
        for s, communicator in joined(stages, rank, TIMEOUT_S).items()
    ]
    return assembled(model, plan, stages, modules, loss_fn, TIMEOUT_S)


@contextmanager
def marked(net: Pipeline, optimizer: torch.optim.Optimizer, tape: Tape) -> Iterator[None]:
    """Let steps in this context leave marks on a tape."""
    hooks = [
        optimizer.register_step_pre_hook(lambda *_: _to(tape, OPTIMIZER)),
        optimizer.register_step_post_hook(lambda *_: _to(tape, OTHER)),
    ]
    net._steps.watch(tape)
    try:
        yield
    finally:
        net._steps.watch(None)
        for hook in hooks:
            hook.remove()


def _to(tape: Tape, part: Part) -> None:
    tape.switch(part)


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


def gathered(
    plan: Plan,
    process: Process,
    plain_s: Sequence[float],
    steps: Sequence[tuple[Span, ...]],
    reductions: Sequence[Span],
    environment: dict[str, str],
) -> dict[str, Any]:
    """Return the measurements of all ranks: of every stage those of the rank that computes most."""
    spans = [[s.part.phase.value, s.part.layer, s.start_s, s.stop_s] for s in (*steps[-1], *reductions)]
    mine = process.rank, stage_seconds(plan, process.rank, steps), spans, [each[-1].stop_s for each in steps]
    everyones: list[Any] = [mine]
    if process.world_size > 1:
        everyones = [None] * process.world_size
        dist.all_gather_object(everyones, mine)
    everyones.sort(key=lambda each: each[0])
    stages = [
        max((found[s] for _, found, _, _ in everyones if s in found), key=lambda each: each.forward_s + each.backward_s)
        for s in range(len(plan.stages))
    ]
    step_s, iqr_s = median_and_iqr(plain_s)
    marked_s = max(statistics.median(seconds) for _, _, _, seconds in everyones)
    measured = MeasuredPipeline(
        plan_sha256=plan.digest, model=plan.model.name, batch=plan.batch, num_ranks=plan.num_ranks,
        environment=environment, steps_s=list(plain_s), step_s=step_s, step_iqr_s=iqr_s, instrumented_step_s=marked_s,
        stages=stages,
    )  # fmt: skip
    return {"pipeline": measured.model_dump(mode="json"), "spans": [each[2] for each in everyones]}
