"""Communication of a step as [OptCNN18] counts it: bytes over all links, not those of the busiest rank.

Its runtime fetches each piece of an activation from where it lies, returns the gradient the same
way, and synchronises a layer's parameters through a parameter server. So the totals are those of
our layouts, without our collectives:

- an edge: what every rank needs of the tensor and does not hold, and as many bytes of its gradient;
- addends of one sum: one copy of every other addend to each rank that needs the sum;
- a parameter: every rank that shares its copy sends the gradient of its piece and fetches the piece,
  the ranks beside the server included. With all parameters on p ranks these are 2 p times their bytes.

Batch norm statistics are left out, as there.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from planner.cost.model import CostModel
from planner.cost.table import CostTable
from planner.ir.graph import Layer, is_boundary
from planner.ir.layout import Layout, Whole
from planner.ir.split import LayerId, Split


@dataclass(frozen=True, slots=True)
class Volume:
    """Bytes of one step, over all ranks.

    Attributes:
        activations: transfers between layers and of partial sums, forward.
        activation_gradients: the same, backward.
        parameters: to and from parameter servers.
    """

    activations: float
    activation_gradients: float
    parameters: int

    @property
    def total(self) -> float:
        """All of them."""
        return self.activations + self.activation_gradients + self.parameters


def received_elements(source: Layout, target: Layout) -> float:
    """Return how many elements all ranks together receive when a tensor changes its layout.

    Of equal copies the nearest is taken; what becomes addends moves nothing. A sum of p addends is made
    where its pieces are wanted, of p - 1 copies each; where every rank wants the same, one makes it
    and hands it on, another p - 1 copies.
    """
    mesh = source.mesh
    if any(source.placements[a] is not Whole.PARTIAL for a in target.axes_with(Whole.PARTIAL)):
        return 0.0
    sums = [a for a in source.axes_with(Whole.PARTIAL) if target.placements[a] is not Whole.PARTIAL]
    addends = math.prod(mesh.shape[a] for a in sums)
    copies = math.prod(mesh.shape[a] for a in sums if not isinstance(target.placements[a], int))
    total = 0.0
    for position in range(mesh.size):
        need = target.region(position)
        common = source.region(position).intersect(need)
        made = addends * need.volume - (common.volume if common is not None else 0)
        total += (made + (copies - 1) * need.volume) / copies
    return total


def step_volume(table: CostTable, choice: Sequence[int]) -> Volume:
    """Return the communication of one step of the strategy at these positions of the space.

    What the model's inputs and outputs are moved for is left out: data is loaded where it is needed.
    """
    model, graph = table.model, table.space.graph
    splits = [table.space.splits[layer.id][c] for layer, c in zip(graph.layers, choice, strict=True)]
    forward = backward = 0.0
    parameters = 0
    for j, layer in enumerate(graph.layers):
        found = model.layouts(layer, splits[j])
        parameters += _parameter_bytes(model, layer, splits[j])
        if is_boundary(layer.op):
            continue
        item = model.settings.activation_dtype(layer.output.dtype).item_bytes
        forward += received_elements(found.computed, found.output.value) * item
        backward += received_elements(found.output.gradient, found.computed.gradient) * item
        for need, producer in zip(found.inputs, layer.inputs, strict=True):
            ahead, behind = _edge_elements(model, producer, splits[graph.index[producer]], need)
            item = model.settings.activation_dtype(graph[producer].output.dtype).item_bytes
            forward += ahead * item
            backward += behind * item
    return Volume(forward, backward, parameters)


def _edge_elements(model: CostModel, producer: LayerId, split: Split, need: Layout) -> tuple[float, float]:
    """Return the elements that move on an edge, forward and backward."""
    layer = model.graph[producer]
    if is_boundary(layer.op):
        return 0.0, 0.0
    have = model.layouts(layer, split).output
    back = received_elements(need.gradient, have.gradient) if model.flows[producer] else 0.0
    return received_elements(have.value, need.value), back


def _parameter_bytes(model: CostModel, layer: Layer, split: Split) -> int:
    """Return the bytes to and from the parameter servers of a layer."""
    total = 0
    layouts = model.layouts(layer, split).params
    for parameter, layout, counts in zip(layer.params, layouts, model.carried(layer), strict=True):
        if parameter.trainable and counts and layout.axes_with(Whole.SHARED):
            pieces = sum(layout.region(position).volume for position in range(model.mesh.size))
            total += 2 * pieces * parameter.spec.dtype.item_bytes
    return total
