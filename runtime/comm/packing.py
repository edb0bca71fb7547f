"""One exchange on one rank: which regions of its piece go to whom, and where what comes is put.

Border rows are few beside the piece, so nothing but them is copied into the message, and what a rank
keeps is left where it is until somebody says where it goes.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from planner.ir.region import Region
from planner.ir.transfer import Step, Transfer
from runtime.comm.communicator import Axes, Communicator, members_of

Narrows = tuple[tuple[int, int, int], ...]
"""Of every dimension that is cut: itself, the first position, how many."""


@functools.lru_cache(maxsize=1 << 14)
def narrows_of(region: Region, frame: Region) -> Narrows:
    """Return where a region lies in a tensor that holds a frame, for ``narrowed``."""
    pairs = enumerate(zip(region.start, region.stop, frame.start, frame.stop, strict=True))
    return tuple((dim, a - c, b - a) for dim, (a, b, c, d) in pairs if (a, b) != (c, d))


def narrowed(x: torch.Tensor, narrows: Narrows) -> torch.Tensor:
    """Return a part of a tensor, as a view."""
    for dim, start, length in narrows:
        x = x.narrow(dim, start, length)
    return x


def new_like(x: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Return a tensor of another shape, not filled, in the memory format of the given one."""
    format_ = format_of(x) if len(shape) == x.dim() else torch.contiguous_format
    return torch.empty(tuple(shape), dtype=x.dtype, device=x.device, memory_format=format_)


def format_of(x: torch.Tensor) -> torch.memory_format:
    """Return the memory format of a tensor: channels last where sizes and strides say so, else contiguous."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if last is None or not x.is_contiguous(memory_format=last):
        return torch.contiguous_format
    is_last = x.stride(1) == 1 and math.prod(x.shape[2:]) > 1  # of one channel, or one position, it may be both
    return last if is_last else torch.contiguous_format


@dataclass(frozen=True)
class Exchange:
    """What one rank does in one exchange.

    Attributes:
        axes: along which ranks talk.
        own: region that the rank has before.
        need: region that it has after.
        kept: what of its own region it needs itself; None where that is nothing.
        incoming: regions that come, in the order in which they do.
        outgoing: regions that go to others, in the order in which they do.
        has_addends: what comes, or is kept, overlaps: it is to be added up.
    """

    axes: Axes
    own: Region
    need: Region
    kept: Region | None
    incoming: tuple[Region, ...]
    outgoing: tuple[Region, ...]
    has_addends: bool
    _send_counts: tuple[int, ...]
    _receive_counts: tuple[int, ...]

    @staticmethod
    def of(step: Step, listed: Sequence[Transfer], communicator: Communicator) -> "Exchange":
        """Return this rank's part in a step; ``listed`` are its copies, see ``planner.ir.transfer.transfers``."""
        position = communicator.position
        members = members_of(communicator.mesh, position, step.axes)
        own, need = step.source.region(position), step.target.region(position)
        listed = [t for t in listed if t.source in members and t.target in members]
        outgoing = [[t.region for t in listed if t.source == position != m and t.target == m] for m in members]
        incoming = [[t.region for t in listed if t.target == position != m and t.source == m] for m in members]
        kept = own.intersect(need) if any(t.source == t.target == position for t in listed) else None
        arriving = tuple(region for regions in incoming for region in regions)
        placed = [*arriving, *([kept] if kept is not None else [])]
        return Exchange(
            step.axes, own, need, kept, arriving, tuple(region for regions in outgoing for region in regions),
            any(a.intersect(b) is not None for a, b in itertools.combinations(placed, 2)),
            tuple(sum(r.volume for r in regions) for regions in outgoing),
            tuple(sum(r.volume for r in regions) for regions in incoming),
        )  # fmt: skip

    def within(self, frame: Region) -> "Exchange":
        """Return the same exchange out of a tensor that holds a frame around the own region."""
        return replace(self, own=frame)

    def packed(self, x: torch.Tensor) -> torch.Tensor:
        """Return what others need of the own region, one after the other; maybe a view of it."""
        sent = self._sent
        if len(sent) == 1:
            return narrowed(x, sent[0]).reshape(-1).contiguous()  # a view may have gaps
        packed = x.new_empty(self._num_sent)
        for narrows, shape, part in zip(sent, self._sent_shapes, packed.split(self._sent_sizes), strict=True):
            part.view(shape).copy_(narrowed(x, narrows))
        return packed

    def start(self, packed: torch.Tensor, communicator: Communicator) -> Callable[[], list[torch.Tensor]]:
        """Send what others need, as ``packed``; the result waits for what comes, one tensor for each of ``incoming``.

        Exchanges must start in one order on all ranks, and each must end before another collective starts.
        """
        wait = communicator.start_exchange(packed, self._send_counts, self._receive_counts, self.axes)
        return lambda: self._parts(wait())

    def run(self, x: torch.Tensor, communicator: Communicator) -> torch.Tensor:
        """Exchange; return the region that the rank needs."""
        found = communicator.exchange(self.packed(x), self._send_counts, self._receive_counts, self.axes)
        parts, joined = self._parts(found), self._joined
        if joined is not None and x.is_contiguous():
            return joined.filled(x, parts)
        result = self._begun(x)
        for place, part in zip(self._places, parts, strict=True):
            if self.has_addends:
                narrowed(result, place).add_(part)
            else:
                narrowed(result, place).copy_(part)
        return result

    def _parts(self, found: torch.Tensor) -> list[torch.Tensor]:
        shapes = self._shapes
        if len(shapes) == 1:
            return [found.view(shapes[0])]
        return [part.view(shape) for part, shape in zip(found.split(self._sizes), shapes, strict=True)]

    def _begun(self, x: torch.Tensor) -> torch.Tensor:
        """Return the needed region with what was kept; zeros where others add or nothing comes."""
        result = new_like(x, self.need.shape)
        kept = self.kept
        if kept != self.need and (self.has_addends or self._covered < self.need.volume):
            result.zero_()
        if kept is not None:
            narrowed(result, narrows_of(kept, self.need)).copy_(narrowed(x, narrows_of(kept, self.own)))
        return result

    # what follows is the same in every step

    @functools.cached_property
    def _sent(self) -> tuple[Narrows, ...]:
        return tuple(narrows_of(region, self.own) for region in self.outgoing)

    @functools.cached_property
    def _sent_shapes(self) -> list[tuple[int, ...]]:
        return [region.shape for region in self.outgoing]

    @functools.cached_property
    def _sent_sizes(self) -> list[int]:
        return [region.volume for region in self.outgoing]

    @functools.cached_property
    def _num_sent(self) -> int:
        return sum(self._send_counts)

    @functools.cached_property
    def _sizes(self) -> list[int]:
        return [region.volume for region in self.incoming]

    @functools.cached_property
    def _shapes(self) -> list[tuple[int, ...]]:
        return [region.shape for region in self.incoming]

    @functools.cached_property
    def _places(self) -> list[Narrows]:
        return [narrows_of(region, self.need) for region in self.incoming]

    @functools.cached_property
    def _joined(self) -> "Joined | None":
        return None if self.has_addends else Joined.of(self.need, self.own, self.kept, self.incoming)

    @functools.cached_property
    def _covered(self) -> int:
        """Elements that are put in place, were there no addends."""
        return sum(region.volume for region in self.incoming) + (self.kept.volume if self.kept is not None else 0)


