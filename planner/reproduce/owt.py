"""One weird trick [OWT14] on 1, 2, 4 and 8 K20: its schemes' volumes, its example and its speed-ups; nothing fitted.

Speed-ups are predicted twice. Once for ``runtime.parallelize`` on the strategy ``conv-data-fc-model``, which is the
paper's scheme (a) on ring collectives. And once for its three schemes, of which the table was measured with (b), pass
by pass: the linear layers work on one turn while the next one is sent, and return the gradients to the owners of the
images. A bus has no multicast, so a sender's link carries K - 1 copies, and an owner's link K - 1 gradients. The paper
names this bottleneck: for (a) and (b) it grows with K.
"""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, get_args

from planner.cost.model import LayerCost
from planner.cost.simulate import LayerTimes, Timeline
from planner.ir.graph import LayerGraph
from planner.ir.ops import Conv, Linear, Output
from planner.ir.tensor import DType
from planner.ir.turns import Scheme
from planner.reproduce.figures import Figure, Reproduction
from planner.reproduce.owt_schemes import Volumes, passes, volumes
from planner.reproduce.traced import layer_graph
from planner.search.auto import Search

NETWORK: Final = "alexnet-owt"
BATCH: Final = 128
"""Images of each GPU."""
WORKERS: Final = (1, 2, 4, 8)
SCHEMES: Final[tuple[Scheme, ...]] = get_args(Scheme)
PUBLISHED: Final = {2: (1.95, 1.93), 4: (3.74, 3.66), 8: (6.25, 6.16)}
"""Speed-ups on K GPUs; linear layers updated once a step, and after each of K turns."""
PUBLISHED_GROWTH: Final[dict[Scheme, str]] = {"a": "grows with K", "b": "grows with K", "c": "constant in K"}
"""Communication over computation of the linear layers."""

UNITS: Final = 4096
EXAMPLE_FLOP_PER_S: Final = 2e12
EXAMPLE_BYTES_PER_S: Final = 6e9
PUBLISHED_PRODUCT_S: Final = 2.09e-6
PUBLISHED_TRANSFER_S: Final = 2.73e-6


@dataclass(frozen=True, slots=True)
class SpeedUp:
    """Predicted speed-ups on K GPUs over one.

    Attributes:
        ring: of collectives on rings.
        once: of each scheme, with an update behind the last turn.
        in_turns: of each scheme, with an update of the linear layers in each turn.
    """

    ring: float
    once: Mapping[Scheme, float]
    in_turns: Mapping[Scheme, float]


def reproduce() -> Reproduction:
    """Return the paper's example, speed-ups and schemes beside ours."""
    graph = layer_graph(NETWORK, BATCH)
    every = {(scheme, k): scheme_volumes(graph, scheme, k) for scheme in SCHEMES for k in WORKERS}
    return Reproduction(
        "[OWT14] Krizhevsky, One weird trick for parallelizing convolutional neural networks, arXiv:1404.5997",
        "layerwise reproduce owt",
        (
            ("example: the product of a sample with 4096 x 4096 weights, on 8 GPUs", _example()),
            ("speed-up on K20 over one GPU, by batch of convolutions and linear layers", tuple(_speed_ups())),
            ("sent by each worker in a step, 128 images each", tuple(_sent(every))),
            ("activations that leave the busiest sender in one pass", tuple(_peaks(every))),
            ("share of the activations that can be sent behind computation", tuple(_hidden(every))),
            ("communication over computation of the linear layers", tuple(_growth(every))),
        ),
        (
            "Each worker sends as many bytes as it receives. Links carry a copy for each receiver.",
            (
                "Compute is the data sheet's roofline of a K20; schemes are timed pass by pass, activations and "
                "gradients one after the other on each worker's link. The paper timed (b) only."
            ),
            "Errors, cross-entropies and hours are results of training and are not reproduced.",
        ),
    )


# --- schemes


