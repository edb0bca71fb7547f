"""Pipelines: stages, micro-batches and schedules."""

from planner.api.pipelines.plans import pipelined, stage_costs
from planner.api.pipelines.pricing import price_pipeline
from planner.api.pipelines.search import Pipeline, best_pipeline, pipeline_at

__all__ = ["Pipeline", "best_pipeline", "pipeline_at", "pipelined", "price_pipeline", "stage_costs"]
