"""A pipeline that was found, as plain numbers for the plan."""

from planner.api.pipelines.search import Pipeline
from planner.cost.simulate import Timeline, simulate
from planner.cost.stages import without_tail
from planner.ir.schedule import in_flight, staleness, weight_versions
from planner.plan.build import FoundStage, PipelinedPlan
from planner.plan.schema import StageCostPart


def pipelined(found: Pipeline) -> PipelinedPlan:
    """Return a pipeline as plain numbers."""
    stages = []
    for stage, cost in zip(found.stages, stage_costs(found), strict=True):
        timeline = simulate(stage.table, stage.choice, stage.bucket_bytes)
        stages.append(FoundStage(stage.table, stage.choice, timeline, cost, stage.times.recompute))
    largest = max(found.stages, key=lambda stage: stage.times.params_bytes)
    count = found.num_microbatches
    busy = [count * sum(x.timeline.source_s.values()) for x in stages]
    slowest = stages[busy.index(max(busy))]
    return PipelinedPlan(
        stages, found.kind.value, count, largest.bucket_bytes, found.timeline.step_s,
        compute_s=max(busy), source_s={k: count * v for k, v in slowest.timeline.source_s.items()},
        sent_bytes=max(_sent_bytes(found, s, stage.timeline) for s, stage in enumerate(stages)),
        memory_bytes=found.memory_bytes, lower_bound_s=min(found.lower_bound_s, found.timeline.step_s),
        num_strategies=found.num_candidates, batch=found.traced.layers.batch * count,
        graph_sha256=found.traced.layers.digest,
    )  # fmt: skip


def _sent_bytes(found: Pipeline, s: int, timeline: Timeline) -> float:
    """Return what the busiest rank of a stage sends in a step: gradients are reduced once, the rest comes M times."""
    stage = found.stages[s]
    each = simulate(without_tail(stage.table), stage.choice, stage.bucket_bytes).communication_bytes
    ahead = found.links[s].forward_bytes if s < len(found.links) else 0.0
    back = found.links[s - 1].backward_bytes if s else 0.0
    return found.num_microbatches * (each + ahead + back) + timeline.communication_bytes - each


def stage_costs(found: Pipeline) -> tuple[StageCostPart, ...]:
    """Return the predicted numbers of every stage."""
    counts = len(found.stages), max(found.positions) + 1
    synchronous = found.kind.is_synchronous
    held = in_flight(found.kind, *counts, found.num_microbatches if synchronous else len(found.stages) * 4)
    stale, versions = staleness(found.kind, counts[0]), weight_versions(found.kind, counts[0])
    costs = []
    for s, times in enumerate(stage.times for stage in found.stages):
        again_s = times.forward_s if times.recompute else 0.0
        costs.append(StageCostPart(
            forward_s=times.forward_s,
            backward_s=times.backward_input_s + times.backward_weight_s + again_s,
            sent_bytes=round(found.links[s].forward_bytes) if s < len(found.links) else 0,
            tail_s=times.sync_s + times.update_s,
            bubble_share=min(max(found.timeline.bubbles[found.positions[s]], 0.0), 1.0),
            staleness=stale[s], weight_versions=versions[s], num_in_flight=max(held[s], 1),
            memory_bytes=found.timeline.memory_bytes[found.positions[s]],
        ))  # fmt: skip
    return tuple(costs)
