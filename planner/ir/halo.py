"""The input that a piece of output needs from a window operator (convolution, pooling)."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Window:
    """A window operator along one dimension.

    Attributes:
        out_size: size of the output dimension, of which ranks hold pieces.
        kernel, stride, padding, dilation: as in ``torch.nn.Conv1d``; ``padding`` is the one before.
    """

    out_size: int
    kernel: int
    stride: int = 1
    padding: int = 0
    dilation: int = 1

    def input_interval(self, start: int, stop: int, in_size: int) -> tuple[int, int]:
        """Return the input positions that outputs ``[start, stop)`` read, cut to the tensor.

        Output rows [a, b) need input rows [a*s - p, (b-1)*s - p + d*(k-1) + 1); what lies outside
        the tensor is padding.
        """
        first = start * self.stride - self.padding
        last = (stop - 1) * self.stride - self.padding + self.dilation * (self.kernel - 1) + 1
        return min(max(first, 0), in_size), max(min(last, in_size), 0)
