r"""Times of collectives under the latency-bandwidth (alpha-beta) model.

Every algorithm is a few rounds of messages that are sent at the same time, by all groups of a mesh
at once. A round takes the latency of its longest route plus the bytes of a message divided by the
bandwidth that each message gets, which ``planner.devices.route`` finds by counting what shares every
link. The additions of a reduction hide behind the transfer and are left out, as in [Thakur05].

In the formulas p ranks hold m bytes each, alpha is the latency and B the bandwidth of a round.
"""

import functools
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, NamedTuple

from planner.cost.patterns import climb, double_tree, flip, fold, spread
from planner.devices.graph import Cluster
from planner.devices.route import PathCost, Router, neighbours

Axes = Sequence[int]
MAX_CHUNKS: Final = 128
"""Of a pipelined tree; more would save less than a tenth of the time."""
_MANY: Final = 2.0**50
"""Bytes that leave nothing of a latency."""


class Library(StrEnum):
    """Whose algorithms are used; a collective takes the cheapest that its library has."""

    NCCL = "nccl"
    """Rings and double binary trees, along each level of the machine or over all of it; its channels
    use every network card of a node, as going level by level does."""
    GLOO = "gloo"
    """One ring in rank order: what ``torch.distributed`` calls (``gloo/allreduce.cc``, UNSPECIFIED)."""
    MPI = "mpi"
    """A ring, or recursive halving and doubling [Thakur05]."""


def library_of(graph: Cluster) -> Library:
    """Return the library that runs on a machine: gloo where the innermost level is called ``cpu``, else NCCL."""
    return Library.GLOO if graph.levels[-1].name == "cpu" else Library.NCCL


def all_reduce_s(router: Router, axes: Axes, num_bytes: float, library: Library | None = None) -> float:
    """Return the time of an all-reduce of ``num_bytes`` on each rank; ``library`` None is that of the machine.

    The least of ``ring_all_reduce_s`` and, with NCCL, ``tree_all_reduce_s`` and, for every cut of the
    axes, ``hierarchical_all_reduce_s``; with MPI, ``halving_doubling_all_reduce_s``.
    """
    kept = _kept_ways(router, axes, library)
    least_s = math.inf
    for fixed_s, seconds_per_byte, trees, parts in kept:
        seconds = fixed_s + num_bytes * seconds_per_byte
        if trees and seconds + trees.least_s(num_bytes / parts) < least_s:  # they come last: often in vain
            seconds += trees.seconds(num_bytes / parts)
        elif trees:
            continue
        least_s = min(least_s, seconds)
    return least_s


def least_all_reduce_rate(router: Router, axes: Axes, most_bytes: float) -> float:
    """Return seconds per byte that no all-reduce of up to ``most_bytes`` on each rank undercuts.

    What a way costs apart from its bytes counts as for the largest message; that trees send in chunks is left out.
    """

    def least_s(way: _Way) -> float:
        linear_s = way.fixed_s + way.seconds_per_byte * most_bytes
        return linear_s + (way.trees.unchunked_s(most_bytes / way.parts) if way.trees else 0.0)

    return min(least_s(way) for way in _kept_ways(router, axes, None)) / most_bytes


def _kept_ways(router: Router, axes: Axes, library: Library | None) -> "list[_Way]":
    """Return the ways of all groups along these axes, linear ones first; made once for a router."""
    key = (tuple(sorted(axes)), library or library_of(router.graph))
    kept = _WAYS.setdefault(router, {})
    if key not in kept:
        kept[key] = sorted(_ways(router, *key), key=lambda way: way.trees is not None)
    return kept[key]


class _Way(NamedTuple):
    """One way to all-reduce: what is linear in the bytes, and trees for one of so many parts of them."""

    fixed_s: float
    seconds_per_byte: float
    trees: "_Trees | None" = None
    parts: int = 1


_WAYS: "weakref.WeakKeyDictionary[Router, dict[tuple[tuple[int, ...], Library], list[_Way]]]" = (
    weakref.WeakKeyDictionary()
)


def _ways(router: Router, axes: tuple[int, ...], library: Library) -> Iterator[_Way]:
    yield _linear(lambda num_bytes: ring_all_reduce_s(num_bytes, _size(router, axes), router.ring(axes)))
    if library is Library.MPI:
        yield _linear(lambda num_bytes: halving_doubling_all_reduce_s(router, axes, num_bytes))
    if library is not Library.NCCL:
        return
    yield _Way(0.0, 0.0, _Trees.of(router, axes))
    for cut in range(1, len(axes)):
        size, path = _size(router, axes[cut:]), router.ring(axes[cut:])
        inside = _linear(functools.partial(ring_all_reduce_s, num_ranks=size, path=path))
        for way in _ways(router, axes[:cut], library):
            yield _Way(
                inside.fixed_s + way.fixed_s,
                inside.seconds_per_byte + way.seconds_per_byte / size,
                way.trees,
                way.parts * size,
            )


