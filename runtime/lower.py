"""From a traced model and a plan to the parallel module: sharded operators, transfers in between."""

import copy
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from planner.frontend.lower import TracedModel, parameter_names
from planner.frontend.recognize import function_name, is_in_place, tensor_inputs
from planner.ir import ops as ir
from planner.ir.graph import Layer
from planner.ir.layout import Layout, Whole
from planner.ir.rules import InputOutput, LayerLayouts, layouts, reduced_axes
from planner.ir.split import LayerId
from planner.ir.transfer import steps
from planner.plan.schema import Plan
from runtime.communicator import Axes, group_size
from runtime.exchange import Conversion
from runtime.ops import (
    BatchNorm,
    Bias,
    Dropout,
    LocalLoss,
    Product,
    Redistribution,
    StepState,
    WholeNorm,
    WholeProduct,
    shard_key,
)
from runtime.params import local_parameter, local_piece

_OUT_OF_PLACE = {
    operator.iadd: operator.add, operator.isub: operator.sub,
    operator.imul: operator.mul, operator.itruediv: operator.truediv,
}  # fmt: skip


@dataclass(frozen=True)
class Lowered:
    """What lowering made.

    Attributes:
        graph: calls the modules by their names.
        modules: by full name.
        synchronised: name, parameter and axes of every parameter whose gradient is reduced, in the
            order in which backward makes the gradients ready.
        replicas: by identity of a local parameter, how many ranks hold the same piece.
    """

    graph: fx.Graph
    modules: dict[str, nn.Module]
    synchronised: list[tuple[str, nn.Parameter, Axes]]
    replicas: dict[int, int]


def communication_axes(traced: TracedModel, plan: Plan) -> set[Axes]:
    """Return every set of mesh axes along which ranks will talk."""
    graph, mesh, strategy = traced.layers, plan.mesh, plan.strategy
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
        found.add(reduced_axes(split))
    everyone = tuple(range(len(mesh.axes)))
    return {axes for axes in found | {everyone} if axes}


