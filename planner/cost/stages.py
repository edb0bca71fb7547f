"""What a pipeline stage takes and holds, from the costs of its layers; and what two stages send each other.

A stage's layers are priced as a model of their own (``planner.ir.stages``), at micro-batch size. Forward and backward
of a micro-batch are a simulated step without gradient reductions and update; what these add is the tail of a step,
which comes once for all micro-batches.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from planner.cost.pipeline import StageLink, StageTimes
from planner.cost.simulate import simulated_step_s
from planner.cost.table import CostTable
from planner.cost.transfer import StepPricer
from planner.ir.count import work
from planner.ir.layout import Layout
from planner.ir.ops import Receive
from planner.ir.stages import crossings


def without_tail(table: CostTable) -> CostTable:
    """Return the table without what comes once a step: reductions of gradients, and the update."""
    layers = tuple(
        tuple(replace(cost, sync={}, whole={}, collect_s=0.0, update_s=0.0) for cost in costs) for costs in table.layers
    )
    return replace(table, layers=layers)


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
    both_s = simulated_step_s(bare if bare is not None else without_tail(table), choice, bucket_bytes)
    forward_s = sum(cost.forward_s + cost.blocking_forward.seconds for cost in costs)
    forward_s += sum(float(edge.forward_s[choice[i], choice[j]]) for (i, j, _), edge in table.edges.items())
    backward_s = max(both_s - forward_s, 0.0)
    weights_s = sum(_weight_share(table, j, choice[j]) * cost.backward_s for j, cost in enumerate(costs))
    weight_s = min(weights_s, backward_s)
    update_s = sum(cost.update_s for cost in costs)
    whole_s = simulated_step_s(table, choice, bucket_bytes)
    received = [j for j, layer in enumerate(table.space.graph.layers) if isinstance(layer.op, Receive)]
    held = [cost.memory.parameters + cost.memory.gradients + cost.memory.state for cost in costs]
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


def stage_link(found: Iterable[Crossing], pricer: StepPricer) -> StageLink:
    """Return what stages send each other for a micro-batch.

    Args:
        found: what crosses.
        pricer: on the mesh of the whole machine.
    """
    ahead: dict[tuple[int, int], int] = {}
    behind: dict[tuple[int, int], int] = {}
    for each in found:
        _add(ahead, each.source, each.target, each.item_bytes)
        if each.has_gradient:
            _add(behind, each.target, each.source, each.item_bytes)
    return StageLink(
        pricer.messages_s(ahead), pricer.messages_s(behind), _most_sent(ahead), _most_sent(behind)
    )  # fmt: skip


def _add(sizes: dict[tuple[int, int], int], source: Layout, target: Layout, item_bytes: int) -> None:
    for move in crossings(source, target):
        pair = source.mesh.ranks[move.source], target.mesh.ranks[move.target]
        if pair[0] != pair[1]:
            sizes[pair] = sizes.get(pair, 0) + move.region.volume * item_bytes


def _most_sent(sizes: dict[tuple[int, int], int]) -> float:
    sent: dict[int, int] = {}
    for (source, _), num_bytes in sizes.items():
        sent[source] = sent.get(source, 0) + num_bytes
    return float(max(sent.values(), default=0))
