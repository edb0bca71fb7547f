"""The layer graph: operators with the parameters and element-wise operators that belong to them."""

import functools
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

import networkx as nx

from planner.ir.canonical import sha256_of
from planner.ir.ops import Input, Op, Output, Redistribute
from planner.ir.split import LayerId
from planner.ir.tensor import TensorSpec


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter or buffer of a layer.

    Attributes:
        name: full name in the module, such as ``features.0.weight``.
        spec: shape and element type.
        out_dim: dimension that follows the layer's output channels, if any.
        in_dim: dimension that follows the layer's input channels, if any.
        trainable: has a gradient; buffers (running statistics) have none.
    """

    name: str
    spec: TensorSpec
    out_dim: int | None = 0
    in_dim: int | None = None
    trainable: bool = True


@dataclass(frozen=True, slots=True)
class Absorbed:
    """An operator without a layer of its own: it works on the piece that the layer's operator made."""

    id: str
    op: Op


@dataclass(frozen=True, slots=True)
class Layer:
    """A node of the layer graph.

    Attributes:
        id: the user's module name, or one made from it.
        op: the operator.
        inputs: ids of the layers whose outputs it reads, in the operator's order.
        output: whole output tensor, global batch included.
        params: parameters and buffers, those of absorbed operators included.
        absorbed: operators applied to the output in place, in order.
        origin: place in the user's code, for messages; no part of the digest.
    """

    id: LayerId
    op: Op
    inputs: tuple[LayerId, ...]
    output: TensorSpec
    params: tuple[Parameter, ...] = ()
    absorbed: tuple[Absorbed, ...] = ()
    origin: str = field(default="", compare=False)


@dataclass(frozen=True)
class LayerGraph:
    """Layers in topological order.

    Attributes:
        name: of the model.
        layers: every layer after those it reads.
        batch: samples of the global batch, the first size of every tensor that carries samples.
    """

    name: str
    layers: tuple[Layer, ...]
    batch: int

    def __post_init__(self) -> None:
        seen: set[LayerId] = set()
        for layer in self.layers:
            if layer.id in seen:
                raise ValueError(f"layer id {layer.id!r} appears twice")
            if missing := [i for i in layer.inputs if i not in seen]:
                raise ValueError(f"layer {layer.id!r} reads {missing} before they are made")
            seen.add(layer.id)

    @functools.cached_property
    def index(self) -> dict[LayerId, int]:
        """Position of every layer."""
        return {layer.id: i for i, layer in enumerate(self.layers)}

    def __getitem__(self, layer_id: LayerId) -> Layer:
        return self.layers[self.index[layer_id]]

    def inputs_of(self, layer: Layer) -> tuple[TensorSpec, ...]:
        """Return the tensors a layer reads, in the operator's order."""
        return tuple(self[i].output for i in layer.inputs)

    def edges(self) -> Iterator[tuple[int, int, int]]:
        """Yield (producer index, consumer index, position among the consumer's inputs)."""
        for j, layer in enumerate(self.layers):
            for position, producer in enumerate(layer.inputs):
                yield self.index[producer], j, position

    def nx(self) -> "nx.MultiDiGraph[LayerId]":
        """Return a networkx view; ``x + x`` has two edges."""
        graph: nx.MultiDiGraph[LayerId] = nx.MultiDiGraph()
        graph.add_nodes_from(layer.id for layer in self.layers)
        graph.add_edges_from((i, layer.id) for layer in self.layers for i in layer.inputs)
        return graph

    @functools.cached_property
    def num_params(self) -> int:
        """Trainable parameters; those that layers share count once."""
        sizes = {p.name: p.spec.numel for layer in self.layers for p in layer.params if p.trainable}
        return sum(sizes.values())

    @functools.cached_property
    def digest(self) -> str:
        """Hash of everything but the model's name and the places in the code."""
        return sha256_of([_plain(layer) for layer in self.layers])


def _plain(layer: Layer) -> dict[str, object]:
    return {
        "id": layer.id,
        "op": [layer.op.kind, asdict(layer.op)],
        "inputs": list(layer.inputs),
        "output": [list(layer.output.shape), layer.output.dtype],
        "params": [asdict(p) for p in layer.params],
        "absorbed": [[a.id, a.op.kind, asdict(a.op)] for a in layer.absorbed],
    }


def share_transfers(graph: LayerGraph) -> LayerGraph:
    """Return the graph with a redistribute layer behind every tensor that several layers read.

    Consumers that ask for the same layout then share one transfer and one gradient reduction.
    Outputs of the model read the tensor directly: their layout is pinned.
    """
    readers: dict[LayerId, int] = {}
    for layer in graph.layers:
        if not isinstance(layer.op, Output):
            for producer in layer.inputs:
                readers[producer] = readers.get(producer, 0) + 1
    shared = {i: LayerId(f"{i}:shared") for i, count in readers.items() if count > 1}
    layers: list[Layer] = []
    for layer in graph.layers:
        keeps = isinstance(layer.op, Output)
        inputs = layer.inputs if keeps else tuple(shared.get(i, i) for i in layer.inputs)
        layers.append(Layer(layer.id, layer.op, inputs, layer.output, layer.params, layer.absorbed, layer.origin))
        if layer.id in shared:
            layers.append(Layer(shared[layer.id], Redistribute(), (layer.id,), layer.output, origin=layer.origin))
    return LayerGraph(graph.name, tuple(layers), graph.batch)


def is_boundary(op: Op) -> bool:
    """Return whether an operator is an input or output of the model, whose split the plan's io pins."""
    return isinstance(op, Input | Output)


def tied_layers(graph: LayerGraph) -> tuple[int, ...]:
    """Return for every layer the first layer with which it shares a parameter, directly or not.

    Tied layers take the same split on every axis.
    """
    leader = list(range(len(graph.layers)))

    def find(i: int) -> int:
        while leader[i] != i:
            i = leader[i]
        return i

    owner: dict[str, int] = {}
    for i, layer in enumerate(graph.layers):
        for parameter in layer.params:
            low, high = sorted((find(owner.setdefault(parameter.name, i)), find(i)))
            leader[high] = low
    return tuple(find(i) for i in range(len(graph.layers)))
