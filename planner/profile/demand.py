"""What a piece of a layer asks of a device in each phase: FLOP, bytes, launches, and sizes.

The sizes decide how well the device does it. The calibrated roofline divides by rates that it fitted.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from planner.ir.count import Shape, multiply_adds, real_products
from planner.ir.graph import is_boundary
from planner.ir.ops import (
    AdaptivePool,
    BatchNorm,
    Concat,
    Conv,
    ConvTranspose,
    Dropout,
    Elementwise,
    GroupNorm,
    Linear,
    Op,
    Permute,
    Pool,
    Reshape,
)
from planner.profile.key import PieceKey
from planner.units import MIB


class Phase(StrEnum):
    """Of a training step, as it is timed."""

    FORWARD = "forward"
    BACKWARD_DATA = "backward_data"
    BACKWARD_WEIGHT = "backward_weight"


PRODUCTS: Final = ("conv", "conv 1x1", "depthwise", "grouped", "transposed conv", "linear")
"""Kinds that are matrix products at heart."""
MOVERS: Final = (
    "max pool", "average pool", "adaptive pool", "norm", "synchronised norm", "element-wise", "concat", "other",
)  # fmt: skip
"""Kinds that read and write memory."""
FRESH_BYTES: Final = 32 * MIB
"""Tensors from this size on get memory that no program has touched: ``M_MMAP_THRESHOLD``'s largest value in glibc,
above which ``free`` gives memory back. Each page then costs a fault. GPUs' allocators keep memory; there it is free."""
SIZES: Final = ("outputs", "rows", "sum", "samples", "groups", "window", "stride", "winograd", "bytes", "channels")
"""Names of ``Demand.sizes``."""


@dataclass(frozen=True, slots=True)
class Demand:
    """One phase of one piece.

    A product is a matrix product of ``outputs`` x ``sum`` by ``sum`` x ``rows`` in each of its groups.

    Attributes:
        flop: of the operator; 0 where it only moves memory.
        num_bytes: that the operator reads and writes.
        norm_bytes, synchronised_bytes, elementwise_bytes: that absorbed norms (on own statistics, or those of several
            ranks) and other absorbed operators read and write.
        fresh_bytes: of large results, and of gradients, whose memory is new (``FRESH_BYTES``).
        launches: operators that are started.
        sizes: natural logarithms, in the order of ``SIZES``: channels of a group's output, samples times positions,
            terms of a sum, samples, groups, positions of the window, stride; 1 or 0 for a 3 x 3 window that moves by
            one (Winograd's algorithm); bytes; channels.
    """

    flop: float
    num_bytes: float
    norm_bytes: float
    synchronised_bytes: float
    elementwise_bytes: float
    fresh_bytes: float
    launches: int
    sizes: tuple[float, ...]


def kind_of(piece: PieceKey) -> str:  # noqa: PLR0911  # a table
    """Return the kind of a piece's operator, one of ``PRODUCTS`` and ``MOVERS``."""
    match piece.op:
        case Conv(groups=1, kernel=kernel):
            return "conv 1x1" if math.prod(kernel) == 1 else "conv"
        case Conv(groups=groups, in_channels=channels):
            return "depthwise" if groups == channels else "grouped"
        case ConvTranspose():
            return "transposed conv"
        case Linear():
            return "linear"
        case Pool(function=function):
            return "max pool" if function == "max" else "average pool"
        case AdaptivePool():
            return "adaptive pool"
        case BatchNorm() | GroupNorm():
            return "synchronised norm" if piece.synchronised else "norm"
        case Elementwise() | Dropout():
            return "element-wise"
        case Concat():
            return "concat"
        case _:
            return "other"


