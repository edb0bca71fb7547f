"""Runs the steps of ``planner.ir.transfer`` on one rank's tensor, forward and backward."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch

from planner.errors import MismatchError, RunError, UsageError
from planner.ir.layout import Cut, Layout
from planner.ir.region import Region
from planner.ir.transfer import Step, StepKind, steps, transfers
from runtime.comm.communicator import Axes, Communicator, members_of
from runtime.comm.failures import peer_failed
from runtime.comm.packing import Exchange, format_of, new_like

Run = Callable[[torch.Tensor], torch.Tensor]
Steps = tuple[tuple[Run, ...], tuple[Run, ...]]
"""Compiled: what to run forward and backward."""

MAX_BATCH_SIZES: Final = 32
"""For which a conversion stays compiled."""


def compile_steps(source: Layout, target: Layout, communicator: Communicator, name: str) -> tuple[Run, ...]:
    """Return what this rank has to do to turn its piece in one layout into its piece in another."""
    return tuple(_guarded(_compile(step, communicator), step, communicator, name) for step in steps(source, target))


def _guarded(run: Run, step: Step, communicator: Communicator, name: str) -> Run:
    """Name rank, layer and collective where a collective fails."""
    if not step.kind.communicates:
        return run

    @functools.wraps(run)
    def guarded(x: torch.Tensor) -> torch.Tensor:
        try:  # not ``named``: a generator to enter in every step
            return run(x)
        except RuntimeError as error:
            raise failure(error, step.kind, communicator, name) from error

    return guarded


@contextlib.contextmanager
def named(kind: str, communicator: Communicator, name: str) -> Iterator[None]:
    """Name rank, layer and collective where a collective fails in this context."""
    try:
        yield
    except RuntimeError as error:
        raise failure(error, kind, communicator, name) from error


def failure(error: RuntimeError, kind: str, communicator: Communicator, name: str) -> RunError:
    """Return an error that names rank, layer and collective."""
    return peer_failed(communicator.mesh.ranks[communicator.position], f"{kind} of {name}", error)


def add_up(addends: torch.Tensor, axes: Axes, communicator: Communicator, name: str) -> None:
    """Add contiguous tensors over the ranks along some axes, in place; a failure names what they are."""
    try:  # not ``named``: a generator to enter in every step
        communicator.all_reduce(addends.view(-1), axes)
    except RuntimeError as error:
        raise failure(error, StepKind.ALL_REDUCE, communicator, name) from error


def _compile(step: Step, communicator: Communicator) -> Run:  # noqa: PLR0911  # a table of kinds
    position, mesh = communicator.position, communicator.mesh
    source, target = step.source.region(position), step.target.region(position)
    match step.kind:
        case StepKind.SLICE:
            part = target.slices_in(source)
            return lambda x: x[part].clone()
        case StepKind.PAD:
            inside = source.slices_in(target)
            return lambda x: _padded(x, target.shape, inside)
        case StepKind.MASK:
            coordinates = mesh.coordinates(position)
            first = all(coordinates[a] == 0 for a in step.axes)
            return (lambda x: x) if first else torch.zeros_like
        case StepKind.ALL_REDUCE:
            return lambda x: _all_reduced(x, step, communicator)
        case StepKind.REDUCE_SCATTER:
            return _reduce_scatter(step, source, communicator)
        case StepKind.ALL_GATHER:
            return _all_gather(step, communicator)
        case _:
            return _exchange(step, communicator)


def _padded(x: torch.Tensor, shape: tuple[int, ...], inside: tuple[slice, ...]) -> torch.Tensor:
    result = new_like(x, shape).zero_()
    result[inside] = x
    return result


def _in_format_of(x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
    """Return a result in the memory format of what it was made from.

    Messages have the elements in the order of their indices: no rank needs to know in which format another has them.
    """
    return result.contiguous(memory_format=format_of(x)) if result.dim() == x.dim() else result


def _all_reduced(x: torch.Tensor, step: Step, communicator: Communicator) -> torch.Tensor:
    result = x.clone(memory_format=torch.contiguous_format)
    communicator.all_reduce(result.view(-1), step.axes)
    return _in_format_of(x, result)


def _reduce_scatter(step: Step, source: Region, communicator: Communicator) -> Run:
    members = members_of(communicator.mesh, communicator.position, step.axes)
    regions = [step.target.region(m) for m in members]
    parts = [region.slices_in(source) for region in regions]
    counts = [region.volume for region in regions]
    shape = step.target.region(communicator.position).shape

    def run(x: torch.Tensor) -> torch.Tensor:
        packed = torch.cat([x[part].reshape(-1) for part in parts])
        return _in_format_of(x, communicator.reduce_scatter(packed, counts, step.axes).view(shape))

    return run


def _all_gather(step: Step, communicator: Communicator) -> Run:
    members = members_of(communicator.mesh, communicator.position, step.axes)
    shapes = [step.source.region(m).shape for m in members]
    counts = [math.prod(shape) for shape in shapes]
    whole = step.target.region(communicator.position).shape

    def run(x: torch.Tensor) -> torch.Tensor:
        found = communicator.all_gather(x.contiguous().view(-1), counts, step.axes)
        if math.prod(whole[: step.dim]) == 1:
            return _in_format_of(x, found.view(whole))
        pieces = [p.view(s) for p, s in zip(found.split(counts), shapes, strict=True)]
        return torch.cat(pieces, step.dim, out=None if x.is_contiguous() else new_like(x, whole))

    return run


def _exchange(step: Step, communicator: Communicator) -> Run:
    found = exchange_of(step, communicator)
    return lambda x: found.run(x, communicator)


def exchange_of(step: Step, communicator: Communicator) -> Exchange:
    """Return this rank's part in an exchange."""
    return Exchange.of(step, _listed(step.source, step.target), communicator)


