"""Which rows of a parameter each of the ranks that share it keeps, where parameters are sharded.

The cost model prices the result, the runtime stores it. A row is an index of dimension 0 of the piece that a rank works
with; rows are cut in balanced pieces.
"""

import math

from planner.ir.layout import Layout, Whole, balanced_pieces
from planner.ir.region import Region


def row_axes(layout: Layout) -> tuple[int, ...]:
    """Return the mesh axes over whose ranks a parameter can be cut in rows; none where some rank would get no row.

    Args:
        layout: of the parameter, as the layer that reads it needs it.
    """
    axes = layout.axes_with(Whole.SHARED)
    if not axes or not layout.shape:
        return ()
    fewest = min(stop - start for start, stop in layout.pieces(0))
    return axes if fewest >= math.prod(layout.mesh.shape[a] for a in axes) else ()


def row_region(layout: Layout, position: int) -> Region:
    """Return what the rank at a mesh position keeps of a parameter that is cut in rows, in coordinates of the whole."""
    axes, piece = row_axes(layout), layout.region(position)
    if not axes:
        return piece
    coordinates, index = layout.mesh.coordinates(position), 0
    for axis in axes:
        index = index * layout.mesh.shape[axis] + coordinates[axis]
    ranks = math.prod(layout.mesh.shape[a] for a in axes)
    start, stop = balanced_pieces(piece.shape[0], ranks)[index]
    first = piece.start[0]
    return Region((first + start, *piece.start[1:]), (first + stop, *piece.stop[1:]))
