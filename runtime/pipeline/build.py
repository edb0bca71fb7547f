"""The stages of a pipelined plan as modules of one rank, and what each of them receives and sends."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Self

import torch
from torch import nn

from planner.errors import TraceError, UsageError
from planner.frontend.lower import TracedModel, trace_layers
from planner.frontend.modes import asks_for_mode, is_same
from planner.frontend.parameters import parameter_names
from planner.frontend.prepare import buffers_written
from planner.frontend.stages import stage_models
from planner.frontend.trace import empty_inputs, trace
from planner.ir.graph import LayerGraph
from planner.ir.layout import Layout
from planner.ir.mesh import Mesh, MeshAxis
from planner.ir.ops import Input, Output, Receive, Send
from planner.ir.region import Region
from planner.ir.rules import layouts
from planner.ir.split import LayerId
from planner.ir.stages import SENT, crossings, homes, stage_graphs
from planner.plan.schema import Plan
from planner.plan.stages import cuts_of, graphs_of, microbatch_inputs, stage_plans
from runtime.comm.communicator import Communicator, TorchCommunicator
from runtime.comm.exchange import Batch
from runtime.comm.groups import ProcessGroups
from runtime.comm.staging import communicator_of
from runtime.evaluation import evaluation_plan
from runtime.graphs import uncompiled
from runtime.lowering.lower import communication_axes
from runtime.lowering.rewriting import samples_of
from runtime.module import ParallelModule
from runtime.parallel import agree, lower_as
from runtime.parameters.local import tensors_of
from runtime.state import is_in_backward
from runtime.timing import Tape, TimedCommunicator
from runtime.types import Casting, ElementTypes


@dataclass(frozen=True)
class StagePlan:
    """One stage of a pipelined plan.

    Attributes:
        index: of the stage.
        plan: the stage alone, for a micro-batch; see ``planner.plan.stages.stage_plans``.
        traced: its part of the model.
        casting: what autocast does to the model's tensors.
        evaluated: the stage in evaluation, where the model's code makes it another; None where it is the same.
    """

    index: int
    plan: Plan
    traced: TracedModel
    casting: Casting
    evaluated: "StagePlan | None" = None

    @property
    def layers(self) -> LayerGraph:
        """The layer graph of the stage."""
        return self.traced.layers

    def layout(self, layer_id: LayerId, batch: int) -> Layout:
        """Return how a layer's tensor lies on the ranks of the stage, for a micro-batch of so many samples."""
        layer = self.layers[layer_id]
        split = self.plan.strategy[layer_id]
        found = layouts(layer, self.layers.inputs_of(layer), self.plan.mesh, split).output
        samples = samples_of(layer.output)
        return found if samples is None else found.with_size(samples[0], batch * samples[1])

    def ids(self, *kinds: type) -> tuple[LayerId, ...]:
        """Return the layers of these kinds of operators, in order."""
        return tuple(layer.id for layer in self.layers.layers if isinstance(layer.op, kinds))


@dataclass(frozen=True)
class Copy:
    """One copy between this rank and another.

    Attributes:
        peer: the other rank, of the whole job; this rank itself where it holds both stages.
        part: of the region that this rank holds.
        region: the same in coordinates of the whole tensor; copies between two ranks come in the order of both lists.
    """

    peer: int
    part: tuple[slice, ...]
    region: Region


@dataclass(frozen=True)
class Port:
    """A tensor that crosses from one stage to the next, as one rank sees it.

    Attributes:
        name: of the tensor.
        shape: of this rank's region.
        dtype: of its elements.
        has_gradient: one comes back.
        forward: copies of the tensor, that this rank receives (it is a receiving stage) or sends.
        backward: copies of its gradient, that this rank sends (it is a receiving stage) or receives.
    """

    name: LayerId
    shape: tuple[int, ...]
    dtype: torch.dtype
    has_gradient: bool
    forward: tuple[Copy, ...]
    backward: tuple[Copy, ...]


