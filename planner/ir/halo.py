"""The input that a piece of output needs from operators that look around: windows, resizing.

Every class answers one question: which positions of an input dimension do the outputs
``[start, stop)`` read, cut to the tensor. Of convolutions that are sums of what each part of the input adds, a window
also answers what that is.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:  # layouts are made of windows
    from planner.ir.layout import Layout
    from planner.ir.ops import Conv

_SPACE: Final = 2
"""The first dimension of space."""


def is_sum(op: "Conv", have: "Layout", computed: "Layout") -> bool:
    """Return whether the runtime may take a convolution for a sum of what each part of its input adds.

    So where every rank computes the outputs that lie as the inputs do which it has: with zeros around these, torch's
    convolution gives all outputs.

    Args:
        op: the convolution.
        have: its input as the ranks have it, without rows of neighbours.
        computed: its output.
    """
    cuts = zip(have.divisions[_SPACE:], computed.divisions[_SPACE:], strict=True)
    return op.keeps_size and all(a.axes == b.axes and a.pieces == b.pieces for a, b in cuts)


@dataclass(frozen=True, slots=True)
class Reached:
    """What of a window reaches a part of its input.

    Attributes:
        first_tap: of the kernel.
        num_taps: from that on.
        start, stop: outputs that read the part.
    """

    first_tap: int
    num_taps: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Window:
    """A window operator along one dimension.

    Attributes:
        out_size: size of the output dimension, of which ranks hold pieces.
        kernel, stride, padding, dilation: as in ``torch.nn.Conv1d``; ``padding`` is the one before.
        mode: what lies outside the tensor, as ``padding_mode`` of ``torch.nn.Conv1d``.
    """

    out_size: int
    kernel: int
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    mode: str = "zeros"

    def reach(self, start: int, stop: int) -> tuple[int, int]:
        """Return the positions that outputs ``[start, stop)`` read; what lies outside the tensor is padding.

        Output rows [a, b) need input rows [a*s - p, (b-1)*s - p + d*(k-1) + 1).
        """
        first = start * self.stride - self.padding
        return first, first + (stop - 1 - start) * self.stride + self.dilation * (self.kernel - 1) + 1

    def reached(self, outputs: tuple[int, int], part: tuple[int, int]) -> Reached | None:
        """Return what outputs [a, b) read of input positions [start, stop); None where that is nothing.

        Of a window of stride 1: output o reads with tap j the position o + j*d - p.
        """
        (a, b), (start, stop), step = outputs, part, self.dilation
        first_tap = max(0, -(-(start + self.padding - b + 1) // step))
        end = min(self.kernel, (stop - 1 + self.padding - a) // step + 1)
        low, high = max(a, start + self.padding - (end - 1) * step), min(b, stop + self.padding - first_tap * step)
        return None if first_tap >= end or low >= high else Reached(first_tap, end - first_tap, low, high)

    def input_interval(self, start: int, stop: int, in_size: int) -> tuple[int, int]:
        """Return the input positions that outputs ``[start, stop)`` read, cut to the tensor."""
        first, last = self.reach(start, stop)
        if self.mode == "zeros" or stop <= start or (first >= 0 and last <= in_size):
            return min(max(first, 0), in_size), max(min(last, in_size), 0)
        read = [self.position(p, in_size) for p in range(first, last)]
        return min(read), max(read) + 1

    def position(self, place: int, in_size: int) -> int:
        """Return which position of the tensor stands at a place, which may lie outside, where padding is no zeros."""
        match self.mode:
            case "reflect":
                place = abs(place)
                return min(place, 2 * (in_size - 1) - place)
            case "circular":
                return place % in_size
            case _:
                return min(max(place, 0), in_size - 1)


@dataclass(frozen=True, slots=True)
class TransposedWindow:
    """A transposed convolution along one dimension; attributes as of ``Window``."""

    out_size: int
    kernel: int
    stride: int = 1
    padding: int = 0
    dilation: int = 1

    def input_interval(self, start: int, stop: int, in_size: int) -> tuple[int, int]:
        """Return the input positions i with start <= i*s - p + d*k < stop for some k of the kernel."""
        reach = self.dilation * (self.kernel - 1)
        first = -(-(start + self.padding - reach) // self.stride)
        last = (stop - 1 + self.padding) // self.stride + 1
        first = min(max(first, 0), in_size)
        return first, max(min(last, in_size), first)


@dataclass(frozen=True, slots=True)
class AdaptiveWindow:
    """Adaptive pooling along one dimension: output i reads [floor(i*n/m), ceil((i+1)*n/m))."""

    out_size: int

    def input_interval(self, start: int, stop: int, in_size: int) -> tuple[int, int]:
        """Return the input positions that outputs ``[start, stop)`` read."""
        return start * in_size // self.out_size, -(-stop * in_size // self.out_size)


@dataclass(frozen=True, slots=True)
class ScaleWindow:
    """Blocks: ``rows`` output positions belong to ``per`` input positions (pixel shuffle and back)."""

    out_size: int
    rows: int
    per: int

    def input_interval(self, start: int, stop: int, in_size: int) -> tuple[int, int]:
        """Return the input positions that outputs ``[start, stop)`` read, whole blocks."""
        return start // self.rows * self.per, min(-(-stop // self.rows) * self.per, in_size)


@dataclass(frozen=True, slots=True)
class InterpolationWindow:
    """Resizing along one dimension.

    Attributes:
        out_size: size of the output dimension.
        step: input positions per output position, as torch computes it.
        mode: ``nearest`` and ``nearest-exact`` read one position, ``linear`` two.
        align_corners: the outermost positions are mapped on each other.
    """

    out_size: int
    step: float
    mode: str
    align_corners: bool = False

    def position(self, index: int) -> float:
        """Return where output ``index`` lies in the input, in input positions."""
        if self.mode == "nearest":
            return index * self.step
        if self.mode == "nearest-exact":
            return (index + 0.5) * self.step
        if self.align_corners:
            return index * self.step
        return max((index + 0.5) * self.step - 0.5, 0.0)

    def input_interval(self, start: int, stop: int, in_size: int) -> tuple[int, int]:
        """Return the input positions that outputs ``[start, stop)`` read; one more at each end, as floats round."""
        reach = 1 if self.mode == "linear" else 0
        first = math.floor(self.position(start)) - 1
        last = math.floor(self.position(stop - 1)) + reach + 2
        first = min(max(first, 0), in_size - 1)
        return first, max(min(last, in_size), first + 1)


AnyWindow = Window | TransposedWindow | AdaptiveWindow | ScaleWindow | InterpolationWindow
