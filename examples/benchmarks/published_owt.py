"""One weird trick [OWT14, Table 1] on 1, 2, 4 and 8 K20: its speed-ups against ours, nothing fitted.

Two predictions. One is our runtime's: the strategy ``conv-data-fc-model``, which is the paper's scheme (a), on ring
collectives. The other is the scheme that the table was measured with, (b): workers take turns in sending their
images' activations to all others; the linear layers work on one turn while the next one is sent, and return
the gradients to the turn's owner. A bus has no multicast, so the sender's link carries K - 1 copies, and the
owner's link K - 1 gradients. The paper names this bottleneck: for (a) and (b) it grows with K.
"""

from dataclasses import dataclass
from typing import Final

import torch

from planner.api import Options, Origin, Planner, machine_of, prepare
from planner.cost.simulate import LayerTimes, Timeline
from planner.cost.table import LayerCost
from planner.frontend.source import load_model
from planner.ir.graph import LayerGraph
from planner.ir.ops import Linear, Output
from planner.ir.tensor import DType
from planner.search.auto import Search

BATCH: Final = 128
"""Images of each GPU."""
PUBLISHED: Final = {2: (1.95, 1.93), 4: (3.74, 3.66), 8: (6.25, 6.16)}
"""Speed-ups on K GPUs; linear layers updated once a step, and after each of K turns."""


@dataclass(frozen=True, slots=True)
class SpeedUp:
    """Predicted speed-ups on K GPUs over one.

    Attributes:
        ring: of our runtime.
        turns: of scheme (b).
        turns_updated: of scheme (b) with an update of the linear layers in each turn.
    """

    ring: float
    turns: float
    turns_updated: float


def speed_up(num_devices: int) -> SpeedUp:
    """Return the predicted speed-ups on so many K20."""
    alone_s = _solved(_planner(1, BATCH))[1].step_s
    search, timeline = _solved(_planner(num_devices, BATCH * num_devices))
    turns_s, updates_s = _turns_s(num_devices)
    in_turns_s = timeline.step_s - sum(_linear_part_s(search, timeline)) + turns_s
    steps_s = timeline.step_s, in_turns_s, in_turns_s + (num_devices - 1) * updates_s
    return SpeedUp(*(num_devices * alone_s / step_s for step_s in steps_s))


def _planner(num_devices: int, batch: int) -> Planner:
    module = load_model("alexnet-owt").module
    images = torch.empty(batch, 3, 224, 224, device="meta")
    machine = machine_of(f"{num_devices}xk20-pcie")
    return prepare(module, (images,), machine, Options(), Origin("alexnet-owt", "alexnet-owt"))


def _solved(planner: Planner) -> tuple[Search, Timeline]:
    search = planner.search(planner.meshes()[0])
    return search, search.fixed("conv-data-fc-model").timeline


def _linear_part(search: Search, timeline: Timeline) -> list[tuple[LayerCost, LayerTimes]]:
    """Return cost and times of the linear layers, and of the output behind them."""
    graph: LayerGraph = search.table.space.graph
    choice = search.fixed("conv-data-fc-model").choice
    return [
        (costs[c], times)
        for layer, costs, c, times in zip(graph.layers, search.table.layers, choice, timeline.layers, strict=True)
        if isinstance(layer.op, Linear | Output)
    ]


def _linear_part_s(search: Search, timeline: Timeline) -> list[float]:
    """Return the seconds of each of them but for the update: compute and transfers."""
    return [c.forward_s + c.backward_s + t.transfer_s for c, t in _linear_part(search, timeline)]


def _turns_s(num_devices: int) -> tuple[float, float]:
    """Return the seconds of the linear layers in turns, and of one of their updates.

    Transfers follow each other; a turn's activations are sent as soon as those before it have been.
    """
    search, timeline = _solved(_planner(num_devices, BATCH))  # the linear layers see one worker's images at a time
    costs = _linear_part(search, timeline)
    update_s = sum(cost.update_s for cost, _ in costs)
    work_s = sum(_linear_part_s(search, timeline)) - costs[0][1].transfer_s
    graph = search.table.space.graph
    first = next(layer for layer in graph.layers if isinstance(layer.op, Linear))
    num_bytes = graph.inputs_of(first)[0].numel * DType.FLOAT32.item_bytes
    router = search.table.model.pricer.router
    others = range(1, num_devices)
    send, back = (router.between(pairs) for pairs in ([(0, i) for i in others], [(i, 0) for i in others]))
    send_s, back_s = (
        path.latency_s + num_bytes / path.bandwidth_bytes_per_s if num_devices > 1 else 0.0 for path in (send, back)
    )
    link_s, done_s, pending = send_s, 0.0, [send_s]  # the link is free, the last turn is done, arrivals
    for turn in range(num_devices):
        done_s = max(done_s, pending[turn]) + work_s
        if turn + 1 < num_devices:
            link_s += send_s
            pending.append(link_s)
        link_s = max(link_s, done_s) + back_s
    return link_s, update_s
