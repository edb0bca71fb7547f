"""What every split of every layer costs, and what it costs to hand a tensor from split to split."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.cost.memory import LayerBytes, Optimizer, layer_bytes, update_passes
from planner.cost.transfer import FREE, Price, StepPricer
from planner.devices.graph import DeviceGraph
from planner.devices.route import Router
from planner.ir.count import gradient_flow
from planner.ir.graph import Layer, LayerGraph
from planner.ir.layout import Layout, Whole
from planner.ir.mesh import Mesh
from planner.ir.ops import BatchNorm
from planner.ir.rules import LayerLayouts, layouts, reduced_axes
from planner.ir.split import LayerId, Split
from planner.ir.tensor import DType
from planner.profile.key import LocalLayer
from planner.profile.table import ProfileTable, Source

Seconds = NDArray[np.float64]
Axes = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Settings:
    """What a step's cost depends on beside network, split and machine.

    Attributes:
        precision: ``fp32``, ``tf32`` or ``bf16`` (autocast: parameters, gradients, sync in fp32).
        optimizer: decides state and update traffic.
        sync_batch_norm: statistics over the global batch, or over each rank's own piece.
    """

    precision: str = "fp32"
    optimizer: Optimizer = Optimizer.MOMENTUM
    sync_batch_norm: bool = True

    def activation_dtype(self, dtype: DType) -> DType:
        """Return the element type of an activation that is ``dtype`` in the model."""
        return DType.BFLOAT16 if self.precision == "bf16" and dtype is DType.FLOAT32 else dtype


@dataclass(frozen=True, slots=True)
class LayerCost:
    """One layer under one split, on the busiest device, per step.

    Attributes:
        forward_s, backward_s: compute.
        blocking_forward, blocking_backward: communication inside the layer that compute waits for:
            partial sums, batch norm statistics.
        sync: bytes of gradients to reduce, by the mesh axes they are reduced over.
        update_s: optimizer step.
        memory: bytes.
        source: where the compute times are from.
    """

    forward_s: float
    backward_s: float
    blocking_forward: Price
    blocking_backward: Price
    sync: Mapping[Axes, int]
    update_s: float
    memory: LayerBytes
    source: Source


@dataclass(frozen=True)
class CostModel:
    """Prices layers and edges of one network on one mesh of one machine."""

    graph: LayerGraph
    machine: DeviceGraph
    mesh: Mesh
    profile: ProfileTable
    settings: Settings
    pricer: StepPricer
    flows: Mapping[LayerId, bool]

    @staticmethod
    def of(
        graph: LayerGraph, machine: DeviceGraph, mesh: Mesh, profile: ProfileTable, settings: Settings
    ) -> "CostModel":
        """Return the model for a network on a mesh of a machine."""
        pricer = StepPricer(Router(machine, mesh), {})
        return CostModel(graph, machine, mesh, profile, settings, pricer, gradient_flow(graph))

    def layouts(self, layer: Layer, split: Split) -> LayerLayouts:
        """Return every layout of a layer under a split."""
        return layouts(layer, self.graph.inputs_of(layer), self.mesh, split)

    def local(self, layer: Layer, split: Split) -> LocalLayer:
        """Return the largest piece of a layer that one device computes."""
        found = self.layouts(layer, split)
        return LocalLayer(
            layer,
            tuple(x.largest_shape() for x in found.inputs),
            found.computed.largest_shape(),
            tuple(x.largest_shape() for x in found.params),
            self.settings.activation_dtype(layer.output.dtype),
            self._input_gradient(layer),
        )

    def _input_gradient(self, layer: Layer) -> bool:
        return any(self.flows[i] for i in layer.inputs)

    def layer(self, layer: Layer, split: Split) -> LayerCost:
        """Return the cost of a layer under a split."""
        found = self.layouts(layer, split)
        local = self.local(layer, split)
        time = self.profile.time(local)
        dtype = local.dtype
        forward = self.pricer.price(found.computed, found.output, dtype.item_bytes)
        backward = self.pricer.price(found.output.gradient, found.computed.gradient, dtype.item_bytes)
        forward_norm, backward_norm = self._statistics(layer, found.output)
        memory = layer_bytes(layer, found, dtype, self.settings.optimizer)
        trainable = sum(
            math.prod(x.largest_shape()) * p.spec.dtype.item_bytes
            for p, x in zip(layer.params, found.params, strict=True) if p.trainable
        )  # fmt: skip
        return LayerCost(
            time.forward_s, time.backward_s,
            forward + forward_norm, backward + backward_norm,
            _gradient_bytes(layer, found.params),
            self.profile.roofline.update_s(trainable * update_passes(self.settings.optimizer)),
            memory, time.source,
        )  # fmt: skip

    def _statistics(self, layer: Layer, output: Layout) -> tuple[Price, Price]:
        """Return what batch norm statistics cost.

        Forward, an all-gather of mean, variance and count; backward, an all-reduce of two sums.
        """
        axes = reduced_axes(layer.output, output)
        if not axes or not self.settings.sync_batch_norm:
            return FREE, FREE
        norms = [op for op in (layer.op, *(a.op for a in layer.absorbed)) if isinstance(op, BatchNorm)]
        channels = output.largest_shape()[1] if norms else 0
        pair = FREE, FREE
        for _ in norms:
            row_bytes = (2 * channels + 1) * DType.FLOAT32.item_bytes
            forward = self.pricer.all_gather(axes, row_bytes * math.prod(self.mesh.shape[a] for a in axes))
            backward = self.pricer.all_reduce(axes, 2 * channels * DType.FLOAT32.item_bytes)
            pair = pair[0] + forward, pair[1] + backward
        return pair

    def edge(self, producer: Layer, have: Layout, need: Layout) -> tuple[Price, Price]:
        """Return the price of an edge, forward and backward.

        Args:
            producer: the layer whose output moves.
            have: the layout of the producer's output.
            need: the layout that the consumer's input asks for.
        """
        item = self.settings.activation_dtype(producer.output.dtype).item_bytes
        forward = self.pricer.price(have, need, item)
        if not self.flows[producer.id]:
            return forward, FREE
        return forward, self.pricer.price(need.gradient, have.gradient, item)


def _gradient_bytes(layer: Layer, params: Sequence[Layout]) -> dict[Axes, int]:
    found: dict[Axes, int] = defaultdict(int)
    for parameter, layout in zip(layer.params, params, strict=True):
        axes = layout.axes_with(Whole.SHARED)
        if parameter.trainable and axes:
            found[axes] += math.prod(layout.largest_shape()) * parameter.spec.dtype.item_bytes
    return dict(found)
