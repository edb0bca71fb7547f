"""Runs the steps of ``planner.ir.transfer`` on one rank's tensor, forward and backward."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch

from planner.errors import MismatchError, RunError
from planner.ir.layout import Cut, Layout
from planner.ir.region import Region
from planner.ir.transfer import Step, StepKind, steps, transfers
from runtime.communicator import Communicator, members_of

Run = Callable[[torch.Tensor], torch.Tensor]

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
        try:
            return run(x)
        except RuntimeError as error:
            raise RunError(
                f"rank {communicator.mesh.ranks[communicator.position]}: {step.kind} of {name} failed: {error}. "
                "If a peer died or hangs, see its own message."
            ) from error

    return guarded


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
    result = x.new_zeros(shape)
    result[inside] = x
    return result


def _all_reduced(x: torch.Tensor, step: Step, communicator: Communicator) -> torch.Tensor:
    result = x.clone(memory_format=torch.contiguous_format)
    communicator.all_reduce(result.view(-1), step.axes)
    return result


def _reduce_scatter(step: Step, source: Region, communicator: Communicator) -> Run:
    members = members_of(communicator.mesh, communicator.position, step.axes)
    regions = [step.target.region(m) for m in members]
    parts = [region.slices_in(source) for region in regions]
    counts = [region.volume for region in regions]
    shape = step.target.region(communicator.position).shape

    def run(x: torch.Tensor) -> torch.Tensor:
        packed = torch.cat([x[part].reshape(-1) for part in parts])
        return communicator.reduce_scatter(packed, counts, step.axes).view(shape)

    return run


def _all_gather(step: Step, communicator: Communicator) -> Run:
    members = members_of(communicator.mesh, communicator.position, step.axes)
    shapes = [step.source.region(m).shape for m in members]
    counts = [math.prod(shape) for shape in shapes]
    whole = step.target.region(communicator.position).shape

    def run(x: torch.Tensor) -> torch.Tensor:
        found = communicator.all_gather(x.reshape(-1), counts, step.axes)
        if math.prod(whole[: step.dim]) == 1:
            return found.view(whole)
        return torch.cat([p.view(s) for p, s in zip(found.split(counts), shapes, strict=True)], step.dim)

    return run


def _exchange(step: Step, communicator: Communicator) -> Run:
    """Pack the regions that others need of the own piece, exchange, add or copy what comes."""
    position = communicator.position
    members = members_of(communicator.mesh, position, step.axes)
    own, need = step.source.region(position), step.target.region(position)
    listed = [t for t in _listed(step.source, step.target) if t.source in members and t.target in members]
    outgoing = [[t.region for t in listed if t.source == position and t.target == m] for m in members]
    incoming = [[t.region for t in listed if t.target == position and t.source == m] for m in members]
    sent = [region.slices_in(own) for regions in outgoing for region in regions]
    placed = [(region.slices_in(need), region.shape) for regions in incoming for region in regions]
    send_counts = [sum(r.volume for r in regions) for regions in outgoing]
    receive_counts = [sum(r.volume for r in regions) for regions in incoming]
    sizes = [math.prod(shape) for _, shape in placed]

    def run(x: torch.Tensor) -> torch.Tensor:
        packed = torch.cat([x[part].reshape(-1) for part in sent]) if sent else x.new_empty(0)
        found = communicator.exchange(packed, send_counts, receive_counts, step.axes)
        result = x.new_zeros(need.shape)
        for (part, shape), piece in zip(placed, found.split(sizes), strict=True):
            result[part] += piece.view(shape)
        return result

    return run


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
    _compiled: dict[Batch, tuple[tuple[Run, ...], tuple[Run, ...]]] = field(default_factory=dict)

    @functools.cached_property
    def is_trivial(self) -> bool:
        """Whether nothing is to do in either direction, whatever the batch: both sides are cut alike."""
        return not steps(self.source, self.target) and not steps(self.target.gradient, self.source.gradient)

    def compiled(self, batch: Batch, communicator: Communicator) -> tuple[tuple[Run, ...], tuple[Run, ...]]:
        """Return what to run forward and backward.

        Raises:
            MismatchError: the batch is so small that a rank would get nothing.
        """
        if batch not in self._compiled:
            source, target = self._resized(self.source, batch), self._resized(self.target, batch)
            if source.has_empty_piece() or target.has_empty_piece():
                raise MismatchError(
                    f"a batch of {batch.size} is too small for this plan: {self.name} would leave a rank without "
                    "samples. Pass a larger batch, or plan for this one."
                )
            if len(self._compiled) >= MAX_BATCH_SIZES:
                self._compiled.clear()
            self._compiled[batch] = (
                compile_steps(source, target, communicator, self.name),
                compile_steps(target.gradient, source.gradient, communicator, f"the gradient of {self.name}"),
            )
        return self._compiled[batch]

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


class Convert(torch.autograd.Function):
    """Runs compiled steps forward and their adjoint backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, forward: tuple[Run, ...], backward: tuple[Run, ...]) -> torch.Tensor:
        ctx.backward_steps = backward
        y = x
        for run in forward:
            y = run(y)
        return y.view_as(y) if y is x else y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (gradient,) = gradients
        for run in ctx.backward_steps:
            gradient = run(gradient)
        return gradient, None, None


class ScaleGradient(torch.autograd.Function):
    """The identity, whose backward multiplies by a number that is asked for only then."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factor: Callable[[], float]) -> torch.Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        factor = ctx.factor()
        return gradients[0] if factor == 1.0 else gradients[0] * factor, None
