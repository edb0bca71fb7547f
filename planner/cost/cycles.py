r"""Pipelines in cycles (``stale``, ``pipedream``): how long a cycle is once the pipeline is full; what a hybrid gains.

Positions wait for each other's messages, but not for each other's cycles. With x(c) the start of something in cycle c,

.. math:: x_v(c) \ge x_u(c - n_{uv}) + t_{uv}

for every u that v waits for. Such a system gets into a rhythm whose period is the largest :math:`\sum t / \sum n` over
the circles of u, v, ... [Baccelli et al., Synchronization and Linearity, 1992, chapter 3]. Circles are a stage's own
forward, backward and update; one direction of one link; and messages there and back between stages, over three cycles
or more, which take longest only where a message takes more than half a cycle.
"""

import itertools
from collections.abc import Sequence
from typing import Final, NamedTuple

import networkx

from planner.errors import UsageError

LEAST_GAIN: Final = 1e-12
"""Relative; a circle that is longer by less counts as no longer, because of rounding."""


class Taken(NamedTuple):
    """Seconds of an action.

    Attributes:
        result_s: until what it sends is there.
        busy_s: until its position is free again.
    """

    result_s: float
    busy_s: float


def steady_cycle_s(
    forward: Sequence[Taken],
    backward: Sequence[Taken],
    forward_links_s: Sequence[float],
    backward_links_s: Sequence[float],
) -> float:
    """Return the seconds of a cycle, on average, of a pipeline that is full.

    Args:
        forward: of every stage.
        backward: of every stage, with the update.
        forward_links_s: messages from stage i to stage i + 1.
        backward_links_s: messages back.
    """
    period_s = max(f.busy_s + b.busy_s for f, b in zip(forward, backward, strict=True))
    period_s = max((period_s, *forward_links_s, *backward_links_s))
    edges = _waits(forward, backward, forward_links_s, backward_links_s)
    while (circle := _longer_circle(edges, period_s)) is not None:
        period_s = sum(edges[pair][0] for pair in circle) / sum(edges[pair][1] for pair in circle)
    return period_s


def hybrid_speedup(num_iterations: int, num_pipelined: int, speedup: float) -> float:
    """Return how much faster training is whose first iterations are pipelined and faster so many times, the rest not.

    Raises:
        UsageError: More iterations are pipelined than there are, or there are none.
    """
    if num_iterations < 1 or not 0 <= num_pipelined <= num_iterations:
        raise UsageError(
            f"{num_pipelined} pipelined iterations of {num_iterations}: give between 0 and all of at least 1 iteration."
        )
    return num_iterations / (num_pipelined / speedup + num_iterations - num_pipelined)


def hybrid_limit(num_iterations: int, num_pipelined: int, num_registers: int) -> float:
    """Return n / (n_p / (2K + 1) + n - n_p), which a hybrid with K register pairs cannot exceed.

    [Zhang & Abdelrahman 2021]: 2K + 1 is the number of accelerators if forward and backward of a stage have one each,
    and those of the last stage one together. With one for every stage, as our positions are, the pipelined part is
    K + 1 times as fast at most (``hybrid_speedup``).

    Raises:
        UsageError: More iterations are pipelined than there are, or there are none.
    """
    return hybrid_speedup(num_iterations, num_pipelined, 2 * num_registers + 1)


_Node = tuple[str, int]
_Waits = dict[tuple[_Node, _Node], tuple[float, int]]
"""Seconds after which, and cycles later, the second goes on once the first has begun."""


def _waits(
    forward: Sequence[Taken],
    backward: Sequence[Taken],
    forward_links_s: Sequence[float],
    backward_links_s: Sequence[float],
) -> _Waits:
    """Return what waits for what, but for circles of one stage or one message."""
    edges: _Waits = {}
    for i, (f, b) in enumerate(zip(forward, backward, strict=True)):
        edges[("forward", i), ("backward", i)] = f.busy_s, 0
        edges[("backward", i), ("forward", i)] = b.busy_s, 1
    for i, (there_s, back_s) in enumerate(zip(forward_links_s, backward_links_s, strict=True)):
        edges[("forward", i), ("forward", i + 1)] = forward[i].result_s + there_s, 1
        edges[("backward", i + 1), ("backward", i)] = backward[i + 1].result_s + back_s, 1
    return edges


def _longer_circle(edges: _Waits, period_s: float) -> list[tuple[_Node, _Node]] | None:
    """Return a circle that takes longer than its cycles of this period; None where there is none."""
    graph: networkx.DiGraph[_Node] = networkx.DiGraph()
    for (u, v), (seconds, cycles) in edges.items():
        graph.add_edge(u, v, weight=cycles * period_s * (1 + LEAST_GAIN) - seconds)
    try:
        circle = networkx.find_negative_cycle(graph, ("forward", 0))
    except networkx.NetworkXError:
        return None
    return list(itertools.pairwise(circle))
