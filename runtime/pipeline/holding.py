"""The parts of a model that a rank holds, stages of a pipeline among others, as one module under the user's names."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import nn

from planner.errors import MismatchError, UsageError
from planner.frontend.parameters import parameter_names
from planner.ir.transfer import StepKind
from planner.plan.schema import Plan
from runtime.comm.communicator import Communicator
from runtime.comm.exchange import named
from runtime.module import ParallelModule
from runtime.parameters.clipping import clip_grad_norm


class Whole(NamedTuple):
    """A tensor of the state dict of the whole model: the first of its names, and its shape."""

    first: str
    shape: tuple[int, ...]


def whole_shapes(model: nn.Module) -> dict[str, Whole]:
    """Return the tensors of the state dict of a model by every name that they have."""
    names = parameter_names(model)
    kept = model.state_dict(keep_vars=True)
    return {n: Whole(names.get(id(t), n), tuple(t.shape)) for n, t in kept.items() if isinstance(t, torch.Tensor)}


class Steps(Protocol):
    """What trains the stages.

    Attributes:
        dtype: of tensors that the plan knows as float32.
        device: of this rank.
    """

    dtype: torch.dtype
    device: torch.device


class HeldStages(nn.Module):
    """The stages of a pipelined model that this rank holds, under the user's names.

    ``state_dict()``, ``named_parameters()`` and the like have what this rank holds; other ranks hold the rest.

    Args:
        modules: of this rank, in order.
        plan: of all stages.
        world: all ranks of the plan.
        whole: of ``whole_shapes``.
    """

    def __init__(
        self, modules: Sequence[ParallelModule], plan: Plan, world: Communicator, whole: Mapping[str, Whole]
    ) -> None:
        super().__init__()
        self.stages = nn.ModuleList(modules)
        self.plan, self.world, self.whole = plan, world, dict(whole)
        self.training = any(module.training for module in modules)

    @property
    def progress(self) -> int | None:
        """What a checkpoint keeps of how far training is, beside the number that the script gives it; here nothing."""
        return None

    def go_on(self, progress: int) -> None:
        """Go on from where ``progress`` was saved."""

    @property
    def held_stages(self) -> tuple[ParallelModule, ...]:
        """The stages of this rank, in order."""
        return tuple(self.stages)  # type: ignore[arg-type]  # as put in

    def require_settled(self, what: str) -> None:
        """Refuse to read or write whole tensors at a time when the stages do not belong together; never, here."""

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters of all stages of this rank, under the user's names."""
        for stage in self.held_stages:
            yield from stage.named_parameters(prefix, recurse, remove_duplicate)

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield likewise the buffers."""
        for stage in self.held_stages:
            yield from stage.named_buffers(prefix, recurse, remove_duplicate)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]  # torch overloads it
        """Return this rank's pieces under the user's names."""
        found: dict[str, Any] = {}
        for stage in self.held_stages:
            found.update(stage.state_dict(*args, **kwargs))
        return found

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Overwrite this rank's pieces; whole tensors and other ranks' pieces go through ``runtime.checkpoint``."""
        own = self.state_dict()
        if strict and own.keys() != state_dict.keys():
            differing = sorted(own.keys() ^ state_dict.keys())
            raise MismatchError(f"the state dict is not of this rank's stages; the names {differing[:20]} differ")
        for stage in self.held_stages:
            names = stage.state_dict().keys()
            stage.load_state_dict({k: v for k, v in state_dict.items() if k in names}, strict, assign)

    def train(self, mode: bool = True) -> Self:
        """Set the mode of all stages."""
        self.training = mode
        for stage in self.held_stages:
            stage.train(mode)
        return self

    def clip_grad_norm_(
        self,
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
        foreach: bool | None = None,
    ) -> torch.Tensor:
        """Scale the gradients so that their norm over all stages is at most ``max_norm``; as of ``ParallelModule``.

        Every rank of the plan must call it.
        """
        pairs = [(p, stage._copies(name)) for stage in self.held_stages for name, p in stage.named_parameters()]
        return clip_grad_norm(pairs, self._gathered, max_norm, norm_type, error_if_nonfinite, foreach)

    def _gathered(self, number: torch.Tensor) -> torch.Tensor:
        """Return a scalar of every rank."""
        size = self.world.mesh.size
        with named(StepKind.ALL_GATHER, self.world, "the norm of the gradients"):
            return self.world.all_gather(number.view(1), [1] * size, (0,)) if size > 1 else number.view(1)

    def add_over_ranks(self, numbers: torch.Tensor) -> None:
        """Add a contiguous tensor over all ranks of the plan, in place; every rank must call it."""
        if self.world.mesh.size > 1:
            with named(StepKind.ALL_REDUCE, self.world, "numbers of the whole model"):
                self.world.all_reduce(numbers, (0,))


class PipelinedStages(HeldStages):
    """The stages of a pipeline, which a rank trains by a schedule."""

    _steps: Steps

    @property
    def device(self) -> torch.device:
        """Of this rank."""
        return self._steps.device

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Convert tensors (``to``, ``double``), and with them what is sent between stages.

        Raises:
            UsageError: to another device, with which nobody has made process groups.
        """
        self.require_settled("it is converted")
        example = fn(torch.empty(1, dtype=self._steps.dtype, device=self.device))
        if example.device != self.device:
            raise UsageError(
                f"a pipeline stays on the device that it was built on ({self.device}), not {example.device}: move the "
                "model before runtime.pipelined"
            )
        super()._apply(fn, recurse)
        self._steps.dtype = example.dtype
        return self
