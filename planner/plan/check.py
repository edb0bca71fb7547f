"""Is a plan consistent, and does it belong to this network and this machine?"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from planner.errors import FormatError, MismatchError
from planner.ir.graph import LayerGraph, is_pinned, tied_layers
from planner.ir.ops import Redistribute
from planner.ir.rules import InputOutput, has_statistics, is_io_legal, is_legal, layouts
from planner.ir.schedule import ScheduleKind, problem_of
from planner.plan.schema import LayerPart, Plan

MAX_ELEMENTS: Final = 2**50
"""Of an input; beyond this, sizes in bytes overflow in torch."""
_ADVICE: Final = "Plan this model again, or build the model that the plan was made for."


def refuse_inconsistent(plan: Plan, what: str) -> None:
    """Check what can be checked without the network.

    Raises:
        FormatError: every problem with its JSON path.
    """
    problems = list(_problems(plan))
    if problems:
        raise FormatError(what, problems)


def _problems(plan: Plan) -> Iterator[tuple[str, str]]:
    yield from _input_problems(plan)
    yield from _schedule_problems(plan)
    yield from _stage_problems(plan)


def _input_problems(plan: Plan) -> Iterator[tuple[str, str]]:
    for i, tensor in enumerate(plan.model.inputs):
        if math.prod(tensor.shape) > MAX_ELEMENTS:
            yield f"$.model.inputs[{i}].shape", f"has more than {MAX_ELEMENTS} elements"
        if tensor.shape[0] != plan.batch:
            yield (
                f"$.model.inputs[{i}].shape[0]",
                f"is {tensor.shape[0]}, but the batch is {plan.batch}",
            )


def _schedule_problems(plan: Plan) -> Iterator[tuple[str, str]]:
    kind, count = plan.schedule.kind, plan.schedule.num_microbatches
    if plan.is_pipelined != (kind != "single"):
        yield "$.schedule.kind", f"is {kind!r}, but the number of stages is {len(plan.stages)}"
    if plan.batch % count:
        yield "$.schedule.num_microbatches", f"is {count}, which does not divide the batch of {plan.batch}"
    if kind in {"single", "stale", "pipedream"} and count != 1:
        yield "$.schedule.num_microbatches", f"is {count}, but {kind!r} works on whole batches"
    yield from _rank_problems(plan)


def _rank_problems(plan: Plan) -> Iterator[tuple[str, str]]:
    kind = plan.schedule.kind
    held: set[tuple[int, ...]] = set()
    known: set[int] = set()
    for s, stage in enumerate(plan.stages):
        ranks = tuple(stage.mesh.ranks)
        if ranks in held:
            if kind not in {"interleaved", "zero-bubble"}:
                yield f"$.stages[{s}].mesh.ranks", f"hold another stage too, which {kind!r} does not allow"
            continue
        if known & set(ranks):
            yield f"$.stages[{s}].mesh.ranks", "hold a part of another stage's ranks; stages share all ranks or none"
        held.add(ranks)
        known |= set(ranks)
    yield from _order_problems(plan, len(held))
    if known != set(range(len(known))):
        where = "$.stages" if plan.is_pipelined else "$.stages[0].mesh.ranks"
        yield where, f"are not the numbers 0 to {len(known) - 1} in order"
    if len(known) > plan.cluster.num_devices:
        where = "$.stages" if plan.is_pipelined else "$.stages[0].mesh"
        yield where, f"has {len(known)} ranks, the cluster {plan.cluster.num_devices} devices"


def _order_problems(plan: Plan, num_positions: int) -> Iterator[tuple[str, str]]:
    """Yield what keeps stages from taking turns on their groups of ranks, where a group may hold several."""
    dealt = [tuple(stage.mesh.ranks) for stage in plan.stages]
    if plan.schedule.kind not in {"interleaved", "zero-bubble"}:
        return
    problem = problem_of(ScheduleKind(plan.schedule.kind), len(dealt), num_positions, plan.schedule.num_microbatches)
    if problem is not None:
        yield "$.schedule", problem
    elif any(ranks != dealt[s % num_positions] for s, ranks in enumerate(dealt)):
        yield "$.stages", f"do not go round {num_positions} groups of ranks in the same order each time"


def _stage_problems(plan: Plan) -> Iterator[tuple[str, str]]:
    for s, stage in enumerate(plan.stages):
        try:
            mesh = stage.mesh.mesh()
        except ValueError as error:
            yield f"$.stages[{s}].mesh", str(error)
            continue
        if list(mesh.ranks) != sorted(mesh.ranks):
            yield f"$.stages[{s}].mesh.ranks", "are not in order"
        if plan.is_pipelined and stage.cost is None:
            yield f"$.stages[{s}].cost", "is missing; a plan of several stages has it"
        if stage.devices and len(set(stage.devices)) != mesh.size:
            yield f"$.stages[{s}].devices", f"are {len(set(stage.devices))} different ones, not one for each rank"
        axes = [axis.name for axis in mesh.axes]
        seen: set[str] = set()
        for k, layer in enumerate(stage.layers):
            here = f"$.stages[{s}].layers[{k}]"
            if layer.id in seen:
                yield f"{here}.id", f"{layer.id!r} appears twice"
            seen.add(layer.id)
            if list(layer.split) != axes:
                yield f"{here}.split", f"has the axes {list(layer.split)}, the mesh {axes}"
            yield from _share_problems(layer, {axis.name: axis.size for axis in mesh.axes}, here)
            if layer.shares and plan.is_pipelined:
                yield f"{here}.shares", "are for plans of one stage; stages cut in equal pieces"
    yield from _io_share_problems(plan)


def _share_problems(layer: LayerPart, sizes: Mapping[str, int], here: str) -> Iterator[tuple[str, str]]:
    """Yield what is wrong with the shares of a layer, apart from what only its operator tells."""
    for axis, weights in layer.shares.items():
        if axis not in sizes:
            yield f"{here}.shares", f"names the axis {axis!r}, the mesh has {list(sizes)}"
        elif len(weights) != sizes[axis]:
            yield f"{here}.shares.{axis}", f"has {len(weights)} weights, the axis {sizes[axis]} coordinates"
        elif not any(weights):
            yield f"{here}.shares.{axis}", "are all 0, so nobody would run the layer"


def _io_share_problems(plan: Plan) -> Iterator[tuple[str, str]]:
    """Yield inputs and outputs that a rank passes in other shares than the first: it has the same samples of all."""
    if plan.io != "per-rank" or plan.is_pipelined:
        return
    ends = [
        (k, x)
        for k, x in enumerate(plan.stages[0].layers)
        if x.op in {"input", "output"} and "sample" in x.split.values()
    ]
    for k, layer in ends:
        if layer.shares != ends[0][1].shares:
            problem = (
                f"are {layer.shares}, those of {ends[0][1].id!r} {ends[0][1].shares}; with io: per-rank a rank has the "
                "same samples of all inputs and outputs"
            )
            yield f"$.stages[0].layers[{k}].shares", problem


def refuse_other_model(plan: Plan, graph: LayerGraph) -> None:
    """Check that a plan was made for this layer graph and that every split is legal.

    Raises:
        MismatchError: with the first differences and what to do.
    """
    _refuse_other_names(plan, graph)
    if graph.digest != plan.model.graph_sha256:
        raise MismatchError(
            f"the plan's layers have this model's names, but operators, shapes or parameters differ (graph digest "
            f"{graph.digest[:12]}…, plan {plan.model.graph_sha256[:12]}…). {_ADVICE}"
        )
    refuse_other_layers(plan, graph)


def _refuse_other_names(plan: Plan, graph: LayerGraph) -> None:
    strategy = plan.strategy
    missing = [layer.id for layer in graph.layers if layer.id not in strategy]
    unknown = [i for i in strategy if i not in graph.index]
    if missing or unknown:
        raise MismatchError(
            f"the plan is for {plan.model.name!r}, not for this {graph.name!r}: "
            f"{_listing('layers of the model without a split', missing)}"
            f"{_listing('layers of the plan that the model has not', unknown)}{_ADVICE}"
        )


def refuse_other_layers(plan: Plan, graph: LayerGraph) -> None:
    """Check that a plan of one stage has a legal split for every layer of a graph, and for no others.

    Raises:
        MismatchError: with the first difference and what to do.
    """
    _refuse_other_names(plan, graph)
    strategy, mesh = plan.strategy, plan.mesh
    leader = tied_layers(graph)
    for i, layer in enumerate(graph.layers):
        first = graph.layers[leader[i]]
        if strategy[layer.id] != strategy[first.id]:
            raise MismatchError(
                f"layers {first.id!r} and {layer.id!r} share a parameter, but are split as {strategy[first.id]} and "
                f"{strategy[layer.id]}. {_ADVICE}"
            )
    io = InputOutput(plan.io)
    for layer in graph.layers:
        split = strategy[layer.id]
        legal = is_io_legal(layer, mesh, io, split) if is_pinned(layer.op) else is_legal(layer, graph, mesh, split)
        if not legal:
            kind = "redistribution" if isinstance(layer.op, Redistribute) else layer.op.kind
            raise MismatchError(f"layer {layer.id!r} ({kind}) cannot be split as {split}. {_ADVICE}")
        own = layer if not (plan.sync_batch_norm or is_pinned(layer.op)) else None
        if own and not has_statistics(own, layouts(own, graph.inputs_of(own), mesh, split).output):
            raise MismatchError(
                f"layer {layer.id!r} split as {split} leaves a rank's batch norm one value of each channel, of which "
                f"there are no statistics. {_ADVICE}"
            )
    plan.enlarged(graph)


def _listing(what: str, ids: Sequence[str]) -> str:
    if not ids:
        return ""
    shown = ", ".join(map(repr, ids[:3]))
    return f"{what}: {shown}{f' and {len(ids) - 3} more' if len(ids) > 3 else ''}. "


def refuse_other_machine(plan: Plan, machine_digest: str, machine_name: str) -> None:
    """Check that a plan was made for this machine.

    Raises:
        MismatchError: with both names.
    """
    if plan.cluster.sha256 != machine_digest:
        raise MismatchError(
            f"the plan is for cluster {plan.cluster.name!r} (digest {plan.cluster.sha256[:12]}…), not for "
            f"{machine_name!r} ({machine_digest[:12]}…). Plan again with --cluster {machine_name}."
        )


def is_as_planned(plan: Plan, machine_digest: str, profile_digest: str) -> bool:
    """Return whether a machine has the links, devices and layer times that a plan was made with."""
    return (plan.cluster.sha256, plan.provenance.profile_sha256) == (machine_digest, profile_digest)