@dataclass(frozen=True)
class Joined:
    """A region that is made of parts side by side in one dimension: one concatenation fills it.

    Attributes:
        dim: the dimension.
        sources: of every part, in order: which of the tensors that come, -1 for the own piece, None for zeros; where it
            is in that; its shape.
    """

    dim: int
    sources: tuple[tuple[int | None, Narrows, tuple[int, ...]], ...]
    _zeros: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = field(default_factory=dict, compare=False)

    @staticmethod
    def of(
        region: Region,
        own: Region,
        kept: Region | None,
        incoming: Sequence[Region],
        outside: Sequence[Region] = (),
    ) -> "Joined | None":
        """Return how a region is joined; None where that takes more than one dimension, or something is missing.

        Args:
            region: to be filled.
            own: region that the rank has.
            kept: part of it that is in the region.
            incoming: regions that come.
            outside: parts of the region that are zeros.
        """
        found: list[tuple[int | None, Region, Region]] = []
        for index, piece, held in [
            *([(-1, kept, own)] if kept is not None else []),
            *((k, region.intersect(part), part) for k, part in enumerate(incoming)),
            *((None, part, part) for part in outside),
        ]:
            if piece is not None:
                found.append((index, piece, held))
        dims = {d for _, p, _ in found for d in range(len(p.start)) if _side(p, d) != _side(region, d)}
        if len(dims) != 1 or not found:
            return None
        (dim,) = dims
        found.sort(key=lambda part: part[1].start[dim])
        edges = [region.start[dim], *(piece.stop[dim] for _, piece, _ in found)]
        if edges[-1] != region.stop[dim] or any(p.start[dim] != e for (_, p, _), e in zip(found, edges, strict=False)):
            return None
        return Joined(dim, tuple((k, narrows_of(piece, held), piece.shape) for k, piece, held in found))

    def filled(self, x: torch.Tensor, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the region.

        Args:
            x: the own piece.
            parts: what came.
        """
        zeros = self._zeros_like(x) if self._has_zeros else ()
        return torch.cat(
            [
                zeros[i] if k is None else narrowed(x if k < 0 else parts[k], narrows)
                for i, (k, narrows, _) in enumerate(self.sources)
            ],
            self.dim,
        )

    @functools.cached_property
    def _has_zeros(self) -> bool:
        return any(k is None for k, _, _ in self.sources)

    def _zeros_like(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        key = x.dtype, x.device
        found = self._zeros.get(key)
        if found is None:
            with torch.inference_mode(False):  # they are used in training too
                found = [x.new_zeros(shape if k is None else ()) for k, _, shape in self.sources]
            self._zeros[key] = found
        return found


def _side(region: Region, dim: int) -> tuple[int, int]:
    return region.start[dim], region.stop[dim]
