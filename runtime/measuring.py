"""Measurements that need all ranks of a job at once; the functions its processes are started with.

Ranks that compute at the same time share memory bandwidth and caches, so layers and rates are timed
on all ranks together.
"""

from typing import Any

from planner.measure.host import measure_host
from planner.measure.layers import measure_layers
from runtime.launch import Process


def host_rates(argument: object, process: Process) -> dict[str, Any]:
    """Return the rates of this rank (``planner.measure.host.HostRates`` as JSON)."""
    del argument
    return measure_host(process.world_size).model_dump()


def layer_times(argument: dict[str, Any], process: Process) -> dict[str, list[float]]:
    """Return forward, backward and inter-quartile seconds and the repeats of every layer in ``keys``."""
    found = measure_layers(argument["keys"], process.device)
    return {key: [m.forward_s, m.backward_s, m.iqr_s, m.num_samples] for key, m in found.items()}
