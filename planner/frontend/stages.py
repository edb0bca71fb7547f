"""The traced model of one pipeline stage: its part of the fx graph, with what it receives as inputs."""

from collections.abc import Iterable

import torch
from torch import fx

from planner.frontend.batch import sample_size
from planner.frontend.calls import METADATA, name_of
from planner.frontend.lower import TracedModel
from planner.ir.graph import Layer, LayerGraph, is_boundary
from planner.ir.ops import Concat, Input, Output, Receive, Redistribute, Send
from planner.ir.split import LayerId


def stage_models(traced: TracedModel, graphs: Iterable[LayerGraph]) -> tuple[TracedModel, ...]:
    """Return the traced model of every stage.

    Its inputs are those of the model or what it receives, in the order of the layer graph; it returns what it sends, as
    a tuple, or what the model returns.

    Args:
        traced: the whole model, at micro-batch size.
        graphs: of ``planner.ir.stages.stage_graphs``.
    """
    stages = tuple(graphs)
    if len(stages) == 1:
        return (traced,)
    homes = _homes(traced, stages)
    return tuple(_Cutter(traced, graph, homes.get(s, set())).cut() for s, graph in enumerate(stages))


def _homes(traced: TracedModel, stages: tuple[LayerGraph, ...]) -> dict[int, set[fx.Node]]:
    """Return nodes that no layer reads and that do something (they write into buffers), by the stage that runs them.

    That is the first one with a layer of the module whose buffer it is, or else the first one.
    """
    owned = {name for names in (*traced.nodes.values(), *traced.sizes.values()) for name in names}
    modules: dict[str, int] = {}
    for s, graph in enumerate(stages):
        for layer in graph.layers:
            for parameter in layer.params:
                modules.setdefault(parameter.name.rpartition(".")[0], s)
    found: dict[int, set[fx.Node]] = {}
    for node in traced.graph.nodes:
        if node.name in owned or node.users or node.op in {"output", "placeholder", "get_attr"}:
            continue
        read = [n for n in node.all_input_nodes if n.op == "get_attr"]
        path = str(read[0].target).rpartition(".")[0] if read else ""
        found.setdefault(modules.get(path, 0), set()).add(node)
    return found


