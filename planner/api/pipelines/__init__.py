"""Pipelines: stages, micro-batches and schedules."""

from planner.api.pipelines.pieces import Pieces
from planner.api.pipelines.plans import pipelined, stage_costs
from planner.api.pipelines.pricing import price_pipeline
from planner.api.pipelines.search import Pipeline, best_pipeline, crossing, pipeline_at, refuse_uneven

__all__ = [
    "Pieces", "Pipeline", "best_pipeline", "crossing", "pipeline_at", "pipelined", "price_pipeline", "refuse_uneven",
    "stage_costs",
]  # fmt: skip
