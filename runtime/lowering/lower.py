"""From a traced model and a plan to the parallel module: sharded operators, transfers in between."""

import copy
import functools
import math
import operator
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import fx, nn

from planner.frontend.batch import sample_size
from planner.frontend.calls import RANDOM, Call, function_name, is_in_place, plain_name, tensor_inputs
from planner.frontend.drafts import is_structure
from planner.frontend.lower import TracedModel
from planner.frontend.proxy import write_items
from planner.frontend.recognize import operands
from planner.frontend.trace import attribute
from planner.ir import ops as ir
from planner.ir.dimension import Dimension
from planner.ir.graph import Layer
from planner.ir.layout import Layout, Whole
from planner.ir.rules import LayerLayouts, layouts, reduced_axes, spatial_axes
from planner.ir.split import LayerId
from planner.ir.tensor import TensorSpec
from planner.ir.transfer import is_halo, steps
from planner.plan.schema import Plan
from runtime.comm.communicator import Axes
from runtime.comm.exchange import Conversion
from runtime.lowering.chance import Dropout, Seeded, shard_key
from runtime.lowering.group_norm import GroupNormOverSpace
from runtime.lowering.halo import Geometry, HaloCall
from runtime.lowering.norms import BatchNorm, Normalise
from runtime.lowering.ops import (
    InTraining,
    LocalLoss,
    LocalMeanOfClasses,
    Redistribution,
    WithScaledGradients,
    steadied,
    written_items,
)
from runtime.lowering.pieces import Local, Piece, broadcast_index, on_piece
from runtime.lowering.products import Bias, OfArguments, Product, scaled
from runtime.parameters.local import LocalParameters
from runtime.state import BatchSize, StepState

_OUT_OF_PLACE: dict[Any, Callable[..., Any]] = {
    operator.iadd: operator.add, operator.isub: operator.sub, operator.imul: operator.mul,
    operator.itruediv: operator.truediv, operator.ifloordiv: operator.floordiv, operator.imod: operator.mod,
    operator.ipow: operator.pow, operator.iand: operator.and_, operator.ior: operator.or_, operator.ixor: operator.xor,
    write_items: written_items,
}  # fmt: skip


LAYER: Final = "layer"
"""In ``meta`` of every node that belongs to a layer: its id. A move belongs to the layer that it is for."""


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
        found |= {reduced_axes(layer.output, mine.output), spatial_axes(layer.output, mine.output)}
    everyone = tuple(range(len(mesh.axes)))
    return {axes for axes in found | {everyone} if axes}


