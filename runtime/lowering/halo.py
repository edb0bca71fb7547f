"""Convolutions whose input piece needs rows of neighbours: their exchange, and computing behind it.

One function does what would else be four: exchange, zeros around the piece, convolution, and the way back. The rows of
the neighbours and the zeros are put beside the own piece in one copy. Where it is overlapped,

- forward, the borders are on their way while the outputs that need only own rows are computed; then come the strips
  that need the neighbours';
- backward, the halo's gradient is on its way to its owners while the gradient of the weight is computed.

Where outputs lie as inputs do, the convolution is taken for a sum (``Share``): of the own piece with zeros around it,
which is computed while borders are on their way, and of every part that comes, with zeros around that and no more of
the kernel than what reaches it. Backward, the shares' inputs come first, because their gradients are the halo's; all
others are computed while it is on its way. Nothing but rows is copied.

Where pieces are small, the frame alone is a function, and torch's own convolution reads it.

The numbers of all ways are the same up to the order of sums; in half precision, each share is rounded by itself.
Shapes: N samples, C channels, ... space.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import torch
from torch.nn import functional

from planner.ir import ops as ir
from planner.ir.halo import Window
from planner.ir.region import Region
from planner.ir.transfer import StepKind, steps
from runtime.comm.communicator import Communicator
from runtime.comm.exchange import MAX_BATCH_SIZES, Batch, Conversion, exchange_of, failure, refuse_second_derivative
from runtime.comm.packing import Exchange, Joined, Narrows, narrowed, narrows_of, new_like
from runtime.lowering.pieces import Piece
from runtime.state import StepState

Box = tuple[tuple[int, int], ...]
"""Of every dimension of space, first position and the one behind the last."""

Gradients: TypeAlias = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]
"""Of input, weight and bias, as far as they were asked for."""

_SPACE: Final = 2
"""The first dimension of space."""

_SMALL: Final = 1 << 15
"""Elements of pieces that are copied in less time than the calls take which would spare time or memory."""

_OF_GRADIENT: Final = "the gradient of "


@dataclass(frozen=True)
class Geometry:
    """A convolution on a piece: which input box its outputs read, and which of them need no neighbour.

    Attributes:
        op: the convolution, padded with zeros.
        groups: of the piece.
        windows: of every dimension of space.
        padding: that the convolution adds itself: in dimensions that the rank has whole.
        sizes: of the whole input, in space.
        outputs: what the rank computes.
        is_cut: dimensions in which the rank adds the padding.
    """

    op: ir.Conv
    groups: int
    windows: tuple[Window, ...]
    padding: tuple[int, ...]
    sizes: tuple[int, ...]
    outputs: Box
    is_cut: tuple[bool, ...]

    @staticmethod
    def of(op: ir.Conv, at: Piece) -> "Geometry":
        """Return the geometry of a piece."""
        groups = 1 if op.groups == 1 else op.groups * at.sources[0].shape[1] // op.in_channels
        uneven = op.padding_after is not None  # the convolution pads both sides alike
        is_cut = tuple(uneven or not at.is_whole(k + _SPACE) for k in range(len(op.kernel)))
        windows = tuple(
            Window(at.output.shape[k + _SPACE], op.kernel[k], op.stride[k], op.padding[k], op.dilation[k])
            for k in range(len(op.kernel))
        )
        padding = tuple(0 if cut else p for cut, p in zip(is_cut, op.padding, strict=True))
        return Geometry(op, groups, windows, padding, at.inputs[0].shape[_SPACE:], tuple(at.intervals()), is_cut)

    def frame(self, outputs: Box) -> Box:
        """Return the input box that outputs read; beyond the tensor, where this rank adds the padding itself."""
        return tuple(
            window.reach(*interval) if cut else (0, size)
            for window, interval, cut, size in zip(self.windows, outputs, self.is_cut, self.sizes, strict=True)
        )

    def interior(self, own: Box) -> Box | None:
        """Return the outputs that read own positions only; None where there are none, or no others."""
        found = []
        for window, outputs, (first, last), cut in zip(self.windows, self.outputs, own, self.is_cut, strict=True):
            start, stop = outputs
            if cut:
                reach = window.dilation * (window.kernel - 1)
                start = max(start, -(-(first + window.padding) // window.stride))
                stop = min(stop, (last - 1 - reach + window.padding) // window.stride + 1)
            if start >= stop:
                return None
            found.append((start, stop))
        return None if tuple(found) == self.outputs else tuple(found)

    def strips(self, interior: Box) -> tuple[Box, ...]:
        """Return the outputs around an interior, as boxes without common elements."""
        found: list[Box] = []
        for k, ((start, stop), (low, high)) in enumerate(zip(self.outputs, interior, strict=True)):
            sides = [(a, b) for a, b in ((start, low), (high, stop)) if a < b]
            found += [(*interior[:k], side, *self.outputs[k + 1 :]) for side in sides]
        return tuple(found)

    def convolved(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, padding: tuple[int, ...] | None = None
    ) -> torch.Tensor:
        """Return the outputs of a frame, padded as ``padding`` says or else with what is not in it yet."""
        op = self.op
        zeros, padding = (0,) * len(op.kernel), self.padding if padding is None else padding
        return torch.convolution(x, weight, bias, op.stride, padding, op.dilation, False, zeros, self.groups)

    def gradients(
        self,
        gradient: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        mask: Sequence[bool],
        padding: tuple[int, ...] | None = None,
    ) -> Gradients:
        """Return the gradients of a frame, the weight and the bias, as far as the mask asks for them.

        See ``convolved`` for the padding.
        """
        op, padding = self.op, self.padding if padding is None else padding
        found: Gradients = torch.ops.aten.convolution_backward.default(
            gradient, x, weight, [weight.shape[0]], op.stride, padding, op.dilation, False,
            [0] * len(op.kernel), self.groups, list(mask),
        )  # fmt: skip
        return found


@dataclass(frozen=True)
class Frame:
    """Where a box of the input is filled from; worked out once, as it is asked for in every step.

    Attributes:
        region: the box.
        shape: its sizes.
        zeros: parts outside the whole tensor.
        own: the part that the rank has: where it is in the box, and in the rank's piece; None where it has none of it.
        halos: parts that come: which one, where it is in the box, and in what came.
        is_own: the box is the rank's piece.
        joined: how one concatenation fills the box; None where it cannot.
    """

    region: Region
    shape: tuple[int, ...]
    zeros: tuple[Narrows, ...]
    own: tuple[Narrows, Narrows] | None
    halos: tuple[tuple[int, Narrows, Narrows], ...]
    is_own: bool
    joined: Joined | None

    @staticmethod
    def of(box: Box, exchange: Exchange, sizes: tuple[int, ...]) -> "Frame":
        """Return the frame of a box in space, of an input of these sizes that is exchanged so."""
        piece = exchange.own
        starts, stops = zip(*box, strict=True)
        region = Region((*piece.start[:_SPACE], *starts), (*piece.stop[:_SPACE], *stops))
        outside: list[Region] = []
        for dim, size in enumerate(sizes, start=_SPACE):
            start, stop = region.start[dim], region.stop[dim]
            outside += [_with_side(region, dim, start, min(0, stop))] if start < 0 else []
            outside += [_with_side(region, dim, max(size, start), stop)] if stop > size else []
        zeros = tuple(narrows_of(part, region) for part in outside)
        common = piece.intersect(region)
        own = None if common is None else (narrows_of(common, region), narrows_of(common, piece))
        halos = [(k, part, part.intersect(region)) for k, part in enumerate(exchange.incoming)]
        found = [(k, narrows_of(c, region), narrows_of(c, part)) for k, part, c in halos if c is not None]
        joined = Joined.of(region, piece, common, exchange.incoming, outside)
        return Frame(region, region.shape, zeros, own, tuple(found), region == piece, joined)

    def filled(self, x: torch.Tensor, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the box from the own piece and what came from others."""
        if self.is_own:
            return x
        if self.joined is not None and x.is_contiguous():
            return self.joined.filled(x, parts)
        result = self.begun(x)
        self.finish(result, parts)
        return result

    def begun(self, x: torch.Tensor) -> torch.Tensor:
        """Return the box with what is own in it, and zeros outside the whole tensor; the rest is not filled."""
        if self.is_own:
            return x
        result = new_like(x, self.shape)
        for part in self.zeros:
            narrowed(result, part).zero_()
        if self.own is not None:
            narrowed(result, self.own[0]).copy_(narrowed(x, self.own[1]))
        return result

    def finish(self, result: torch.Tensor, parts: Sequence[torch.Tensor]) -> None:
        """Put what came from others into the box."""
        for k, place, part in self.halos:
            narrowed(result, place).copy_(narrowed(parts[k], part))