class Lowering:
    """Rewrites one traced model for one rank."""

    def __init__(self, traced: TracedModel, model: nn.Module, plan: Plan, state: StepState) -> None:
        self._traced, self._model, self._plan, self._state = traced, model, plan, state
        self._names = parameter_names(model)
        self._graph = traced.graph
        self._nodes = {node.name: node for node in self._graph.nodes}
        self._mesh, self._strategy = plan.mesh, plan.strategy
        self._modules: dict[str, nn.Module] = {}
        self._synchronised: dict[int, tuple[str, nn.Parameter, Axes]] = {}
        self._layouts = {
            layer.id: layouts(layer, traced.layers.inputs_of(layer), self._mesh, self._strategy[layer.id])
            for layer in traced.layers.layers
        }
        self._pieces: dict[int, nn.Parameter] = {}  # by the whole parameter: tied layers share one piece
        self._replicas: dict[int, int] = {}
        self._values: dict[LayerId, fx.Node] = {}

    def run(self) -> Lowered:
        """Rewrite the graph layer by layer."""
        self._state.gradient_scale = self._best_gradient_scale()
        outputs: list[fx.Node] = []
        for layer in self._traced.layers.layers:
            match layer.op:
                case ir.Output():
                    outputs.append(self._converted(layer, 0))
                case ir.Redistribute():
                    self._values[layer.id] = self._converted(layer, 0)
                case _:
                    self._layer(layer)
        self._replace_outputs(outputs)
        self._graph.lint()
        ready = list(reversed(self._synchronised.values()))
        return Lowered(self._graph, self._modules, ready, self._replicas)

    # ---- layers

    def _layer(self, layer: Layer) -> None:
        names = self._traced.nodes[layer.id]
        main, *absorbed = (self._nodes[name] for name in names)
        if not isinstance(layer.op, ir.Input):
            self._connect(layer, main)
            main = self._operator(layer, main, layer.op, is_main=True)
        last = main
        for part, node in zip(layer.absorbed, absorbed, strict=True):
            last = self._operator(layer, node, part.op, is_main=False)
        self._values[layer.id] = last

    def _connect(self, layer: Layer, node: fx.Node) -> None:
        """Let a node read its inputs in the layouts that its split asks for."""
        found = iter([self._converted(layer, k) for k in range(len(layer.inputs))])

        def swap(n: fx.Node) -> fx.Node:
            return next(found) if isinstance(n.meta.get("val"), torch.Tensor) else n

        node.args = fx.node.map_arg(node.args, swap)
        node.kwargs = fx.node.map_arg(node.kwargs, swap)

    def _converted(self, layer: Layer, position: int) -> fx.Node:
        """Return the node that gives a layer's input in the layout it asks for."""
        graph = self._traced.layers
        producer = graph[layer.inputs[position]]
        have, need = self._layouts[producer.id].output, self._layouts[layer.id].inputs[position]
        value = self._values[producer.id]
        is_input, is_output = isinstance(producer.op, ir.Input), isinstance(layer.op, ir.Output)
        if not (is_input or is_output) and not steps(have, need) and not steps(need.gradient, have.gradient):
            return value
        samples = bool(producer.output.shape) and producer.output.shape[0] == graph.batch
        conversion = Conversion(have, need, f"{producer.id} for {layer.id}", samples)
        factor = _of_input if is_input else (self._output_factor(samples) if is_output else None)
        return self._insert(f"transfers.{_plain(layer.id)}", Redistribution(conversion, self._state, factor), value)

    def _insert(self, name: str, module: nn.Module, value: fx.Node) -> fx.Node:
        """Call a new module on a value, right behind it; return the node with the result."""
        behind = value if value.op != "placeholder" else list(self._graph.find_nodes(op="placeholder"))[-1]
        with self._graph.inserting_after(behind):
            node = self._graph.call_module(self._add(f"{name}_{len(self._modules)}", module), (value,))
        node.meta["val"] = value.meta.get("val")
        return node

    def _output_factor(self, samples: bool) -> Any:
        return _of_own_samples if samples and self._plan.input_output is InputOutput.PER_RANK else _of_whole

    def _replace_outputs(self, converted: list[fx.Node]) -> None:
        (output,) = self._graph.find_nodes(op="output")
        found: Iterator[fx.Node] = iter(converted)
        output.args = fx.node.map_arg(output.args, lambda _: next(found))

    def _add(self, name: str, module: nn.Module) -> str:
        assert name not in self._modules, f"two modules called {name}"
        self._modules[name] = module
        return name

    # ---- operators

    def _operator(self, layer: Layer, node: fx.Node, op: ir.Op, *, is_main: bool) -> fx.Node:
        """Replace an operator by its version for this rank; return the node with its result."""
        name = str(node.target)
        original = self._model.get_submodule(name) if node.op == "call_module" else None
        match op:
            case ir.Conv() | ir.Linear():
                assert isinstance(original, WholeProduct)
                if name not in self._modules:  # a module that is called twice is tied to one split
                    self._add(name, self._product(layer, original))
                return self._resolved(layer, node)
            case ir.BatchNorm():
                assert isinstance(original, WholeNorm)
                if name not in self._modules:
                    self._add(name, self._batch_norm(layer, original))
            case ir.Dropout():
                return self._dropout(layer, node, op)
            case ir.Flatten():
                return self._swap_call(node, torch.flatten, 1)
            case ir.Elementwise("identity") if _reshapes(node, original):
                return self._swap_call(node, torch.Tensor.contiguous)  # its sizes are those of the whole batch
            case ir.Loss():
                return self._loss(layer, node, op, original)
            case _:
                fresh = not is_main and _makes_new_memory(tensor_inputs(node)[0], self._modules)
                self._as_it_is(node, original, keeps_in_place=fresh)
        return node

    def _resolved(self, layer: Layer, node: fx.Node) -> fx.Node:
        """Return the node with a product's output: behind it, partial sums are resolved and the bias added."""
        mine = self._layouts[layer.id]
        if not steps(mine.computed, mine.output):
            return node
        users = list(node.users)
        samples = layer.output.shape[0] == self._traced.layers.batch
        conversion = Conversion(mine.computed, mine.output, f"the partial sums of {layer.id}", samples)
        result = self._insert(f"sums.{_plain(layer.id)}", Redistribution(conversion, self._state), node)
        product = self._modules[str(node.target)]
        assert isinstance(product, Product)
        if product.bias is not None:
            result = self._insert(f"biases.{_plain(layer.id)}", Bias(product), result)
        for user in users:
            user.replace_input_with(node, result)
        return result

    def _as_it_is(self, node: fx.Node, original: nn.Module | None, *, keeps_in_place: bool) -> None:
        """Keep an operator; a write into a tensor that others may read becomes a new tensor."""
        in_place = is_in_place(node, original) and not keeps_in_place
        if original is not None:
            name = str(node.target)
            if in_place:
                module = copy.copy(original)
                module.inplace = False  # type: ignore[assignment]  # the attribute of element-wise modules
                node.target = self._add(f"{name}_out_of_place_{len(self._modules)}", module)
            elif name not in self._modules:
                self._add(name, original)
        elif in_place:
            target = node.target
            node.target = target.rstrip("_") if isinstance(target, str) else _OUT_OF_PLACE.get(target, target)
            if "inplace" in node.kwargs:
                node.kwargs = {**node.kwargs, "inplace": False}
            if function_name(node) == "relu_":
                node.target = torch.relu

    def _swap_call(self, node: fx.Node, function: Any, *arguments: Any) -> fx.Node:
        with self._graph.inserting_after(node):
            new = self._graph.call_function(function, (tensor_inputs(node)[0], *arguments))
        return self._take_over(node, new)

    def _take_over(self, node: fx.Node, new: fx.Node) -> fx.Node:
        new.meta["val"] = node.meta.get("val")
        node.replace_all_uses_with(new, lambda user: user is not new)
        self._graph.erase_node(node)
        return new

    def _dropout(self, layer: Layer, node: fx.Node, op: ir.Dropout) -> fx.Node:
        axes = tuple(i for i, p in enumerate(self._layouts[layer.id].output.placements) if isinstance(p, int))
        key = shard_key(node.name, self._mesh, self._state.communicator.position, axes)
        own = str(node.target) if node.op == "call_module" else f"dropouts.{_plain(node.name)}"
        name = own if own not in self._modules else f"{own}_{len(self._modules)}"
        self._add(name, Dropout(op.probability, op.whole_channels, key, self._state))
        with self._graph.inserting_after(node):
            new = self._graph.call_module(name, (tensor_inputs(node)[0],))
        return self._take_over(node, new)

    def _loss(self, layer: Layer, node: fx.Node, op: ir.Loss, original: nn.Module | None) -> fx.Node:
        mine = self._layouts[layer.id]
        if not mine.computed.axes_with(Whole.PARTIAL):
            self._as_it_is(node, original, keeps_in_place=False)
            return node
        resolve = Redistribution(Conversion(mine.computed, mine.output, layer.id, False), self._state)
        call = original if original is not None else node.target
        assert callable(call)
        name = self._add(
            f"losses.{_plain(layer.id)}_{len(self._modules)}",
            LocalLoss(call, op.reduction == "mean", resolve, self._state),
        )
        with self._graph.inserting_after(node):
            new = self._graph.call_module(name, node.args, node.kwargs)
        return self._take_over(node, new)

    # ---- parameters

    def _best_gradient_scale(self) -> float:
        """Return the factor on all gradients that spares most parameters a multiplication of their own.

        The gradient of a parameter that g ranks hold has to arrive g times too large (see
        ``Reducer``). With gradients g times too large from the loss on, nothing is left to do for
        it, and every other parameter pays one pass over its gradient.
        """
        num_bytes: dict[float, int] = {1.0: 0}
        for layer in self._traced.layers.layers:
            for parameter, layout in zip(layer.params, self._layouts[layer.id].params, strict=True):
                if parameter.trainable:
                    g = float(group_size(self._mesh, layout.axes_with(Whole.SHARED)))
                    num_bytes[g] = num_bytes.get(g, 0) + layout.region(0).volume
        return max(sorted(num_bytes), key=num_bytes.__getitem__)

    def _local(self, layer: Layer, tensor: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Return the local piece of a parameter or buffer and the factor for its gradient."""
        name = self._names[id(tensor)]
        index = next(i for i, p in enumerate(layer.params) if p.name == name)
        layout: Layout = self._layouts[layer.id].params[index]
        position = self._state.communicator.position
        if not isinstance(tensor, nn.Parameter):
            return local_piece(tensor, layout, position), 1.0
        axes = layout.axes_with(Whole.SHARED)
        piece = self._pieces.setdefault(id(tensor), local_parameter(tensor, layout, position))
        self._replicas[id(piece)] = group_size(self._mesh, layout.axes_with(Whole.SHARED, Whole.EQUAL))
        if axes and tensor.requires_grad:
            self._synchronised[id(piece)] = (name, piece, axes)
        return piece, group_size(self._mesh, axes) / self._state.gradient_scale

    def _product(self, layer: Layer, original: WholeProduct) -> nn.Module:
        mine = self._layouts[layer.id]
        weight, factor = self._local(layer, original.weight)
        bias, bias_factor = None, 1.0
        if original.bias is not None:
            bias, bias_factor = self._local(layer, original.bias)
        groups = 1
        if isinstance(layer.op, ir.Conv) and layer.op.groups > 1:
            groups = layer.op.groups * weight.shape[0] // layer.op.out_channels
        adds_bias = not steps(mine.computed, mine.output)
        if adds_bias and weight is original.weight and factor == bias_factor == 1.0:
            return original
        assert isinstance(weight, nn.Parameter)
        return Product(original, weight, bias, groups, adds_bias, (factor, bias_factor))  # type: ignore[arg-type]  # a parameter as well

    def _batch_norm(self, layer: Layer, original: WholeNorm) -> nn.Module:
        axes = reduced_axes(self._strategy[layer.id]) if self._plan.sync_batch_norm else ()
        tensors: dict[str, torch.Tensor] = {}
        factor = 1.0
        for own, tensor in [
            *original.named_parameters(recurse=False),
            *original.named_buffers(recurse=False),
        ]:
            tensors[own], this = self._local(layer, tensor)
            factor = this if isinstance(tensor, nn.Parameter) else factor
        if not axes and factor == 1.0 and tensors["weight"] is original.weight:
            return original
        return BatchNorm(original, tensors, axes, self._state, factor)


def _reshapes(node: fx.Node, original: nn.Module | None) -> bool:
    return isinstance(original, nn.Flatten | nn.Unflatten) or function_name(node) in {"view", "reshape", "flatten"}


def _makes_new_memory(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Return whether a node's result is surely no view of anything that is read elsewhere."""
    fresh = (Product, Bias, BatchNorm, nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    return node.op == "call_module" and isinstance(modules.get(str(node.target)), (*fresh, *norms))


def _plain(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name)


def _of_input(state: StepState) -> float:
    return 1.0 / state.gradient_scale


def _of_whole(state: StepState) -> float:
    return state.gradient_scale


def _of_own_samples(state: StepState) -> float:
    """Return rank r's share n_r / N of the mean over the batch, times the scale of all gradients."""
    batch = state.current_batch()
    return state.rank_samples / batch.size * state.gradient_scale