class Lowering:
    """Rewrites one traced model for one rank."""

    def __init__(self, traced: TracedModel, model: nn.Module, plan: Plan, state: StepState) -> None:
        self._traced, self._model, self._plan, self._state = traced, model, plan, state
        self._graph = traced.graph
        self._nodes = {node.name: node for node in self._graph.nodes}
        self._in_layers = {name for names in traced.nodes.values() for name in names}
        self._mesh, self._strategy = plan.mesh, plan.strategy
        self._modules: dict[str, nn.Module] = {}
        self._attributes: dict[str, torch.Tensor] = {}
        self._layouts = {
            layer.id: layouts(layer, traced.layers.inputs_of(layer), self._mesh, self._strategy[layer.id])
            for layer in traced.layers.layers
        }
        self._overlapped = {layer.id for stage in plan.stages for layer in stage.layers if layer.overlap}
        self._values: dict[LayerId, fx.Node] = {}
        self._origins: dict[LayerId, LayerId] = {}
        self._reorders = any(isinstance(layer.op, ir.Permute | ir.PerSample) for layer in traced.layers.layers)
        self._params = LocalParameters(
            model, traced.layers.layers, self._layouts, self._mesh, state.communicator.position
        )  # fmt: skip

    def share(self, other: Lowered, gradient_scale: float) -> None:
        """Work on the parameters of another lowered graph of the model, with gradients as large as there."""
        self._params.pieces, self._params.cut = other.pieces, other.cut
        self._params.replicas, self._params.gradient_scale = other.replicas, gradient_scale

    def run(self) -> Lowered:
        """Rewrite the graph layer by layer."""
        self._state.gradient_scale = self._params.gradient_scale
        outputs: list[fx.Node] = []
        for layer in self._traced.layers.layers:
            match layer.op:
                case ir.Output():
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

    # ---- layers

    def _layer(self, layer: Layer) -> None:
        names = self._traced.nodes[layer.id]
        main, *absorbed = (self._nodes[name] for name in names)
        for node in (main, *absorbed):
            node.meta[LAYER] = layer.id
        if not isinstance(layer.op, ir.Input):
            self._connect(layer, [main, *absorbed])
            for parameter in layer.params:
                self._params.local(layer, attribute(self._model, parameter.name))
            main = self._operator(layer, main, layer.op, is_main=True)
        last = self._steadied(layer.op, main)
        for part, node in zip(layer.absorbed, absorbed, strict=True):
            last = self._steadied(part.op, self._operator(layer, node, part.op, is_main=False))
        self._values[layer.id] = last

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

    def _converted(self, layer: Layer, position: int) -> fx.Node:
        """Return the node that gives a layer's input in the layout it asks for."""
        graph = self._traced.layers
        producer = graph[layer.inputs[position]]
        have, need = self._layouts[producer.id].output, self._layouts[layer.id].inputs[position]
        value = self._values[producer.id]
        is_input, is_output = isinstance(producer.op, ir.Input), isinstance(layer.op, ir.Output)
        if not (is_input or is_output) and not steps(have, need) and not steps(need.gradient, have.gradient):
            return value
        if self._fetches_halo(layer):
            return value
        conversion = self._conversion(layer, position)
        of = _of_input if is_input else (_of_output if is_output else None)
        factor = None if of is None else functools.partial(of, conversion)
        move = Redistribution(conversion, self._state, factor)
        return self._insert(layer, f"transfers.{_plain(layer.id)}", move, value)

    def _conversion(self, layer: Layer, position: int) -> Conversion:
        producer = self._traced.layers[layer.inputs[position]]
        have, need = self._layouts[producer.id].output, self._layouts[layer.id].inputs[position]
        return Conversion(have, need, f"{producer.id} for {layer.id}", _samples(producer.output))

    def _fetches_halo(self, layer: Layer) -> bool:
        """Return whether a layer's operator gets the rows of neighbours itself (``runtime.lowering.halo``)."""
        if not isinstance(layer.op, ir.Conv) or layer.op.computed_weight or layer.op.padding_mode != "zeros":
            return False
        return is_halo(self._layouts[layer.inputs[0]].output, self._layouts[layer.id].inputs[0])

    def _insert(self, layer: Layer, name: str, module: nn.Module, value: fx.Node) -> fx.Node:
        """Call a new module of a layer on a value, right behind it; return the node with the result."""
        behind = value if value.op != "placeholder" else list(self._graph.find_nodes(op="placeholder"))[-1]
        with self._graph.inserting_after(behind):
            node = self._graph.call_module(self._add(f"{name}_{len(self._modules)}", module), (value,))
        node.meta |= {"val": value.meta.get("val"), LAYER: layer.id}
        return node

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

    def _add(self, name: str, module: nn.Module) -> str:
        assert name not in self._modules, f"two modules called {name}"
        self._modules[name] = module
        return name

    # ---- operators

    def _operator(self, layer: Layer, node: fx.Node, op: ir.Op, *, is_main: bool) -> fx.Node:  # noqa: PLR0911  # a table of kinds
        """Replace an operator by its version for this rank; return the node with its result."""
        name = str(node.target)
        original = self._model.get_submodule(name) if node.op == "call_module" else None
        match op:
            case ir.Conv() | ir.ConvTranspose() | ir.Linear() if not getattr(op, "computed_weight", False):
                return self._product(layer, node, op, original)
            case ir.BatchNorm():
                self._batch_norm(layer, node, op, original)
            case ir.Dropout():
                return self._dropout(layer, node, op)
            case ir.Loss():
                return self._loss(layer, node, op, original)
            case ir.Custom() if original is not None:
                self._custom(layer, node, original)
            case ir.GroupNorm() if self._is_cut(layer):
                return self._group_norm(layer, node, op, original)
            case _ if self._has_own_sizes(layer, op):
                return self._resolved(layer, self._on_piece(layer, node, op))
            case ir.Elementwise("identity") if _reshapes(node, original):
                return self._swap_call(node, torch.Tensor.contiguous)  # its sizes are those of the whole batch
            case _:
                fresh = not is_main and _makes_new_memory(tensor_inputs(node)[0], self._modules)
                fresh = fresh or (isinstance(layer.op, ir.PerSample) and not is_main)
                if isinstance(op, ir.Elementwise | ir.Concat) or (isinstance(op, ir.Along) and op.function == "cat"):
                    self._slice_constants(layer, node)
                self._as_it_is(layer, node, original, keeps_in_place=fresh)
        return node

    def _is_cut(self, layer: Layer) -> bool:
        """Return whether a layer's output is cut by anything but samples."""
        samples = layer.output.sample_dim
        return any(isinstance(p, int) and p != samples for p in self._layouts[layer.id].output.placements)

    def _cuts_space(self, layer: Layer) -> bool:
        """Return whether a rank reads or computes a part of space only."""
        return not self._piece(layer, self._layouts[layer.id].computed).has_whole_space

    def _has_own_sizes(self, layer: Layer, op: ir.Op) -> bool:
        """Return whether an operator on this rank's piece has other sizes than the user wrote."""
        if isinstance(op, ir.Reshape):
            return self._is_cut(layer)
        if isinstance(op, ir.Reduce):
            return bool(self._layouts[layer.id].computed.axes_with(Whole.PARTIAL))
        if isinstance(op, ir.Pool) and op.function == "lp":
            return False  # it has no padding: what a rank holds gives what it computes
        looks_around = ir.Conv | ir.Pool | ir.AdaptivePool | ir.Interpolate | ir.PixelShuffle
        return isinstance(op, looks_around) and self._cuts_space(layer)

    def _as_it_is(self, layer: Layer, node: fx.Node, original: nn.Module | None, *, keeps_in_place: bool) -> None:
        """Keep an operator; a write into a tensor that others may read becomes a new tensor."""
        in_place = is_in_place(node, original) and not keeps_in_place
        if original is not None:
            name = str(node.target)
            if in_place:
                module = copy.copy(original)
                module.inplace = False  # type: ignore[assignment]  # the attribute of element-wise modules
                own = name if name not in self._modules else f"{name}_out_of_place_{len(self._modules)}"
                node.target = self._add(own, module)
            elif name not in self._modules:
                self._add(name, self._whole_module(layer, original))
        elif in_place:
            target = node.target
            node.target = target.rstrip("_") if isinstance(target, str) else _OUT_OF_PLACE.get(target, target)
            if "inplace" in node.kwargs:
                node.kwargs = {**node.kwargs, "inplace": False}
            if function_name(node) == "relu_":
                node.target = torch.relu
        self._seed(layer, node)

    def _seed(self, layer: Layer, node: fx.Node) -> None:
        """Let a call that draws random numbers draw the same ones on replicas, others on other pieces."""
        module = self._modules.get(str(node.target)) if node.op == "call_module" else None
        if not _is_random(node, module) or isinstance(module, Seeded):
            return
        call: Any = module if module is not None else node.target
        if node.op == "call_method":
            call = getattr(torch.Tensor, str(node.target))
        key = shard_key(node.name, self._mesh, self._state.communicator.position, self._cut_axes(layer, "element"))
        if module is not None:
            drawn = module if "forward" in vars(module) else copy.copy(module)  # the user's own module stays
            own = vars(module).get("forward") or types.MethodType(type(module).forward, drawn)
            vars(drawn)["forward"] = Seeded(own, key, self._state)  # no submodule, though it is a module
            self._modules[str(node.target)] = drawn
            return
        name = self._add(f"random.{_plain(node.name)}_{len(self._modules)}", Seeded(call, key, self._state))
        node.op, node.target = "call_module", name

    def _cut_axes(self, layer: Layer, unit: str) -> Axes:
        """Return the mesh axes along which ranks draw other numbers, where so much is drawn at once."""
        spec, placements = layer.output, self._layouts[layer.id].output.placements
        drawn: set[int | None] = {spec.sample_dim} if unit == "sample" else set()
        if unit == "channel":
            drawn = {spec.sample_dim, spec.dim_of(Dimension.OUT_CHANNEL)}
        return tuple(
            i for i, p in enumerate(placements) if isinstance(p, int) and (unit == "element" or p in drawn)
        )  # fmt: skip

    def _slice_constants(self, layer: Layer, node: fx.Node) -> None:
        """Let an operator on a piece read the same piece of the constants that it is broadcast with."""
        if not self._is_cut(layer):
            return
        for source in list(dict.fromkeys(tensor_inputs(node))):
            if not self._is_constant(source):
                continue
            value = source.meta["val"]
            index = broadcast_index(value.shape, self._piece(layer))
            if any(i != slice(None) for i in index):
                with self._graph.inserting_before(node):
                    part = self._graph.call_function(operator.getitem, (source, index))
                part.meta["val"] = value
                node.replace_input_with(source, part)

    def _is_constant(self, node: fx.Node) -> bool:
        """Return whether a node is one of the traced ones that belong to no layer."""
        traced = self._nodes.get(node.name) is node and node.op != "placeholder"
        return traced and node.name not in self._in_layers and isinstance(node.meta.get("val"), torch.Tensor)

    def _swap_call(self, node: fx.Node, function: Any, *arguments: Any) -> fx.Node:
        with self._graph.inserting_after(node):
            new = self._graph.call_function(function, (tensor_inputs(node)[0], *arguments))
        return self._take_over(node, new)

    def _take_over(self, node: fx.Node, new: fx.Node) -> fx.Node:
        new.meta |= {key: node.meta[key] for key in ("val", LAYER) if key in node.meta}
        node.replace_all_uses_with(new, lambda user: user is not new)
        self._graph.erase_node(node)
        return new

    def _piece(self, layer: Layer, output: Layout | None = None) -> Piece:
        """Return what this rank reads of a layer, and its region of the output: as consumers see it, or as given."""
        mine, position = self._layouts[layer.id], self._state.communicator.position
        sources = tuple(layout.region(position) for layout in mine.inputs)
        inputs = self._traced.layers.inputs_of(layer)
        return Piece(inputs, sources, layer.output, (output or mine.output).region(position))

    def _on_piece(self, layer: Layer, node: fx.Node, op: ir.Op, *arguments: Any) -> fx.Node:
        """Replace an operator by its version for this rank's piece."""
        piece = self._piece(layer, self._layouts[layer.id].computed)
        call = OfArguments(on_piece(op, piece, torch.clone))  # it has a local form: the whole is not called
        if isinstance(op, ir.Conv):  # of a computed weight
            operand = operands(Call.of(node, self._model))
            arguments = operand["weight"], operand["bias"]
        name = self._add(f"pieces.{_plain(node.name)}_{len(self._modules)}", call)
        with self._graph.inserting_after(node):
            new = self._graph.call_module(name, (tensor_inputs(node)[0], *arguments))
        return self._take_over(node, new)

    def _group_norm(self, layer: Layer, node: fx.Node, op: ir.GroupNorm, original: nn.Module | None) -> fx.Node:
        """Normalise a piece of whole groups."""
        call = Call.of(node, self._model)
        weight: Any = None
        bias: Any = None
        if original is not None:
            eps = float(getattr(original, "eps", 1e-5))
            for own, tensor in original.named_parameters(recurse=False):
                self._attributes[f"{node.target}.{own}"] = tensor
                with self._graph.inserting_before(node):
                    read = self._graph.get_attr(f"{node.target}.{own}")
                read.meta["val"] = tensor
                weight, bias = (read, bias) if own == "weight" else (weight, read)
        elif call.name == "group_norm":
            _, weight, bias, eps = call.arguments(num_groups=1, weight=None, bias=None, eps=1e-5)
        else:
            *_, weight, bias, _, _, eps = call.arguments(
                running_mean=None, running_var=None, weight=None, bias=None, use_input_stats=True, momentum=0.1,
                eps=1e-5,
            )  # fmt: skip
        axes = spatial_axes(layer.output, self._layouts[layer.id].output)
        if not axes:
            return self._on_piece(layer, node, op, weight, bias, eps)
        held = self._piece(layer).region
        groups = op.groups * held.shape[1] // op.channels
        module = GroupNormOverSpace(groups, slice(held.start[1], held.stop[1]), axes, layer.id, self._state)
        name = self._add(f"norms.{_plain(node.name)}_{len(self._modules)}", module)
        with self._graph.inserting_after(node):
            new = self._graph.call_module(name, (tensor_inputs(node)[0], weight, bias, eps))
        return self._take_over(node, new)

    def _dropout(self, layer: Layer, node: fx.Node, op: ir.Dropout) -> fx.Node:
        axes = self._cut_axes(layer, op.unit)
        key = shard_key(node.name, self._mesh, self._state.communicator.position, axes)
        own = str(node.target) if node.op == "call_module" else f"dropouts.{_plain(node.name)}"
        name = own if own not in self._modules else f"{own}_{len(self._modules)}"
        self._add(name, Dropout(op, key, self._state))
        with self._graph.inserting_after(node):
            new = self._graph.call_module(name, (tensor_inputs(node)[0],))
        return self._take_over(node, new)

    def _loss(self, layer: Layer, node: fx.Node, op: ir.Loss, original: nn.Module | None) -> fx.Node:
        mine = self._layouts[layer.id]
        if not mine.computed.axes_with(Whole.PARTIAL):
            self._as_it_is(layer, node, original, keeps_in_place=False)
            return node
        call: Any = original if original is not None else node.target
        options = dict(node.kwargs)
        local: nn.Module
        if op.of_classes and op.reduction == "mean":
            ignored: Any = options.get("ignore_index", getattr(original, "ignore_index", -100))
            if original is not None:
                call = copy.copy(original)
                call.reduction = "sum"
            else:
                options["reduction"] = "sum"
            axes = mine.computed.axes_with(Whole.PARTIAL)
            local = LocalMeanOfClasses(call, int(ignored), axes, layer.id, self._state)
        else:
            resolve = Redistribution(Conversion(mine.computed, mine.output, layer.id, None), self._state)
            elements = max(
                math.prod(spec.shape) // (spec.shape[spec.sample_dim] // spec.sample_rows)
                for spec in self._traced.layers.inputs_of(layer)
                if spec.sample_dim is not None
            )
            local = LocalLoss(call, op.reduction == "mean", elements, resolve, self._state)
        name = self._add(f"losses.{_plain(layer.id)}_{len(self._modules)}", local)
        with self._graph.inserting_after(node):
            new = self._graph.call_module(name, node.args, options)
        return self._take_over(node, new)

    # ---- operators with parameters

    def _product(self, layer: Layer, node: fx.Node, op: Any, original: nn.Module | None) -> fx.Node:
        """Replace a product; behind it, partial sums are resolved and the bias is added once."""
        mine = self._layouts[layer.id]
        adds_bias = not steps(mine.computed, mine.output)
        num_spatial = 0 if isinstance(op, ir.Linear) else len(op.kernel)
        call = self._product_call(layer, op)
        if original is not None:
            name = str(node.target)
            if name not in self._modules:  # a module that is called twice is tied to one split
                self._add(name, self._product_module(layer, original, call, adds_bias))
            elif self._cuts_space(layer):  # but its inputs may have other sizes
                product = self._modules[name]
                assert isinstance(product, Product)
                node.args = (*node.args, product.with_call(call))
            product = self._modules[name]
            if adds_bias:
                return node
            assert isinstance(product, Product)
            bias = Bias(product.scaled_bias, num_spatial) if product.bias is not None else None
        else:
            operand = operands(Call.of(node, self._model))
            read = operand["bias"]
            name = self._add(f"products.{_plain(node.name)}_{len(self._modules)}", OfArguments(call))
            with self._graph.inserting_before(node):
                new = self._graph.call_module(
                    name, (tensor_inputs(node)[0], operand["weight"], read if adds_bias else None)
                )
            node = self._take_over(node, new)
            if adds_bias:
                return node
            bias = None if read is None else Bias(self._reader(_target(read)), num_spatial)
        return self._resolved(layer, node, bias)

    def _product_call(self, layer: Layer, op: Any) -> Local:
        """Return a product on this rank's piece, from its input, weight and bias."""
        piece = self._piece(layer, self._layouts[layer.id].computed)
        if not self._fetches_halo(layer):
            return on_piece(op, piece, torch.clone)  # it has a local form
        conversion, overlapped = self._conversion(layer, 0), layer.id in self._overlapped
        is_input = isinstance(self._traced.layers[layer.inputs[0]].op, ir.Input)
        factor = functools.partial(_of_input, conversion) if is_input else None
        return HaloCall(conversion, Geometry.of(op, piece), overlapped, self._state, factor)

    def _resolved(self, layer: Layer, node: fx.Node, bias: Bias | None = None) -> fx.Node:
        """Turn what a layer computes into what its consumers see; behind it a bias is added."""
        mine = self._layouts[layer.id]
        if not steps(mine.computed, mine.output):
            return node
        conversion = Conversion(mine.computed, mine.output, f"the partial sums of {layer.id}", _samples(layer.output))
        users = list(node.users)
        result = self._insert(layer, f"sums.{_plain(layer.id)}", Redistribution(conversion, self._state), node)
        if bias is not None:
            result = self._insert(layer, f"biases.{_plain(layer.id)}", bias, result)
        for user in users:
            user.replace_input_with(node, result)
        return result

    def _product_module(self, layer: Layer, original: nn.Module, call: Local, adds_bias: bool) -> nn.Module:
        whole = getattr(original, "weight")  # noqa: B009  # a product has one
        weight, factor = self._params.local(layer, whole)
        bias, bias_factor = None, 1.0
        if original.bias is not None:
            bias, bias_factor = self._params.local(layer, original.bias)  # type: ignore[arg-type]  # a tensor
        if adds_bias and weight is whole and factor == bias_factor == 1.0 and not self._cuts_space(layer):
            return original
        assert isinstance(weight, nn.Parameter)
        return Product(call, weight, bias, adds_bias, (factor, bias_factor))  # type: ignore[arg-type]  # a parameter

    def _reader(self, name: str) -> Any:
        """Return a function that returns a local parameter whose gradient has this rank's factor; it can be copied."""
        piece = self._params.pieces[id(attribute(self._model, name))]
        return functools.partial(scaled, piece, self._params.factors.get(name, 1.0))

    def _batch_norm(self, layer: Layer, node: fx.Node, op: ir.BatchNorm, original: nn.Module | None) -> None:
        axes = reduced_axes(layer.output, self._layouts[layer.id].output) if self._plan.sync_batch_norm else ()
        if original is None:
            found = operands(Call.of(node, self._model))
            name = self._add(f"norms.{_plain(node.name)}_{len(self._modules)}", Normalise(op, axes, self._state))
            arguments = [found[role] for role in ("running_mean", "running_var", "weight", "bias")]
            node.op, node.target, node.args, node.kwargs = "call_module", name, (node.args[0], *arguments), {}
            return
        name = str(node.target)
        if name in self._modules:
            return
        tensors: dict[str, torch.Tensor] = {}
        factor, cut = 1.0, False
        for own, tensor in [*original.named_parameters(recurse=False), *original.named_buffers(recurse=False)]:
            tensors[own], this = self._params.local(layer, tensor)
            factor = this if isinstance(tensor, nn.Parameter) else factor
            cut = cut or tensors[own].shape != tensor.shape
        plain = not axes and factor == 1.0 and not cut
        self._add(name, original if plain else BatchNorm(op, tensors, axes, self._state, factor))

    def _whole_module(self, layer: Layer, original: nn.Module) -> nn.Module:
        """Return a module whose parameters every rank holds whole."""
        factors = {name: self._params.local(layer, p)[1] for name, p in original.named_parameters()}
        if all(f == 1.0 for f in factors.values()):
            return original
        clone = copy.copy(original)
        clone.forward = WithScaledGradients(clone, original, factors, dict(original.named_parameters()))
        return clone

    def _custom(self, layer: Layer, node: fx.Node, original: nn.Module) -> None:
        """Put a module of the user's own on this rank's pieces of its parameters."""
        name = str(node.target)
        if name in self._modules:
            return
        pieces, factors = {}, {}
        for own, tensor in [*original.named_parameters(), *original.named_buffers()]:
            pieces[own], factors[own] = self._params.local(layer, tensor)
        clone = copy.deepcopy(original, {id(t): pieces[own] for own, t in original.named_parameters()})
        for own, piece in pieces.items():
            path, _, leaf = own.rpartition(".")
            holder = clone.get_submodule(path)
            (holder._parameters if leaf in holder._parameters else holder._buffers)[leaf] = piece  # type: ignore[assignment]  # one of both
        if any(f != 1.0 for f in factors.values()):
            inner = copy.copy(clone)
            clone.forward = WithScaledGradients(clone, inner, factors, pieces)
        self._add(name, clone)

    # ---- what the graph reads itself

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
            user.target = self._add(f"writes.{_plain(user.name)}_{len(self._modules)}", InTraining(call))
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
            if node.name not in own and node.op != "get_attr" and self._is_constant(node) and _is_random(node, None):
                call = getattr(torch.Tensor, str(node.target)) if node.op == "call_method" else node.target
                key = shard_key(node.name, self._mesh, 0, ())
                name = self._add(f"random.{_plain(node.name)}_{len(self._modules)}", Seeded(call, key, self._state))
                node.op, node.target = "call_module", name

    def _transient(self) -> tuple[str, ...]:
        """Return the names of read tensors that are no part of the user's state dict."""
        kept = set(self._model.state_dict(keep_vars=True))
        buffers = (name for name, t in self._attributes.items() if not isinstance(t, nn.Parameter))
        return tuple(name for name in buffers if name not in kept)


