r"""Times of collectives under the latency-bandwidth (alpha-beta) model.

With p ranks, m bytes, alpha the latency and B the bandwidth of the slowest link of the ring,
following [Thakur05]; the additions of a reduction hide behind the transfer and are left out.
"""

import math
from collections.abc import Sequence

from planner.devices.route import PathCost, Router


def ring_all_gather_s(num_bytes: float, num_ranks: int, path: PathCost) -> float:
    r"""Return the time of a ring all-gather; ``num_bytes`` is the whole result on each rank.

    .. math:: T = (p - 1) (\alpha + \frac{m}{p B})
    """
    return (num_ranks - 1) * (path.latency_s + num_bytes / num_ranks / path.bandwidth_bytes_per_s)


def ring_reduce_scatter_s(num_bytes: float, num_ranks: int, path: PathCost) -> float:
    """Return the time of a ring reduce-scatter of ``num_bytes`` on each rank; that of an all-gather."""
    return ring_all_gather_s(num_bytes, num_ranks, path)


def ring_all_reduce_s(num_bytes: float, num_ranks: int, path: PathCost) -> float:
    r"""Return the time of a ring all-reduce of ``num_bytes`` on each rank.

    .. math:: T = 2 (p - 1) (\alpha + \frac{m}{p B})
    """
    return 2 * ring_all_gather_s(num_bytes, num_ranks, path)


def all_reduce_s(router: Router, axes: Sequence[int], num_bytes: float) -> float:
    """Return the time of an all-reduce over mesh axes: one ring, or level by level if that is faster.

    Level by level: reduce-scatter along the innermost axis, all-reduce of the pieces along the
    others, all-gather back. Each level then moves only what its outer links must carry.
    """
    shape = router.mesh.shape
    size = math.prod(shape[a] for a in axes)
    flat = ring_all_reduce_s(num_bytes, size, router.ring(axes))
    if len(axes) < 2:
        return flat
    *outer, inner = axes
    inner_s = ring_all_reduce_s(num_bytes, shape[inner], router.ring((inner,)))
    return min(flat, inner_s + all_reduce_s(router, outer, num_bytes / shape[inner]))


def exchange_s(router: Router, axes: Sequence[int], num_bytes: float) -> float:
    """Return the time of an all-to-all in which the busiest rank moves ``num_bytes``."""
    size = math.prod(router.mesh.shape[a] for a in axes)
    latency_s, seconds_per_byte = router.alltoall(axes)
    return (size - 1) * latency_s + num_bytes * seconds_per_byte