class StageModule(ParallelModule):
    """One rank's part of one stage.

    ``forward`` takes this rank's regions of the model's inputs, or of what the stage receives, in the order of
    ``receives``; it returns what it sends, as a tuple in the order of ``sends``, or the model's output. Every call is
    one micro-batch; ``samples`` says how many samples it has, on all ranks of the stage together.
    """

    stage: StagePlan
    samples: int

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        memo[id(self.stage)] = self.stage
        return super().__deepcopy__(memo)

    @uncompiled
    def _before_forward(self, _module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        if not self.training and isinstance(self._evaluation, str):
            raise UsageError(self._evaluation)
        state = self._state
        self._shards.prepare()
        if self._reducer.enabled and not is_in_backward():
            self._reducer.reset()
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        if any(part.training for part in self.modules()):
            state.step = state.passes.begin(state.step, tensors)
        state.batch = Batch(self.samples)
        self._shards.enter(self.training)


def cut(model: nn.Module, plan: Plan) -> tuple[StagePlan, ...]:
    """Return the stages of a plan after checking that it was made for the model.

    Raises:
        UsageError: weights are on the meta device.
        MismatchError: the plan was made for another model.
    """
    if any(t.is_meta for t in (*model.parameters(), *model.buffers())):
        raise UsageError("the model's weights are on the meta device; build it on a real device to run it")
    inputs, keywords = empty_inputs(microbatch_inputs(plan))
    traced = trace_layers(model, inputs, plan.model.name, keywords=keywords)
    if any(not name.endswith("num_batches_tracked") for name in buffers_written(traced.graph)):
        evaluation = trace(model, inputs, keywords, training=False)
        traced = replace(traced, written_in_evaluation=buffers_written(evaluation))
    graphs = graphs_of(plan, traced.layers)
    parts, plans = stage_models(traced, graphs), stage_plans(plan, graphs)
    found = _in_evaluation(model, traced, plan, graphs)
    evaluated = _planned(parts, plans, found, _casting(model, found[0], plan)) if isinstance(found, tuple) else found
    casting = _casting(model, traced, plan)
    if not isinstance(evaluated, tuple):
        return tuple(
            StagePlan(s, one, replace(part, evaluation=evaluated), casting)
            for s, (one, part) in enumerate(zip(plans, parts, strict=True))
        )
    return tuple(
        StagePlan(s, one, replace(part, evaluation=other.traced), casting, other)
        for s, (one, part, other) in enumerate(zip(plans, parts, evaluated, strict=True))
    )


def in_mode(stages: Sequence[StagePlan], *, training: bool) -> tuple[StagePlan, ...]:
    """Return the stages as they are in training or in evaluation."""
    return tuple(stage if training or stage.evaluated is None else stage.evaluated for stage in stages)


def _casting(model: nn.Module, traced: TracedModel, plan: Plan) -> Casting:
    inputs, keywords = empty_inputs(microbatch_inputs(plan))
    names = [x.name for x in plan.model.inputs if not x.keyword]
    return Casting(model, traced, {**dict(zip(names, inputs, strict=True)), **keywords})


def _in_evaluation(
    model: nn.Module, traced: TracedModel, plan: Plan, graphs: Sequence[LayerGraph]
) -> "_Evaluated | str | None":
    """Return what the stages run in evaluation; None where it is the same, a sentence where they cannot."""
    if not asks_for_mode(model):
        return None
    inputs, keywords = empty_inputs(microbatch_inputs(plan))
    try:
        found = trace_layers(model, inputs, plan.model.name, keywords=keywords, training=False)
    except TraceError as error:
        return f"the model asks for its mode, and in evaluation it cannot be traced: {error}. {_ADVICE}"
    if is_same(found.graph, traced.graph):
        return None
    try:
        others = stage_graphs(found.layers, cuts_of(plan, traced.layers))
    except ValueError as error:
        return f"in evaluation the model cannot be cut where the plan cuts it: {error}. {_ADVICE}"
    home = homes(graphs)
    if moved := sorted(name for name, stage in homes(others).items() if home.get(name, 0) != stage):
        return f"in evaluation another stage than in training reads {', '.join(moved[:3])}. {_ADVICE}"
    return replace(found, written_in_evaluation=buffers_written(found.graph)), others


_Evaluated = tuple[TracedModel, tuple[LayerGraph, ...]]
"""A model in evaluation, and the layers of every stage."""
_ADVICE: Final = "Evaluate the unparallelized model with the weights of a checkpoint (runtime.checkpoint.export)."


def _planned(
    parts: Sequence[TracedModel], plans: Sequence[Plan], evaluated: _Evaluated, casting: Casting
) -> tuple[StagePlan, ...] | str:
    """Return the stages in evaluation with splits of their own, a sentence where there are no legal ones."""
    traced, graphs = evaluated
    try:
        return tuple(
            StagePlan(s, evaluation_plan(replace(part, evaluation=other), one), other, casting)
            for s, (part, one, other) in enumerate(zip(parts, plans, stage_models(traced, graphs), strict=True))
        )
    except UsageError as error:
        return f"{error} {_ADVICE}"


def everyone(plan: Plan, timeout_s: float) -> TorchCommunicator:
    """Return how all ranks of a plan talk to each other; every rank must call it."""
    count = plan.num_ranks
    mesh = Mesh((MeshAxis("rank", count),) if count > 1 else (), tuple(range(count)))
    axes = [(0,)] if count > 1 else []
    return communicator_of(mesh, ProcessGroups(mesh, axes, timeout_s))


def joined(stages: Sequence[StagePlan], rank: int, timeout_s: float) -> dict[int, Communicator]:
    """Return how this rank talks to the others of each stage that it holds; every rank must call it."""
    found: dict[int, Communicator] = {}
    for stage in stages:
        mesh = stage.plan.mesh
        axes = communication_axes(stage.traced, stage.plan)
        if stage.evaluated is not None:
            axes |= communication_axes(stage.evaluated.traced, stage.evaluated.plan)
        groups = ProcessGroups(mesh, axes, timeout_s)
        if rank in mesh.ranks:
            found[stage.index] = communicator_of(mesh, groups)
    return found


def build(
    model: nn.Module,
    stages: Sequence[StagePlan],
    plan: Plan,
    rank: int,
    timeout_s: float,
    tape: Tape | None = None,
) -> list[StageModule]:
    """Return the modules of the stages that this rank holds, in order; every rank must call it.

    Parameters and buffers of rank 0 are broadcast first.

    Args:
        model: with its weights, on the device of this rank.
        stages: of ``cut``.
        plan: the whole plan.
        rank: this one, of the job.
        timeout_s: after which a collective with a missing peer fails.
        tape: where communication inside the stages leaves marks while it runs; None where nobody measures.
    """
    seed = agree(model, everyone(plan, timeout_s))
    return [
        stage_module(model, stages, s, inner if tape is None else TimedCommunicator(inner, tape), seed)
        for s, inner in joined(stages, rank, timeout_s).items()
    ]


def stage_module(
    model: nn.Module, stages: Sequence[StagePlan], index: int, communicator: Communicator, seed: int
) -> StageModule:
    """Return the module of one stage, for the communicator's rank."""
    stage = stages[index]
    home, first = homes(each.layers for each in stages), parameter_names(model)
    places = {name: home.get(first[id(tensor)], 0) for name, tensor in tensors_of(model).items()}
    module = lower_as(
        StageModule, model, stage.traced, stage.plan, communicator, seed,
        keeps=lambda name: places[name] == index,
    )  # fmt: skip
    module.stage, module.samples = stage, stage.plan.batch
    return module


def receives(stages: Sequence[StagePlan], index: int, rank: int, batch: int, types: ElementTypes) -> tuple[Port, ...]:
    """Return what a stage receives on a rank, for micro-batches of so many samples.

    Args:
        stages: all of them.
        index: of the stage.
        rank: of the job; one of the stage's.
        batch: samples of a micro-batch.
        types: of the elements.
    """
    own = stages[index]
    return tuple(_port(own, stages[index - 1], name, rank, batch, types) for name in own.ids(Receive))


def sends(stages: Sequence[StagePlan], index: int, rank: int, batch: int, types: ElementTypes) -> tuple[Port, ...]:
    """Return what a stage sends from a rank; arguments as of ``receives``."""
    own = stages[index]
    return tuple(_port(own, stages[index + 1], name, rank, batch, types) for name in own.ids(Send))


def _port(own: StagePlan, other: StagePlan, mine: LayerId, rank: int, batch: int, types: ElementTypes) -> Port:
    is_receiving = isinstance(own.layers[mine].op, Receive)
    name = LayerId(mine if is_receiving else mine.removesuffix(SENT))
    theirs = LayerId(name + SENT) if is_receiving else name
    here, there = own.layout(mine, batch), other.layout(theirs, batch)
    position = here.mesh.ranks.index(rank)
    frame = here.region(position)

    def copies(source: Layout, target: Layout) -> tuple[Copy, ...]:
        is_source = source is here
        found = []
        for move in crossings(source, target):
            if (move.source if is_source else move.target) != position:
                continue
            peer = target.mesh.ranks[move.target] if is_source else source.mesh.ranks[move.source]
            found.append(Copy(peer, move.region.slices_in(frame), move.region))
        return tuple(found)

    come, go = copies(there, here), copies(here, there)
    spec = own.layers[mine].output
    receiver = own.layers[mine].op if is_receiving else other.layers[theirs].op
    has_gradient = isinstance(receiver, Receive) and receiver.has_gradient
    ahead, behind = (come, go) if is_receiving else (go, come)
    return Port(name, frame.shape, types.of(name, spec), has_gradient, ahead, behind)


def input_regions(stage: StagePlan, rank: int, batch: int) -> dict[str, Region]:
    """Return by name which region of each input of the model a rank of the first stage passes with a micro-batch."""
    position = stage.plan.mesh.ranks.index(rank)
    return {str(i): stage.layout(i, batch).region(position) for i in stage.ids(Input)}


def output_regions(stage: StagePlan, rank: int, batch: int) -> list[Region]:
    """Return which region of each output of the model a rank of the last stage gets with a micro-batch."""
    position = stage.plan.mesh.ranks.index(rank)
    return [stage.layout(i, batch).region(position) for i in stage.ids(Output)]
