"""Pipelines: stages on ranks of their own, with synchronous schedules or in cycles with stale weights."""
