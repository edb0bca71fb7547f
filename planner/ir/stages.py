"""Pipeline stages of a layer graph: what each computes, and what moves from one to the next.

A stage is an interval of the layers in their topological order, so that tensors only ever go forward. A tensor that a
later stage than the next one reads is relayed: every stage in between receives and sends it. The layer graph of a stage
is a layer graph like any other, so that whatever prices, searches or lowers a model does the same to a stage.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from planner.ir.count import gradient_flow
from planner.ir.graph import Layer, LayerGraph, share_transfers, tied_layers
from planner.ir.layout import Layout, Whole
from planner.ir.ops import Input, Output, Receive, Redistribute, Send
from planner.ir.region import Region
from planner.ir.split import LayerId
from planner.ir.transfer import Transfer

SENT = ":sent"
"""Behind a tensor's name: the layer that sends it."""


def without_redistribution(graph: LayerGraph) -> LayerGraph:
    """Return the graph without redistribute layers; ``planner.ir.graph.share_transfers`` puts them in again."""
    origin = {layer.id: layer.inputs[0] for layer in graph.layers if isinstance(layer.op, Redistribute)}
    layers = (
        replace(layer, inputs=tuple(origin.get(i, i) for i in layer.inputs))
        for layer in graph.layers
        if layer.id not in origin
    )
    return LayerGraph(graph.name, tuple(layers), graph.batch)


def legal_cuts(graph: LayerGraph) -> tuple[LayerId, ...]:
    """Return every layer that may be the first of a stage, in order.

    Layers that share a parameter or a call stay together, inputs are in the first stage and outputs in the last one,
    and every stage has something to compute.
    """
    plain = without_redistribution(graph)
    last = {leader: i for i, leader in enumerate(tied_layers(plain))}
    found, end, computed = [], 0, False
    num_outputs = sum(isinstance(layer.op, Output) for layer in plain.layers)
    for i, (layer, leader) in enumerate(zip(plain.layers, tied_layers(plain), strict=True)):
        is_late = i >= len(plain.layers) - num_outputs
        if computed and i > end and not is_late and not isinstance(layer.op, Input):
            found.append(layer.id)
        computed = computed or not isinstance(layer.op, Input)
        end = max(end, last[leader])
    return tuple(found)


def stage_graphs(graph: LayerGraph, cuts: Sequence[LayerId]) -> tuple[LayerGraph, ...]:
    """Return the layer graph of every stage.

    What a stage receives is a layer of the tensor's own name; what it sends is called as the tensor, with ``:sent``.

    Args:
        graph: of the whole model, for a micro-batch.
        cuts: the first layer of every stage but the first, in order; of ``legal_cuts``.

    Raises:
        ValueError: a cut is not legal, or they are not in order.
    """
    if not cuts:
        return (graph,)
    plain = without_redistribution(graph)
    if illegal := set(cuts) - set(legal_cuts(graph)):
        raise ValueError(f"no stage can begin with {sorted(illegal)}")
    starts = [0, *(plain.index[cut] for cut in cuts), len(plain.layers)]
    if starts != sorted(set(starts)):
        raise ValueError(f"the cuts {list(cuts)} are not in the order of the layers")
    stage_of = {layer.id: sum(i >= start for start in starts[1:-1]) for i, layer in enumerate(plain.layers)}
    last_reader = {layer.id: stage_of[layer.id] for layer in plain.layers}
    for layer in plain.layers:
        for producer in layer.inputs:
            last_reader[producer] = max(last_reader[producer], stage_of[layer.id])
    flows = gradient_flow(plain)
    return tuple(
        _stage(plain, s, starts[s], starts[s + 1], stage_of, last_reader, flows) for s in range(len(starts) - 1)
    )


def _stage(
    graph: LayerGraph,
    stage: int,
    start: int,
    stop: int,
    stage_of: dict[LayerId, int],
    last_reader: dict[LayerId, int],
    flows: dict[LayerId, bool],
) -> LayerGraph:
    own = graph.layers[start:stop]
    entering = [x for x in graph.layers[:start] if stage_of[x.id] < stage <= last_reader[x.id]]
    leaving = [x for x in (*entering, *own) if last_reader[x.id] > stage]
    read = {producer for layer in own for producer in layer.inputs}
    received = [
        Layer(
            x.id, Receive(flows[x.id]), (), x.output, origin=x.origin,
            saved_bytes=x.output.numel * x.output.dtype.item_bytes if x.id in read else 0,
        )
        for x in entering
    ]  # fmt: skip
    sent = [Layer(LayerId(f"{x.id}{SENT}"), Send(), (x.id,), x.output, origin=x.origin) for x in leaving]
    return share_transfers(LayerGraph(graph.name, (*received, *own, *sent), graph.batch))


def crossings(source: Layout, target: Layout) -> tuple[Transfer, ...]:
    """List the copies that take a tensor from the layout of one stage to that of the next, in (target, source) order.

    Sources are positions of the source's mesh, targets of the target's. Every element comes from one rank: the receiver
    itself where it holds it, otherwise the holders take turns. A gradient comes back by the same function with the
    layouts exchanged.

    Raises:
        ValueError: one of the layouts has addends; stages send and receive values.
    """
    if any(layout.axes_with(Whole.PARTIAL, Whole.SHARED) for layout in (source, target)):
        raise ValueError(f"stages exchange whole values, not {source.placements} and {target.placements}")
    holders: dict[Region, list[int]] = {}
    for position in range(source.mesh.size):
        holders.setdefault(source.region(position), []).append(position)
    found = []
    for position, rank in enumerate(target.mesh.ranks):
        need = target.region(position)
        for region, positions in holders.items():
            common = region.intersect(need)
            if common is not None:
                own = [p for p in positions if source.mesh.ranks[p] == rank]
                found.append(Transfer(own[0] if own else positions[position % len(positions)], position, common))
    return tuple(found)


def homes(graphs: Iterable[LayerGraph]) -> dict[str, int]:
    """Return for every parameter and buffer that a layer reads the first stage that holds it."""
    found: dict[str, int] = {}
    for s, graph in enumerate(graphs):
        for layer in graph.layers:
            for parameter in layer.params:
                found.setdefault(parameter.name, s)
    return found
