"""A plan of one stage as two plans on the same ranks: convolutions on own samples, linear layers on everyone's."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from planner.errors import UsageError
from planner.ir.dimension import Dimension
from planner.ir.graph import Layer, LayerGraph
from planner.ir.ops import Conv, ConvTranspose, Input, Linear, Output, Receive, Redistribute, Send
from planner.ir.rules import InputOutput, is_legal
from planner.ir.split import LayerId, Split
from planner.ir.stages import legal_cuts, stage_graphs
from planner.plan.check import refuse_other_layers
from planner.plan.schema import CostPart, InputTensor, LayerPart, Plan


@dataclass(frozen=True)
class Half:
    """One of the two: its layers, and the plan of them."""

    layers: LayerGraph
    plan: Plan


def halves(plan: Plan, graph: LayerGraph, first: str | None = None) -> tuple[Half, Half]:
    """Return the part in front of the linear layers and that from there on.

    The first ends with each rank holding all of some samples. The second begins with every rank holding all samples,
    whose gradients are addends, and gives the whole output to every rank. In between all layers keep their splits.

    Args:
        plan: of one stage, for the graph.
        graph: of the model.
        first: layer with which the second part begins; the first linear layer behind the last convolution unless given.

    Raises:
        UsageError: there is no such layer, or more than one tensor with samples goes from one part to the other.
    """
    if any(layer.shares for layer in plan.only_stage.layers):
        raise UsageError("variable batch: the plan cuts in unequal shares, turns are equal. Plan with --shares equal.")
    cut = _cut(graph, first)
    front, back = stage_graphs(graph, (cut,))
    received = [layer for layer in back.layers if isinstance(layer.op, Receive)]
    if len(received) != 1 or received[0].output.sample_dim != 0 or received[0].output.sample_rows != 1:
        listed = ", ".join(f"{layer.id!r} {layer.output.shape}" for layer in received)
        raise UsageError(
            f"variable batch: what layer {cut!r} and those behind it read of the layers in front is {listed}; it must "
            "be one tensor with the samples first. Begin the linear layers elsewhere (first=LAYER)."
        )
    back = replace(back, layers=tuple(_shared(layer) for layer in back.layers))
    return _half(plan, front, InputOutput.PER_RANK), _half(plan, back, InputOutput.GLOBAL)


def _shared(layer: Layer) -> Layer:
    """Return a layer that receives as one that gets all of the tensor and gives back addends of its gradient."""
    return replace(layer, op=replace(layer.op, is_shared=True)) if isinstance(layer.op, Receive) else layer


def _cut(graph: LayerGraph, first: str | None) -> LayerId:
    legal = legal_cuts(graph)
    if first is not None:
        if first not in legal:
            raise UsageError(
                f"variable batch: the linear layers cannot begin with {first!r}; possible are {', '.join(legal)}"
            )
        return LayerId(first)
    last = max((i for i, x in enumerate(graph.layers) if isinstance(x.op, Conv | ConvTranspose)), default=-1)
    linear = next((x.id for x in graph.layers[last + 1 :] if isinstance(x.op, Linear)), None)
    if linear is None or linear not in legal:
        what = "has no linear layer behind its last convolution" if linear is None else f"cannot be cut at {linear!r}"
        raise UsageError(f"variable batch: {graph.name!r} {what}. Name the layer to begin with (first=LAYER).")
    return linear


def _half(plan: Plan, graph: LayerGraph, io: InputOutput) -> Half:
    stage, keywords = plan.only_stage, {tensor.name for tensor in plan.model.inputs if tensor.keyword}
    known = {layer.id: layer for layer in stage.layers}
    layers = [_layer_part(plan, graph, layer, known.get(layer.id), io) for layer in graph.layers]
    inputs = [
        InputTensor.model_construct(
            name=layer.id, shape=list(layer.output.shape), dtype=layer.output.dtype, keyword=layer.id in keywords
        )
        for layer in graph.layers
        if isinstance(layer.op, Input | Receive)
    ]
    model = plan.model.model_copy(update={"inputs": inputs, "graph_sha256": graph.digest})
    found = plan.model_copy(update={
        "model": model, "io": io.value, "stages": [stage.model_copy(update={"layers": layers})],
    })  # fmt: skip
    refuse_other_layers(found, graph)
    return Half(graph, found)


_FREE = CostPart(compute_s=0.0, transfer_s=0.0, halo_s=0.0, sync_s=0.0, exposed_s=0.0)


def _layer_part(plan: Plan, graph: LayerGraph, layer: Layer, known: LayerPart | None, io: InputOutput) -> LayerPart:
    """Return a layer's part of the plan: the given one, but where samples enter and leave."""
    match layer.op:
        case Receive():
            wanted: Sequence[Dimension] = (Dimension.BROADCAST,)
        case Send():
            wanted = (Dimension.SAMPLE,)
        case Input() | Output():
            is_own = io is InputOutput.PER_RANK and layer.output.sample_dim is not None
            wanted = (Dimension.SAMPLE if is_own else Dimension.REPLICATE,)
        case Redistribute() if known is None:
            wanted = (Dimension.BROADCAST,)
        case _:
            assert known is not None, f"the plan has no layer {layer.id!r}"
            return known
    mesh = plan.mesh
    split = Split.of(mesh, tuple(wanted) * len(mesh.axes))
    if isinstance(layer.op, Send) and not is_legal(layer, graph, mesh, split):
        raise UsageError(
            f"variable batch: {mesh.size} ranks have no samples of their own in a batch of {plan.batch}; plan a batch "
            f"of at least {mesh.size}"
        )
    return LayerPart(
        id=layer.id, op=layer.op.kind, split=dict(split.axes), cost=_FREE, memory_bytes=0
    )  # fmt: skip
