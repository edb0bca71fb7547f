"""What a pipeline stage takes and holds, from the costs of its layers; and what two stages send each other.

A stage's layers are priced as a model of their own (``planner.ir.stages``), at micro-batch size. Forward and backward
of a micro-batch are a simulated step without gradient reductions and update; what these add is the tail of a step,
which comes once for all micro-batches.

Parameters that are sharded fully are gathered for every micro-batch, forward and backward; their gradients are kept
whole until the last one reduces the sum (``runtime.parameters.sharding``).

A memory limit holds for all that a stage has at once, micro-batches in flight included. Solvers know sums over layers
only, so what a stage holds beside the micro-batch at work is put on its layers (``holding``).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from planner.cost.memory import LayerBytes
from planner.cost.model import LayerCost
from planner.cost.pipeline import InFlight, StageLink, StageTimes
from planner.cost.simulate import simulated_forward_s, simulated_step_s
from planner.cost.table import CostTable
from planner.cost.transfer import StepPricer
from planner.ir.count import work
from planner.ir.graph import Layer
from planner.ir.layout import Layout
from planner.ir.ops import Receive
from planner.ir.stages import crossings


def without_tail(table: CostTable) -> CostTable:
    """Return the table without what comes once a step: reductions of gradients, and the update."""
    return _changed(table, lambda _, cost: table.model.without_tail(cost))


def accumulating(table: CostTable) -> CostTable:
    """Return the table of a stage that sums gradients of several micro-batches, whole where parameters are sharded."""
    return _with_held(table, lambda _, memory: memory.gathered)


def holding(table: CostTable, in_flight: InFlight, *, recompute: bool) -> CostTable:
    """Return the table of a stage with what it holds beside the micro-batch at work, at most.

    Args:
        table: of the stage.
        in_flight: what the schedule has it, and no other stage, hold.
        recompute: of micro-batches whose backward has not begun, it keeps what it receives only.
    """
    (versions,) = in_flight.versions

    def held(layer: Layer, memory: LayerBytes) -> int:
        keeps = not recompute or isinstance(layer.op, Receive)
        others = (in_flight.most if keeps else in_flight.most_begun) - 1
        return memory.held + others * memory.activations + (versions - 1) * memory.parameters

    return _with_held(table, held)


def _with_held(table: CostTable, held: Callable[[Layer, LayerBytes], int]) -> CostTable:
    return _changed(
        table, lambda layer, cost: replace(cost, memory=replace(cost.memory, held=held(layer, cost.memory)))
    )


def _changed(table: CostTable, change: Callable[[Layer, LayerCost], LayerCost]) -> CostTable:
    """Return the table with other costs of its layers; layers that share theirs go on sharing them."""
    made: dict[tuple[int, bool], tuple[LayerCost, ...]] = {}
    found = []
    for layer, costs in zip(table.space.graph.layers, table.layers, strict=True):
        key = id(costs), isinstance(layer.op, Receive)
        if key not in made:
            made[key] = tuple(change(layer, cost) for cost in costs)
        found.append(made[key])
    return replace(table, layers=tuple(found))


def stage_times(
    table: CostTable,
    choice: Sequence[int],
    bucket_bytes: int,
    *,
    bare: CostTable | None = None,
    recompute: bool = False,
) -> StageTimes:
    """Return what a stage takes for a micro-batch under these splits, and what it holds, on its busiest rank.

    Args:
        table: of the stage's layers.
        choice: position of every layer's split.
        bucket_bytes: of the gradient reductions.
        bare: ``without_tail(table)``, where it is known.
        recompute: keep only what the stage receives.
    """
    costs = [layer[c] for layer, c in zip(table.layers, choice, strict=True)]
    bare = without_tail(table) if bare is None else bare
    both_s = simulated_step_s(bare, choice, bucket_bytes)
    forward_s = simulated_forward_s(bare, choice)
    backward_s = max(both_s - forward_s, 0.0)
    weights_s = sum(_weight_share(table, j, choice[j]) * cost.backward_s for j, cost in enumerate(costs))
    weight_s = min(weights_s, backward_s)
    update_s = sum(cost.update_s for cost in costs)
    whole_s = simulated_step_s(table, choice, bucket_bytes)
    received = [j for j, layer in enumerate(table.space.graph.layers) if isinstance(layer.op, Receive)]
    held = [cost.memory.resident - cost.memory.activations for cost in costs]
    return StageTimes(
        forward_s, backward_s - weight_s, weight_s, update_s, max(whole_s - both_s - update_s, 0.0),
        resident_bytes=sum(held) + max(cost.memory.transient for cost in costs),
        params_bytes=sum(cost.memory.parameters for cost in costs),
        saved_bytes=sum(cost.memory.activations for cost in costs),
        input_bytes=sum(costs[j].memory.activations for j in received),
        recompute=recompute,
    )  # fmt: skip


def _weight_share(table: CostTable, j: int, c: int) -> float:
    """Return which part of a layer's backward computes gradients of parameters: their share of its FLOP."""
    layer = table.space.graph.layers[j]
    split = table.space.splits[layer.id][c]
    found = table.model.layouts(layer, split)
    counted = work(
        layer, [x.largest_shape() for x in found.inputs], found.computed.largest_shape(),
        [x.largest_shape() for x in found.params], input_gradient=any(table.model.flows[i] for i in layer.inputs),
    )  # fmt: skip
    total = counted.input_gradient_flop + counted.weight_gradient_flop
    return counted.weight_gradient_flop / total if total else 0.0


@dataclass(frozen=True, slots=True)
class Crossing:
    """A tensor on its way to the next stage.

    Attributes:
        source, target: as it is sent and received; the ranks of their meshes are those of the machine.
        item_bytes: of an element.
        has_gradient: one comes back.
    """

    source: Layout
    target: Layout
    item_bytes: int
    has_gradient: bool


Messages = dict[tuple[int, int], int]
"""Bytes by sender and receiver, ranks of the machine."""


def messages(found: Iterable[Crossing]) -> tuple[Messages, Messages]:
    """Return what ranks of a stage send those of the next one for a micro-batch, and the gradients that come back."""
    ahead: Messages = {}
    behind: Messages = {}
    for each in found:
        _add(ahead, each.source, each.target, each.item_bytes)
        if each.has_gradient:
            _add(behind, each.target, each.source, each.item_bytes)
    return ahead, behind


def stage_link(found: Iterable[Crossing], pricer: StepPricer) -> StageLink:
    """Return what stages send each other for a micro-batch.

    Args:
        found: what crosses.
        pricer: on the mesh of the whole machine.
    """
    ahead, behind = messages(found)
    return StageLink(
        pricer.messages_s(ahead), pricer.messages_s(behind), most_sent(ahead), most_sent(behind)
    )  # fmt: skip


def _add(sizes: Messages, source: Layout, target: Layout, item_bytes: int) -> None:
    for move in crossings(source, target):
        pair = source.mesh.ranks[move.source], target.mesh.ranks[move.target]
        if pair[0] != pair[1]:
            sizes[pair] = sizes.get(pair, 0) + move.region.volume * item_bytes


def most_sent(sizes: Messages) -> float:
    """Return the bytes of the rank that sends most."""
    sent: dict[int, int] = {}
    for (source, _), num_bytes in sizes.items():
        sent[source] = sent.get(source, 0) + num_bytes
    return float(max(sent.values(), default=0))
