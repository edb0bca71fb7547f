"""`parallelize`: the parallel module of one rank."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from planner.errors import TraceError, UsageError
from planner.frontend.lower import TracedModel, trace_layers
from planner.frontend.modes import asks_for_mode, is_same
from planner.frontend.prepare import buffers_written
from planner.frontend.trace import empty_inputs, trace
from planner.plan.check import refuse_other_model
from planner.plan.schema import Plan
from runtime.agreement import start_together
from runtime.comm.communicator import Communicator, TorchCommunicator
from runtime.comm.groups import ProcessGroups
from runtime.comm.staging import communicator_of
from runtime.evaluation import Evaluation, evaluation_plan, lower_evaluation
from runtime.feed import input_layouts
from runtime.lowering.idle import Idle
from runtime.lowering.lower import Lowering, communication_axes
from runtime.module import ParallelModule, keep_hooks
from runtime.parameters.local import broadcast_state, held, refuse_differing_models
from runtime.parameters.sharding import Shards
from runtime.state import StepState

__all__ = ["ParallelModule", "agree", "joined", "lower", "lower_as", "parallelize", "trace_for"]

Module = TypeVar("Module", bound=ParallelModule)


def parallelize(
    model: nn.Module, plan: Plan, mesh: DeviceMesh | None = None, *, timeout_s: float = 60.0
) -> ParallelModule:
    """Return this rank's part of a model, to be trained like any module.

    Every rank calls it with the same plan, under torchrun or any other launcher. Parameters and
    buffers of rank 0 are broadcast first. Pass each rank its own samples (``io: per-rank``; what a
    ``DistributedSampler`` gives it) or the whole batch (``io: global``); compute the loss as on one
    device; call ``backward()`` and step any optimizer over ``parameters()``.

    Args:
        model: the planned network with its weights, on the device that this rank uses.
        plan: the plan.
        mesh: a mesh over the ranks, for users who have one; its ranks must be those of the plan.
        timeout_s: after which a collective with a missing peer fails.

    Raises:
        UsageError: torch.distributed is not initialised, weights are on the meta device, or the
            plan is for another number of ranks.
        MismatchError: the plan was made for another model; or ranks have different plans, models or code.
        RunError: a rank did not come.
    """

    def check() -> TracedModel:
        if mesh is not None and sorted(mesh.mesh.flatten().tolist()) != sorted(plan.mesh.ranks):
            raise UsageError(f"the given mesh has ranks {mesh.mesh.tolist()}, the plan {list(plan.mesh.ranks)}")
        return trace_for(model, plan)

    traced = start_together("parallelize", model, plan, check)
    return lower(model, traced, plan, joined(traced, plan, timeout_s))


def joined(traced: TracedModel, plan: Plan, timeout_s: float = 60.0) -> TorchCommunicator:
    """Return how this rank talks to the others of the plan; every rank must call it."""
    axes = communication_axes(traced, plan)
    if isinstance(traced.evaluation, TracedModel):
        axes |= communication_axes(traced.evaluation, evaluation_plan(traced, plan))
    groups = ProcessGroups(plan.mesh, axes, timeout_s)
    return communicator_of(plan.mesh, groups)


def trace_for(model: nn.Module, plan: Plan) -> TracedModel:
    """Return the traced model after checking that the plan was made for it.

    Raises:
        UsageError: weights are on the meta device.
        MismatchError: the plan was made for another model.
    """
    if any(t.is_meta for t in itertools.chain(model.parameters(), model.buffers())):
        raise UsageError("the model's weights are on the meta device; build it on a real device to run it")
    inputs, keywords = empty_inputs(plan.model.inputs)
    traced = trace_layers(model, inputs, plan.model.name, keywords=keywords)
    refuse_other_model(plan, traced.layers)
    if any(not name.endswith("num_batches_tracked") for name in buffers_written(traced.graph)):
        evaluation = trace(model, inputs, keywords, training=False)
        traced = replace(traced, written_in_evaluation=buffers_written(evaluation))
    if asks_for_mode(model):
        traced = replace(traced, evaluation=_in_evaluation(model, traced, plan))
    return traced


def _in_evaluation(model: nn.Module, traced: TracedModel, plan: Plan) -> TracedModel | str | None:
    """Return what the model is in evaluation; None where it is the same, a sentence where it cannot be run."""
    inputs, keywords = empty_inputs(plan.model.inputs)
    try:
        found = trace_layers(model, inputs, plan.model.name, keywords=keywords, training=False)
    except TraceError as error:
        return f"the model asks for its mode, and in evaluation it cannot be traced: {error}"
    if is_same(found.graph, traced.graph):
        return None
    found = replace(found, written_in_evaluation=buffers_written(found.graph))
    try:
        evaluation_plan(replace(traced, evaluation=found), plan)
    except UsageError as error:
        return str(error)
    return found


def lower(model: nn.Module, traced: TracedModel, plan: Plan, communicator: Communicator) -> ParallelModule:
    """Return the parallel module of the communicator's rank; ``parallelize`` without the checks."""
    return lower_as(ParallelModule, model, traced, plan, communicator, agree(model, communicator))


