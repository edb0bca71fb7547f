"""The plan: a strategy with everything that is needed to run it and to trust it, as a file."""

from planner.plan.schema import Plan

__all__ = ["Plan"]
