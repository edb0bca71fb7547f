"""`pipeline` for plans whose stages work in cycles: a rank's stage, its messages, what training scripts call.

The cycles are in ``runtime.pipeline.stale``. Here a stage may have several ranks: each runs its part of every
forward and backward pass, and sends to the ranks of the stages beside it exactly what they need.
"""

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map

from planner.errors import MismatchError, UsageError
from planner.ir.layout import balanced_pieces
from planner.ir.ops import Input
from planner.ir.region import Region
from planner.ir.rules import InputOutput
from planner.ir.transfer import StepKind
from planner.plan.schema import Plan
from runtime.comm.communicator import TorchCommunicator
from runtime.comm.exchange import named
from runtime.data import smallest_batch
from runtime.pipeline.build import (
    Port,
    StageModule,
    StagePlan,
    build,
    cut,
    everyone,
    in_mode,
    input_regions,
    receives,
    sends,
)
from runtime.pipeline.holding import PipelinedStages, whole_shapes
from runtime.pipeline.links import Message
from runtime.pipeline.stale import CycleStage, Mode, StalePipeline
from runtime.pipeline.transfers import Arrival, Post
from runtime.timing import Tape
from runtime.types import ElementTypes

OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]


class PortLink:
    """The link of a rank to the ranks of the stage beside its own.

    Of what was sent, the latest message may still be under way: one that is sent in a cycle is received while both
    stages go on to the next one, and all that a stage waits for was sent a cycle earlier, so nobody waits in a circle.

    Args:
        group: of all ranks of the pipeline.
        device: of the tensors.
        to_next: whether the other stage is the next one; activations go there, and gradients come.

    Attributes:
        ports: the tensors that cross; to be set for the size of the batches.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device, *, to_next: bool) -> None:
        self._post, self._to_next = Post(group, device), to_next
        self.ports: tuple[Port, ...] = ()
        self._arriving: deque[tuple[Arrival | None, ...]] = deque()
        self._num_sent = self._num_expected = 0

    def send(self, tensors: Message) -> None:
        """Start sending a message; wait for the one before the last."""
        remote = sum(len(port.forward if self._to_next else port.backward) for port in self.ports)
        self._post.flush(num_left=remote)
        for port, tensor in zip(self.ports, tensors, strict=True):
            if tensor is None or not (self._to_next or port.has_gradient):
                continue
            if tensor.shape != port.shape:
                raise MismatchError(
                    f"{port.name!r} has the shape {tuple(tensor.shape)} on this rank, and the stage beside it expects "
                    f"{port.shape}. Pass batches of one size on all ranks."
                )
            copies = port.forward if self._to_next else port.backward
            self._post.send(tensor.to(port.dtype), copies, self._what(port, self._num_sent, self._to_next))
        self._num_sent += 1

    def expect(self) -> None:
        """Start receiving the next message."""
        self._arriving.append(tuple(self._arrival(port) for port in self.ports))
        self._num_expected += 1

    def receive(self) -> Any:
        """Wait for the oldest expected message."""
        arrived = zip(self._arriving.popleft(), self.ports, strict=True)
        tensors = tuple((None if arrival is None else arrival.wait(), port) for arrival, port in arrived)
        if self._to_next:
            return tuple(tensor for tensor, _ in tensors)
        return tuple(t.requires_grad_(port.has_gradient) for t, port in tensors if t is not None)

    def flush(self) -> None:
        """Wait until all that was sent has gone."""
        self._post.flush()

    def _arrival(self, port: Port) -> Arrival | None:
        if self._to_next and not port.has_gradient:
            return None
        copies = port.backward if self._to_next else port.forward
        what = self._what(port, self._num_expected, not self._to_next)
        return self._post.receive(port.shape, port.dtype, copies, what)

    def _what(self, port: Port, number: int, is_activation: bool) -> str:
        side = "next" if self._to_next else "previous"
        kind = "" if is_activation else "the gradient of "
        return f"{kind}{port.name!r} (message {number} between this stage and the {side} one)"


class CyclePipeline(PipelinedStages):
    """This rank's stage, trained in cycles; made by ``runtime.pipelined``.

    Every rank makes the same calls. ``step`` returns before the batch is done: behind the last one, and before weights
    are read, saved or evaluated, call ``drain``. The optimizer is called by ``step``.
    """

    _steps: "_Cycles"

    @property
    def optimizer(self) -> Optimizer | None:
        """Of this rank's parameters; None where the stage has none."""
        return self._steps.training.stages[0].optimizer

    @property
    def num_steps(self) -> int:
        """Batches that were fed; what a hybrid counts. A checkpoint that is loaded sets it."""
        return self._steps.training.num_steps

    @num_steps.setter
    def num_steps(self, value: int) -> None:
        self._steps.training.load_state_dict({"num_steps": value})

    @property
    def progress(self) -> int:
        """``num_steps``."""
        return self.num_steps

    def go_on(self, progress: int) -> None:
        """Set ``num_steps``."""
        self.num_steps = progress

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise UsageError(
            "a pipeline in cycles cannot be copied: it updates its weights by itself, while batches are in flight. "
            "Copy its tensors (state_dict()), or save a checkpoint."
        )

    @property
    def in_flight(self) -> int:
        """Batches that were fed and are not through; 0 behind ``drain``."""
        return self._steps.training.in_flight

    def step(self, *inputs: Any, target: Any = None, **keywords: Any) -> list[Tensor]:
        """Feed a batch and run a cycle.

        Inputs are read in the first stage and targets in the last one; other ranks may pass the same or nothing. A rank
        cuts its own samples out. A batch of another size than the one before drains the pipeline first; then all ranks
        must pass it. Nobody may write into what was passed.

        Args:
            inputs: of the model, with the samples of the whole batch in their first dimension.
            target: a tensor, or tensors in tuples, lists and dicts, likewise. Without one, ``loss_fn`` gets the output.
            keywords: inputs of the model that are passed by name.

        Returns:
            On the ranks of the last stage, the mean losses over the global batch of the batches that were finished, in
            order; else an empty list.

        Raises:
            MismatchError: the batch is too small for the plan.
            RunError: a rank died or hangs; with rank and what was on its way.
        """
        return self._steps.step(inputs, keywords, target)

    def drain(self) -> list[Tensor]:
        """Finish all batches in flight; returns losses as ``step`` does."""
        return self._steps.mean(self._steps.training.drain())

    def run(self, batches: Iterable[tuple[Any, Any]]) -> list[Tensor]:
        """Train on pairs of inputs and target, then drain; returns all losses as ``step`` does."""
        losses: list[Tensor] = []
        for inputs, target in batches:
            losses += self.step(*(inputs if isinstance(inputs, tuple) else (inputs,)), target=target)
        return losses + self.drain()

    def require_settled(self, what: str) -> None:
        """Refuse while batches are in flight: stages have the weights of different moments, and gradients to come.

        Raises:
            UsageError: with their number.
        """
        self._steps.training.require_drained(what)

    def evaluate(self, *inputs: Any, **keywords: Any) -> Any:
        """Return this rank's samples of the output, on the ranks of the last stage; else None.

        Call ``drain()`` and ``eval()`` first. The batch has the size of those in training, or all ranks pass it.

        Raises:
            UsageError: batches are in flight.
        """
        return self._steps.evaluate(inputs, keywords)

    def forward(self, *_args: Any, **_kwargs: Any) -> Any:
        """Raise: a stage runs for several batches at a time."""
        raise UsageError("a pipeline has no forward(): call step(...) to train, and evaluate(...) for the output")


