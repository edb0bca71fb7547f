"""The stages of a pipelined plan, each as a plan of one stage for a micro-batch: what lowers a plan lowers these."""

from collections.abc import Sequence

from planner.errors import MismatchError
from planner.ir.graph import LayerGraph
from planner.ir.ops import Input, Receive
from planner.ir.rules import default_io
from planner.ir.split import LayerId
from planner.ir.stages import legal_cuts, stage_graphs
from planner.plan.check import refuse_other_layers
from planner.plan.schema import InputTensor, Plan, SchedulePart


def microbatch_inputs(plan: Plan) -> list[InputTensor]:
    """Return the model's inputs for the samples that a stage works on at once."""
    return [
        tensor.model_copy(update={"shape": [plan.microbatch, *tensor.shape[1:]]}) for tensor in plan.model.inputs
    ]  # fmt: skip


def cuts_of(plan: Plan, graph: LayerGraph) -> tuple[LayerId, ...]:
    """Return the first layer of every stage but the first.

    Raises:
        MismatchError: the model has no such layer, or no stage can begin with it.
    """
    legal = set(legal_cuts(graph)) if plan.is_pipelined else set()
    found = []
    for s, stage in enumerate(plan.stages[1:], 1):
        own = {layer.id for layer in stage.layers if layer.op != Receive.kind}
        first = next((x.id for x in graph.layers if x.id in own and x.id in legal), None)
        if first is None:
            raise MismatchError(
                f"stage {s} of the plan begins with no layer that a stage of {graph.name!r} can begin with. Plan this "
                "model again, or build the model that the plan was made for."
            )
        found.append(first)
    return tuple(found)


def graphs_of(plan: Plan, graph: LayerGraph) -> tuple[LayerGraph, ...]:
    """Return the layer graph of every stage.

    Args:
        plan: that was made for the model.
        graph: of the whole model, for ``microbatch_inputs``.

    Raises:
        MismatchError: the plan was made for another model, or splits a layer in a way that is not legal.
    """
    if graph.digest != plan.model.graph_sha256:
        raise MismatchError(
            f"the plan is for another {plan.model.name!r} than this {graph.name!r}: operators, shapes or parameters "
            f"differ (graph digest {graph.digest[:12]}…, plan {plan.model.graph_sha256[:12]}…). Plan this model again, "
            "or build the model that the plan was made for."
        )
    try:
        graphs = stage_graphs(graph, cuts_of(plan, graph))
    except ValueError as error:
        raise MismatchError(f"the stages of the plan do not fit {graph.name!r}: {error}. Plan it again.") from None
    for one, stage in zip(stage_plans(plan, graphs), graphs, strict=True):
        refuse_other_layers(one, stage)
    return graphs


def stage_plans(plan: Plan, graphs: Sequence[LayerGraph]) -> tuple[Plan, ...]:
    """Return every stage as a plan of one stage, for a micro-batch; its inputs are what the stage receives.

    Ranks stay those of the whole job. Where a stage has no more ranks than a micro-batch has samples, each of its ranks
    passes and gets its own samples of the model's inputs and outputs, else all of them do.
    """
    return tuple(_stage_plan(plan, s, graph) for s, graph in enumerate(graphs))


def _stage_plan(plan: Plan, s: int, graph: LayerGraph) -> Plan:
    stage = plan.stages[s]
    keywords = {tensor.name for tensor in plan.model.inputs if tensor.keyword}
    inputs = [
        InputTensor.model_construct(
            name=layer.id, shape=list(layer.output.shape), dtype=layer.output.dtype, keyword=layer.id in keywords
        )
        for layer in graph.layers
        if isinstance(layer.op, Input | Receive)
    ]
    model = plan.model.model_copy(update={"inputs": inputs, "graph_sha256": graph.digest})
    io = default_io(plan.microbatch, len(stage.mesh.ranks))
    return plan.model_copy(update={
        "model": model, "batch": plan.microbatch, "io": io.value, "schedule": SchedulePart(), "stages": [stage],
    })  # fmt: skip