def _linear(seconds: Callable[[float], float]) -> _Way:
    return _Way(fixed := seconds(0.0), (seconds(_MANY) - fixed) / _MANY)


def all_gather_s(router: Router, axes: Axes, num_bytes: float, library: Library | None = None) -> float:
    r"""Return the time of an all-gather whose result has ``num_bytes`` on each rank.

    One ring or, with NCCL, level by level if that is faster: along the outer axes, in as many groups
    at once as there are ranks along the inner ones, then along the inner axes.
    """
    library, axes = library or library_of(router.graph), sorted(axes)
    flat = ring_all_gather_s(num_bytes, _size(router, axes), router.ring(axes))
    if library is not Library.NCCL:
        return flat
    levels = (
        all_gather_s(router, axes[:cut], num_bytes / _size(router, axes[cut:]), library)
        + ring_all_gather_s(num_bytes, _size(router, axes[cut:]), router.ring(axes[cut:]))
        for cut in range(1, len(axes))
    )
    return min([flat, *levels])


def reduce_scatter_s(router: Router, axes: Axes, num_bytes: float, library: Library | None = None) -> float:
    """Return the time of a reduce-scatter of ``num_bytes`` on each rank: an all-gather backwards."""
    return all_gather_s(router, axes, num_bytes, library)


def ring_all_gather_s(num_bytes: float, num_ranks: int, path: PathCost) -> float:
    r"""Return the time of a ring all-gather; ``num_bytes`` is the whole result on each rank [Thakur05].

    .. math:: T = (p - 1) (\alpha + \frac{m}{p B})
    """
    return (num_ranks - 1) * (path.latency_s + num_bytes / num_ranks / path.bandwidth_bytes_per_s)


def ring_reduce_scatter_s(num_bytes: float, num_ranks: int, path: PathCost) -> float:
    """Return the time of a ring reduce-scatter of ``num_bytes`` on each rank; that of an all-gather."""
    return ring_all_gather_s(num_bytes, num_ranks, path)


def ring_all_reduce_s(num_bytes: float, num_ranks: int, path: PathCost) -> float:
    r"""Return the time of a ring all-reduce of ``num_bytes`` on each rank [Patarasuk09].

    .. math:: T = 2 (p - 1) (\alpha + \frac{m}{p B})
    """
    return 2 * ring_all_gather_s(num_bytes, num_ranks, path)


def hierarchical_all_reduce_s(router: Router, axes: Axes, cut: int, num_bytes: float, library: Library) -> float:
    """Return the time of an all-reduce level by level [Cho19].

    Reduce-scatter along the inner axes, ``axes[cut:]``; all-reduce of the pieces along the outer
    ones, in as many groups at once; all-gather back. Outer links carry only what they must.
    """
    inner = axes[cut:]
    size = _size(router, inner)
    inside = ring_all_reduce_s(num_bytes, size, router.ring(inner))
    return inside + all_reduce_s(router, axes[:cut], num_bytes / size, library)


def halving_doubling_all_reduce_s(router: Router, axes: Axes, num_bytes: float) -> float:
    r"""Return the time of an all-reduce by recursive vector halving and distance doubling [Rabenseifner04].

    Round k reduces half of what is left with the rank at distance 2^k; then the same backwards.

    .. math:: T = 2 \sum_{k=0}^{\log_2 p - 1} (\alpha_k + \frac{m}{2^{k+1} B_k})

    Of p ranks that are no power of two, the surplus first hands its m bytes to neighbours and gets
    the result from them at last: 2 (alpha + m / B) more.
    """
    size = _size(router, axes)
    rounds = int(math.log2(size))
    total = sum(_round_s(router.together(axes, flip, k), num_bytes / 2 ** (k + 1)) for k in range(rounds))
    return 2 * (total + _round_s(router.together(axes, fold), num_bytes))


def tree_all_reduce_s(router: Router, axes: Axes, num_bytes: float) -> float:
    r"""Return the time of an all-reduce over two binary trees, in chunks [Sanders09].

    Each tree reduces half of the data to its root and sends the sum back; a rank with children in
    one tree has none in the other. With k chunks of m / 2 k bytes, and t_i what such a chunk takes
    from the ranks of height i to their parents,

    .. math:: T = 2 \sum_i t_i - t + \max(k t, \frac{m}{2 B}), \quad
              t_i = \alpha_i + \frac{m}{2 k B_i}, \quad t = \max_i t_i

    B is what a message gets while both trees use all their edges in both directions. Latencies of some
    chunks then hide behind transfers of others, which the synchronous rounds of the paper do not let them.
    """
    return _Trees.of(router, axes).seconds(num_bytes)


def tree_chunks(router: Router, axes: Axes, num_bytes: float) -> int:
    """Return the number of chunks of ``tree_all_reduce_s``.

    A longer chunk delays the first one on its way, a shorter one adds latencies.
    """
    return _Trees.of(router, axes).chunks(num_bytes)


