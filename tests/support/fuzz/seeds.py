"""Good plans and partitions of small networks, planned once: what is mutated, and the networks to verify against."""

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from planner.ir.graph import LayerGraph
from planner.plan import Plan
from support.plans import document, plan_of

SHIPPED = Path(__file__).parents[3] / "profiles"


def small_plan() -> Plan:
    """Return the plan of two layers."""
    return plan_of(document())


def plans() -> Sequence[bytes]:
    """Return plans of one stage on one and two axes, with unequal shares, recomputed halos, and of pipelines."""
    return _planned()[0]


def known_graphs() -> Mapping[str, LayerGraph]:
    """Return the networks of the plans by digest, of pipelines for a micro-batch; none before ``plans`` was called."""
    return _planned()[1] if _planned.cache_info().currsize else {}


@functools.cache
def _planned() -> tuple[Sequence[bytes], Mapping[str, LayerGraph]]:
    from planner.api import Options, Origin, example_inputs, machine_of, prepare
    from planner.frontend.source import load_model

    found, networks = [json.dumps(document()).encode()], {}
    for name, machine, options in (
        ("lenet5", "2x2-t4-eth10", Options(mesh="node=2,gpu=2", time_limit_s=5.0)),
        ("lenet5", "4xt4-pcie", Options(solver="sample-spatial", halo_recompute="always")),
        ("digits-cnn", "4xt4-pcie", Options(stages=2, schedule="1f1b", microbatches=2)),
        ("digits-cnn", "4xt4-pcie", Options(stages=4, schedule="interleaved", microbatches=4)),
    ):
        model = load_model(name, {})
        origin = Origin(model.name, model.source, {}, f"layerwise plan {name}")
        planner = prepare(
            model.module,
            example_inputs(model.input_shapes, 8),
            machine_of(machine, None, "fp32", None),
            options,
            origin,
        )
        plan = planner.plan()
        layers = planner.traced.layers if not plan.is_pipelined else planner.retraced(plan.microbatch).layers
        found.append(plan.to_json().encode())
        networks[plan.model.graph_sha256] = layers
    shared = json.loads(found[1])
    for layer in shared["stages"][0]["layers"]:
        axis = next(iter(layer["split"]))
        if layer["split"][axis] == "sample":
            layer["shares"] = {axis: [3, 1]}
    found.append(json.dumps(shared).encode())
    return found, networks


@functools.cache
def partitions() -> Sequence[bytes]:
    """Return a partition for inference."""
    from support.command_line import layerwise

    ran = layerwise(
        "plan", "lenet5", "--cluster", "4xsamg55-wlan4", "--objective", "inference-rate", "--group", "4",
        "--time-limit", "1s",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    return [ran.out.encode()]
