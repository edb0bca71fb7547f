"""Who sends to whom in one round of a collective, as (from, to) positions in a group of a size.

Messages of one pattern are sent at the same time; ``planner.devices.route`` prices them. Sources of the
algorithms are beside their formulas in ``planner.cost.collectives``.
"""

import math
from collections.abc import Iterable


def flip(size: int, bit: int) -> Iterable[tuple[int, int]]:
    """Pairs whose numbers differ in one bit send to each other; surplus ranks stay out, see ``fold``."""
    surplus = size - 2 ** int(math.log2(size))
    members = [*range(1, 2 * surplus, 2), *range(2 * surplus, size)]
    return [(member, members[index ^ 1 << bit]) for index, member in enumerate(members)]


def fold(size: int) -> Iterable[tuple[int, int]]:
    """So many first ranks that the others are a power of two, every other one, send to the next."""
    return [(2 * i, 2 * i + 1) for i in range(size - 2 ** int(math.log2(size)))]


def spread(size: int, distance: int) -> Iterable[tuple[int, int]]:
    """A round of a binomial tree: ranks that have the data send it over a distance."""
    return [(i, i + distance) for i in range(0, size - distance, 2 * distance)]


def tree_parent(rank: int, size: int) -> int:
    """Return the parent of a rank other than 0 in a binary tree over ranks in order, whose root is 0.

    A rank's height is the number of the lowest bit that is set; that of its parent is larger.
    """
    bit = rank & -rank
    above = (rank ^ bit) | bit << 1
    return above if above < size else rank ^ bit


def climb(size: int, height: int) -> Iterable[tuple[int, int]]:
    """In both trees of ``double_tree``, the ranks of one height send to their parents."""
    ranks = range(1 << height, size, 2 << height)
    edges = [(rank, tree_parent(rank, size)) for rank in ranks]
    return [*edges, *(_mirrored(edge, size) for edge in edges)]


def double_tree(size: int) -> Iterable[tuple[int, int]]:
    """Both directions of every edge of a tree and of its mirror image, or with odd sizes its shift by one."""
    edges = [edge for height in range((size - 1).bit_length()) for edge in climb(size, height)]
    return [pair for child, parent in edges for pair in ((child, parent), (parent, child))]


def _mirrored(edge: tuple[int, int], size: int) -> tuple[int, int]:
    child, parent = edge
    return ((child + 1) % size, (parent + 1) % size) if size % 2 else (size - 1 - child, size - 1 - parent)