def demands(piece: PieceKey, flop: tuple[int, int, int] | None = None) -> Mapping[Phase, Demand]:
    """Return the phases that a piece goes through.

    Absorbed operators belong to the gradient of the inputs where there is one, else to that of the parameters.

    Args:
        piece: what is computed.
        flop: of forward, backward-data and backward-weight, where the operator alone does not tell
            (``PerSample``, ``Custom``).
    """
    op, item = piece.op, piece.dtype.item_bytes
    moved_in, moved_out = sum(map(math.prod, piece.inputs)), math.prod(piece.output)
    weights = _weights(op, piece.output)
    own = 0 if _is_view(op) else moved_in + moved_out + weights
    again = moved_in if isinstance(op, BatchNorm | GroupNorm) else 0
    behind = math.prod(piece.resolved or piece.output)
    norms = sum(isinstance(a.op, BatchNorm | GroupNorm) for a in piece.absorbed)
    others = sum(not _is_view(a.op) for a in piece.absorbed) - norms
    norm_bytes, other_bytes = 3.0 * norms * behind * item, 2.0 * others * behind * item
    absorbed = (0.0, norm_bytes, other_bytes) if piece.synchronised else (norm_bytes, 0.0, other_bytes)
    product = 2.0 * multiply_adds(op, piece.inputs, piece.output) * real_products(op, piece.dtype)
    ahead, to_inputs, to_weights = flop or (product, product, product)
    tail = norms + others
    tail_results = [behind * item] * tail
    *sizes, _, channels = _sizes(piece)

    def demand(flop: float, elements: float, results: Sequence[float], *, with_absorbed: bool) -> Demand:
        tail_bytes = absorbed if with_absorbed else (0.0, 0.0, 0.0)
        launches = bool(elements) + tail * with_absorbed
        made = [*results, *(tail_results if with_absorbed else ())]
        fresh = sum(size for size in made if size >= FRESH_BYTES)
        of_bytes = math.log(max(elements * item, 1))
        return Demand(flop, elements * item, *tail_bytes, fresh, launches, (*sizes, of_bytes, channels))

    results = [moved_out * item] if own else []
    found = {Phase.FORWARD: demand(ahead, own + again, results, with_absorbed=True)}
    if piece.input_gradient:
        gradients = [math.prod(shape) * item for shape in piece.inputs] if own else []
        found[Phase.BACKWARD_DATA] = demand(to_inputs, own + again, gradients, with_absorbed=True)
    trains = piece.weight_gradient or any(a.weight_gradient for a in piece.absorbed)
    if trains and (is_product(piece) or not piece.input_gradient):
        of_weights = piece.weight_gradient
        found[Phase.BACKWARD_WEIGHT] = demand(
            to_weights * of_weights, own * of_weights, [weights * item * of_weights],
            with_absorbed=not piece.input_gradient,
        )  # fmt: skip
    return found


def is_product(piece: PieceKey) -> bool:
    """Return whether backward has kernels of its own for the parameters; a norm computes all gradients in one."""
    return kind_of(piece) in PRODUCTS


def _weights(op: Op, output: Shape) -> int:
    match op:
        case Conv():
            return op.out_channels * (op.in_channels // op.groups) * math.prod(op.kernel)
        case ConvTranspose():
            return op.in_channels * (op.out_channels // op.groups) * math.prod(op.kernel)
        case Linear():
            return op.in_features * op.out_features
        case BatchNorm() | GroupNorm():
            return 2 * output[1]
        case _:
            return 0


def _is_view(op: Op) -> bool:
    """Return whether an operator moves nothing."""
    views = isinstance(op, Reshape | Permute) or is_boundary(op) or op.kind == "redistribute"
    return views or (isinstance(op, Elementwise) and op.function in {"identity", "detach", "contiguous"})


def _sizes(piece: PieceKey) -> tuple[float, ...]:
    """Return ``Demand.sizes``, with 0 for the bytes, which differ from phase to phase."""
    op, output = piece.op, piece.output
    samples = output[0] if output else 1
    channels = (output[1] if len(output) > 1 else 1) if not isinstance(op, Linear) else output[-1]
    outputs, total, groups = channels, 1, 1
    kernel: Shape = ()
    stride: Shape = ()
    match op:
        case Conv():
            outputs, groups, kernel, stride = op.out_channels // op.groups, op.groups, op.kernel, op.stride
            total = op.in_channels // op.groups * math.prod(kernel)
        case ConvTranspose():
            outputs, groups, kernel, stride = op.out_channels // op.groups, op.groups, op.kernel, op.stride
            total = op.in_channels // op.groups * math.prod(kernel)
        case Linear():
            total = op.in_features
        case Pool():
            kernel, stride = op.kernel, op.stride
        case AdaptivePool() if len(piece.inputs[0]) == len(output):
            kernel = tuple(-(-a // max(b, 1)) for a, b in zip(piece.inputs[0][2:], output[2:], strict=True))
        case _:
            pass
    rows = math.prod(output) / max(channels, 1)
    winograd = isinstance(op, Conv) and set(kernel) == {3} and {*op.stride, *op.dilation} == {1}
    values = (outputs, rows, total, samples, groups, _volume(kernel), _volume(stride))
    logs = (math.log(max(value, 1)) for value in values)
    return (*logs, float(winograd), 0.0, math.log(max(channels, 1)))


def _volume(sizes: Sequence[int]) -> int:
    return math.prod(sizes) if sizes else 1
