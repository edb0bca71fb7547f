r"""Parameters, gradients and optimizer state cut over the ranks that would hold equal copies of them.

A parameter whose gradient is summed over g ranks (``LayerLayouts.params``: SHARED there) can live in g pieces. With m
bytes of it on each rank, per step and beside the layer's own work [Rajbhandari20, sections 5 and 7]:

=============  ======================================  ============================  =====================
sharding       communication                           bytes on a rank               updated on a rank
=============  ======================================  ============================  =====================
``none``       all-reduce of gradients, m              parameters m, gradients m,    m
                                                       state k m
``optimizer``  reduce-scatter of gradients, m;         m, m, k m / g                 m / g
               all-gather behind the update, m
``full``       all-gather before forward, m, and       m / g, m / g, k m / g; whole  m / g
               again before backward, m;               while a layer needs them
               reduce-scatter of gradients, m
=============  ======================================  ============================  =====================

k is the optimizer's ``STATE_COPIES``. An all-reduce moves what a reduce-scatter and an all-gather move, so
``optimizer`` sends as much as ``none`` and ``full`` 1.5 times as much.

What is cut are rows, the indices of dimension 0 of the piece that a rank works with (``planner.ir.rows``). A parameter
with fewer rows than ranks is held, reduced and updated as without sharding (``LayerCost.whole``). Where rows do not
divide, equal sections of messages have gaps, which are not counted.

``optimizer`` is stage 1 of ZeRO: gradients are reduced in buckets behind backward, and the same buckets are gathered
behind the update (by the runtime in front of the next forward pass).

``full`` is its stage 3 in the form of FSDP [Zhao23], as torch's ``fully_shard`` does it for every layer on its own: the
gather of the next layer with parameters is started when a layer starts (one ahead, forward as backward) and waits its
turn on the levels of the machine that it uses; gradients are reduced layer by layer, without buckets. At most two
layers' parameters and two layers' gradients are whole at any time: the runtime waits for a layer's gradients when those
of the second layer behind it are ready, by which time the gather between them had to be there. The last layer is
gathered twice as all others are, although its two uses follow each other. Parameters that are not trained, buffers, and
parameters that no two ranks share are held as without sharding.
"""

import math
from collections.abc import Sequence
from enum import StrEnum

from planner.ir.graph import Layer
from planner.ir.layout import Layout
from planner.ir.rows import row_axes


class ParameterSharding(StrEnum):
    """What is cut over the ranks that synchronise a parameter; the value is that of the plan file."""

    NONE = "none"
    OPTIMIZER = "optimizer"
    FULL = "full"


def shard_bytes(layout: Layout, item_bytes: int) -> int:
    """Return the most bytes that a rank keeps of a parameter that is cut in rows."""
    ranks = math.prod(layout.mesh.shape[a] for a in row_axes(layout))
    rows, *row = layout.largest_shape()
    return math.ceil(rows / ranks) * math.prod(row) * item_bytes


def largest_gathers(layers: Sequence[Layer]) -> tuple[int, int]:
    """Return the trainable bytes of the layer with the most, and of that with the second most, whole."""
    sizes = sorted((whole_bytes(layer) for layer in layers), reverse=True)
    first, second = (*sizes, 0, 0)[:2]
    return first, second


def whole_bytes(layer: Layer) -> int:
    """Return the bytes of all trainable parameters of a layer."""
    return sum(p.spec.numel * p.spec.dtype.item_bytes for p in layer.params if p.trainable)
