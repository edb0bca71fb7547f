"""The layer graph: operators with the parameters and element-wise operators that belong to them."""

import functools
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace

import networkx as nx

from planner import html
from planner.ir.canonical import sha256_of
from planner.ir.ops import Input, Op, Output, Receive, Redistribute, Send, describe
from planner.ir.split import LayerId
from planner.ir.tensor import TensorSpec
from planner.units import format_count


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter or buffer of a layer.

    Attributes:
        name: full name in the module, such as ``features.0.weight``.
        spec: shape and element type.
        out_dim: dimension that follows the layer's output channels, if any.
        in_dim: dimension that follows the layer's input channels, if any.
        trainable: has a gradient; buffers (running statistics) have none.
        role: what it is to the operator: ``weight``, ``bias``, ``running_mean`` ...; empty where it is
            read through other operators.
        whole: every rank holds it whole, and its gradient is an addend wherever ranks do different work.
    """

    name: str
    spec: TensorSpec
    out_dim: int | None = 0
    in_dim: int | None = None
    trainable: bool = True
    role: str = ""
    whole: bool = False


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
        follows: the layer whose call made this layer's tensor as another of its results; it takes that layer's split.
        origin: place in the user's code, for messages; no part of the digest.
        saved_bytes: of this layer's results and what its operators keep beside them, held for backward;
            of the whole batch. No part of the digest: it may differ between versions of torch.
        saved_constant_bytes: those of ``saved_bytes`` that every rank holds whole: of weights computed from weights.
    """

    id: LayerId
    op: Op
    inputs: tuple[LayerId, ...]
    output: TensorSpec
    params: tuple[Parameter, ...] = ()
    absorbed: tuple[Absorbed, ...] = ()
    follows: LayerId | None = None
    origin: str = field(default="", compare=False)
    saved_bytes: int = field(default=0, compare=False)
    saved_constant_bytes: int = field(default=0, compare=False)


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
        """Return a networkx view."""
        graph: nx.MultiDiGraph[LayerId] = nx.MultiDiGraph()
        graph.add_nodes_from(layer.id for layer in self.layers)
        graph.add_edges_from((i, layer.id) for layer in self.layers for i in layer.inputs)
        return graph

    def _repr_html_(self) -> str:
        """Return what a notebook shows: the layers in order."""
        rows = [
            (str(layer.id), describe(layer.op), " x ".join(map(str, layer.output.shape)) or "scalar", _params_of(layer))
            for layer in self.layers
        ]
        title = f"{self.name}, batch {self.batch}: {len(rows)} layers, {format_count(self.num_params)} parameters"
        layers = html.table(("layer", "operator", "output", "parameters"), rows, num_text=3)
        return html.titled(title, html.folded("layers", layers))

    @functools.cached_property
    def num_params(self) -> int:
        """Trainable parameters; those that layers share count once."""
        sizes = {p.name: p.spec.numel for layer in self.layers for p in layer.params if p.trainable}
        return sum(sizes.values())

    @functools.cached_property
    def digest(self) -> str:
        """Hash of everything but the model's name and the places in the code."""
        return sha256_of([_plain(layer) for layer in self.layers])


def _params_of(layer: Layer) -> str:
    count = sum(parameter.spec.numel for parameter in layer.params if parameter.trainable)
    return format_count(count) if count else ""


def _plain(layer: Layer) -> dict[str, object]:
    return {
        "id": layer.id,
        "op": [layer.op.kind, asdict(layer.op)],
        "inputs": list(layer.inputs),
        "output": _plain_tensor(layer.output),
        "params": [{**asdict(p), "spec": [list(p.spec.shape), p.spec.dtype]} for p in layer.params],
        "follows": layer.follows,
        "absorbed": [[a.id, a.op.kind, asdict(a.op)] for a in layer.absorbed],
    }


def _plain_tensor(spec: TensorSpec) -> list[object]:
    return [list(spec.shape), spec.dtype, list(spec.roles), spec.sample_rows]


def share_transfers(graph: LayerGraph) -> LayerGraph:
    """Return the graph with a redistribute layer behind every tensor that several layers read.

    Consumers that ask for the same layout then share one transfer and one gradient reduction.
    Outputs of the model read the tensor directly: their layout is pinned. So do further results of a
    call: they are where the call is.
    """
    readers: dict[LayerId, int] = {}
    for layer in graph.layers:
        if not _reads_directly(layer):
            for producer in layer.inputs:
                readers[producer] = readers.get(producer, 0) + 1
    shared = {i: LayerId(f"{i}:shared") for i, count in readers.items() if count > 1}
    layers: list[Layer] = []
    for layer in graph.layers:
        inputs = layer.inputs if _reads_directly(layer) else tuple(shared.get(i, i) for i in layer.inputs)
        layers.append(replace(layer, inputs=inputs))
        if layer.id in shared:
            layers.append(Layer(shared[layer.id], Redistribute(), (layer.id,), layer.output, origin=layer.origin))
    return LayerGraph(graph.name, tuple(layers), graph.batch)


def _reads_directly(layer: Layer) -> bool:
    return isinstance(layer.op, Output | Send) or layer.follows is not None


def is_boundary(op: Op) -> bool:
    """Return whether an operator computes nothing: a tensor enters or leaves the model or a pipeline stage there."""
    return isinstance(op, Input | Output | Receive | Send)


def is_pinned(op: Op) -> bool:
    """Return whether an operator is an input or output of the model, whose split the plan's io pins."""
    return isinstance(op, Input | Output)


def tied_layers(graph: LayerGraph) -> tuple[int, ...]:
    """Return for every layer the first layer with which it shares a parameter or a call, directly or not.

    Tied layers take the same split on every axis.
    """
    leader = list(range(len(graph.layers)))

    def find(i: int) -> int:
        while leader[i] != i:
            i = leader[i]
        return i

    owner: dict[str, int] = {}
    for i, layer in enumerate(graph.layers):
        if layer.follows is not None:
            leader[find(i)] = find(graph.index[layer.follows])
        for parameter in layer.params:
            if parameter.whole and not parameter.trainable:
                continue  # a table that every rank holds whole ties nobody
            low, high = sorted((find(owner.setdefault(parameter.name, i)), find(i)))
            leader[high] = low
    return tuple(find(i) for i in range(len(graph.layers)))
