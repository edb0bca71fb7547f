"""What a mesh axis can split of a layer, and what the dimensions of a tensor hold."""

from enum import StrEnum


class Dimension(StrEnum):
    """What a mesh axis can split; counts parts of the output but for the two ``in_channel`` forms."""

    SAMPLE = "sample"
    HEIGHT = "height"
    WIDTH = "width"
    DEPTH = "depth"
    LENGTH = "length"
    OUT_CHANNEL = "out_channel"
    IN_CHANNEL = "in_channel"
    """Split the reduction; the partial sums are all-reduced inside the layer."""
    IN_CHANNEL_SCATTER = "in_channel_scatter"
    """Split the reduction; the partial sums are reduce-scattered into output channels."""
    REPLICATE = "replicate"
    BROADCAST = "broadcast"
    """Of what only moves or arrives: equal copies whose gradients are addends of one sum."""


CHANNEL_DIMENSIONS = frozenset({Dimension.OUT_CHANNEL, Dimension.IN_CHANNEL, Dimension.IN_CHANNEL_SCATTER})
SPATIAL_DIMENSIONS = frozenset({Dimension.HEIGHT, Dimension.WIDTH, Dimension.DEPTH, Dimension.LENGTH})

SPACE: dict[int, tuple[Dimension, ...]] = {
    0: (),
    1: (Dimension.LENGTH,),
    2: (Dimension.HEIGHT, Dimension.WIDTH),
    3: (Dimension.DEPTH, Dimension.HEIGHT, Dimension.WIDTH),
}
"""The names of one to three dimensions of space, outermost first."""

Roles = tuple[Dimension | None, ...]
"""What each dimension of a tensor holds; None where cutting it has no meaning."""


def image_roles(rank: int) -> Roles:
    """Return samples, channels, space: what convolutions read and write."""
    if rank < 2:
        return (Dimension.SAMPLE,)[:rank]
    return (Dimension.SAMPLE, Dimension.OUT_CHANNEL, *SPACE.get(rank - 2, (None,) * (rank - 2)))