class _Cutter:
    """Copies the nodes of one stage."""

    def __init__(self, traced: TracedModel, layers: LayerGraph, extra: set[fx.Node]) -> None:
        self._traced, self._layers, self._extra = traced, layers, extra
        self._by_name: dict[str, fx.Node] = {node.name: node for node in traced.graph.nodes}
        self._graph = fx.Graph()
        self._copies: dict[fx.Node, fx.Node] = {}
        self._carrier: tuple[fx.Node, int, int] | None = None
        computed = (layer.id for layer in layers.layers if layer.id in traced.nodes and not is_boundary(layer.op))
        self._concats: dict[fx.Node, tuple[int, list[fx.Node]]] = {}
        own = {name for i in computed for name in traced.nodes[i]}
        self._elsewhere = {name for names in traced.nodes.values() for name in names} - own

    def cut(self) -> TracedModel:
        """Return the traced model of the stage."""
        own = [layer for layer in self._layers.layers if not isinstance(layer.op, Redistribute)]
        inputs = {
            layer.id: self._entering(layer.id, layer.op) for layer in own if isinstance(layer.op, Input | Receive)
        }
        for layer in own:
            spec = layer.output
            if layer.id in inputs and spec.sample_dim is not None and self._carrier is None:
                self._carrier = inputs[layer.id], spec.sample_dim, spec.sample_rows
        computed = [layer.id for layer in own if not is_boundary(layer.op)]
        names = {i: self._traced.nodes[i] for i in computed}
        sizes = {i: self._traced.sizes[i] for i in computed if i in self._traced.sizes}
        wanted = [self._by_name[n] for group in (*names.values(), *sizes.values()) for n in group]
        (output,) = self._traced.graph.find_nodes(op="output")
        is_last = any(isinstance(layer.op, Output) for layer in own)
        for layer in own:
            if isinstance(layer.op, Concat):
                node, sources = (
                    self._by_name[self._traced.nodes[layer.id][0]],
                    list(map(self._last, self._origins(layer))),
                )
                if not set(sources) <= set(node.all_input_nodes):
                    self._concats[node] = layer.op.dim, sources
        needed = self._reached([*wanted, *self._extra, *([output] if is_last else [])])
        for node in self._traced.graph.nodes:
            if node in needed and node is not output:
                self._copies[node] = self._copied(node)
        if is_last:
            self._graph.output(fx.node.map_arg(output.args[0], self._copies.__getitem__))
        else:
            sent = [layer.inputs[0] for layer in own if isinstance(layer.op, Send)]
            self._graph.output(tuple(self._copies[self._last(i)] for i in sent))
        self._graph.lint()
        nodes = {i: tuple(self._copies[self._by_name[n]].name for n in group) for i, group in names.items()}
        nodes |= {i: (node.name,) for i, node in inputs.items()}
        return TracedModel(
            self._graph, self._layers, nodes,
            {i: tuple(self._copies[self._by_name[n]].name for n in group) for i, group in sizes.items()},
            tuple(k for k in self._traced.keywords if k in inputs),
            self._traced.traced_by, self._traced.written_in_evaluation,
        )  # fmt: skip

    def _origins(self, layer: Layer) -> list[LayerId]:
        """Return the layers that made what a layer reads, redistribute layers apart."""
        sources = [self._layers[i] for i in layer.inputs]
        return [source.inputs[0] if isinstance(source.op, Redistribute) else source.id for source in sources]

    def _last(self, layer_id: LayerId) -> fx.Node:
        """Return the node whose tensor is a layer's."""
        return self._by_name[self._traced.nodes[layer_id][-1]]

    def _entering(self, layer_id: LayerId, op: object) -> fx.Node:
        """Copy an input of the model, or make a new one of what is received in its place."""
        last = self._last(layer_id)
        new = self._graph.node_copy(last) if isinstance(op, Input) else self._graph.placeholder(last.name)
        new.meta = dict(last.meta)
        self._copies[last] = new
        return new

    def _reached(self, wanted: Iterable[fx.Node]) -> set[fx.Node]:
        """Return these nodes and all that they read, up to what enters the stage."""
        found: set[fx.Node] = set()
        stack = list(wanted)
        while stack:
            node = stack.pop()
            if node in found or node in self._copies:
                continue
            found.add(node)
            sources = self._concats[node][1] if node in self._concats else node.all_input_nodes
            stack.extend(n for n in sources if not self._is_foreign(n, node))
        return found

    def _is_foreign(self, source: fx.Node, reader: fx.Node) -> bool:
        """Return whether a node only asks for sizes or the device of a tensor that is not in the stage."""
        asks = reader.target is sample_size or name_of(reader) in METADATA
        asks = asks or (reader.target is getattr and reader.args[1] in {"device", "dtype"})
        return asks and source not in self._copies and source.name in self._elsewhere

    def _copied(self, node: fx.Node) -> fx.Node:
        if node in self._concats:  # an earlier concatenation stands for its parts
            dim, parts = self._concats[node]
            arguments = [self._copies[n] for n in parts], dim
            new = self._graph.create_node("call_function", torch.cat, arguments, name=node.name)
        elif self._carrier is not None and node.target is sample_size and node.args[0] not in self._copies:
            carrier, dim, rows = self._carrier
            new = self._graph.call_function(sample_size, (carrier, dim, rows, node.args[3]))
        else:
            new = self._graph.node_copy(node, lambda n: self._copy_of(n, node))
        new.meta = dict(node.meta)
        return new

    def _copy_of(self, source: fx.Node, reader: fx.Node) -> fx.Node:
        """Return the copy of what a node reads; another tensor for one of which it only asks the device or type."""
        if source in self._copies:
            return self._copies[source]
        assert self._carrier is not None, f"{reader.name} reads {source.name}, which is not in its stage"
        return self._carrier[0]
