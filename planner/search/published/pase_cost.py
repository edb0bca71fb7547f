"""PaSE's configurations and their costs [PaSE21], as arrays of numbers.

Costs are in FLOP, one multiply-add counted as 1. Communication counts in FLOP as well: so many words of 8 bytes
times the balance r, the FLOP that a device does while it sends one word. Nothing overlaps; there is no latency, no
topology and no memory. The formulas are those of the published code (baidu-research/PaSE, nn_ops.py at 02d6915),
which is more precise than the paper.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from planner.search.problem import Costs
from planner.search.published.pase_operators import TENSOR, B, C, H, Kind, N, Operator, R, S, Shape, W

Degrees = NDArray[np.int64]
"""int64[configurations, 7]: into how many pieces each of ``DIMENSIONS`` is cut. Reductions are cut as well."""

BALANCE: Final = 5000.0
"""FLOP per word at the published defaults: 10 TFLOP/s, 16 GB/s, 8 bytes a word."""
WORD_BYTES: Final = 8
LEAST: Final = 4
"""A dimension is cut only into pieces of at least so many."""
NORM_FLOP: Final = 16.0
"""Of a normalisation, per element, forward and backward."""
EXPONENT_FLOP: Final = 3.0

_SPLITTABLE: Final = {
    Kind.PRODUCT: (B, C, R, S, N),  # no exchange of halos
    Kind.CONCAT: (B, H, W),
    Kind.LOSS: (B, C),
}


def configurations(operator: Operator, devices: int, least: int = LEAST) -> Degrees:
    """Return every configuration: all factors that leave ``least`` per piece, product at most ``devices``.

    A reshape is cut along its outermost dimension alone, so that pieces stay contiguous.
    """
    splittable = _SPLITTABLE.get(operator.kind, TENSOR)
    if operator.kind in {Kind.FLATTEN, Kind.UNFLATTEN}:
        splittable = tuple(d for d in TENSOR if operator.sizes[d] > 1)[:1]
    rows = np.ones((1, 0), dtype=np.int64)
    for d, size in enumerate(operator.sizes):
        degrees = _degrees(size, devices, least) if d in splittable else [1]
        column = np.tile(np.array(degrees, dtype=np.int64), len(rows))[:, None]
        rows = np.hstack([np.repeat(rows, len(degrees), axis=0), column])
        rows = rows[rows.prod(axis=1) <= devices]
    return rows


def _degrees(size: int, devices: int, least: int) -> list[int]:
    return [d for d in range(1, min(size // least, devices) + 1) if size % d == 0] or [1]


def all_reduce(words: Costs, degree: Degrees, balance: float) -> Costs:
    """Return the FLOP of all-reducing so many words of each device over so many devices: 2 r (p - 1) w / p."""
    steps: Costs = balance * 2.0 * (degree - 1).astype(np.float64)
    return steps * (words / degree)


def node_costs(operator: Operator, degrees: Degrees, balance: float = BALANCE) -> Costs:
    """Return the FLOP of an operator under every configuration, float64[configurations]."""
    local: Costs = np.array(operator.sizes) / degrees
    elements: Costs = local.prod(axis=1)
    found: Costs = np.zeros(len(degrees))
    match operator.kind:
        case Kind.PRODUCT:
            found = _product(operator, degrees, local, balance)
        case Kind.POOL:
            found = elements + halo(operator.reads, degrees[:, TENSOR], operator.window, balance)
        case Kind.NORM:
            found = _norm(degrees, local, balance)
        case Kind.ELEMENTWISE:
            found = (1 + operator.pointwise) * elements
        case Kind.MEAN:
            found = all_reduce(elements, degrees[:, H] * degrees[:, W], balance)
        case Kind.LOSS:
            words = elements / local[:, C]
            found = (EXPONENT_FLOP + 1) * elements + 2 * words
            found = found + np.where(degrees[:, C] > 1, balance * 2 * words, 0.0)
        case Kind.CONCAT | Kind.FLATTEN | Kind.UNFLATTEN:
            pass
    return found


def _product(operator: Operator, degrees: Degrees, local: Costs, balance: float) -> Costs:
    """Return 3 m n k + pointwise + AR(m n, p_k) + AR(m k, p_n) + AR(n k, p_m); groups are products of their own.

    The three products and reductions are those of the output, the input's gradient and the weight's gradient.
    """
    p_m, p_n, p_k = degrees[:, [B, H, W]].prod(axis=1), degrees[:, N], degrees[:, [C, R, S]].prod(axis=1)
    m, n, k = local[:, [B, H, W]].prod(axis=1), local[:, N], local[:, [C, R, S]].prod(axis=1)
    times: Costs | float = 1.0
    if operator.groups > 1:  # sizes hold all channels; only whole groups are cut apart, over n
        times, n, k, p_n = operator.groups / p_n, n * p_n / operator.groups, k / operator.groups, np.ones_like(p_n)
    work = 3.0 * m * n * k + 3.0 * operator.pointwise * m * n
    reduced = all_reduce(m * n, p_k, balance) + all_reduce(m * k, p_n, balance) + all_reduce(n * k, p_m, balance)
    total: Costs = times * (work + reduced)
    if (degrees[:, [H, W]] > 1).any():
        total = total + halo(operator.reads, degrees[:, TENSOR], (operator.sizes[R], operator.sizes[S]), balance)
    return total


def _norm(degrees: Degrees, local: Costs, balance: float) -> Costs:
    """Return the FLOP of a batch norm as the published code has it.

    Its statistics and weights are counted per (channel, row, column) instead of per channel: 4 all-reduces of
    c h w words over the pieces of the batch. The other term reduces b words over the other pieces.
    """
    samples = local[:, B]
    elements: Costs = local.prod(axis=1)
    others = degrees.prod(axis=1) // degrees[:, B]
    statistics = 4.0 * all_reduce(elements / samples, degrees[:, B], balance)
    weights = 4.0 * all_reduce(samples, others, balance)
    return NORM_FLOP * elements + statistics + weights


def halo(shape: Shape, cuts: Degrees, window: tuple[int, int], balance: float) -> Costs:
    """Return the FLOP of fetching the rows and columns around a piece: a whole window where a dimension is cut."""
    tile = np.array(shape) / cuts
    inner = tile[:, H] * tile[:, W]
    outer = (tile[:, H] + window[0] * (cuts[:, H] > 1)) * (tile[:, W] + window[1] * (cuts[:, W] > 1))
    words: Costs = (outer - inner) * tile[:, B] * tile[:, C]
    return balance * words


def output_cuts(operator: Operator, degrees: Degrees) -> Degrees:
    """Return how every configuration cuts the tensor that an operator makes, int64[configurations, 4]."""
    if operator.kind is Kind.FLATTEN:
        return _joined(degrees)
    cuts = degrees[:, (B, N, H, W) if operator.kind is Kind.PRODUCT else TENSOR]
    if operator.kind is Kind.MEAN:
        cuts[:, [H, W]] = 1
    return cuts


def input_cuts(operator: Operator, degrees: Degrees) -> Degrees:
    """Return how every configuration cuts each tensor that an operator reads, int64[configurations, 4]."""
    return _joined(degrees) if operator.kind is Kind.UNFLATTEN else degrees[:, TENSOR]


def _joined(degrees: Degrees) -> Degrees:
    cuts = np.ones((len(degrees), 4), dtype=np.int64)
    cuts[:, 0] = degrees.prod(axis=1)
    return cuts


def edge_costs(shape: tuple[int, ...], source: Degrees, target: Degrees, balance: float = BALANCE) -> Costs:
    """Return the FLOP of handing a tensor on, forward and backward: 2 r max(0, |target tile| - |overlap|).

    Tiles are known by their sizes, not by where they lie: the overlap is the product of the smaller sides. It is
    nothing where the reader cuts the tensor into more pieces than there are at its maker: some reader holds none.

    Args:
        shape: of the tensor.
        source: cuts at the maker, int64[n, len(shape)].
        target: cuts at the reader, int64[m, len(shape)].
        balance: FLOP per word.

    Returns:
        float64[n, m].
    """
    have: Costs = np.array(shape) / source
    need: Costs = np.array(shape) / target
    wanted: Costs = need.prod(axis=1)
    overlap = np.ones((len(source), len(target)))
    for d in range(len(shape)):
        overlap *= np.minimum(have[:, d, None], need[None, :, d])
    is_finer = target.prod(axis=1)[None, :] > source.prod(axis=1)[:, None]
    missing: Costs = wanted[None, :] - np.where(is_finer, 0.0, overlap)
    return balance * 2.0 * missing.clip(min=0.0)
