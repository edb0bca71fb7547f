"""`parallelize`: the parallel module of one rank."""

import contextlib
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.distributed.device_mesh import DeviceMesh

from planner.errors import MismatchError, UsageError
from planner.frontend.lower import TracedModel, trace_layers
from planner.frontend.prepare import buffers_written
from planner.frontend.trace import empty_inputs, trace
from planner.ir.layout import balanced_pieces
from planner.ir.rules import InputOutput
from planner.plan.check import refuse_other_model
from planner.plan.schema import Plan, require_single_rank_count
from runtime.communicator import Communicator, TorchCommunicator
from runtime.exchange import Batch
from runtime.groups import ProcessGroups
from runtime.lower import Lowering, communication_axes
from runtime.params import broadcast_state
from runtime.reducer import Reducer
from runtime.state import StepState

CLIP_EPSILON = 1e-6
"""As in ``torch.nn.utils.clip_grad_norm_``."""


class ParallelModule(fx.GraphModule):
    """One rank's part of a planned model: local parameters under their original names.

    ``print(module.code)`` shows what it runs. After ``loss.backward()`` every gradient is that of
    the mean loss over the global batch, as one device would have it.
    """

    plan: Plan
    _state: StepState
    _reducer: Reducer
    _replicas: dict[int, int]

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Accumulate gradients on this rank only; the next backward pass outside reduces their sum."""
        self._reducer.enabled = False
        try:
            yield
        finally:
            self._reducer.enabled = True

    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        """Scale the gradients so that the norm of all of them, over all ranks, is at most ``max_norm``.

        Use this instead of ``torch.nn.utils.clip_grad_norm_``, which knows this rank's pieces only.

        Returns:
            The norm before.
        """
        state = self._state
        grads = [(p.grad, self._replicas[id(p)]) for p in self.parameters() if p.grad is not None]
        device = next(self.parameters()).device
        total = torch.zeros(1, dtype=torch.float64, device=device)
        for gradient, replicas in grads:
            total += gradient.detach().double().square().sum() / replicas
        everyone = tuple(range(len(self.plan.mesh.axes)))
        if everyone:
            state.communicator.all_reduce(total, everyone)
        norm = total.sqrt()[0]
        factor = (max_norm / (norm + CLIP_EPSILON)).clamp(max=1.0)
        for gradient, _ in grads:
            gradient.mul_(factor.to(gradient.dtype))
        return norm

    def _before_forward(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state = self._state
        self._reducer.reset()
        state.current_batch()  # that of an earlier pass nobody asked for
        samples = {x.shape[0] for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor) and x.dim()}
        if len(samples) != 1:
            raise MismatchError(f"the inputs have {sorted(samples)} samples; all need the batch as their first size")
        state.rank_samples = samples.pop()
        if self.training:
            state.step += 1
        if InputOutput(self.plan.io) is InputOutput.GLOBAL:
            state.batch = Batch(state.rank_samples)
            return
        pending = state.communicator.start_gather_ints(state.rank_samples)

        def resolve() -> None:
            state.batch = _batch_of(tuple(pending()))

        state.resolve_batch = resolve


def _batch_of(pieces: tuple[int, ...]) -> Batch:
    size = sum(pieces)
    balanced = tuple(b - a for a, b in balanced_pieces(size, len(pieces)))
    if min(pieces) < 1:
        raise MismatchError(f"the ranks passed {pieces} samples; every rank needs at least one")
    return Batch(size, None if pieces == balanced else pieces)


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
        MismatchError: the plan was made for another model.
    """
    if not torch.distributed.is_initialized():
        raise UsageError(
            "torch.distributed is not initialised: call runtime.launch.initialize() (or "
            "torch.distributed.init_process_group()) first, and start the script with torchrun"
        )
    require_single_rank_count(plan, torch.distributed.get_world_size())
    if mesh is not None and sorted(mesh.mesh.flatten().tolist()) != sorted(plan.mesh.ranks):
        raise UsageError(f"the given mesh has ranks {mesh.mesh.tolist()}, the plan {list(plan.mesh.ranks)}")
    traced = trace_for(model, plan)
    return lower(model, traced, plan, joined(traced, plan, timeout_s))


def joined(traced: TracedModel, plan: Plan, timeout_s: float = 60.0) -> TorchCommunicator:
    """Return how this rank talks to the others of the plan; every rank must call it."""
    groups = ProcessGroups(plan.mesh, communication_axes(traced, plan), timeout_s)
    return TorchCommunicator(plan.mesh, groups)


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
    return traced


def lower(model: nn.Module, traced: TracedModel, plan: Plan, communicator: Communicator) -> ParallelModule:
    """Return the parallel module of the communicator's rank; ``parallelize`` without the checks."""
    broadcast_state(model, communicator)
    state = StepState(communicator)
    device = next(itertools.chain(model.parameters(), model.buffers()), torch.empty(0)).device
    seed = torch.tensor([torch.initial_seed() % 2**31], device=device)
    communicator.broadcast(seed)
    state.seed = int(seed)
    lowered = Lowering(traced, model, plan, state).run()
    module = ParallelModule(lowered.state, lowered.graph, type(model).__name__)
    for name in lowered.transient:
        path, _, own = name.rpartition(".")
        module.get_submodule(path)._non_persistent_buffers_set.add(own)
    _add_unused(module, model, lowered.pieces)
    module.plan, module._state = plan, state
    module._reducer = Reducer(lowered.synchronised, communicator, plan.bucket_bytes)
    module._replicas = lowered.replicas
    module.register_forward_pre_hook(module._before_forward, with_kwargs=True)
    modes = {name: original.training for name, original in model.named_modules()}
    for name, part in module.named_modules():
        part.training = modes.get(name, model.training)
    return module


def _add_unused(module: nn.Module, model: nn.Module, pieces: Mapping[int, nn.Parameter]) -> None:
    """Register what ``forward`` does not read, and further names of what it reads, so that no name is missing."""
    known = module.state_dict(keep_vars=True)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in known or not isinstance(tensor, torch.Tensor):
            continue
        path, _, own = name.rpartition(".")
        holder: nn.Module = module
        for part in path.split(".") if path else ():
            if part not in holder._modules:
                holder.add_module(part, nn.Module())
            holder = holder.get_submodule(part)
        if isinstance(tensor, nn.Parameter):
            holder.register_parameter(own, pieces.get(id(tensor), tensor))
        else:
            holder.register_buffer(own, tensor)
