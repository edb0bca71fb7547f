"""``layerwise report``: everything that is known of a plan, on one page."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Final

from planner.api.comparing import planner_of, price_with
from planner.api.explaining import around
from planner.api.machine import Machine
from planner.api.pipelines import crossing, price_pipeline, stage_costs
from planner.api.planning import Planner
from planner.api.scaling import scaled
from planner.cost.overlap import Event
from planner.cost.pipeline import PipelineTimeline
from planner.cost.simulate import Timeline, simulate
from planner.cost.stages import messages, most_sent
from planner.cost.table import collector_paused
from planner.cost.traffic import of_pipeline, traffic
from planner.plan.build import versions
from planner.plan.check import is_as_planned
from planner.plan.measured import Measured
from planner.plan.measured_stages import MeasuredPipeline
from planner.plan.schema import Plan
from planner.report.document import Content, document
from planner.report.html import page
from planner.report.pictures import PricedStage
from planner.search.alternatives import Standing
from planner.space.enumerate import DEFAULT_DIMENSIONS

MAX_SHOWN: Final = 256
"""Devices whose traffic is shown, each with each other."""


def report(
    plan: Plan,
    machine: Machine,
    *,
    measured: Measured | MeasuredPipeline | None = None,
    trace: Mapping[str, Sequence[Event]] | None = None,
    trace_facts: Mapping[str, str] | None = None,
    alternatives: bool = True,
    scale: Sequence[int] = (),
    progress: Callable[[str], None] = lambda _: None,
) -> str:
    """Return a report of a plan as one HTML page that needs nothing beside it.

    The model is built from the source that the plan names (code of the user's, if it is no shipped one).

    Args:
        plan: of one stage or several.
        machine: that it is priced on.
        measured: a run of the plan (``layerwise run --measured``).
        trace: a measured timeline by rank (``planner.report.trace.read_trace``).
        trace_facts: what its file says of it.
        alternatives: look for the next best split of every layer; not of pipelines, and not where halos are recomputed.
        scale: numbers of devices of the machine that the network is planned for too.
        progress: is told what is being done.

    Raises:
        LayerwiseError: as ``planner.api.price_plan``; a number of ``scale`` is no part of the machine.
    """
    progress("pricing the plan")
    used = {d for stage in plan.stages for split in stage.strategy().values() for d in split.dimensions}
    planner = planner_of(plan, machine, DEFAULT_DIMENSIONS | used)
    with collector_paused():
        if plan.is_pipelined:
            content = _of_pipeline(plan, planner)
        else:
            content = _of_one_stage(plan, planner, alternatives, progress)
    content = replace(
        content, measured=measured, trace=trace or {}, trace_facts=trace_facts or {},
        scale=tuple(scaled(plan, planner, scale, progress)),
    )  # fmt: skip
    progress("writing the page")
    return page(content.title, document(content))


def _content(
    plan: Plan, machine: Machine, stages: Sequence[PricedStage], timeline: Timeline | PipelineTimeline
) -> Content:
    return Content(
        plan, machine.graph, is_as_planned(plan, machine.graph.digest, machine.profile.digest), stages,
        timeline.step_s, timeline.events, [machine.graph.devices[rank].id for rank in _ranks(stages)],
        datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"), versions(),
    )  # fmt: skip


def _of_one_stage(plan: Plan, planner: Planner, alternatives: bool, progress: Callable[[str], None]) -> Content:
    priced = price_with(planner, plan)
    standings: tuple[Standing, ...] = ()
    if alternatives and plan.mesh.size > 1 and not plan.only_stage.recomputing():
        progress("looking for the next best split of every layer")
        standings = tuple(around(plan, priced).standings())
    stages = [PricedStage(priced.table, priced.choice, priced.timeline)]
    content = _content(plan, planner.machine, stages, priced.timeline)
    sent = traffic(priced.table, priced.choice) if plan.mesh.size <= MAX_SHOWN else None
    return replace(content, standings=standings, traffic=sent)


def _of_pipeline(plan: Plan, planner: Planner) -> Content:
    found = price_pipeline(plan, planner)
    stages = [
        PricedStage(stage.table, stage.choice, simulate(stage.table, stage.choice, stage.bucket_bytes))
        for stage in found.stages
    ]
    content = _content(plan, planner.machine, stages, found.timeline)
    tensors = [list(crossing(a, b)) for a, b in itertools.pairwise(found.stages)]
    sent = None
    if plan.num_ranks <= MAX_SHOWN:
        pairs = [(stage.table, stage.choice) for stage in found.stages]
        sent = of_pipeline(pairs, map(messages, tensors), found.num_microbatches, _ranks(stages))
    return replace(
        content, stage_costs=stage_costs(found), position_bytes=found.timeline.memory_bytes, traffic=sent,
        sent=[[sum(map(most_sent, messages([each]))) for each in of_stage] for of_stage in tensors],
    )  # fmt: skip


def _ranks(stages: Sequence[PricedStage]) -> list[int]:
    return sorted({rank for stage in stages for rank in stage.table.space.mesh.ranks})
