"""Which meshes to search: whole levels first, then fewer devices, then levels cut into several axes.

Three limits keep the search short, none of them a clock, so that the same request gives the same plan:

- a mesh is left out where even its compute alone is longer than the best step so far; one over fewer devices of the
  same levels is then not looked at either;
- the pairs of splits to be priced on further meshes are counted, up to ``MAX_PAIRS``;
- so are the meshes (``MAX_MESHES``, ``MAX_FEWER``).
"""

from collections.abc import Collection, Iterator
from typing import Final

from planner.devices.graph import Cluster
from planner.devices.shapes import factored, fewer
from planner.ir.dimension import Dimension
from planner.ir.graph import Layer, LayerGraph, is_boundary
from planner.ir.mesh import Mesh
from planner.ir.ops import Redistribute
from planner.ir.rules import effects

MAX_AXES: Final = 3
"""Of a candidate mesh; the splits of a layer are up to 5 to the power of its axes."""
MAX_MESHES: Final = 6
"""Candidate meshes over all devices: whole levels first, then their factorings."""
MAX_FEWER: Final = 8
"""Candidate meshes over fewer devices."""
MAX_PAIRS: Final = 300_000
"""Pairs of splits on the edges of further meshes, edges between layers that look alike counted once: a ResNet-50 has
381,385 on three axes and 17,933 on two, so that its plan takes seconds; an AlexNet has room for all candidates."""

Counts = tuple[int, ...]
"""How many devices of each level."""


def whole_meshes(graph: Cluster) -> list[Mesh]:
    """Return the candidates over all devices, whole levels first; neighbouring ones are joined where they are many."""
    sizes = [level.size for level in graph.levels]
    few = [mesh for mesh in graph.meshes() if len(mesh.axes) <= MAX_AXES]
    return (few or list(graph.whole_meshes(sizes, MAX_AXES)))[:MAX_MESHES]


def fewer_meshes(graph: Cluster) -> Iterator[tuple[Counts, Mesh]]:
    """Yield the candidates over fewer devices, and how many of each level they use, the most promising first."""
    every = fewer([level.size for level in graph.levels])
    chosen = every[:MAX_FEWER]
    if (alone := (1,) * len(graph.levels)) in every[MAX_FEWER:]:
        chosen[-1] = alone  # small networks are fastest there, however many levels there are
    for counts in chosen:
        yield counts, graph.whole_meshes(counts, MAX_AXES)[0]


def factorings(graph: Cluster, counts: Counts) -> list[Mesh]:
    """Return the meshes over these devices that cut levels, fewest axes first."""
    found = (graph.mesh_of(shape) for shape in factored(counts)[1:])
    return [mesh for mesh in found if len(mesh.axes) <= MAX_AXES][: MAX_MESHES - 1]


def num_pairs(graph: LayerGraph, dimensions: Collection[Dimension], num_axes: int) -> int:
    """Return about how many pairs of splits the edges of a network have on a mesh of so many axes.

    Args:
        graph: the network.
        dimensions: that may be split.
        num_axes: of the mesh.
    """
    options = {layer.id: _num_dimensions(layer, graph, dimensions) ** num_axes for layer in graph.layers}
    signature = {
        layer.id: (layer.op, layer.output, graph.inputs_of(layer), tuple(p.spec for p in layer.params))
        for layer in graph.layers
    }
    pairs = {
        (signature[producer], signature[layer.id], position): options[producer] * options[layer.id]
        for layer in graph.layers
        for position, producer in enumerate(layer.inputs)
    }
    return sum(pairs.values())


def _num_dimensions(layer: Layer, graph: LayerGraph, dimensions: Collection[Dimension]) -> int:
    if is_boundary(layer.op):
        return 1
    legal = effects(layer.op, graph.inputs_of(layer), layer.output)
    also = {Dimension.REPLICATE, Dimension.BROADCAST} if isinstance(layer.op, Redistribute) else {Dimension.REPLICATE}
    return sum(d in dimensions or d in also for d in legal)