def _with_side(region: Region, dim: int, start: int, stop: int) -> Region:
    """Return the part of a region between two positions of a dimension."""
    starts, stops = list(region.start), list(region.stop)
    starts[dim], stops[dim] = start, stop
    return Region(tuple(starts), tuple(stops))


@dataclass(frozen=True)
class Share:
    """What a part of the input adds to the outputs of a convolution of stride 1, whose sum over all parts they are.

    Attributes:
        widths: of zeros around the part, as ``functional.pad`` takes them; negative: what of it no output reads.
        padding: further zeros, that the convolution adds.
        taps: what of the kernel reaches the part.
        outputs: those that read it.
    """

    widths: tuple[int, ...]
    padding: tuple[int, ...]
    taps: Narrows
    outputs: Box

    @staticmethod
    def of(part: Region, geometry: Geometry) -> "Share | None":
        """Return the share of a part; None where no output reads it."""
        widths, padding, taps, outputs = list[int](), [], [], []
        for k, (window, (first, last)) in enumerate(zip(geometry.windows, geometry.outputs, strict=True)):
            start, stop, step = part.start[k + _SPACE], part.stop[k + _SPACE], window.dilation
            found = window.reached((first, last), (start, stop))
            if found is None:
                return None
            tap, end, low, high = found.first_tap, found.first_tap + found.num_taps, found.start, found.stop
            before = start - (low + tap * step - window.padding)
            behind = high + (end - 1) * step - window.padding - stop
            inside = before if before == behind > 0 else 0
            padding.append(inside)
            widths = [before - inside, behind - inside, *widths]  # the last dimension comes first
            taps.append((k + _SPACE, tap, found.num_taps))
            outputs.append((low, high))
        used = tuple(t for t, window in zip(taps, geometry.windows, strict=True) if t[2] < window.kernel)
        return Share(tuple(widths), tuple(padding), used, tuple(outputs))

    def around(self, part: torch.Tensor) -> torch.Tensor:
        """Return the part with zeros around it."""
        return functional.pad(part, self.widths) if any(self.widths) else part

    def inside(self, framed: torch.Tensor) -> torch.Tensor:
        """Return the part of what has zeros around it; the reverse of ``around``."""
        return functional.pad(framed, [-width for width in self.widths]) if any(self.widths) else framed


