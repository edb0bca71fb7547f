"""From a traced model and a plan to the parallel module: sharded operators, transfers in between."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from planner.frontend.batch import sample_size
from planner.frontend.calls import is_in_place
from planner.frontend.drafts import is_structure
from planner.frontend.lower import TracedModel
from planner.frontend.trace import attribute
from planner.ir import ops as ir
from planner.ir.graph import Layer
from planner.ir.layout import Layout, Whole
from planner.ir.rules import LayerLayouts, layouts, reduced_axes, spatial_axes
from planner.ir.split import LayerId
from planner.ir.transfer import steps
from planner.plan.schema import Plan
from runtime.comm.communicator import Axes
from runtime.lowering.chance import Seeded, shard_key
from runtime.lowering.idle import COUNTER, Idle
from runtime.lowering.operators import Operators
from runtime.lowering.ops import InTraining, steadied
from runtime.lowering.products import scaled
from runtime.lowering.rewriting import LAYER, draws, identifier
from runtime.state import BatchSize
from runtime.types import Casting


@dataclass(frozen=True)
class Lowered:
    """What lowering made.

    Attributes:
        graph: calls the modules by their names.
        state: modules, and parameters and buffers that the graph reads itself, by full name.
        transient: names of buffers that are no part of the state dict.
        synchronised: name, parameter and axes of every parameter whose gradient is reduced, in the
            order in which backward makes the gradients ready.
        replicas: by identity of a local parameter, how many ranks hold the same piece.
        pieces: local parameters by identity of the whole ones.
        cut: by name, the layout of every parameter and buffer that a layer reads.
    """

    graph: fx.Graph
    state: dict[str, Any]
    transient: tuple[str, ...]
    synchronised: list[tuple[str, nn.Parameter, Axes]]
    replicas: dict[int, int]
    pieces: dict[int, nn.Parameter]
    cut: dict[str, Layout]


def communication_axes(traced: TracedModel, plan: Plan) -> set[Axes]:
    """Return every set of mesh axes along which ranks will talk."""
    graph, mesh, strategy = traced.layers, plan.mesh, plan.enlarged(traced.layers)
    found: set[Axes] = set()
    of: dict[LayerId, LayerLayouts] = {}
    for layer in graph.layers:
        split = strategy[layer.id]
        mine = of[layer.id] = layouts(layer, graph.inputs_of(layer), mesh, split)
        pairs = [(mine.computed, mine.output)]
        pairs += [(of[p].output, need) for p, need in zip(layer.inputs, mine.inputs, strict=True)]
        for have, need in pairs:
            found |= {s.axes for s in (*steps(have, need), *steps(need.gradient, have.gradient)) if s.kind.communicates}
        found |= {layout.axes_with(Whole.SHARED) for layout in mine.params}
        found |= {reduced_axes(layer.output, mine.output), spatial_axes(layer.output, mine.output)}
    everyone = tuple(range(len(mesh.axes)))
    return {axes for axes in found | {everyone} if axes}


class Lowering(Operators):
    """Rewrites one traced model for one rank."""

    def share(self, other: Lowered, gradient_scale: float) -> None:
        """Work on the parameters of another lowered graph of the model, with gradients as large as there."""
        self._params.pieces, self._params.cut = other.pieces, other.cut
        self._params.replicas, self._params.gradient_scale = other.replicas, gradient_scale

    def run(self) -> Lowered:
        """Rewrite the graph layer by layer."""
        self._state.gradient_scale = self._params.gradient_scale
        outputs: list[fx.Node] = []
        position = self._state.communicator.position
        if any(each.output.is_idle(position) for each in self._layouts.values()):
            self._casting = self._made_casting()
            self._state.dtype = self._casting.own
        for layer in self._traced.layers.layers:
            match layer.op:
                case ir.Output() | ir.Send():
                    outputs.append(self._converted(layer, 0))
                case ir.Redistribute():
                    self._origins[layer.id] = layer.inputs[0]
                    self._values[layer.id] = self._converted(layer, 0)
                case _:
                    self._layer(layer)
        self._replace_outputs(outputs)
        self._bind_attributes()
        self._bind_global_sizes()
        self._seed_constants()
        self._graph.lint()
        ready = list(reversed(self._params.synchronised.values()))
        state, params = {**self._modules, **self._attributes}, self._params
        return Lowered(self._graph, state, self._transient(), ready, params.replicas, params.pieces, params.cut)

    def _layer(self, layer: Layer) -> None:
        names = self._traced.nodes[layer.id]
        main, *absorbed = (self._nodes[name] for name in names)
        for node in (main, *absorbed):
            node.meta[LAYER] = layer.id
        if self._layouts[layer.id].output.is_idle(self._state.communicator.position):
            self._values[layer.id] = self._idle(layer, [main, *absorbed])
            return
        if not isinstance(layer.op, ir.Input | ir.Receive):
            self._connect(layer, [main, *absorbed])
            for parameter in layer.params:
                self._params.local(layer, attribute(self._model, parameter.name))
            main = self._operator(layer, main, layer.op, is_main=True)
        last = self._steadied(layer.op, main)
        for part, node in zip(layer.absorbed, absorbed, strict=True):
            last = self._steadied(part.op, self._operator(layer, node, part.op, is_main=False))
        self._values[layer.id] = last

    def _idle(self, layer: Layer, nodes: list[fx.Node]) -> fx.Node:
        """Leave a layer out that other ranks run; return the node with this rank's part of its result, nothing."""
        last = nodes[-1]
        sources = [self._converted(layer, k) for k in range(len(layer.inputs))]
        read = {p.name: attribute(self._model, p.name) for p in layer.params}
        for tensor in read.values():
            self._params.local(layer, tensor)
        trained = [name for name, tensor in read.items() if isinstance(tensor, nn.Parameter)]
        counters = [name for name, tensor in read.items() if name.endswith(COUNTER) and not tensor.dim()]
        module = Idle(self._layouts[layer.id].output.region(self._state.communicator.position).shape, layer,
                      len(layer.inputs), len(trained), counters, self._casting, self._state)  # fmt: skip
        name = self._add(f"idle.{identifier(layer.id)}", module)
        with self._graph.inserting_before(last):
            tensors = [self._graph.get_attr(each) for each in (*trained, *counters)]
            new = self._graph.call_module(name, (*sources, *tensors))
        new.meta |= {"val": last.meta.get("val"), LAYER: layer.id}
        last.replace_all_uses_with(new)
        sizes = [self._nodes[each] for each in self._traced.sizes.get(layer.id, ())]
        for node in reversed([*sizes, *nodes]):
            if not node.users:
                self._graph.erase_node(node)
        return new

    def _made_casting(self) -> Casting:
        """Return what autocast does to the model's tensors, from a copy of the graph as the user's model is."""
        empty: dict[str, torch.Tensor] = {
            x.id: torch.empty(x.output.shape, dtype=getattr(torch, x.output.dtype.value), device="meta")
            for x in self._traced.layers.layers
            if isinstance(x.op, ir.Input | ir.Receive)
        }
        return Casting(self._model, replace(self._traced, graph=copy.deepcopy(self._graph)), empty)

    def _steadied(self, op: ir.Op, node: fx.Node) -> fx.Node:
        """Return the node with a norm's result, whose gradient comes in the order of memory that torch needs."""
        if not isinstance(op, ir.GroupNorm) and not (isinstance(op, ir.BatchNorm) and self._reorders):
            return node
        with self._graph.inserting_after(node):
            new = self._graph.call_function(steadied, (node,))
        new.meta |= {key: node.meta[key] for key in ("val", LAYER) if key in node.meta}
        node.replace_all_uses_with(new, lambda user: user is not new)
        return new

    def _connect(self, layer: Layer, nodes: list[fx.Node]) -> None:
        """Let a layer's nodes read its inputs in the layouts that its split asks for."""
        sizes = [self._nodes[name] for name in self._traced.sizes.get(layer.id, ())]
        swaps: dict[fx.Node, fx.Node] = {}
        sources = [self._values[self._origins.get(p, p)] for p in layer.inputs]
        if isinstance(layer.op, ir.Concat) and not set(sources) <= set(nodes[0].all_input_nodes):
            nodes[0].args = (sources, layer.op.dim)  # an earlier concatenation stands for its parts
            nodes[0].kwargs = {}
        for k, producer in enumerate(layer.inputs):
            old, new = self._values[self._origins.get(producer, producer)], self._converted(layer, k)
            if old is not new:
                swaps[old] = new
        for node in (*sizes, *nodes):
            for old, new in swaps.items():
                node.replace_input_with(old, new)
        for node in sizes:
            node.meta[LAYER] = layer.id
            self._seed(layer, node)

    def _replace_outputs(self, converted: list[fx.Node]) -> None:
        """Return the converted tensors, in the structure that the user's model returns."""
        (output,) = self._graph.find_nodes(op="output")
        found: Iterator[fx.Node] = iter(converted)

        def swap(node: fx.Node) -> fx.Node:
            if not is_structure(node):
                return next(found)
            node.args = fx.node.map_arg(node.args, swap)
            node.kwargs = fx.node.map_arg(node.kwargs, swap)
            output.prepend(node)
            return node

        output.args = fx.node.map_arg(output.args, swap)

    def _bind_attributes(self) -> None:
        """Give the graph the local pieces of the parameters and buffers that it reads itself."""
        layers = {p.name: layer for layer in self._traced.layers.layers for p in layer.params}
        for node in list(self._graph.find_nodes(op="get_attr")):
            path = str(node.target)
            tensor = attribute(self._model, path)
            name = self._params.name_of(tensor)
            if name is None or name not in layers:
                self._attributes[path] = tensor
            else:
                piece, factor = self._params.local(layers[name], tensor)
                self._attributes[path] = piece
                if factor != 1.0 and isinstance(piece, nn.Parameter):
                    with self._graph.inserting_after(node):
                        new = self._graph.call_function(scaled, (node, factor))
                    node.replace_all_uses_with(new, lambda user, new=new: user is not new)
            if not isinstance(tensor, nn.Parameter) and path not in self._traced.written_in_evaluation:
                self._write_in_training(node)

    def _write_in_training(self, node: fx.Node) -> None:
        """Let what writes into a buffer in training only do so: the graph is that of training."""
        for user in list(node.users):
            calls = user.op in {"call_function", "call_method"}
            if not calls or not is_in_place(user, None) or user.args[0] is not node:
                continue
            target: Any = user.target
            call: Any = getattr(torch.Tensor, target) if user.op == "call_method" else target
            user.op = "call_module"
            user.target = self._add(f"writes.{identifier(user.name)}_{len(self._modules)}", InTraining(call))
            self._write_in_training(user)  # x.mul_(a).add_(b)

    def _bind_global_sizes(self) -> None:
        """Let sizes that belong to no layer's piece be those of the whole batch."""
        own = {name for names in self._traced.sizes.values() for name in names}
        for node in list(self._graph.find_nodes(op="call_function", target=sample_size)):
            if node.name not in own:
                with self._graph.inserting_before(node):
                    name = self._add(f"sizes.batch_{len(self._modules)}", BatchSize(node.args[3], self._state))
                    new = self._graph.call_module(name)
                self._take_over(node, new)

    def _seed_constants(self) -> None:
        """Let random numbers that belong to no layer's piece be the same on every rank."""
        own = {name for names in self._traced.sizes.values() for name in names}
        for node in list(self._nodes.values()):
            if node.name not in own and node.op != "get_attr" and self._is_constant(node) and draws(node, None):
                call = getattr(torch.Tensor, str(node.target)) if node.op == "call_method" else node.target
                key = shard_key(node.name, self._mesh, 0, ())
                name = self._add(f"random.{identifier(node.name)}_{len(self._modules)}", Seeded(call, key, self._state))
                node.op, node.target = "call_module", name

    def _transient(self) -> tuple[str, ...]:
        """Return the names of read tensors that are no part of the user's state dict."""
        kept = set(self._model.state_dict(keep_vars=True))
        buffers = (name for name, t in self._attributes.items() if not isinstance(t, nn.Parameter))
        return tuple(name for name in buffers if name not in kept)
