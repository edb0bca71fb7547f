"""`pipelined`: what a training script calls on one rank of a pipeline."""

import copy
from collections.abc import Sequence
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import nn

from planner.errors import UsageError
from planner.ir.schedule import ScheduleKind
from planner.plan.schema import Plan
from runtime.agreement import start_together
from runtime.comm.communicator import TorchCommunicator
from runtime.pipeline.build import StageModule, StagePlan, build, cut, everyone
from runtime.pipeline.cycles import CyclePipeline, OptimizerFactory, cycle_pipeline
from runtime.pipeline.holding import PipelinedStages, whole_shapes
from runtime.pipeline.synchronous import LossFunction, Scale, Synchronous


@overload
def pipelined(model: nn.Module, plan: Plan, loss_fn: LossFunction, *, timeout_s: float = 60.0) -> "Pipeline": ...


@overload
def pipelined(
    model: nn.Module,
    plan: Plan,
    loss_fn: LossFunction,
    *,
    timeout_s: float = 60.0,
    optimizer: OptimizerFactory,
    pipelined_steps: int | None = None,
) -> CyclePipeline: ...


def pipelined(
    model: nn.Module,
    plan: Plan,
    loss_fn: LossFunction,
    *,
    timeout_s: float = 60.0,
    optimizer: OptimizerFactory | None = None,
    pipelined_steps: int | None = None,
) -> "Pipeline | CyclePipeline":
    """Return this rank's stages of a model, to be trained by the schedule of the plan.

    Every rank calls it with the same plan. Parameters and buffers of rank 0 are broadcast first. The model's memory is
    shared; delete the model afterwards, so that the stages of other ranks are freed here.

    Args:
        model: the planned network with its weights, on the device that this rank uses.
        plan: of several stages, or of one whose batch is divided into micro-batches.
        loss_fn: from the output of the model, and the target where ``step`` gets one, to a scalar: the mean loss over
            the samples that it is given.
        timeout_s: after which a message or collective with a missing peer fails.
        optimizer: for the schedules in cycles (``stale``, ``pipedream``), and for no other: makes the optimizer of this
            rank's parameters, such as ``functools.partial(torch.optim.SGD, lr=0.1)``; ``step`` calls it.
        pipelined_steps: of these schedules: later batches are not pipelined (hybrid). None: all are.

    Raises:
        UsageError: torch.distributed is not initialised, weights are on the meta device, the plan is for another number
            of ranks, or its schedule needs an optimizer or none.
        MismatchError: the plan was made for another model; or ranks have different plans, models or code.
        RunError: a rank did not come.
    """

    def check() -> tuple[StagePlan, ...]:
        _refuse_unfit(plan, optimizer)
        return cut(model, plan) if optimizer is None else ()

    stages = start_together("pipelined", model, plan, check)
    if optimizer is not None:
        return cycle_pipeline(model, plan, loss_fn, optimizer, pipelined_steps=pipelined_steps, timeout_s=timeout_s)
    return assembled(model, plan, stages, build(model, stages, plan, dist.get_rank(), timeout_s), loss_fn, timeout_s)


def _refuse_unfit(plan: Plan, optimizer: OptimizerFactory | None) -> None:
    """Check that a plan's schedule has the optimizer that it needs, and can have its sharded parameters."""
    kind = ScheduleKind(plan.schedule.kind)
    if kind.is_synchronous != (optimizer is None):
        does, advice = "is called by the training script, behind step()", "Pass no optimizer."
        if not kind.is_synchronous:
            does, advice = "steps in every cycle", "Pass one: optimizer=functools.partial(torch.optim.SGD, lr=0.1)."
        raise UsageError(f"with schedule {kind.value!r} the optimizer {does}. {advice}")
    if kind.splits_backward and any(stage.parameter_sharding != "none" for stage in plan.stages):
        raise UsageError(
            f"schedule {kind.value!r} computes gradients of weights where no hook sees them, which sharded parameters "
            "need. Use schedule '1f1b' or 'interleaved', or parameter_sharding 'none'."
        )