def cycle_pipeline(
    model: nn.Module,
    plan: Plan,
    loss_fn: Callable[..., Tensor],
    optimizer: OptimizerFactory,
    *,
    pipelined_steps: int | None = None,
    timeout_s: float = 60.0,
    tape: Tape | None = None,
) -> CyclePipeline:
    """Return this rank's stage of a model, to be trained by the plan's schedule ``stale`` or ``pipedream``.

    ``runtime.pipelined`` calls this. Every batch updates the weights of each stage in a cycle of its own, so the
    pipeline holds the optimizer.

    Args:
        model: the planned network with its weights.
        plan: of several stages in cycles.
        loss_fn: from the output of the model, and the target where ``step`` gets one, to the mean loss.
        optimizer: makes one of the parameters of this rank, such as ``functools.partial(SGD, lr=0.1)``.
        pipelined_steps: later batches are not pipelined (hybrid); None: all are.
        timeout_s: after which a message or collective with a missing peer fails.
        tape: as of ``build``.

    Raises:
        UsageError: a stage shards parameters over time or computes activations again.
        MismatchError: the plan was made for another model.
    """
    for s, stage in enumerate(plan.stages):
        if stage.parameter_sharding != "none" or stage.recompute:
            raise UsageError(
                f"stage {s} of the plan shards parameters or computes activations again, which read the weights of "
                f"another moment than schedule {plan.schedule.kind!r} does. Plan with neither."
            )
    stages = cut(model, plan)
    (module,) = build(model, stages, plan, dist.get_rank(), timeout_s, tape)
    found = CyclePipeline([module], plan, everyone(plan, timeout_s), whole_shapes(model))
    parameters = [p for p in module.parameters() if p.requires_grad]
    found._steps = _Cycles(found, stages, loss_fn, optimizer(parameters) if parameters else None, pipelined_steps)
    return found


