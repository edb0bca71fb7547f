"""Inference on constrained devices: from a module and a machine to a partition file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import torch
from torch import nn

from planner.api.options import Origin
from planner.devices.graph import Cluster
from planner.errors import UnknownNameError, UsageError
from planner.frontend.lower import trace_layers
from planner.inference.groups import neuron_groups
from planner.inference.problem import Devices, Objective, Problem
from planner.inference.schema import Partition, Request, partition_file
from planner.inference.search import Limits, partition
from planner.plan.build import versions
from planner.plan.schema import ClusterPart, InputTensor, ModelPart


@dataclass(frozen=True, slots=True)
class InferenceOptions:
    """What a partition is made for.

    Attributes:
        objective: inferences per second, or bytes between devices.
        group: side of the squares of positions that stay together, see ``neuron_groups``; None for whole layers.
        element_bytes: of each number: 4 for fp32, 1 for int8.
        input_device: id of the device on which the model's inputs are; None for anywhere.
        limits: when the search ends.
    """

    objective: Objective = Objective.INFERENCE_RATE
    group: int | None = None
    element_bytes: int = 4
    input_device: str | None = None
    limits: Limits = Limits()  # noqa: RUF009  # a frozen value


def plan_inference(
    module: nn.Module,
    inputs: Sequence[torch.Tensor],
    machine: Cluster,
    options: InferenceOptions = InferenceOptions(),  # a frozen value
    origin: Origin = Origin(),  # noqa: B008  # a frozen value
    keywords: Mapping[str, Any] | None = None,
) -> Partition:
    """Return which device computes which part of a network, one inference after the other.

    Args:
        module: traced as it runs in evaluation.
        inputs: of one sample; meta tensors will do.
        machine: devices and links, see ``Devices.of``.
        options: what counts.
        origin: for the file's provenance.
        keywords: inputs by name.

    Raises:
        UsageError: an option is of no use.
        TraceError: the model cannot be traced.
        InfeasibleError: proven that nothing fits.
        NoPlanError: nothing that fits was found.
    """
    if options.element_bytes < 1 or (options.group is not None and options.group < 1):
        raise UsageError("group and element_bytes must be at least 1")
    device = _device(machine, options.input_device)
    name = origin.name or type(module).__name__
    traced = trace_layers(module, tuple(inputs), name, keywords=dict(keywords or {}), training=False)
    layers = traced.layers
    groups = neuron_groups(layers, options.group, options.element_bytes)
    if not groups.flop.any():
        raise UsageError(f"{layers.name} computes nothing, so that no device has anything to do")
    problem = Problem.of(groups, Devices.of(machine), options.objective, device)
    found = partition(problem, options.limits)
    tensors = [
        InputTensor(
            name=layer.id, shape=list(layer.output.shape), dtype=layer.output.dtype, keyword=layer.id in traced.keywords
        )
        for layer in layers.layers
        if layer.op.kind == "input"
    ]
    model = ModelPart(
        name=layers.name, source=origin.source, arguments=dict(origin.arguments), graph_sha256=layers.digest,
        num_params=layers.num_params, inputs=tensors,
    )  # fmt: skip
    cluster = ClusterPart(name=machine.name, sha256=machine.digest, num_devices=len(machine.devices))
    request = Request(
        model, cluster, options.element_bytes, options.group, device, options.limits, origin.command, versions(),
        datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    )  # fmt: skip
    return partition_file(problem, found, request)


def _device(machine: Cluster, name: str | None) -> int | None:
    names = [device.id for device in machine.devices]
    if name is None:
        return None
    if name not in names:
        raise UnknownNameError(f"device of {machine.name}", name, names, "(--input-device)")
    return names.index(name)