@dataclass(frozen=True, slots=True)
class _Trees:
    """Two trees over the ranks of every group: what their messages get.

    Attributes:
        climbs: one for each height.
        both: while all edges are used in both directions.
    """

    climbs: tuple[PathCost, ...]
    both: PathCost

    @staticmethod
    def of(router: Router, axes: Axes) -> "_Trees":
        heights = range((_size(router, axes) - 1).bit_length())
        climbs = tuple(router.together(axes, climb, height) for height in heights)
        return _Trees(climbs, router.together(axes, double_tree))

    def least_s(self, num_bytes: float) -> float:
        """Return less than ``seconds``."""
        return num_bytes / 2 / self.both.bandwidth_bytes_per_s

    def unchunked_s(self, num_bytes: float) -> float:
        """Return at most ``seconds``, as a line: all edges busy throughout, and each climb's latency up and down.

        Once for the slowest: it is what ``seconds`` counts beside the chunks.
        """
        latencies_s = [path.latency_s for path in self.climbs]
        return 2 * sum(latencies_s) - max(latencies_s, default=0.0) + self.least_s(num_bytes)

    def chunks(self, num_bytes: float) -> int:
        most = max(1, min(MAX_CHUNKS, int(num_bytes)))
        latency_s = max((path.latency_s for path in self.climbs), default=0.0)
        if latency_s == 0:
            return most
        sending_s = sum(num_bytes / path.bandwidth_bytes_per_s for path in self.climbs)
        return max(1, min(round(math.sqrt(sending_s / latency_s)), most))

    def seconds(self, num_bytes: float) -> float:
        chunks = self.chunks(num_bytes)
        rounds = [_round_s(path, num_bytes / 2 / chunks) for path in self.climbs]
        slowest_s = max(rounds, default=0.0)
        steady_s = self.least_s(num_bytes)
        return 2 * sum(rounds) - slowest_s + max(chunks * slowest_s, steady_s)


def exchange_s(router: Router, axes: Axes, num_bytes: float) -> float:
    r"""Return the time of an all-to-all in which the busiest rank moves ``num_bytes``.

    All messages are posted at once, as gloo (``gloo/alltoall.cc``) and NCCL's grouped sends do, not in
    the rounds of [Thakur05], in which links would wait for each other:

    .. math:: T = \alpha + \max_l \frac{f_l}{(p - 1) B_l} m

    with f_l pairs of ranks whose route uses link l. A rank's own time for each message is left out.
    """
    latency_s, seconds_per_byte = router.alltoall(axes)
    return latency_s + num_bytes * seconds_per_byte


def halo_s(router: Router, axes: Axes, num_bytes: float) -> float:
    r"""Return the time of a halo exchange: ``num_bytes`` to each of both neighbours, all at once.

    .. math:: T = \alpha + \frac{m}{B}

    with B what a message gets while every rank sends two and receives two.
    """
    return _round_s(router.together(axes, neighbours), num_bytes)


def point_to_point_s(router: Router, pairs: Iterable[tuple[int, int]], num_bytes: float) -> float:
    """Return the time of messages of ``num_bytes`` that are sent at once, as (from, to) positions in the mesh."""
    return _round_s(router.between(pairs), num_bytes)


def broadcast_s(router: Router, axes: Axes, num_bytes: float) -> float:
    r"""Return the time of a broadcast of ``num_bytes`` from the first rank of each group [Thakur05].

    The cheaper of a binomial tree, and a scatter along it followed by a ring all-gather:

    .. math:: T = \sum_k (\alpha_k + \frac{m}{B_k}), \quad
              T = \sum_k (\alpha_k + \frac{2^k m}{p B_k}) + (p - 1) (\alpha + \frac{m}{p B})

    Round k, from the largest to 0, sends over a distance of 2^k.
    """
    size = _size(router, axes)
    paths = [router.together(axes, spread, 2**k) for k in range((size - 1).bit_length())]
    scatter = sum(_round_s(path, num_bytes * 2**k / size) for k, path in enumerate(paths))
    gather = ring_all_gather_s(num_bytes, size, router.ring(axes))
    return min(binomial_broadcast_s(router, axes, num_bytes), scatter + gather)


def binomial_broadcast_s(router: Router, axes: Axes, num_bytes: float) -> float:
    """Return the time of a broadcast of ``num_bytes`` along a binomial tree; the first formula of ``broadcast_s``."""
    rounds = range((_size(router, axes) - 1).bit_length())
    return sum(_round_s(router.together(axes, spread, 2**k), num_bytes) for k in rounds)


def _round_s(path: PathCost, num_bytes: float) -> float:
    return path.latency_s + num_bytes / path.bandwidth_bytes_per_s


def _size(router: Router, axes: Axes) -> int:
    return math.prod(router.mesh.shape[a] for a in axes)
