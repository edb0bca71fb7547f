"""Plans for tests: a small one as JSON values, made without torch."""

import json
from typing import Any

from planner.plan import Plan

Json = dict[str, Any]


def document() -> Json:
    """Return a sound plan of two layers on two devices; the figures are made up."""
    return {
        "schema_version": 1,
        "model": {
            "name": "net", "source": "nets.py:net", "arguments": {"width": 0.5, "bias": True},
            "graph_sha256": "a" * 64, "num_params": 650,
            "inputs": [{"name": "input", "shape": [8, 64], "dtype": "float32", "keyword": False}],
            "changes": [],
        },
        "batch": 8, "precision": "fp32", "optimizer": "momentum", "io": "per-rank",
        "sync_batch_norm": True, "bucket_bytes": 2**20,
        "cluster": {"name": "2xa100-nvlink", "sha256": "b" * 64, "num_devices": 2},
        "schedule": {"kind": "single", "num_microbatches": 1},
        "stages": [{
            "mesh": {"axes": [{"name": "gpu", "size": 2}], "ranks": [0, 1]},
            "devices": [], "parameter_sharding": "none", "recompute": False, "cost": None,
            "layers": [
                layer("input", "input", "sample", 0.0), layer("fc1", "linear", "out_channel", 0.002),
                layer("fc2", "linear", "out_channel", 0.001), layer("output", "output", "sample", 0.0),
            ],
        }],
        "totals": {
            "step_s": 0.004, "samples_per_s": 2000.0, "compute_s": 0.003, "exposed_s": 0.001,
            "measured_s": 0.0015, "fitted_s": 0.0005, "data_sheet_s": 0.001, "communication_bytes": 4096.0,
            "memory_bytes": 3 * 2**20,
        },
        "baselines": [
            {"name": "data", "step_s": 0.005, "exposed_s": 0.002, "communication_bytes": 8192.0,
             "memory_bytes": 5 * 2**20, "num_replaced": 0, "note": ""},
        ],
        "search": {"solver": "auto", "status": "feasible", "lower_bound_s": 0.003, "gap": 0.25,
                   "num_strategies": "144", "memory_limit_bytes": 4 * 2**20,
                   "constraints": [{"kind": "pin", "text": "fc*=out_channel"}], "branches": None},
        "provenance": {"profile_sha256": "c" * 64, "versions": {"layerwise": "0.1.0"},
                       "command": "layerwise plan nets.py:net --cluster 2xa100-nvlink",
                       "utc": "2030-01-01T00:00:00Z"},
    }  # fmt: skip


def layer(name: str, op: str, dimension: str, compute_s: float) -> Json:
    """Return a layer of ``document``."""
    figures = ("compute_s", "transfer_s", "halo_s", "sync_s", "exposed_s")
    cost = dict.fromkeys(figures, 0.0) | {"compute_s": compute_s}
    return {
        "id": name,
        "op": op,
        "split": {"gpu": dimension},
        "shares": {},
        "overlap": False,
        "halo": "exchange",
        "cost": cost,
        "memory_bytes": 2**20,
    }


def plan_of(found: Json) -> Plan:
    """Return the plan that JSON values describe."""
    return Plan.from_json(json.dumps(found))
