"""One stage on the runtime of ``torch.distributed.pipelining``; the only file that touches its internals (torch 2.13).

What of it runs SPMD stages of unequal numbers of ranks, and how:

- Its schedules know one rank for each place in the pipeline. Here a *position* is such a rank: all ranks of a position
  run the same list of actions, and the stage says so in place of its process group (``group_rank``, ``group_size``).
- ``_PipelineScheduleRuntime`` takes any order of F, B, I and W and puts sends and receives between them, for every pair
  of positions in one order on both sides: so pairs of ranks agree too, whatever the number of ranks in a position. Its
  classes for single schedules (GPipe, 1F1B) pair ``fwd_sends_bwd_recvs`` of two ranks and are not needed.
- It asks a stage for operators to post (``get_fwd_recv_ops`` and its like) and then waits for all sends at the end of
  the step. A stage posts its messages itself when it is asked, and returns none: it may have several peers, it waits
  where the tensor is read, and forgets what has been sent.
- Its inference of shapes runs a real forward pass, which spoils running statistics. Shapes are known here.
- Its split of backward (``stage_backward_input``, ``stage_backward_weight``) loses gradients of weights that it does
  not find behind an input with a gradient, without a word: of every weight, where what is received has none (frozen
  stages in front). Of a weight that comes into the network in two places (a tied one) it goes backward through a graph
  that may be gone. Such stages do all of backward in one part. It also detaches outputs in place, which no view allows,
  nor an operator whose result is saved for W: they are kept from it.
- Hooks on parameters do not run in W, so the reducer is called by hand there.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.pipelining import _backward as torch_backward
from torch.distributed.pipelining import schedules as torch_schedules
from torch.distributed.pipelining.stage import _PipelineStageBase
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from planner.ir.schedule import Order
from runtime.pipeline.build import Port, StageModule
from runtime.pipeline.transfers import Arrival, Post
from runtime.pipeline.weights import without_autocast
from runtime.timing import Part, Phase, Tape, marked

LossOf = Callable[[Any, Any], torch.Tensor]


class TorchStage(_PipelineStageBase):
    """A stage as torch's schedules run it.

    Args:
        module: of this rank.
        num_stages: of the pipeline.
        place: position of this rank's group, and how many positions there are.
        post: to the other ranks.
        device: of the tensors.

    Attributes:
        receives: from the stage in front; to be set for the size of the micro-batches.
        sends: to the stage behind, likewise.
        on_this_rank: all stages of this rank, by index.
        tape: where forward and backward of every micro-batch leave marks; None where nobody measures.
        structure: of what the last stage returns; a schedule sees its tensors.
    """

    structure: TreeSpec

    def __init__(
        self, module: StageModule, num_stages: int, place: tuple[int, int], post: Post, device: torch.device
    ) -> None:
        self._place = place
        super().__init__(module, module.stage.index, num_stages, device)
        self._module, self._post = module, post
        self._recomputes = module.plan.stages[0].recompute
        self.receives: tuple[Port, ...] = ()
        self.sends: tuple[Port, ...] = ()
        self._arrivals: dict[tuple[str, int], tuple[Arrival, ...]] = {}
        self._splittable: tuple[tuple[bool, ...], bool] | None = None
        self._is_reduced = False
        self.tape: Tape | None = None
        self.on_this_rank: dict[int, TorchStage] = {module.stage.index: self}

    @property
    def group_rank(self) -> int:
        """The position, in place of the rank in a process group."""
        return self._place[0]

    @group_rank.setter
    def group_rank(self, _: int) -> None:
        """Torch's own is of no use."""

    @property
    def group_size(self) -> int:
        """The number of positions."""
        return self._place[1]

    @group_size.setter
    def group_size(self, _: int) -> None:
        """Torch's own is of no use."""

    # ---- what torch would infer

    def _prepare_forward_infra(
        self, num_microbatches: int, args: Any, kwargs: Any = None, has_backward: bool = False
    ) -> None:
        del num_microbatches, args, kwargs, has_backward
        self.args_recv_info, self.act_send_info = {0: ()}, {}
        # read for its length alone: of the gradients of a stage's inputs, those that are arguments
        self._stage_meta.inputs = (None,) * len(self.receives)  # type: ignore[assignment]

    def _prepare_backward_infra(self, num_microbatches: int, *args: Any, **kwargs: Any) -> None:
        del args, kwargs
        self.chunks = num_microbatches

    def _create_grad_recv_info(self, act_send_info: dict[int, Any]) -> tuple[Any, ...]:
        del act_send_info
        return ()

    def _get_init_p2p_neighbors_ops(self) -> list[Any]:
        return []

    # ---- messages

    def _what(self, port: Port, microbatch: int, kind: str) -> str:
        return f"{kind}{port.name!r} of micro-batch {microbatch}, stage {self.stage_index},"

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[Any]:
        """Start receiving what forward reads."""
        self._arrivals["F", fwd_chunk_id] = tuple(
            self._post.receive(c.shape, c.dtype, c.forward, self._what(c, fwd_chunk_id, "")) for c in self.receives
        )
        return []

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[Any]:
        """Start receiving the gradients of what was sent."""
        if self.has_backward:
            self._arrivals["B", bwd_chunk_id] = tuple(
                self._post.receive(c.shape, c.dtype, c.backward, self._what(c, bwd_chunk_id, "the gradient of "))
                for c in self.sends
                if c.has_gradient
            )
        return []

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[Any]:
        """Start sending what forward returned."""
        outputs, _ = self.fwd_cache[fwd_chunk_id]
        if not self.has_backward:
            del self.fwd_cache[fwd_chunk_id]
        for port, tensor in zip(self.sends, outputs, strict=True):
            self._post.send(tensor, port.forward, self._what(port, fwd_chunk_id, ""))
        return []

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[Any]:
        """Start sending the gradients of what was received; zeros where nothing depends on it."""
        if not self.has_backward:
            return []
        for port, gradient in zip(self.receives, self.bwd_cache.pop(bwd_chunk_id), strict=True):
            if port.has_gradient:
                tensor = torch.zeros(port.shape, dtype=port.dtype, device=self.device)
                tensor = tensor if gradient is None else gradient
                what = self._what(port, bwd_chunk_id, "the gradient of ")
                self._post.send(tensor, port.backward, what)
        return []

    # Stages that follow each other on the same ranks; torch would hand tensors over, but their layouts may differ.

    def set_local_fwd_input(self, prev_stage_outputs: Any, mb_index: int) -> None:
        """Move what the stage in front returned."""
        del prev_stage_outputs
        self.on_this_rank[self.stage_index - 1].get_fwd_send_ops(mb_index)
        self.get_fwd_recv_ops(mb_index)

    def get_local_bwd_output(self, mb_index: int) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of what this stage received."""
        return self.bwd_cache[mb_index]

    def set_local_bwd_input(self, next_stage_bwd_outputs: tuple[torch.Tensor | None, ...], mb_index: int) -> None:
        """Move the gradients of the stage behind."""
        del next_stage_bwd_outputs
        self.on_this_rank[self.stage_index + 1].get_bwd_send_ops(mb_index)
        self.get_bwd_recv_ops(mb_index)

    def _retrieve_recv_activations(self, fwd_chunk_id: int) -> tuple[torch.Tensor, ...]:
        arrivals = self._arrivals.pop(("F", fwd_chunk_id))
        trains = self.has_backward and torch.is_grad_enabled()
        return tuple(
            arrival.wait().requires_grad_(trains and port.has_gradient)
            for arrival, port in zip(arrivals, self.receives, strict=True)
        )

    def _retrieve_recv_grads(self, bwd_chunk_id: int) -> tuple[torch.Tensor | None, ...]:
        arrived = iter(self._arrivals.pop(("B", bwd_chunk_id)))
        return tuple(next(arrived).wait() if c.has_gradient else None for c in self.sends)

    # ---- computing

    def clear_runtime_states(self) -> None:
        """Begin a step."""
        super().clear_runtime_states()
        for kept in (self._arrivals, self.bwd_cache, self.backward_state, self.dw_runner):
            kept.clear()  # of a step that failed
        self._is_reduced = False

    def forward_maybe_with_nosync(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        """Return the tensors that the stage sends, in the types that were planned; of the last stage all it returns."""
        recompute = self._recomputes and self.has_backward
        with self._marked(Phase.FORWARD):
            output = _recomputed(self.submod, args, kwargs) if recompute else self.submod(*args, **kwargs)
        if self.is_last:
            leaves, self.structure = tree_flatten(output)
            return tuple(leaves)
        pairs = zip(_as_tuple(output), self.sends, strict=True)
        return tuple(t.to(port.dtype) for t, port in pairs)  # autocast may have chosen another

    def forward_one_chunk(
        self, fwd_chunk_id: int, args: tuple[Any, ...], kwargs: Any = None, save_forward_output: bool = True
    ) -> Any:
        """Run forward on a micro-batch; backward of the last stage begins with the loss, not with its output."""
        kwargs = kwargs if self.is_first else None  # torch passes the model's to all stages of a rank
        output = super().forward_one_chunk(fwd_chunk_id, args, kwargs, save_forward_output)
        if self.is_last:
            self.fwd_cache[fwd_chunk_id] = (), self.fwd_cache[fwd_chunk_id][1]
        return output

    def backward_maybe_with_nosync(
        self, backward_type: Any, bwd_kwargs: dict[str, Any], last_backward: bool = False
    ) -> tuple[tuple[torch.Tensor | None, ...], Any]:
        """Run backward or a part of it; the last whole one of a step reduces gradients behind it."""
        with self._marked(Phase.BACKWARD), without_autocast():
            match backward_type:
                case "full":
                    return self._whole(_Backward(**bwd_kwargs), last_backward), None
                case "input":
                    backward = _Backward(**bwd_kwargs)
                    bwd_kwargs["stage_output"], bwd_kwargs["output_grads"] = (), None  # torch would keep them until W
                    return self._of_inputs(backward)
                case _:
                    self._of_weights(bwd_kwargs["param_groups"], last_backward)
                    return (), None

    def _marked(self, phase: Phase) -> contextlib.AbstractContextManager[None]:
        return marked(self.tape, Part(phase, f"stage {self.stage_index}"))

    def _whole(self, backward: "_Backward", is_last: bool) -> tuple[torch.Tensor | None, ...]:
        if not backward.requires_grad:
            return (None,) * len(backward.input_values)
        with contextlib.nullcontext() if is_last else self._module.no_sync():
            self._is_reduced = is_last
            return torch_backward.stage_backward(backward.outputs, backward.gradients, backward.input_values)

    def _of_inputs(self, backward: "_Backward") -> tuple[tuple[torch.Tensor | None, ...], Any]:
        """Return the gradients of the inputs, and what is left to do for those of the weights."""
        if not backward.requires_grad or not any(x.requires_grad for x in backward.input_values):
            return (None,) * len(backward.input_values), backward
        if self._recomputes or not self._can_split(backward):  # two parts would compute activations twice again
            return self._whole(backward, is_last=False), _DONE
        with self._module.no_sync():
            once: Any = iter(backward.outputs)  # torch iterates a second time to detach them in place
            return torch_backward.stage_backward_input(
                once, backward.output_grads, backward.input_values, self.submod.parameters()
            )

    def _of_weights(self, left: Any, is_last: bool) -> None:
        if isinstance(left, _Backward):
            self._whole(left, is_last)
        elif left is not _DONE:
            with self._module.no_sync():
                torch_backward.stage_backward_weight(self.submod.parameters(), left)

    def _can_split(self, backward: "_Backward") -> bool:
        """Return whether torch would find every weight, and once; asked again when some are frozen or thawed."""
        trained = tuple(p.requires_grad for p in self.submod.parameters())
        if self._splittable is None or self._splittable[0] != trained:
            self._splittable = trained, _finds_all_weights_once(backward, list(self.submod.parameters()))
        return self._splittable[1]

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        """Reduce gradients, unless the last backward did."""
        del grad_scale_factor
        if not self._is_reduced:
            self._module.reduce_gradients()


_DONE = object()
"""Left to do for the weights where all of backward has run."""


class _Backward:
    """The backward pass of one micro-batch, with torch's names."""

    def __init__(self, stage_output: Any, output_grads: Any, input_values: list[torch.Tensor]) -> None:
        self.stage_output, self.output_grads, self.input_values = stage_output, output_grads, input_values

    @property
    def outputs(self) -> tuple[torch.Tensor, ...]:
        """What it begins with."""
        return _as_tuple(self.stage_output)

    @property
    def gradients(self) -> tuple[torch.Tensor | None, ...]:
        """Of the outputs; None for the loss."""
        return (None,) * len(self.outputs) if self.output_grads is None else self.output_grads

    @property
    def requires_grad(self) -> bool:
        """Whether there is anything to do."""
        return any(t.requires_grad for t in self.outputs)