def agree(model: nn.Module, communicator: Communicator) -> int:
    """Give all ranks the parameters and buffers of the first; return a seed that they share.

    Raises:
        MismatchError: they have built different models.
    """
    refuse_differing_models(model, communicator)
    broadcast_state(model, communicator)
    device = next(itertools.chain(model.parameters(), model.buffers()), torch.empty(0)).device
    seed = torch.tensor([torch.initial_seed() % 2**31], device=device)
    communicator.broadcast(seed)
    return int(seed)


def lower_as(
    kind: type[Module],
    model: nn.Module,
    traced: TracedModel,
    plan: Plan,
    communicator: Communicator,
    seed: int,
    keeps: Callable[[str], bool] = lambda _: True,
) -> Module:
    """Return the parallel module of the communicator's rank, of a class that is asked for.

    Args:
        kind: of module.
        model: with the weights of all ranks.
        traced: the model, or one stage of it.
        plan: of one stage.
        communicator: of this rank.
        seed: of what is random, equal on all ranks.
        keeps: whether the module has a tensor of the model, by name, that no layer reads.
    """
    state = StepState(communicator, seed=seed)
    lowered = Lowering(traced, model, plan, state).run()
    other = traced.evaluation
    evaluation = lower_evaluation(model, traced, plan, state, lowered) if isinstance(other, TracedModel) else other
    shards = Shards.of(
        plan.stages[0].parameter_sharding, lowered.synchronised, lowered.cut, traced.layers.layers, communicator,
        plan.bucket_bytes,
    )  # fmt: skip
    parts = {**lowered.state, **shards.insert(lowered.graph, lowered.state)}
    if isinstance(evaluation, Evaluation):
        evaluation.own.update(shards.insert(evaluation.graph, {**lowered.state, **evaluation.own}))
    module = kind(parts, lowered.graph, type(model).__name__)
    for name in lowered.transient:
        path, _, own = name.rpartition(".")
        module.get_submodule(path)._non_persistent_buffers_set.add(own)
    module.plan, module._state, module._inputs = plan, state, input_layouts(plan)
    module._take_unused(model, lowered.pieces, lowered.cut, keeps)
    module.held = shards.refined(held(model, module, lowered.cut, plan.mesh, communicator.position))
    shards.attach(module)
    module._shards, module._reducer = shards, shards.reducer(lowered.synchronised, plan.bucket_bytes)
    module._evaluation = evaluation
    module.register_forward_pre_hook(module._before_forward, with_kwargs=True)
    module.register_forward_hook(module._after_forward, always_call=True)
    modes = {name: original.training for name, original in model.named_modules()}
    for name, part in module.named_modules():
        part.training = modes.get(name, model.training)
        if isinstance(part, Idle):
            part.count_in(module)
    keep_hooks(module, model)
    module._choose_graph()
    return module
