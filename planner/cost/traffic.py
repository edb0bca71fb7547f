"""Bytes that every device sends to every other one in a step.

What moves is what ``planner.ir.transfer.steps`` lists, as in the prices of ``planner.cost.transfer``. An exchange goes
from the rank that holds a region to the one that needs it. Collectives go around rings in the order of the ranks, which
gives each rank the bytes that it is priced with; a library may choose other neighbours (double trees, level by level).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from planner.cost.model import LayerCost
from planner.cost.moves import moves
from planner.cost.sharding import ParameterSharding
from planner.cost.stages import Messages, without_tail
from planner.cost.table import CostTable
from planner.ir.branches import busy_positions
from planner.ir.graph import Layer
from planner.ir.layout import Layout
from planner.ir.mesh import Mesh
from planner.ir.ops import GroupNorm
from planner.ir.rules import reduced_axes, spatial_axes
from planner.ir.split import Split
from planner.ir.transfer import Step, StepKind, steps

Bytes = NDArray[np.float64]
"""[sender, receiver], positions of a mesh."""


class Cause(StrEnum):
    """Why something is sent."""

    LAYOUTS = "between layers"
    """A tensor, or its gradient, goes from one layer's split to another's, or to another stage."""
    SUMS = "inside layers"
    """Partial sums, and statistics of norms."""
    PARAMETERS = "parameters"
    """Gradients that are reduced; parameters that are gathered, where they are sharded."""


Traffic = Mapping[Cause, Bytes]


def traffic(table: CostTable, choice: Sequence[int]) -> dict[Cause, Bytes]:
    """Return what is sent in a step of the strategy at these positions of the space, both directions."""
    found = _Traffic(table)
    layers, model = table.space.graph.layers, table.model
    splits = [table.space.splits[layer.id][c] for layer, c in zip(layers, choice, strict=True)]
    for i, j, position in table.edges:
        have = model.layouts(layers[i], splits[i]).output
        need = model.layouts(layers[j], splits[j]).inputs[position]
        item_bytes = model.settings.activation_dtype(layers[i].output.dtype).item_bytes
        found.move(Cause.LAYOUTS, have, need, item_bytes)
        if model.flows[layers[i].id]:
            found.move(Cause.LAYOUTS, need.gradient, have.gradient, item_bytes)
    for layer, split, costs, c in zip(layers, splits, table.layers, choice, strict=True):
        found.layer(layer, split, costs[c])
    return found.sent


def of_pipeline(
    stages: Sequence[tuple[CostTable, Sequence[int]]],
    crossing: Iterable[tuple[Messages, Messages]],
    num_microbatches: int,
    ranks: Sequence[int],
) -> dict[Cause, Bytes]:
    """Return what is sent in a step of a pipeline (of schedules in cycles, a cycle).

    Args:
        stages: tables of a micro-batch, and the position of every layer's split.
        crossing: what goes from each stage to the next one, and comes back, for a micro-batch.
        num_microbatches: of a step; gradients are reduced once.
        ranks: of the machine that take part, in the order of rows and columns.
    """
    found = {cause: np.zeros((len(ranks), len(ranks))) for cause in Cause}
    index = {rank: i for i, rank in enumerate(ranks)}
    for table, choice in stages:
        own = [index[rank] for rank in table.space.mesh.ranks]
        here = np.ix_(own, own)
        each, whole = traffic(without_tail(table), choice), traffic(table, choice)
        for cause in Cause:
            found[cause][here] += (num_microbatches - 1) * each[cause] + whole[cause]
    for messages in crossing:
        for (sender, receiver), num_bytes in (*messages[0].items(), *messages[1].items()):
            found[Cause.LAYOUTS][index[sender], index[receiver]] += num_microbatches * num_bytes
    return found


@dataclass
class _Traffic:
    table: CostTable
    sent: dict[Cause, Bytes] = field(init=False)
    _moved: dict[tuple[Layout, Layout], Bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        size = self.mesh.size
        self.sent = {cause: np.zeros((size, size)) for cause in Cause}

    @property
    def mesh(self) -> Mesh:
        return self.table.space.mesh

    def move(self, cause: Cause, source: Layout, target: Layout, item_bytes: int) -> None:
        """Note what turning one layout into another sends."""
        key = source.value, target.value
        if key not in self._moved:
            self._moved[key] = moved(*key)
        self.sent[cause] += self._moved[key] * item_bytes

    def layer(self, layer: Layer, split: Split, cost: LayerCost) -> None:
        """Note what a layer sends beside its inputs."""
        model = self.table.model
        layouts = model.layouts(layer, split)
        item_bytes = model.settings.activation_dtype(layer.output.dtype).item_bytes
        pairs = (layouts.computed, layouts.output), (layouts.output.gradient, layouts.computed.gradient)
        blocking = cost.blocking_forward.num_bytes + cost.blocking_backward.num_bytes
        for source, target in pairs:
            self.move(Cause.SUMS, source, target, item_bytes)
            blocking -= model.pricer.price(source, target, item_bytes).num_bytes
        if blocking > 1e-6:  # what is left are statistics of norms, which have no layout
            axes_of = spatial_axes if isinstance(layer.op, GroupNorm) else reduced_axes
            self._ring(Cause.SUMS, axes_of(layer.output, layouts.output), blocking)
        busy = busy_positions(split, self.mesh)
        for axes, num_bytes in cost.sync.items():
            self._ring(Cause.PARAMETERS, axes, self._passes() * num_bytes * _others(self.mesh, axes), busy)
        for axes, num_bytes in cost.whole.items():
            self._ring(Cause.PARAMETERS, axes, 2 * num_bytes * _others(self.mesh, axes), busy)
        for axes, num_bytes in cost.only_gathered.items():
            self._ring(Cause.PARAMETERS, axes, 2 * num_bytes * _others(self.mesh, axes), busy)

    def _passes(self) -> int:
        """Return how often parameters go around: a reduce-scatter and an all-gather, or one more gather."""
        return 3 if self.table.model.settings.parameter_sharding is ParameterSharding.FULL else 2

    def _ring(self, cause: Cause, axes: tuple[int, ...], num_bytes: float, busy: int = -1) -> None:
        """Note that every busy rank sends so many bytes to the next one of its group."""
        for group in self.mesh.groups(axes):
            members = [position for position in group if busy >> position & 1]
            _around(self.sent[cause], members, num_bytes)


def moved(source: Layout, target: Layout) -> Bytes:
    """Return the elements that go from each rank to each other when one layout is turned into another."""
    mesh = source.mesh
    found = np.zeros((mesh.size, mesh.size))
    for step, move in zip(steps(source, target), moves(source, target), strict=True):
        if step.kind is StepKind.EXCHANGE:
            found += copied(step.source, step.target)
        elif step.kind.communicates:
            times = 2 if step.kind is StepKind.ALL_REDUCE else 1
            for group in mesh.groups(step.axes):
                _around(found, _holders(step, group), times * move.elements * _others(mesh, step.axes))
    return found


def copied(source: Layout, target: Layout) -> Bytes:
    """Return the elements of the copies between ranks that ``planner.ir.transfer.transfers`` lists."""
    mesh = source.mesh
    starts, stops = _ends(source)
    need_starts, need_stops = _ends(target)
    found = np.ones((mesh.size, mesh.size))
    for dim in range(len(source.shape)):
        common = np.minimum(stops[:, None, dim], need_stops[:, dim]) - np.maximum(
            starts[:, None, dim], need_starts[:, dim]
        )
        found *= np.maximum(common, 0)
    coordinates = np.array([mesh.coordinates(position) for position in range(mesh.size)])
    for axis in range(len(mesh.axes)):
        if axis not in source.dividing_axes:  # of equal copies, that of the rank with the receiver's coordinate
            found *= coordinates[:, None, axis] == coordinates[:, axis]
    np.fill_diagonal(found, 0)
    return found


def _ends(layout: Layout) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return where every rank's region begins and ends, int64[ranks, dims] each."""
    regions = [layout.region(position) for position in range(layout.mesh.size)]
    return np.array([r.start for r in regions]), np.array([r.stop for r in regions])


def _holders(step: Step, group: Iterable[int]) -> list[int]:
    return [position for position in group if not step.source.is_idle(position)]


def _around(found: Bytes, members: Sequence[int], each: float) -> None:
    """Add what every member of a ring sends to the next one."""
    if len(members) > 1:
        for sender, receiver in zip(members, (*members[1:], members[0]), strict=True):
            found[sender, receiver] += each


def _others(mesh: Mesh, axes: tuple[int, ...]) -> float:
    """Return the share of the other ranks of a group along these axes."""
    size = math.prod(mesh.shape[a] for a in axes)
    return (size - 1) / size