_listed = functools.lru_cache(maxsize=256)(transfers)


@dataclass(frozen=True)
class Batch:
    """The global batch of a step.

    Attributes:
        size: samples of all ranks together.
        pieces: samples of every rank, where they are not the balanced pieces; else None.
    """

    size: int
    pieces: tuple[int, ...] | None = None


@dataclass
class Conversion:
    """Both directions between two layouts, compiled for each batch size that occurs.

    Attributes:
        source, target: layouts for the planned batch.
        name: what is converted, for messages.
        samples: the dimension that holds the samples and its rows for each sample, so that the layouts
            follow the batch; None where the tensor has no samples.
    """

    source: Layout
    target: Layout
    name: str
    samples: tuple[int, int] | None
    _compiled: dict[Batch, Steps] = field(default_factory=dict)
    _shares: dict[tuple[bool, Batch], float] = field(default_factory=dict)

    @functools.cached_property
    def is_trivial(self) -> bool:
        """Whether nothing is to do in either direction, whatever the batch: both sides are cut alike."""
        return not steps(self.source, self.target) and not steps(self.target.gradient, self.source.gradient)

    @functools.cached_property
    def summed_axes(self) -> Axes:
        """Axes over which addends are summed, where that is all, and the sum's gradient that of every addend."""
        there, back = steps(self.source, self.target), steps(self.target.gradient, self.source.gradient)
        return there[0].axes if [step.kind for step in there] == [StepKind.ALL_REDUCE] and not back else ()

    def __deepcopy__(self, _memo: dict[int, Any]) -> "Conversion":
        return self  # it knows nothing of tensors

    def compiled(self, batch: Batch, communicator: Communicator) -> Steps:
        """Return what to run forward and backward.

        Raises:
            MismatchError: the batch is so small that a rank would get nothing.
        """
        found = self._compiled.get(batch)
        if found is None:
            source, target = self.layouts(batch)
            if len(self._compiled) >= MAX_BATCH_SIZES:
                self._compiled.clear()
            found = self._compiled[batch] = (
                compile_steps(source, target, communicator, self.name),
                compile_steps(target.gradient, source.gradient, communicator, f"the gradient of {self.name}"),
            )
        return found

    def layouts(self, batch: Batch) -> tuple[Layout, Layout]:
        """Return source and target for a batch.

        Raises:
            MismatchError: the batch is so small that a rank would get nothing.
        """
        source, target = self._resized(self.source, batch), self._resized(self.target, batch)
        if source.has_empty_piece() or target.has_empty_piece():
            raise MismatchError(
                f"a batch of {batch.size} is too small for this plan: {self.name} would leave a rank without "
                "samples. Pass a larger batch, or plan for this one."
            )
        return source, target

    def share(self, side: Layout, batch: Batch, communicator: Communicator) -> float:
        """Return which share of the elements this rank has on a side, source or target; 1 where it has them all."""
        key = (side is self.source, batch)
        found = self._shares.get(key)
        if found is None:
            layout = self._resized(side, batch)
            if len(self._shares) >= 2 * MAX_BATCH_SIZES:
                self._shares.clear()
            found = self._shares[key] = layout.region(communicator.position).volume / math.prod(layout.shape)
        return found

    def _resized(self, layout: Layout, batch: Batch) -> Layout:
        """Return a layout for another batch; where every axis cuts the samples, pieces are the users' own."""
        if self.samples is None:
            return layout
        dim, rows = self.samples
        layout = layout.with_size(dim, batch.size * rows)
        if batch.pieces is not None:
            sizes = Cut(sizes=tuple(n * rows for n in batch.pieces))
            layout = replace(layout, cuts=(*layout.cuts[:dim], sizes, *layout.cuts[dim + 1 :]))
        return layout