def assembled(
    model: nn.Module,
    plan: Plan,
    stages: Sequence[StagePlan],
    modules: Sequence[StageModule],
    loss_fn: LossFunction,
    timeout_s: float,
) -> "Pipeline":
    """Return the pipeline of this rank's modules; every rank must call it. Arguments as of ``pipelined``, ``build``."""
    floating = [p for p in (*model.parameters(), *model.buffers()) if p.is_floating_point()]
    dtype = floating[0].dtype if floating else torch.float32
    device = floating[0].device if floating else torch.device("cpu")
    world = everyone(plan, timeout_s)
    found = Pipeline(modules, plan, world, whole_shapes(model))
    found._steps = Synchronous(plan, stages, modules, group_of(world), device, dtype, loss_fn)
    return found


def group_of(world: TorchCommunicator) -> dist.ProcessGroup:
    """Return the process group of all ranks of a plan for messages between stages."""
    if not world.mesh.axes:
        return dist.distributed_c10d._get_default_group()
    return world._groups.blocking((0,))


class Pipeline(PipelinedStages):
    """This rank's stages, trained by a synchronous schedule; made by ``runtime.pipelined``.

    After ``step`` the gradients are those of the mean loss over the global batch, added to those that were there. Batch
    norm takes its statistics over each micro-batch, as in GPipe; with one micro-batch they are those of one device.
    """

    _steps: Synchronous

    def __deepcopy__(self, memo: dict[int, Any]) -> "Pipeline":
        """Return stages with parameters and buffers of their own, which talk over the same process groups."""
        modules = [copy.deepcopy(stage, memo) for stage in self.held_stages if isinstance(stage, StageModule)]
        found = Pipeline(modules, self.plan, self.world, self.whole)
        memo[id(self)] = found
        found._steps = self._steps.copied(modules)
        return found

    def step(
        self,
        *inputs: Any,
        target: Any = None,
        scale: Scale | None = None,
        everywhere: bool = False,
        **keywords: Any,
    ) -> torch.Tensor | None:
        """Do forward and backward of one batch, in micro-batches.

        Every rank must call it. Inputs are read in the first stage and targets in the last one; other ranks may pass
        the same or nothing. A rank cuts its own samples out of every micro-batch. Without anything passed, a rank takes
        the batch to have the planned size.

        Args:
            inputs: of the model, with the samples of the whole batch in their first dimension.
            target: a tensor, or tensors in tuples, lists and dicts, likewise. Without one, ``loss_fn`` gets the output.
            scale: applied to the loss in front of backward, such as ``scale`` of a ``runtime.GradScaler``.
            everywhere: return the loss on every rank.
            keywords: inputs of the model that are passed by name.

        Returns:
            The mean loss over the global batch, on the ranks of the last stage or on all; else None.

        Raises:
            MismatchError: the batch does not divide into micro-batches, or is too small for the plan.
            RunError: a rank died or hangs; with rank, stage and what was on its way.
        """
        return self._steps.step(inputs, keywords, target, scale, everywhere)

    def evaluate(self, *inputs: Any, **keywords: Any) -> Any:
        """Return the output of the model for any number of samples, on the ranks of the last stage; else None.

        Every rank must call it, with the same inputs: those of the first stage read them, the others count samples.
        Call ``eval()`` first. The last micro-batch is filled up with copies of its last sample, which are dropped.

        Raises:
            MismatchError: modules are in training mode, and the samples do not divide into micro-batches.
            RunError: as of ``step``.
        """
        return self._steps.evaluate(inputs, keywords)

    def forward(self, *_args: Any, **_kwargs: Any) -> Any:
        """Raise: which stages run depends on the rank."""
        raise UsageError("a pipeline has no forward(): call step(...) to train, and evaluate(...) for the output")