class _Cycles:
    """Cuts batches for this rank, and feeds them."""

    def __init__(
        self,
        held: CyclePipeline,
        stages: Sequence[StagePlan],
        loss_fn: Callable[..., Tensor],
        optimizer: Optimizer | None,
        pipelined_steps: int | None,
    ) -> None:
        (module,) = held.held_stages
        assert isinstance(module, StageModule)
        assert isinstance(held.world, TorchCommunicator)
        self._module = module
        self._plan, self._all, self._loss_fn = held.plan, stages, loss_fn
        self._evaluated = in_mode(stages, training=False) if stages[0].evaluated is not None else stages
        self._index, self._rank = self._module.stage.index, dist.get_rank()
        floating = [p for p in (*self._module.parameters(), *self._module.buffers()) if p.is_floating_point()]
        self.dtype = stages[0].casting.own  # of all stages; this one may have no parameters
        self.device = floating[0].device if floating else torch.device("cpu")
        self._smallest = max(smallest_batch(stage.plan) for stage in stages)
        group, last = held.world._groups.blocking((0,)), len(stages) - 1
        self._before = PortLink(group, self.device, to_next=False) if self._index else None
        self._after = PortLink(group, self.device, to_next=True) if self._index < last else None
        mode: Mode = "pipedream" if held.plan.schedule.kind == "pipedream" else "stale"
        stage = CycleStage(
            self._module,
            optimizer,
            stage=self._index,
            num_stages=len(stages),
            loss_fn=self._loss if self._index == last else None,
            links=(self._before, self._after),
            mode=mode,
        )
        self.training = StalePipeline(stage, pipelined_steps)
        self._sizes: tuple[int, tuple[bool, ElementTypes]] | None = None

    @property
    def _now(self) -> Sequence[StagePlan]:
        """All stages in the mode of this moment."""
        return self._all if self._module.training else self._evaluated

    def watch(self, tape: Tape | None) -> None:
        """Let forward, backward and update leave marks on a tape, or on none."""
        for stage in self.training.stages:
            stage.tape = tape

    def step(self, inputs: Sequence[Any], keywords: Mapping[str, Any], target: Any) -> list[Tensor]:
        """Feed a batch; see ``CyclePipeline.step``."""
        if self._now is not self._all:
            raise UsageError(
                "step() trains, and the model's code makes another of it in evaluation; call train() first"
            )
        size = self._size_of((*inputs, *keywords.values(), target))
        losses = self._use(size)
        has_target = target is not None
        own = (has_target, self._own_target(target, size))
        losses += self.training.step(self._own_inputs(inputs, keywords, size), own)
        return self.mean(losses)

    def evaluate(self, inputs: Sequence[Any], keywords: Mapping[str, Any]) -> Any:
        """Go forward; see ``CyclePipeline.evaluate``."""
        size = self._size_of((*inputs, *keywords.values()))
        if self.training.is_drained:
            self._use(size)
        return self.training.evaluate(self._own_inputs(inputs, keywords, size))

    def mean(self, losses: list[Tensor]) -> list[Tensor]:
        """Return means over the global batch, from those of this rank's samples."""
        last = self._all[-1].plan
        if not losses or last.mesh.size == 1:
            return losses
        communicator, (batch, _) = self._module._state.communicator, self._sizes or (self._plan.batch, None)
        share = 1.0 / last.mesh.size
        if last.input_output is InputOutput.PER_RANK:
            a, b = balanced_pieces(batch, last.mesh.size)[communicator.position]
            share = (b - a) / batch
        total = torch.stack(losses) * share
        with named(StepKind.ALL_REDUCE, communicator, "the loss"):
            communicator.all_reduce(total, tuple(range(len(last.mesh.axes))))
        return list(total)

    def _loss(self, output: Any, target: tuple[bool, Any]) -> Tensor:
        return self._loss_fn(output, target[1]) if target[0] else self._loss_fn(output)

    def _use(self, batch: int) -> list[Tensor]:
        """Get ready for batches of so many samples; returns the losses of those that had to be finished first.

        Raises:
            MismatchError: a rank would get no samples.
        """
        if batch < self._smallest:
            raise MismatchError(
                f"batches of {batch} samples leave a rank without any; the plan needs at least {self._smallest}"
            )
        stages = self._now
        types = stages[0].casting.types(self.device.type, self.dtype)
        key = batch, (stages is self._all, types)
        if self._sizes == key:
            return []
        losses = self.training.drain()
        self._sizes, self._module.samples = key, batch
        if self._before is not None:
            self._before.ports = receives(stages, self._index, self._rank, batch, types)
        if self._after is not None:
            self._after.ports = sends(stages, self._index, self._rank, batch, types)
        return losses

    def _size_of(self, passed: Iterable[Any]) -> int:
        """Return how many samples a batch has; where nothing is passed, as many as the one before."""
        sizes = {x.shape[0] for x in tree_leaves(list(passed)) if isinstance(x, Tensor) and x.dim()}
        if len(sizes) > 1:
            raise MismatchError(f"inputs and targets have {sorted(sizes)} samples; all need those of the whole batch")
        return int(sizes.pop()) if sizes else (self._sizes or (self._plan.batch, None))[0]

    def _own_inputs(self, inputs: Sequence[Any], keywords: Mapping[str, Any], batch: int) -> tuple[Any, ...]:
        """Return this rank's regions of the inputs, in the order of the stage's arguments."""
        if self._index:
            return ()
        stage = self._now[0]
        names = [str(i) for i in stage.ids(Input)]
        positional = [n for n in names if n not in keywords]
        if len(inputs) != len(positional) or not keywords.keys() <= set(names):
            given = [f"{len(inputs)} by position", *sorted(keywords)]
            raise UsageError(f"the model has the inputs {names}; given on rank {self._rank}: {', '.join(given)}")
        passed = dict(zip(positional, inputs, strict=True)) | dict(keywords)
        regions = input_regions(stage, self._rank, batch)
        return tuple(self._piece(passed[name], regions[name]) for name in names)

    def _piece(self, value: Any, region: Region) -> Any:
        if not isinstance(value, Tensor):
            return value
        frame = Region((0,) * value.dim(), tuple(value.shape))
        return value.detach()[region.slices_in(frame)].to(self.device)

    def _own_target(self, target: Any, batch: int) -> Any:
        last = self._all[-1].plan
        if self._index < len(self._all) - 1:
            return None
        a, b = 0, batch
        if last.input_output is InputOutput.PER_RANK:
            a, b = balanced_pieces(batch, last.mesh.size)[last.mesh.ranks.index(self._rank)]
        return tree_map(lambda t: t[a:b].to(self.device) if isinstance(t, Tensor) and t.dim() else t, target)