def _as_tuple(output: Any) -> tuple[torch.Tensor, ...]:
    return (output,) if isinstance(output, torch.Tensor) else tuple(output)


def _finds_all_weights_once(backward: _Backward, parameters: Sequence[nn.Parameter]) -> bool:
    node_of = torch_backward._get_grad_fn_or_grad_acc
    nodes = [node for t in (*backward.outputs,) if t.requires_grad and (node := node_of(t)) is not None]
    reverse = torch_backward.construct_reverse_graph(nodes)
    weights = [node for p in parameters if p.requires_grad and (node := node_of(p)) is not None]
    reached = [node for node in weights if node in reverse]
    inputs = [node for x in backward.input_values if x.requires_grad and (node := node_of(x)) is not None]
    groups = torch_backward.get_param_groups(inputs, weights, reverse)
    found = set().union(*(group["params"] for group in groups))
    return found.issuperset(reached) and all(len(group["intermediates"]) == 1 for group in groups)


def _recomputed(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a module that forgets its activations; when they are computed again, its buffers stay as they are."""

    def contexts() -> tuple[Any, Any]:
        return contextlib.nullcontext(), _buffers_kept(module)

    return checkpoint(module, *args, use_reentrant=False, context_fn=contexts, **kwargs)


@contextlib.contextmanager
def _buffers_kept(module: nn.Module) -> Iterator[None]:
    before = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        for buffer, value in before:
            buffer.data.copy_(value)  # past autograd, which would take graphs that saved the buffer for outdated


class TorchSchedule(torch_schedules._PipelineScheduleRuntime):
    """An order of work, as torch's runtime executes it on this rank.

    Args:
        stages: of this rank, in ascending order.
        order: what every position does.
        num_microbatches: of a step.
        loss: of the tensors that the last stage returns and a target; None to go forward only.
    """

    def __init__(
        self, stages: Sequence[TorchStage], order: Sequence[Order], num_microbatches: int, loss: LossOf | None
    ) -> None:
        super().__init__(list(stages), num_microbatches, loss, scale_grads=False)
        actions = {
            p: [torch_schedules._Action.from_str(str(action)) for action in mine] for p, mine in enumerate(order)
        }
        if loss is not None:
            self._prepare_schedule_with_comms(actions)
            return
        home = {action.stage: p for p, mine in enumerate(order) for action in mine}  # torch checks for backward
        self.pipeline_order_with_comms = torch_schedules._add_send_recv(actions, home.__getitem__, self._num_stages)

    def run(
        self, inputs: Sequence[tuple[Any, ...]], keywords: Sequence[dict[str, Any]], targets: Sequence[Any]
    ) -> list[Any]:
        """Do a step.

        Args:
            inputs: of every micro-batch; empty tuples where this rank has not the first stage.
            keywords: likewise.
            targets: of every micro-batch, for the last stage.

        Returns:
            On ranks with the last stage the losses of the micro-batches, or without a loss its output, as tuples of
            tensors; else nothing.
        """
        trains = self._loss_fn is not None
        for stage in self._stages:
            stage.has_backward = trains
            stage.clear_runtime_states()
        self._internal_losses.clear()
        self.fwd_recv_ops.clear()
        self.bwd_recv_ops.clear()
        losses: list[Any] = []
        with _quiet():
            self._step_microbatches(list(inputs), list(keywords), list(targets), losses if trains else None, not trains)
        if trains:
            return losses
        found = [output for stage in self._stages for output in stage.output_chunks]
        for stage in self._stages:
            stage.clear_runtime_states()
        return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch from printing all of the schedule where an action fails; the error says which it was."""
    before = torch_schedules.logger.disabled
    torch_schedules.logger.disabled = True
    try:
        yield
    finally:
        torch_schedules.logger.disabled = before


def unflattened(stage: TorchStage, leaves: Sequence[Any]) -> Any:
    """Return what the last stage returned, in the structure that the model gives it."""
    return tree_unflatten(list(leaves), stage.structure)