def scheme_volumes(graph: LayerGraph, scheme: Scheme, workers: int) -> Volumes:
    """Return what a worker sends in a step of a network that was traced with one worker's images."""
    item_bytes = DType.FLOAT32.item_bytes
    convs = [layer for layer in graph.layers if isinstance(layer.op, Conv)]
    return volumes(
        scheme,
        workers,
        images=graph.batch,
        activation_bytes=_handed_on(graph) // graph.batch * item_bytes,
        weight_bytes=sum(p.spec.numel for layer in convs for p in layer.params if p.trainable) * item_bytes,
    )


def _handed_on(graph: LayerGraph) -> int:
    """Return the elements that the first linear layer reads."""
    first = next(layer for layer in graph.layers if isinstance(layer.op, Linear))
    return graph.inputs_of(first)[0].numel


def _sent(every: dict[tuple[Scheme, int], Volumes]) -> Iterator[Figure]:
    for k in WORKERS:
        (sent,) = {every[scheme, k].sent for scheme in SCHEMES}
        yield Figure(f"K = {k}, activations and their gradients, every scheme", None, sent, "B")
        yield Figure(f"K = {k}, gradients and weights of the convolutions", None, every["a", k].weights, "B")


def _peaks(every: dict[tuple[Scheme, int], Volumes]) -> Iterator[Figure]:
    for scheme in SCHEMES:
        for k in WORKERS:
            yield Figure(f"({scheme}), K = {k}", None, every[scheme, k].peak, "B")


def _hidden(every: dict[tuple[Scheme, int], Volumes]) -> Iterator[Figure]:
    for k in WORKERS:
        yield Figure(f"(b), K = {k}", (k - 1) / k, every["b", k].hidden)
    for scheme in ("a", "c"):
        yield Figure(f"({scheme}), K = 8", None, every[scheme, 8].hidden)


def _growth(every: dict[tuple[Scheme, int], Volumes]) -> Iterator[Figure]:
    """Yield how the bytes that are sent in turn grow; the computation of a worker, b images' worth, does not."""
    for scheme in SCHEMES:
        once = [every[scheme, k].in_turn_once for k in WORKERS if k > 1]
        copies = [every[scheme, k].in_turn for k in WORKERS if k > 1]
        printed = PUBLISHED_GROWTH[scheme]
        ours = "constant in K" if len(set(once)) == 1 else "grows with K"
        remark = (
            "" if ours == printed else "all workers send at once; it grows where they share one bus, or send copies"
        )
        yield Figure(f"({scheme}), a broadcast counted once", printed, ours, remark=remark)
        yield Figure(f"({scheme}), a copy for each receiver, K = 8 over K = 2", None, copies[-1] / copies[0])


# --- example


def example_s() -> tuple[float, float]:
    """Return the seconds of a sample's product with 4096 x 4096 weights on one of 8 GPUs, and of its activations.

    2 x 4096 x 4096 FLOP over 8 GPUs of 2 TFLOP/s; 4096 words of 4 bytes at 6 GB/s.
    """
    product_s = 2 * UNITS * UNITS / max(WORKERS) / EXAMPLE_FLOP_PER_S
    return product_s, UNITS * DType.FLOAT32.item_bytes / EXAMPLE_BYTES_PER_S


def _example() -> tuple[Figure, ...]:
    product_s, transfer_s = example_s()
    is_cut = math.floor(product_s * 1e8) == round(PUBLISHED_PRODUCT_S * 1e8)
    remark = "printed without its last digits, not rounded" if is_cut else ""
    return (
        Figure("product at 2 TFLOP/s", PUBLISHED_PRODUCT_S, product_s, "s", remark=remark),
        Figure("its activations at 6 GB/s", PUBLISHED_TRANSFER_S, transfer_s, "s"),
    )


# --- speed-ups


