"""What every split of every layer costs, and what it costs to hand a tensor from split to split."""

import functools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from operator import attrgetter

import numpy as np
from numpy.typing import NDArray

from planner.cost.crew import NO_OTHERS, Crew, Worker, slowest
from planner.cost.halo import HaloOverlap
from planner.cost.memory import LayerBytes, Optimizer, layer_bytes, update_passes
from planner.cost.sharding import ParameterSharding, largest_gathers, whole_bytes
from planner.cost.transfer import FREE, Price, Reduction, StepPricer
from planner.devices.graph import Cluster
from planner.devices.measured import CollectiveKind
from planner.devices.route import Router
from planner.ir.branches import busy_positions
from planner.ir.count import gradient_flow
from planner.ir.graph import Layer, LayerGraph
from planner.ir.layout import Layout, Whole
from planner.ir.mesh import Mesh
from planner.ir.ops import BatchNorm, GroupNorm
from planner.ir.rows import row_axes
from planner.ir.rules import LayerLayouts, Partition, partition, reduced_axes, spatial_axes
from planner.ir.split import LayerId, Split
from planner.ir.tensor import DType
from planner.profile.key import LocalLayer
from planner.profile.table import LayerTime, ProfileTable, Source

Seconds = NDArray[np.float64]
Axes = tuple[int, ...]
_LOCAL_VALUES = attrgetter(*(field.name for field in fields(LocalLayer) if field.name != "layer"))
"""What two pieces of one layer can differ in."""
COLLECT_PASSES = 2
"""How often a gradient is read or written on its way into the buffer of a reduction (``runtime.parameters``)."""
GATHER_PASSES = 2
"""How often a sharded parameter is read or written on its way out of the buffer of a gather; see above."""
UNPACK_PASSES = 2 * GATHER_PASSES
"""Of fully sharded parameters, which are gathered forward and backward."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What a step's cost depends on beside network, split and machine.

    Attributes:
        precision: ``fp32``, ``tf32`` or ``bf16`` (autocast: parameters, gradients, sync in fp32).
        optimizer: decides state and update traffic.
        sync_batch_norm: statistics over the global batch, or over each rank's own piece.
        parameter_sharding: what is cut over the ranks that synchronise a parameter.
        halo_overlap: which halo exchanges run beside computation.
    """

    precision: str = "fp32"
    optimizer: Optimizer = Optimizer.MOMENTUM
    sync_batch_norm: bool = True
    parameter_sharding: ParameterSharding = ParameterSharding.NONE
    halo_overlap: HaloOverlap = HaloOverlap.NEVER

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
        sync: bytes of gradients to reduce, by the mesh axes they are reduced over. What a sharded parameter is
            gathered from, and how large it is then, are the same.
        collect_s: copying gradients into the buffers they are reduced in, and sharded parameters out of those they
            are gathered in; all in backward.
        update_s: optimizer step, and copying what other ranks updated.
        memory: bytes.
        source: where the compute times are from.
        whole: bytes of gradients that are all-reduced although parameters are sharded: of those that cannot be cut.
        only_gathered: bytes of parameters that forward and backward gather, by mesh axes, where their gradients are not
            reduced: of a micro-batch, and only if parameters are sharded fully (``planner.cost.stages``).
        busy: share of the ranks that compute the layer.
    """

    forward_s: float
    backward_s: float
    blocking_forward: Price
    blocking_backward: Price
    sync: Mapping[Axes, int]
    collect_s: float
    update_s: float
    memory: LayerBytes
    source: Source
    whole: Mapping[Axes, int] = field(default_factory=dict)
    only_gathered: Mapping[Axes, int] = field(default_factory=dict)
    busy: float = 1.0

    @property
    def gathered(self) -> Mapping[Axes, int]:
        """Bytes of parameters that are gathered where they are sharded fully, by mesh axes."""
        return self.sync or self.only_gathered


@dataclass(frozen=True)
class CostModel:
    """Prices layers and edges of one network on one mesh of one machine.

    A parameter that several layers share is held, reduced and updated once: it counts with the first of them.

    Attributes:
        graph: the network.
        machine: whose devices may be of several kinds and speeds.
        mesh: the ranks.
        profile: of the slowest kind of device.
        settings: see there.
        pricer: of what moves.
        flows: whether a layer's output has a gradient.
        carriers: of every parameter, the first layer that has it.
        others: profiles of the other kinds.
    """

    graph: LayerGraph
    machine: Cluster
    mesh: Mesh
    profile: ProfileTable
    settings: Settings
    pricer: StepPricer
    flows: Mapping[LayerId, bool]
    carriers: Mapping[str, LayerId]
    others: Mapping[str, ProfileTable] = field(default_factory=dict)

    @staticmethod
    def of(
        graph: LayerGraph,
        machine: Cluster,
        mesh: Mesh,
        profile: ProfileTable,
        settings: Settings,
        others: Mapping[str, ProfileTable] = NO_OTHERS,
    ) -> "CostModel":
        """Return the model for a network on a mesh of a machine; ``others`` are profiles of other kinds of devices."""
        crew = Crew.of(machine, mesh, profile, others)
        pricer = StepPricer(Router(machine, mesh), crew.bandwidth_bytes_per_s)
        flows, carriers = gradient_flow(graph), _carriers(graph)
        return CostModel(graph, machine, mesh, profile, settings, pricer, flows, carriers, others)

    @functools.cached_property
    def crew(self) -> Crew:
        """What each rank computes on."""
        return Crew.of(self.machine, self.mesh, self.profile, self.others)

    def layouts(self, layer: Layer, split: Split) -> LayerLayouts:
        """Return every layout of a layer under a split."""
        return self.partition(layer).layouts(split)

    def partition(self, layer: Layer) -> Partition:
        """Return how the tensors of a layer lie under any split."""
        return partition(layer, self.graph.inputs_of(layer), self.mesh)

    def local(self, layer: Layer, split: Split) -> LocalLayer:
        """Return the largest piece of a layer that one device computes."""
        return self._local(layer, self.layouts(layer, split))

    def locals(self, layer: Layer, split: Split) -> tuple[LocalLayer, ...]:
        """Return the pieces of a layer that devices compute, as far as they are timed apart."""
        found = self.layouts(layer, split)
        if not split.shares:
            return (self._local(layer, found),)
        busy = (position for position in range(self.mesh.size) if not found.output.is_idle(position))
        return tuple({_LOCAL_VALUES(x): x for x in (self._local(layer, found, p) for p in busy)}.values())

    def _local(self, layer: Layer, found: LayerLayouts, position: int | None = None) -> LocalLayer:
        """Return the piece of a rank, or the largest one."""
        is_sum = bool(found.computed.axes_with(Whole.PARTIAL))

        def shape(layout: Layout) -> tuple[int, ...]:
            return layout.largest_shape() if position is None else layout.region(position).shape

        return LocalLayer(
            layer,
            tuple(map(shape, found.inputs)),
            shape(found.computed),
            tuple(map(shape, found.params)),
            self.settings.activation_dtype(layer.output.dtype),
            self._input_gradient(layer),
            self.settings.precision,
            synchronised=self.settings.sync_batch_norm and bool(reduced_axes(layer.output, found.output)),
            resolved=shape(found.output) if is_sum else None,
        )

    def carried(self, layer: Layer) -> tuple[bool, ...]:
        """Return for every parameter of a layer whether it counts here: no earlier layer has it."""
        return tuple(self.carriers[p.name] == layer.id for p in layer.params)

    def _input_gradient(self, layer: Layer) -> bool:
        return any(self.flows[i] for i in layer.inputs)

    def layers(self, layer: Layer, splits: Sequence[Split]) -> tuple[LayerCost, ...]:
        """Return the cost of a layer under each of these splits."""
        lies, carried = self.partition(layer), self.carried(layer)
        times = self.times(layer, splits)
        found = []
        for split, time in zip(splits, times, strict=True):
            if split.weights:
                busy = busy_positions(split, self.mesh)
                cost = self._cost(layer, lies.layouts(split), time, carried, self.crew.at(busy))
                found.append(replace(cost, busy=busy.bit_count() / self.mesh.size))
            else:
                found.append(self._cost(layer, lies.layouts(split), time, carried, self.crew))
        return tuple(found)

    def times(self, layer: Layer, splits: Sequence[Split]) -> list[LayerTime]:
        """Return the compute of a layer under each of these splits, on the rank that takes longest.

        The profile is asked once for each local piece. Where all pieces are alike, that is the slowest device's.
        """
        lies = self.partition(layer)
        times: dict[object, LayerTime] = {}
        found = []
        for split in splits:
            own = lies.layouts(split)
            plain = lies.layouts(replace(split, tiles=())) if split.tiles else None
            if split.shares:
                found.append(self._slowest(layer, own, plain))
                continue
            local, untiled = self._local(layer, own), self._local(layer, plain) if plain else None
            piece = _LOCAL_VALUES(local), _LOCAL_VALUES(untiled) if untiled else ()
            if piece not in times:
                times[piece] = slowest([_time(worker, local, untiled) for worker in self.crew.different])
            found.append(times[piece])
        return found

    def _slowest(self, layer: Layer, found: LayerLayouts, plain: LayerLayouts | None) -> LayerTime:
        """Return the compute of a layer whose pieces differ: of the rank that takes longest, forward and backward.

        Args:
            layer: the layer.
            found: its layouts.
            plain: those without tiles, where it has any.
        """
        times: dict[object, LayerTime] = {}
        for position, worker in enumerate(self.crew.workers):
            if not found.output.is_idle(position):
                local = self._local(layer, found, position)
                untiled = self._local(layer, plain, position) if plain else None
                key = worker, _LOCAL_VALUES(local), _LOCAL_VALUES(untiled) if untiled else ()
                if key not in times:
                    times[key] = _time(worker, local, untiled)
        return slowest(tuple(times.values()))

    def _cost(
        self, layer: Layer, found: LayerLayouts, time: LayerTime, carried: Sequence[bool], crew: Crew
    ) -> LayerCost:
        dtype = self.settings.activation_dtype(layer.output.dtype)
        forward = self.pricer.price(found.computed, found.output, dtype.item_bytes)
        backward = self.pricer.price(found.output.gradient, found.computed.gradient, dtype.item_bytes)
        forward_norm, backward_norm = self._statistics(layer, found.output)
        sharding = self.settings.parameter_sharding
        memory = layer_bytes(layer, found, dtype, self.settings.optimizer, carried, sharding, reorders=self._reorders)
        sync, whole = _gradient_bytes(layer, found.params, carried, sharding)
        cut_bytes = sum(sync.values())
        collected = COLLECT_PASSES * (cut_bytes + sum(whole.values()))
        updated = memory.updated * update_passes(self.settings.optimizer)
        if sharding is ParameterSharding.FULL:
            memory = replace(memory, other_gathered=self._other_gathered(layer))
            collected += UNPACK_PASSES * cut_bytes
        elif sharding is ParameterSharding.OPTIMIZER:
            updated += GATHER_PASSES * cut_bytes
        return LayerCost(
            time.forward_s, time.backward_s,
            forward + forward_norm, backward + backward_norm,
            sync, crew.update_s(collected), crew.update_s(updated),
            memory, time.source, whole,
        )  # fmt: skip

    @functools.cached_property
    def _reorders(self) -> bool:
        """Whether a convolution's kernel works on copies of its operands (``layer_bytes``)."""
        return any(device.kind == "cpu" for device in self.machine.devices)

    @functools.cached_property
    def _largest_gathers(self) -> tuple[int, int]:
        return largest_gathers(self.graph.layers)

    def _other_gathered(self, layer: Layer) -> int:
        """Return the most bytes of parameters that any other layer can gather."""
        first, second = self._largest_gathers
        return second if whole_bytes(layer) == first else first

    def sync(self, axes: Axes, num_bytes: int) -> Price:
        """Return what keeping so many bytes of parameters in step over these axes costs, nothing of it hidden.

        The table of ``planner.cost.sharding``: an all-reduce; or a reduce-scatter and an all-gather; or these and
        one more all-gather.
        """
        pricer, sharding = self.pricer, self.settings.parameter_sharding
        if sharding is ParameterSharding.NONE:
            return pricer.all_reduce(axes, num_bytes)
        whole = pricer.reduce_scatter(axes, num_bytes) + pricer.all_gather(axes, num_bytes)
        return whole if sharding is ParameterSharding.OPTIMIZER else whole + pricer.all_gather(axes, num_bytes)

    def gathers(self, cost: LayerCost) -> Price:
        """Return what gathering the parameters of a layer forward and backward costs, where that is all of its sync."""
        found = [self.pricer.all_gather(axes, b) for axes, b in cost.only_gathered.items()]
        return sum((each + each for each in found), FREE)

    def without_tail(self, cost: LayerCost) -> LayerCost:
        """Return what a layer costs in a pass behind which gradients are not reduced and parameters not updated.

        Parameters that are sharded fully are gathered in every pass.
        """
        is_full = self.settings.parameter_sharding is ParameterSharding.FULL
        gathered = cost.sync if is_full else {}
        unpack_s = self.profile.roofline.update_s(UNPACK_PASSES * sum(gathered.values())) if gathered else 0.0
        return replace(cost, sync={}, whole={}, collect_s=unpack_s, update_s=0.0, only_gathered=gathered)

    def reduction(self, axes: Axes, num_bytes: int, *, is_whole: bool = False) -> Reduction:
        """Return what reducing so many bytes of gradients over these axes takes behind computation.

        Args:
            axes: of the mesh.
            num_bytes: on each rank.
            is_whole: of parameters that are not sharded, though others may be.
        """
        is_whole = is_whole or self.settings.parameter_sharding is ParameterSharding.NONE
        kind = CollectiveKind.ALL_REDUCE if is_whole else CollectiveKind.REDUCE_SCATTER
        return self.pricer.reduction(axes, num_bytes, kind)

    def gathering(self, axes: Axes, num_bytes: int) -> Reduction:
        """Return what gathering so many bytes of sharded parameters over these axes takes behind computation."""
        return self.pricer.reduction(axes, num_bytes, CollectiveKind.ALL_GATHER)

    def _statistics(self, layer: Layer, output: Layout) -> tuple[Price, Price]:
        """Return what the statistics of batch norms, and of a group norm that is split by space, cost.

        Forward, an all-gather of mean, variance and count; backward, an all-reduce of two sums. Of a group norm for
        each sample and group.
        """
        if isinstance(layer.op, GroupNorm):
            return self._group_statistics(layer.op, spatial_axes(layer.output, output), output)
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

    def _group_statistics(self, op: GroupNorm, axes: tuple[int, ...], output: Layout) -> tuple[Price, Price]:
        samples, channels, *_ = output.largest_shape()
        rows = samples * (op.groups * channels // op.channels)
        if not axes:
            return FREE, FREE
        row_bytes = (2 * rows + 1) * DType.FLOAT32.item_bytes
        forward = self.pricer.all_gather(axes, row_bytes * math.prod(self.mesh.shape[a] for a in axes))
        return forward, self.pricer.all_reduce(axes, 2 * rows * DType.FLOAT32.item_bytes)


def _time(worker: Worker, local: LocalLayer, untiled: LocalLayer | None) -> LayerTime:
    """Return the time of a piece; of a tile that was not measured, that of the piece by the ratio of estimates.

    What a tile takes longer is held against what messages take: the error of an estimate must not look like it.

    Args:
        worker: that computes it.
        local: the piece.
        untiled: the piece without the tile, where it is one.
    """
    own = worker.time(local)
    if untiled is None or own.source is Source.MEASURED:
        return own
    found = worker.time(untiled)
    if found.source is not Source.MEASURED:
        return own
    large, small = worker.profile.estimate(local), worker.profile.estimate(untiled)
    return replace(
        found,
        forward_s=found.forward_s * (large.forward_s / small.forward_s if small.forward_s else 1.0),
        backward_s=found.backward_s * (large.backward_s / small.backward_s if small.backward_s else 1.0),
    )


def _carriers(graph: LayerGraph) -> dict[str, LayerId]:
    """Return for every parameter and buffer the first layer that has it."""
    carriers: dict[str, LayerId] = {}
    for layer in graph.layers:
        for parameter in layer.params:
            carriers.setdefault(parameter.name, layer.id)
    return carriers


def _gradient_bytes(
    layer: Layer, params: Sequence[Layout], carried: Sequence[bool], sharding: ParameterSharding
) -> tuple[dict[Axes, int], dict[Axes, int]]:
    """Return ``LayerCost.sync`` and ``LayerCost.whole``."""
    sync: dict[Axes, int] = defaultdict(int)
    whole: dict[Axes, int] = defaultdict(int)
    for parameter, layout, counts in zip(layer.params, params, carried, strict=True):
        axes = layout.axes_with(Whole.SHARED)
        if parameter.trainable and axes and counts:
            found = sync if sharding is ParameterSharding.NONE or row_axes(layout) else whole
            found[axes] += math.prod(layout.largest_shape()) * parameter.spec.dtype.item_bytes
    return dict(sync), dict(whole)
