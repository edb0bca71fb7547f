"""Where a plan recomputes halos instead of exchanging them: exact, for given splits.

A run of layers that are cut in space alike falls into segments. In front of a segment one halo is fetched, as wide as
all of its layers need; within it nothing moves, and each layer computes a tile that is the larger the farther the
segment's end is. So what a layer computes follows from what its readers compute. Beside its piece, a layer gets one
option for each tile that some combination of its readers' options asks for; between a tile and a reader that it does
not contain there is no transfer. What is left is a small problem of the same kind as the search for splits, and the
same elimination solves it exactly: over a chain it is the recursion over segments, over blocks with branches likewise.

The additive cost leaves out what gradient reductions hide behind, so the result is simulated, and taken where its step
is shorter. Published where each tile is recomputed by hand: overlapped tiling of stencils and of convolutions
(``planner/README.md``, [Dryden19a] exchanges instead).
"""

import itertools
import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from enum import StrEnum
from typing import Final

from planner.cost.simulate import simulated_step_s
from planner.cost.table import CostTable
from planner.ir.layout import Layout
from planner.ir.recompute import all_recomputing, enlarged, may_recompute, readers_of, tiled, untied
from planner.ir.rules import partition
from planner.ir.split import LayerId, Split
from planner.search.elimination import solve_dp
from planner.search.formulate import formulate
from planner.search.problem import Choice, Limits
from planner.space.enumerate import SearchSpace

MAX_TILES: Final = 12
"""Options of a layer beside its piece; the smallest tiles. Of a chain: segments of up to so many layers and one."""
MAX_COMBINATIONS: Final = 4096
"""Of the readers' options that are looked at for a layer."""


class HaloRecompute(StrEnum):
    """Which halos ranks compute themselves."""

    AUTO = "auto"
    """Those where that is predicted to be faster."""
    ALWAYS = "always"
    """All that can be."""
    NEVER = "never"


def tile_space(table: CostTable, choice: Choice) -> SearchSpace:
    """Return the space of a strategy in which layers may have tiles; each layer's own split comes first."""
    space = table.space
    graph, mesh, strategy = space.graph, space.mesh, table.strategy(choice)
    lies = {layer.id: partition(layer, graph.inputs_of(layer), mesh) for layer in graph.layers}
    readers, alone = readers_of(graph), untied(graph)
    found: dict[LayerId, tuple[Split, ...]] = {layer: (split,) for layer, split in strategy.items()}
    for layer in reversed(graph.layers):
        if layer.id not in alone or not may_recompute(layer):
            continue
        own = strategy[layer.id]
        asked = [
            list(dict.fromkeys(lies[reader].layouts(split).inputs[k] for split in found[reader]))
            for reader, k in readers[layer.id]
        ]
        tiles = {
            split: _elements(lies[layer.id].layouts(split).output)
            for needs in itertools.islice(itertools.product(*asked), MAX_COMBINATIONS)
            if (split := tiled(layer, lies[layer.id], own, needs)) is not None and split.tiles
        }
        smallest = sorted(tiles, key=lambda split: (tiles[split], split.tiles))[:MAX_TILES]
        found[layer.id] = own, *smallest
    return replace(space, splits=found, narrowed_from=space.num_strategies)


def _elements(layout: Layout) -> int:
    return math.prod(layout.largest_shape())


def with_tiles(table: CostTable, choice: Choice, recomputing: Collection[LayerId]) -> tuple[CostTable, Choice]:
    """Return the table of one strategy in which these layers recompute halos, and its only choice.

    Raises:
        ValueError: a layer cannot (``planner.ir.recompute.enlarged``).
    """
    space = table.space
    strategy = enlarged(space.graph, space.mesh, table.strategy(choice), recomputing)
    one = replace(space, splits={i: (split,) for i, split in strategy.items()}, narrowed_from=space.num_strategies)
    return CostTable.of(one, table.model), (0,) * len(choice)


def recomputed(
    table: CostTable, choice: Choice, wish: HaloRecompute, bucket_bytes: int, limit_bytes: int | None = None
) -> frozenset[LayerId]:
    """Return the layers of a strategy that recompute halos.

    Args:
        table: the costs.
        choice: the strategy.
        wish: which halos may be, or have to be.
        bucket_bytes: of the gradient reductions.
        limit_bytes: memory of a device; where the strategy does not obey it, nothing recomputes.
    """
    graph, strategy = table.space.graph, table.strategy(choice)
    if wish is HaloRecompute.NEVER:
        return frozenset()
    every = all_recomputing(graph, table.space.mesh, strategy)
    if wish is HaloRecompute.ALWAYS or not every:
        return every
    tiles = CostTable.of(tile_space(table, choice), table.model)
    formulation = formulate(tiles, limit_bytes=limit_bytes)
    solution = solve_dp(formulation.problem, Limits())
    if solution.choice is None:
        return frozenset()
    found = _layers_with_tiles(tiles.strategy(formulation.layer_choice(solution.choice)))
    if not found:
        return found
    before_s = simulated_step_s(table, choice, bucket_bytes)
    return found if simulated_step_s(*with_tiles(table, choice, found), bucket_bytes) < before_s else frozenset()


def _layers_with_tiles(strategy: Mapping[LayerId, Split]) -> frozenset[LayerId]:
    return frozenset(layer for layer, split in strategy.items() if split.tiles)
