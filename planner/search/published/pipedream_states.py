"""Where PipeDream may cut a network [PipeDream19]: the down-sets of its layers, each with what crosses the cut.

A down-set holds with a layer all that it depends on. A cut between two stages is a down-set: the layers that are
computed so far. On a chain these are its prefixes; beside branches there are more.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from planner.errors import UsageError
from planner.profile.pipedream import MeasuredLayer

Numbers = npt.NDArray[np.float64]

MAX_STATES: Final = 4096
"""Down-sets of a network; tables of the partitioner have the square of that."""


@dataclass(frozen=True, slots=True)
class States:
    """Down-sets, smaller ones first; the first is empty, the last has all layers. There are n of them.

    Attributes:
        compute_s: of the layers in each, forward and backward of one mini-batch; float64[n].
        weight_bytes: of the layers in each; float64[n].
        sent_bytes: results that cross the cut behind each; 0 behind the last; float64[n].
        extends: whether the second is larger than the first and contains it; bool[n, n].
        layers: of each, as positions in the topological order.
    """

    compute_s: Numbers
    weight_bytes: Numbers
    sent_bytes: Numbers
    extends: npt.NDArray[np.bool_]
    layers: tuple[frozenset[int], ...]


def states_of(layers: Sequence[MeasuredLayer]) -> States:
    """Return every down-set of layers that are in a topological order.

    Raises:
        UsageError: there are more than ``MAX_STATES``: too many branches side by side.
    """
    masks = _down_sets([sum(1 << i for i in layer.reads) for layer in layers])
    compute_s = np.array([layer.forward_s + layer.backward_s for layer in layers])
    weights = np.array([layer.weight_bytes for layer in layers])
    sizes = [layer.output_bytes for layer in layers]
    sets = [frozenset(i for i in range(len(layers)) if mask >> i & 1) for mask in masks]
    member = np.array([[i in s for i in range(len(layers))] for s in sets], dtype=np.float64)
    sent = [sum(sizes[i] for i in _crossing(layers, s)) for s in sets[:-1]]
    outside = member @ (1 - member).T  # how many layers of the one are not in the other
    extends = (outside == 0) & (outside.T > 0)
    return States(member @ compute_s, member @ weights, np.array([*sent, 0.0]), extends, tuple(sets))


def chain_of(layers: Sequence[MeasuredLayer]) -> States:
    """Return the prefixes of the order alone, each sending the result of its last layer alone.

    This is the chain of the printed formula, in which a_s is of layer s: what skips over the cut beside it is free.
    """
    n = len(layers)
    compute_s = np.cumsum([0.0, *(layer.forward_s + layer.backward_s for layer in layers)])
    weights = np.cumsum([0.0, *(layer.weight_bytes for layer in layers)])
    sent = np.array([0.0, *(layer.output_bytes for layer in layers[:-1]), 0.0])
    prefixes = tuple(frozenset(range(i)) for i in range(n + 1))
    return States(compute_s, weights, sent, np.triu(np.ones((n + 1, n + 1), dtype=bool), 1), prefixes)


def _down_sets(reads: Sequence[int]) -> list[int]:
    """Return the down-sets as bit masks; smaller ones first."""
    found, level = [0], [0]
    for _ in reads:
        larger = {
            mask | 1 << i for mask in level for i, need in enumerate(reads) if not mask >> i & 1 and not need & ~mask
        }
        level = sorted(larger)
        found += level
        if len(found) > MAX_STATES:
            raise UsageError(
                f"this network can be cut in more than {MAX_STATES} places: too many branches side by side for "
                "PipeDream's partitioner; merge the layers of each branch into one"
            )
    return found


def _crossing(layers: Sequence[MeasuredLayer], inside: frozenset[int]) -> set[int]:
    return {i for j, layer in enumerate(layers) if j not in inside for i in layer.reads if i in inside}