def _speed_ups() -> Iterator[Figure]:
    ring = "conv-data-fc-model on rings, updates once a step: no link carries K - 1 copies"
    for k, (once, in_turns) in PUBLISHED.items():
        found = speed_up(k)
        batch = BATCH * k
        yield Figure(f"{k} GPUs ({batch}, {batch}), scheme (b)", once, found.once["b"])
        yield Figure(f"{k} GPUs ({batch}, {BATCH}), scheme (b)", in_turns, found.in_turns["b"])
        yield Figure(f"{k} GPUs ({batch}, {batch}), collectives on rings", once, found.ring, remark=ring)
        yield Figure(f"{k} GPUs ({batch}, {batch}), scheme (a)", None, found.once["a"])
        yield Figure(f"{k} GPUs ({batch}, {batch}), scheme (c)", None, found.once["c"])
        yield Figure(f"{k} GPUs ({batch}, {BATCH}), scheme (c)", None, found.in_turns["c"])


def speed_up(num_devices: int) -> SpeedUp:
    """Return the predicted speed-ups on so many K20."""
    alone_s = _solved(1, BATCH)[1].step_s
    search, timeline = _solved(num_devices, BATCH * num_devices)
    others_s = timeline.step_s - sum(_linear_part_s(search, timeline))
    once: dict[Scheme, float] = {}
    in_turns: dict[Scheme, float] = {}
    for scheme in SCHEMES:
        num_turns = len(passes(scheme, num_devices, BATCH))
        linear_s, update_s = _turns_s(scheme, num_devices)
        once[scheme] = num_devices * alone_s / (others_s + linear_s)
        in_turns[scheme] = num_devices * alone_s / (others_s + linear_s + (num_turns - 1) * update_s)
    return SpeedUp(num_devices * alone_s / timeline.step_s, once, in_turns)


@functools.cache
def _solved(num_devices: int, batch: int) -> tuple[Search, Timeline]:
    from planner.api import Options, Origin, example_inputs, machine_of, prepare
    from planner.frontend.source import load_model

    model = load_model(NETWORK)
    images = example_inputs(model.input_shapes, batch)
    machine = machine_of(f"{num_devices}xk20-pcie")
    planner = prepare(model.module, images, machine, Options(), Origin(NETWORK, NETWORK))
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
    return [c.forward_s + c.backward_s + t.waited_s for c, t in _linear_part(search, timeline)]


def _turns_s(scheme: Scheme, num_devices: int) -> tuple[float, float]:
    """Return the seconds of the linear layers in a scheme's turns, and of one of their updates.

    Transfers follow each other; a turn's activations are sent as soon as those before it have been.
    """
    handed = passes(scheme, num_devices, BATCH)
    search, timeline = _solved(num_devices, sum(handed[0]))  # the linear layers see a turn's images at a time
    costs = _linear_part(search, timeline)
    update_s = sum(cost.update_s for cost, _ in costs)
    work_s = sum(_linear_part_s(search, timeline)) - costs[0][1].transfer_s
    graph = search.table.space.graph
    num_bytes = _handed_on(graph) // graph.batch * DType.FLOAT32.item_bytes

    def moves_s(images: Sequence[int], *, back: bool) -> float:
        workers = range(num_devices)
        pairs = [(j, i) if back else (i, j) for i in workers if images[i] for j in workers if i != j]
        if not pairs:
            return 0.0
        path = search.table.model.pricer.router.between(pairs)
        return path.latency_s + max(images) * num_bytes / path.bandwidth_bytes_per_s

    link_s = moves_s(handed[0], back=False)  # until then the link is busy
    done_s, pending = 0.0, [link_s]  # the last turn's work, arrivals
    for turn, images in enumerate(handed):
        done_s = max(done_s, pending[turn]) + work_s
        if turn + 1 < len(handed):
            link_s += moves_s(handed[turn + 1], back=False)
            pending.append(link_s)
        link_s = max(link_s, done_s) + moves_s(images, back=True)
    return link_s, update_s