def _target(node: fx.Node | None) -> str:
    assert node is not None
    return str(node.target)


def _samples(spec: TensorSpec) -> tuple[int, int] | None:
    return None if spec.sample_dim is None else (spec.sample_dim, spec.sample_rows)


_DRAWING = (
    nn.Dropout | nn.Dropout1d | nn.Dropout2d | nn.Dropout3d | nn.AlphaDropout | nn.FeatureAlphaDropout | nn.RReLU
    | nn.FractionalMaxPool2d | nn.FractionalMaxPool3d
)  # fmt: skip


def _is_random(node: fx.Node, module: nn.Module | None) -> bool:
    """Return whether a call draws random numbers."""
    if module is not None:
        rates = [getattr(part, "dropout", 0) for part in module.modules()]
        drops = any(isinstance(rate, int | float) and rate > 0 for rate in rates)
        return drops or any(isinstance(part, _DRAWING) for part in module.modules())
    drops = any(isinstance(v, float) and v > 0 for k, v in node.kwargs.items() if "dropout" in k)
    return plain_name(node) in RANDOM or drops


def _reshapes(node: fx.Node, original: nn.Module | None) -> bool:
    return isinstance(original, nn.Flatten | nn.Unflatten) or function_name(node) in {"view", "reshape", "flatten"}


def _makes_new_memory(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Return whether a node's result is surely no view of anything that is read elsewhere."""
    fresh = (Product, Bias, BatchNorm, Normalise, nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    return node.op == "call_module" and isinstance(modules.get(str(node.target)), (*fresh, *norms))


def _plain(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name)


def _of_input(conversion: Conversion, state: StepState) -> float:
    """Return what undoes ``_of_output``: a gradient of this rank's input is that of its own loss, as under DDP."""
    share = conversion.share(conversion.source, state.current_batch(), state.communicator)
    return 1.0 / (share * state.gradient_scale)


def _of_output(conversion: Conversion, state: StepState) -> float:
    """Return the share of an output that this rank's loss is the mean of, times the scale of all gradients."""
    return conversion.share(conversion.target, state.current_batch(), state.communicator) * state.gradient_scale