@dataclass(frozen=True)
class Halo:
    """One convolution on one rank for one batch.

    Attributes:
        geometry: of the piece.
        forward, backward: the exchange of borders, and that of their gradients.
        interior: the outputs to compute while borders are on their way; None: all of them behind the exchange, or
            ``in_place``.
        in_place: outputs are sums of shares, of which the own piece's is computed while borders are on their way.
        is_small: torch's own convolution keeps what it read; equal on all ranks.
        name: of what is exchanged, for messages.
    """

    geometry: Geometry
    forward: Exchange
    backward: Exchange
    interior: Box | None
    in_place: bool
    is_small: bool
    name: str
    communicator: Communicator

    @functools.cached_property
    def frame(self) -> Frame:
        """What the rank's outputs read."""
        return self._frame(self.geometry.outputs)

    @functools.cached_property
    def _inside(self) -> tuple[Narrows, Narrows]:
        """Where the input of the interior is in the own piece, and where its outputs are in all outputs."""
        assert self.interior is not None
        frame = self._frame(self.interior)
        return narrows_of(frame.region, self.forward.own), self._place(self.interior)

    @functools.cached_property
    def _strips(self) -> list[tuple[Frame, Narrows]]:
        """Of every strip what it reads, and where its outputs are in all outputs."""
        assert self.interior is not None
        return [(self._frame(box), self._place(box)) for box in self.geometry.strips(self.interior)]

    @functools.cached_property
    def _shares(self) -> list[tuple[Share, Narrows] | None]:
        """Of every part that comes, what it adds, and where its outputs are in all outputs."""
        assert self.backward.outgoing == self.forward.incoming
        found = [Share.of(part, self.geometry) for part in self.forward.incoming]
        return [None if share is None else (share, self._place(share.outputs)) for share in found]

    @functools.cached_property
    def returning(self) -> Exchange:
        """The exchange of the gradients of borders, out of the gradient of the frame."""
        return self.backward.within(self.frame.region)

    @functools.cached_property
    def _returned(self) -> list[Narrows]:
        """Where what comes back is in the own piece."""
        return [narrows_of(region, self.forward.own) for region in self.backward.incoming]

    def _frame(self, outputs: Box) -> Frame:
        return Frame.of(self.geometry.frame(outputs), self.forward, self.geometry.sizes)

    def _place(self, outputs: Box) -> Narrows:
        pairs = enumerate(zip(outputs, self.geometry.outputs, strict=True), start=_SPACE)
        return tuple((dim, a - first, b - a) for dim, ((a, b), (first, last)) in pairs if (a, b) != (first, last))

    def start(self, exchange: Exchange, packed: torch.Tensor, kind: str = "") -> Callable[[], list[torch.Tensor]]:
        """Start an exchange; failures name it."""
        try:
            arrived = exchange.start(packed, self.communicator)
        except RuntimeError as error:
            raise failure(error, StepKind.EXCHANGE, self.communicator, kind + self.name) from error

        def wait() -> list[torch.Tensor]:
            try:
                return arrived()
            except RuntimeError as error:
                raise failure(error, StepKind.EXCHANGE, self.communicator, kind + self.name) from error

        return wait

    def computed(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the outputs, and what backward needs beside the weight: the own piece and the halos.

        The piece is mostly kept by the layer that made it as well, so that a frame would be a second copy of it.
        """
        geometry = self.geometry
        wait = self.start(self.forward, self.forward.packed(x))
        if self.in_place:
            result, parts = geometry.convolved(x, weight, bias, geometry.op.padding), wait()
            for part, found in zip(parts, self._shares, strict=True):
                if found is not None:
                    share, place = found
                    kernel = narrowed(weight, share.taps)
                    narrowed(result, place).add_(geometry.convolved(share.around(part), kernel, None, share.padding))
            return result, [x, *parts]
        if self.interior is None:
            framed, parts = self.frame.begun(x), wait()
            self.frame.finish(framed, parts)
            return geometry.convolved(framed, weight, bias), [x, *parts]
        read, place = self._inside
        y = geometry.convolved(narrowed(x, read), weight, bias)
        result = new_like(y, (*y.shape[:_SPACE], *(b - a for a, b in geometry.outputs)))
        narrowed(result, place).copy_(y)
        parts = wait()
        for frame, place in self._strips:
            narrowed(result, place).copy_(geometry.convolved(frame.filled(x, parts), weight, bias))
        return result, [x, *parts]

    def framed(self, kept: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the frame of all outputs from what ``computed`` kept."""
        return self.frame.filled(kept[0], kept[1:])

    def gradients(
        self, gradient: torch.Tensor, kept: Sequence[torch.Tensor], weight: torch.Tensor, mask: Sequence[bool]
    ) -> Gradients:
        """Return the gradients of the own piece, the weight and the bias, as far as the mask asks for them."""
        geometry, (of_input, *of_params) = self.geometry, mask
        if self.in_place:
            return self._gradients_in_place(gradient, kept, weight, mask)
        if not of_input:
            return geometry.gradients(gradient, self.framed(kept), weight, mask)
        overlapped = self.interior is not None and any(of_params)
        if overlapped:  # only the shape of the input matters for its gradient
            stand_in = weight.new_empty(1).expand(self.frame.shape)
            framed, of_kernel, of_bias = geometry.gradients(gradient, stand_in, weight, [True, False, False])
        else:
            framed, of_kernel, of_bias = geometry.gradients(gradient, self.framed(kept), weight, mask)
        assert framed is not None
        wait = self.start(self.returning, self.returning.packed(framed), _OF_GRADIENT)
        if overlapped:
            _, of_kernel, of_bias = geometry.gradients(gradient, self.framed(kept), weight, [False, *of_params])
        return self.gradient_of_piece(framed, wait()), of_kernel, of_bias

    def _gradients_in_place(
        self, gradient: torch.Tensor, kept: Sequence[torch.Tensor], weight: torch.Tensor, mask: Sequence[bool]
    ) -> Gradients:
        """Return the gradients where outputs are sums of shares."""
        geometry, (x, *parts) = self.geometry, kept
        of_input, of_weight, _ = mask
        wait = self.start(self.backward, self._sent_back(gradient, parts, weight), _OF_GRADIENT) if of_input else None
        of_piece, of_weights, of_bias = geometry.gradients(gradient, x, weight, mask, geometry.op.padding)
        for part, found in zip(parts, self._shares, strict=True) if of_weight else ():
            if found is not None and of_weights is not None:
                of_kernel = self._gradients_of_share(found, part, gradient, weight, [False, True, False])[1]
                narrowed(of_weights, found[0].taps).add_(of_kernel)
        if wait is not None and of_piece is not None:
            self._add_returned(of_piece, wait())
        return of_piece, of_weights, of_bias

    def _sent_back(self, gradient: torch.Tensor, parts: Sequence[torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
        """Return the gradients of what came, one after the other."""
        sent = []
        for part, found in zip(parts, self._shares, strict=True):
            if found is None:
                sent.append(torch.zeros_like(part).view(-1))
            else:
                framed = self._gradients_of_share(found, part, gradient, weight, [True, False, False])[0]
                sent.append(found[0].inside(framed).reshape(-1))
        return torch.cat([weight.new_empty(0), *sent])

    def _gradients_of_share(
        self, found: tuple[Share, Narrows], part: torch.Tensor, gradient: torch.Tensor, weight: torch.Tensor,
        mask: Sequence[bool],
    ) -> Any:  # fmt: skip
        share, place = found
        kernel = narrowed(weight, share.taps)
        return self.geometry.gradients(narrowed(gradient, place), share.around(part), kernel, mask, share.padding)

    def gradient_of_piece(self, framed: torch.Tensor, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the gradient of the own piece from that of the frame and what comes from the neighbours."""
        own, frame = self.forward.own, self.frame
        if frame.own is not None and not frame.own[1]:
            result = narrowed(framed, frame.own[0])  # all of the piece was read
        else:
            result = new_like(framed, own.shape).zero_()
            if frame.own is not None:
                narrowed(result, frame.own[1]).copy_(narrowed(framed, frame.own[0]))
        self._add_returned(result, parts)
        return result

    def _add_returned(self, of_piece: torch.Tensor, parts: Sequence[torch.Tensor]) -> None:
        for place, part in zip(self._returned, parts, strict=True):
            narrowed(of_piece, place).add_(part)


class _Framed(torch.autograd.Function):
    """What all outputs of a piece read, by the exchange of borders."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, halo: Halo, factor: Callable[[], float] | None) -> torch.Tensor:
        ctx.halo, ctx.factor = halo, factor
        return halo.frame.filled(x, halo.start(halo.forward, halo.forward.packed(x))())

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        refuse_second_derivative()
        halo, (framed,) = ctx.halo, gradients
        wait = halo.start(halo.returning, halo.returning.packed(framed), _OF_GRADIENT)
        # writes into the gradient, which the convolution's backward has just made for this function alone
        return _weighed(halo.gradient_of_piece(framed, wait()), ctx.factor), None, None


class HaloConvolution(torch.autograd.Function):
    """A convolution on a piece with the exchange of its borders, forward and backward."""

    @staticmethod
    def forward(  # what autograd passes
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        halo: Halo,
        factor: Callable[[], float] | None,
    ) -> torch.Tensor:
        y, kept = halo.computed(x, weight, bias)
        ctx.halo, ctx.factor = halo, factor
        ctx.save_for_backward(weight, *kept)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        refuse_second_derivative()
        (weight, *kept), mask = ctx.saved_tensors, ctx.needs_input_grad[:3]
        of_piece, *found = ctx.halo.gradients(gradients[0], kept, weight, mask)
        return None if of_piece is None else _weighed(of_piece, ctx.factor), *found, None, None


def _weighed(gradient: torch.Tensor, factor: Callable[[], float] | None) -> torch.Tensor:
    return gradient if factor is None or (found := factor()) == 1.0 else gradient * found


@dataclass
class HaloCall:
    """A convolution on a piece that fetches its borders; called with the own piece, weight and bias.

    Attributes:
        conversion: from the own piece to what the outputs read; see ``is_halo`` of ``planner.ir.transfer``.
        geometry: of the piece.
        overlapped: compute while borders are on their way.
        in_place: then outputs are sums of shares; see ``planner.ir.halo.is_sum``.
        state: of this rank.
        gradient_factor: multiplies the gradient of the input; a function of the state.
    """

    conversion: Conversion
    geometry: Geometry
    overlapped: bool
    in_place: bool
    state: StepState
    gradient_factor: Callable[[StepState], float] | None = None
    _compiled: dict[Batch, Halo] = field(default_factory=dict)

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        halo = self._halo(self.state.current_batch())
        factor = None
        if self.gradient_factor is not None and x.requires_grad:
            factor = functools.partial(self.gradient_factor, self.state.of_this_pass())
        x, weight, bias = _cast(x, weight, bias)
        if halo.is_small:
            return self.geometry.convolved(_Framed.apply(x, halo, factor), weight, bias)
        found: torch.Tensor = HaloConvolution.apply(x, weight, bias, halo, factor)
        return found

    def _halo(self, batch: Batch) -> Halo:
        found = self._compiled.get(batch)
        if found is None:
            if len(self._compiled) >= MAX_BATCH_SIZES:
                self._compiled.clear()
            source, target = self.conversion.layouts(batch)
            communicator = self.state.communicator
            (there,), (back,) = steps(source, target), steps(target.gradient, source.gradient)
            forward, backward = exchange_of(there, communicator), exchange_of(back, communicator)
            own, geometry = forward.own, self.geometry
            box = tuple(zip(own.start[_SPACE:], own.stop[_SPACE:], strict=True))
            in_place = self.overlapped and self.in_place
            interior = geometry.interior(box) if self.overlapped and not in_place else None
            is_small = not self.overlapped and math.prod(target.largest_shape()) <= _SMALL
            name = self.conversion.name
            found = Halo(geometry, forward, backward, interior, in_place, is_small, name, communicator)
            self._compiled[batch] = found
        return found

    def __str__(self) -> str:
        return f"conv with halo{', overlapped' if self.overlapped else ''}"


def _cast(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return tensors in the element type that autocast gives a convolution."""
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return x, weight, bias
    wanted = torch.get_autocast_dtype(device)

    def cast(t: torch.Tensor) -> torch.Tensor:
        return t if t.dtype == torch.float64 else t.to(wanted)

    return cast(x), cast(weight), None if bias is None else cast(bias)