def refuse_second_derivative() -> None:
    """Raise in a backward pass that is to be differentiated itself."""
    if torch.is_grad_enabled():
        raise UsageError(
            "backward(create_graph=True) through a parallel module: there is no backward pass of its backward pass, as "
            "ranks weigh what enters it differently from a loss. Compute such penalties on the unparallelized model."
        )


Factors = Callable[[], tuple[float, float]]
"""Of the gradients of source and target; asked for in the backward pass."""


class _Convert(torch.autograd.Function):
    """Runs compiled steps forward and their adjoint backward; gradients may be weighed."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, compiled: Steps, factors: Factors | None) -> torch.Tensor:
        forward, ctx.backward_steps = compiled
        ctx.factors = factors
        y = x
        for run in forward:
            y = run(y)
        return y.view_as(y) if y is x else y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        refuse_second_derivative()
        (gradient,) = gradients
        of_source, of_target = (1.0, 1.0) if ctx.factors is None else ctx.factors()
        if of_target != 1.0:
            gradient = gradient * of_target
        for run in ctx.backward_steps:
            gradient = run(gradient)
        return gradient if of_source == 1.0 else gradient * of_source, None, None


def converted(x: torch.Tensor, compiled: Steps, factors: Factors | None) -> torch.Tensor:
    """Return a tensor behind compiled steps; without a node of autograd where no gradient is asked for."""
    if not (x.requires_grad and torch.is_grad_enabled()):
        for run in compiled[0]:
            x = run(x)
        return x
    found: torch.Tensor = _Convert.apply(x, compiled, factors)
    return found


class ScaleGradients(torch.autograd.Function):
    """The identity of tensors, whose backward multiplies their gradients by numbers."""

    @staticmethod
    def forward(ctx: Any, factors: tuple[float, ...], *tensors: torch.Tensor) -> Any:
        ctx.factors = factors
        ctx.set_materialize_grads(False)
        found = tuple(x.view_as(x) for x in tensors)
        return found if len(found) > 1 else found[0]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        refuse_second_derivative()
        pairs = zip(gradients, ctx.factors, strict=True)
        return None, *(g if g is None or factor == 1.0 else g * factor for g, factor in pairs)
