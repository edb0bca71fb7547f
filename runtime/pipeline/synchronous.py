"""Synchronous pipelines: micro-batches in the order of a schedule, with nothing in flight behind a step."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_leaves, tree_map

from planner.errors import LayerwiseError, MismatchError, UsageError
from planner.ir.layout import balanced_pieces
from planner.ir.ops import Input, Output
from planner.ir.region import Region
from planner.ir.rules import InputOutput
from planner.ir.schedule import Action, ActionKind, Order, ScheduleKind, orders
from planner.ir.split import LayerId
from planner.ir.transfer import StepKind
from planner.plan.schema import Plan
from runtime.comm.exchange import named
from runtime.data import smallest_batch
from runtime.lowering.rewriting import samples_of
from runtime.pipeline.build import StageModule, StagePlan, in_mode, receives, sends
from runtime.pipeline.torch_stage import TorchSchedule, TorchStage, unflattened
from runtime.pipeline.transfers import Post
from runtime.timing import Tape
from runtime.types import ElementTypes

Scale = Callable[[torch.Tensor], torch.Tensor]
LossFunction = Callable[..., torch.Tensor]

MIN_EVALUATED: Final = 4
"""Micro-batches of a round of evaluation, for each position, so that the pipeline is full most of the time."""


def positions_of(plan: Plan) -> tuple[tuple[int, ...], ...]:
    """Return the groups of ranks that hold stages, in the order of their first stages.

    Raises:
        UsageError: stages are not dealt to them in turn.
    """
    ranks = [tuple(stage.mesh.ranks) for stage in plan.stages]
    found = tuple(dict.fromkeys(ranks))
    if any(group != found[s % len(found)] for s, group in enumerate(ranks)):
        raise UsageError(f"the stages are on ranks {ranks}; groups of ranks take them in turn, the first one first")
    return found


class Synchronous:
    """Runs the steps of a synchronous schedule on one rank.

    Args:
        plan: of all stages.
        stages: all of them.
        modules: those of this rank, in order.
        group: of all ranks.
        device: of this rank.
        dtype: of tensors that the plan knows as float32.
        loss_fn: from the last stage's output, and a target if there is one, to the mean loss.
    """

    def __init__(
        self,
        plan: Plan,
        stages: Sequence[StagePlan],
        modules: Sequence[StageModule],
        group: dist.ProcessGroup,
        device: torch.device,
        dtype: torch.dtype,
        loss_fn: LossFunction,
    ) -> None:
        self._plan, self._all, self.dtype, self.device, self._loss_fn = plan, stages, dtype, device, loss_fn
        self._evaluated = in_mode(stages, training=False) if stages[0].evaluated is not None else stages
        self._rank, self._post, self._group = dist.get_rank(), Post(group, device), group
        self._kind = ScheduleKind(plan.schedule.kind)
        groups = positions_of(plan)
        self._num_positions = len(groups)
        position = next(p for p, ranks in enumerate(groups) if self._rank in ranks)
        self._stages = [TorchStage(m, len(stages), (position, len(groups)), self._post, device) for m in modules]
        for stage in self._stages:
            stage.on_this_rank = {each.stage_index: each for each in self._stages}
            stage._module._state.passes.keep(plan.schedule.num_microbatches)
        self._smallest = max(smallest_batch(stage.plan) for stage in stages)
        self._schedules: dict[tuple[int, bool], TorchSchedule] = {}
        self._sizes: tuple[int, tuple[bool, ElementTypes]] | None = None
        self._scale: Scale = _unscaled
        self._has_target = False
        self._values: list[torch.Tensor] = []

    def copied(self, modules: Sequence[StageModule]) -> "Synchronous":
        """Return the same for copies of the modules."""
        return Synchronous(self._plan, self._all, modules, self._group, self.device, self.dtype, self._loss_fn)

    def watch(self, tape: Tape | None) -> None:
        """Let forward and backward leave marks on a tape, or on none."""
        for stage in self._stages:
            stage.tape = tape

    # ---- training

    def step(
        self, inputs: Sequence[Any], keywords: Mapping[str, Any], target: Any, scale: Scale | None, everywhere: bool
    ) -> torch.Tensor | None:
        """Do forward and backward of a batch; see ``runtime.pipeline.module.Pipeline.step``."""
        if not torch.is_grad_enabled():
            raise UsageError("step() trains, and gradients are switched off (torch.no_grad()); evaluate() needs none")
        if self._now is not self._all:
            raise UsageError(
                "step() trains, and the model's code makes another of it in evaluation; call train() first"
            )
        count = self._plan.schedule.num_microbatches
        size = self._size_of((*inputs, *keywords.values(), target))
        if size % count:
            raise MismatchError(
                f"a batch of {size} samples does not divide into {count} micro-batches; pass batches of a multiple of "
                f"{count} (drop the last one of an epoch, or plan with another number of micro-batches)"
            )
        self._use(size // count)
        self._scale, self._has_target = scale or _unscaled, target is not None
        args, kwargs = self._fed(inputs, keywords, count)
        targets = [None] * count if target is None else self._own_targets(target, count)
        self._values.clear()
        if scale is not None and not self._stages[-1].is_last:
            scale(torch.zeros((), device=self.device))  # a scaler makes its number when it is first called
        self._run(self._schedule(count, trains=True), args, kwargs, targets)
        return self._mean_loss(everywhere)

    def _loss(self, leaves: Sequence[Any], target: Any) -> torch.Tensor:
        output = unflattened(self._stages[-1], leaves)
        loss = self._loss_fn(output, target) if self._has_target else self._loss_fn(output)
        if loss.dim():
            raise UsageError(f"loss_fn returned a tensor of shape {tuple(loss.shape)}; it must return the mean loss")
        if not loss.requires_grad and any(isinstance(t, torch.Tensor) and t.requires_grad for t in leaves):
            raise UsageError("loss_fn returned a loss without a gradient; it must not detach it")
        self._values.append(loss.detach())
        return self._scale(loss / self._plan.schedule.num_microbatches)

    def _mean_loss(self, everywhere: bool) -> torch.Tensor | None:
        """Return the mean over the global batch, in the last stage or on every rank."""
        last, mesh = self._all[-1], self._all[-1].plan.mesh
        total = None
        if self._values:
            communicator, (batch, _) = self._stages[-1]._module._state.communicator, self._sizes or (1, None)
            share = 1.0 / mesh.size
            if last.plan.input_output is InputOutput.PER_RANK:
                a, b = balanced_pieces(batch, mesh.size)[communicator.position]
                share = (b - a) / batch
            total = (torch.stack(self._values).mean() * share).reshape(1)
            if mesh.size > 1:
                with named(StepKind.ALL_REDUCE, communicator, "the loss"):
                    communicator.all_reduce(total, tuple(range(len(mesh.axes))))
        if everywhere and self._plan.num_ranks > 1:
            total = torch.zeros(1, dtype=torch.float64, device=self.device) if total is None else total.double()
            with named("broadcast", self._stages[-1]._module._state.communicator, "the loss"):
                dist.broadcast(total, mesh.ranks[0], self._group)
        return None if total is None else total[0]

    def _own_targets(self, target: Any, count: int) -> list[Any]:
        last = self._all[-1]
        if self._rank not in last.plan.mesh.ranks:
            return [None] * count
        assert self._sizes is not None
        batch, (a, b) = self._sizes[0], (0, self._sizes[0])
        if last.plan.input_output is InputOutput.PER_RANK:
            mesh = last.plan.mesh
            a, b = balanced_pieces(batch, mesh.size)[mesh.ranks.index(self._rank)]

        def part(t: Any, m: int) -> Any:
            return t[m * batch + a : m * batch + b].to(self.device) if isinstance(t, torch.Tensor) and t.dim() else t

        return [tree_map(lambda t, m=m: part(t, m), target) for m in range(count)]

    # ---- evaluation

    def evaluate(self, inputs: Sequence[Any], keywords: Mapping[str, Any]) -> Any:
        """Go forward; see ``runtime.pipeline.module.Pipeline.evaluate``."""
        size, batch = self._size_of((*inputs, *keywords.values())), self._plan.microbatch
        training = any(part.training for stage in self._stages for part in stage.submod.modules())
        missing = -size % batch
        if missing and training:
            raise MismatchError(
                f"{size} samples do not divide into micro-batches of {batch}, and modules in training mode look at "
                "whole micro-batches; call eval() first, or pass a multiple"
            )
        last = self._now[-1]
        if missing and any(samples_of(last.layers[i].output) is None for i in last.ids(Output)):
            raise MismatchError(
                f"{size} samples do not divide into micro-batches of {batch}, and an output of the model has none: "
                "it (a loss, say) would count copies of the last sample. Pass a multiple."
            )
        self._use(batch)
        count = (size + missing) // batch
        padded = [_padded(x, missing) for x in inputs], {k: _padded(x, missing) for k, x in keywords.items()}
        args, kwargs = self._fed(*padded, count)
        at_once = max(self._plan.schedule.num_microbatches, MIN_EVALUATED * self._num_positions)
        found: list[Any] = []
        with torch.no_grad():
            for start in range(0, count, at_once):
                part = slice(start, min(start + at_once, count))
                here = part.stop - part.start
                found += self._run(self._schedule(here, trains=False), args[part], kwargs[part], [None] * here)
        return self._merged(found, size) if found else None

    def _merged(self, chunks: list[tuple[Any, ...]], size: int) -> Any:
        """Return the whole output, of this rank's part for every micro-batch."""
        layers = iter(self._now[-1].ids(Output))
        leaves = [
            self._joined(next(layers), parts, size) if isinstance(parts[0], torch.Tensor) else parts[0]
            for parts in zip(*chunks, strict=True)
        ]
        return unflattened(self._stages[-1], leaves)

    def _joined(self, layer: LayerId, parts: Sequence[torch.Tensor], size: int) -> torch.Tensor:
        """Return one of the outputs, without samples that were filled up; the mean of one that has none."""
        assert self._sizes is not None
        last, batch = self._now[-1], self._sizes[0]
        layout, samples = last.layout(layer, batch), samples_of(last.layers[layer].output)
        regions = [layout.region(p) for p in range(layout.mesh.size)]
        whole = [self._gathered(part, regions, layout.shape) for part in parts]
        if samples is None:
            return torch.stack(whole).mean(0)
        dim, rows = samples
        return torch.cat(whole, dim).narrow(dim, 0, size * rows)

    def _gathered(self, part: torch.Tensor, regions: Sequence[Region], shape: tuple[int, ...]) -> torch.Tensor:
        if all(region.shape == shape for region in regions):
            return part
        communicator = self._stages[-1]._module._state.communicator
        counts = [region.volume for region in regions]
        axes = tuple(range(len(communicator.mesh.axes)))
        with named(StepKind.ALL_GATHER, communicator, "the output"):
            got = communicator.all_gather(part.contiguous().view(-1), counts, axes).split(counts)
        whole, frame = part.new_empty(shape), Region((0,) * len(shape), shape)
        for region, numbers in zip(regions, got, strict=True):
            whole[region.slices_in(frame)] = numbers.view(region.shape)
        return whole

    # ---- both

    @property
    def _now(self) -> Sequence[StagePlan]:
        """All stages in the mode of this moment."""
        return self._all if self._stages[0]._module.training else self._evaluated

    def _size_of(self, passed: Iterable[Any]) -> int:
        """Return how many samples a batch has."""
        sizes = {x.shape[0] for x in tree_leaves(list(passed)) if isinstance(x, torch.Tensor) and x.dim()}
        if len(sizes) > 1:
            raise MismatchError(f"inputs and targets have {sorted(sizes)} samples; all need those of the whole batch")
        return int(sizes.pop()) if sizes else self._plan.batch

    def _use(self, batch: int) -> None:
        """Get ready for micro-batches of so many samples.

        Raises:
            MismatchError: a rank would get none.
        """
        if batch < self._smallest:
            raise MismatchError(
                f"micro-batches of {batch} samples leave a rank without any; the plan needs at least {self._smallest} "
                f"({self._smallest * self._plan.schedule.num_microbatches} for a batch)"
            )
        stages = self._now
        types = stages[0].casting.types(self.device.type, self.dtype)
        if self._sizes == (batch, (stages is self._all, types)):
            return
        self._sizes = batch, (stages is self._all, types)
        for stage in self._stages:
            index = stage.stage_index
            stage._module.samples = batch
            stage.receives = () if stage.is_first else receives(stages, index, self._rank, batch, types)
            stage.sends = () if stage.is_last else sends(stages, index, self._rank, batch, types)

    def _fed(
        self, inputs: Sequence[Any], keywords: Mapping[str, Any], count: int
    ) -> tuple[list[tuple[Any, ...]], list[dict[str, Any]]]:
        """Return what this rank passes to the first stage with every micro-batch."""
        first = self._stages[0]
        if not first.is_first:
            return [()] * count, [{}] * count
        assert self._sizes is not None
        stage, batch = self._now[0], self._sizes[0]
        known = list(map(str, stage.ids(Input)))
        if unknown := sorted(set(keywords) - set(known)):
            raise UsageError(f"the model has the inputs {known}, and none of the name {', '.join(unknown)}")
        names = [n for n in known if n not in keywords]
        if len(inputs) != len(names):
            raise UsageError(f"the model has the inputs {names}, and {len(inputs)} were given on rank {self._rank}")
        position = stage.plan.mesh.ranks.index(self._rank)

        def part(name: str, x: Any, m: int) -> Any:
            if not isinstance(x, torch.Tensor):
                return x
            region = next(stage.layout(i, batch) for i in stage.ids(Input) if i == name).region(position)
            own = x.detach()[m * batch : (m + 1) * batch] if region.shape else x
            frame = Region((0,) * own.dim(), tuple(own.shape))
            return own[region.slices_in(frame)].to(self.device)

        args = [tuple(part(n, x, m) for n, x in zip(names, inputs, strict=True)) for m in range(count)]
        return args, [{n: part(n, x, m) for n, x in keywords.items()} for m in range(count)]

    def _schedule(self, count: int, *, trains: bool) -> TorchSchedule:
        if (count, trains) not in self._schedules:
            order = self._orders(count) if trains else self._forward_orders(count)
            self._schedules[count, trains] = TorchSchedule(self._stages, order, count, self._loss if trains else None)
        return self._schedules[count, trains]

    def _orders(self, count: int) -> tuple[Order, ...]:
        return orders(self._kind, len(self._all), self._num_positions, count)

    def _forward_orders(self, count: int) -> tuple[Order, ...]:
        return tuple(
            tuple(
                Action(ActionKind.FORWARD, stage, m)
                for stage in range(position, len(self._all), self._num_positions)
                for m in range(count)
            )
            for position in range(self._num_positions)
        )

    def _run(self, schedule: TorchSchedule, args: Any, kwargs: Any, targets: Any) -> list[Any]:
        try:
            found = schedule.run(args, kwargs, targets)
            self._post.flush()
        except RuntimeError as error:  # torch wraps what a stage raises
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, LayerwiseError):
                cause = cause.__cause__
            if cause is None:
                raise
            raise cause from error
        return found


def _unscaled(loss: torch.Tensor) -> torch.Tensor:
    return loss


def _padded(x: Any, missing: int) -> Any:
    """Return a tensor with its last sample repeated."""
    if not missing or not isinstance(x, torch.Tensor) or not x.dim():
        return x
    return torch.cat([x, x[-1:].expand(missing, *x.shape[1:])])
