"""Operators, one after the other, replaced by their versions for one rank."""

import copy
import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from planner.frontend.calls import Call, function_name, is_in_place, tensor_inputs
from planner.frontend.proxy import write_items
from planner.frontend.recognize import operands
from planner.frontend.trace import attribute
from planner.ir import ops as ir
from planner.ir.graph import Layer
from planner.ir.halo import is_sum
from planner.ir.layout import Whole
from planner.ir.rules import reduced_axes, spatial_axes
from runtime.comm.exchange import Conversion
from runtime.lowering.chance import Dropout, shard_key
from runtime.lowering.group_norm import GroupNormOverSpace
from runtime.lowering.halo import Geometry, HaloCall
from runtime.lowering.norms import BatchNorm, Normalise
from runtime.lowering.ops import (
    BiasOf,
    LocalLoss,
    LocalMeanOfClasses,
    PartialSum,
    Redistribution,
    WithScaledGradients,
    written_items,
)
from runtime.lowering.pieces import Local, broadcast_index, on_piece
from runtime.lowering.products import OfArguments, Product, paired
from runtime.lowering.rewriting import Rewriting, identifier

_OUT_OF_PLACE: dict[Any, Callable[..., Any]] = {
    operator.iadd: operator.add, operator.isub: operator.sub, operator.imul: operator.mul,
    operator.itruediv: operator.truediv, operator.ifloordiv: operator.floordiv, operator.imod: operator.mod,
    operator.ipow: operator.pow, operator.iand: operator.and_, operator.ior: operator.or_, operator.ixor: operator.xor,
    write_items: written_items,
}  # fmt: skip


class Operators(Rewriting):
    """Replaces operators; one method for each kind that must know its split."""

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

    def _on_piece(self, layer: Layer, node: fx.Node, op: ir.Op, *arguments: Any) -> fx.Node:
        """Replace an operator by its version for this rank's piece."""
        piece = self._piece(layer, self._layouts[layer.id].computed)
        call = OfArguments(on_piece(op, piece, torch.clone))  # it has a local form: the whole is not called
        if isinstance(op, ir.Conv):  # of a computed weight
            operand = operands(Call.of(node, self._model))
            arguments = operand["weight"], operand["bias"]
        name = self._add(f"pieces.{identifier(node.name)}_{len(self._modules)}", call)
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
        name = self._add(f"norms.{identifier(node.name)}_{len(self._modules)}", module)
        with self._graph.inserting_after(node):
            new = self._graph.call_module(name, (tensor_inputs(node)[0], weight, bias, eps))
        return self._take_over(node, new)

    def _dropout(self, layer: Layer, node: fx.Node, op: ir.Dropout) -> fx.Node:
        axes = self._cut_axes(layer, op.unit)
        key = shard_key(node.name, self._mesh, self._state.communicator.position, axes)
        own = str(node.target) if node.op == "call_module" else f"dropouts.{identifier(node.name)}"
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
        name = self._add(f"losses.{identifier(layer.id)}_{len(self._modules)}", local)
        with self._graph.inserting_after(node):
            new = self._graph.call_module(name, node.args, options)
        return self._take_over(node, new)

    def _product(self, layer: Layer, node: fx.Node, op: Any, original: nn.Module | None) -> fx.Node:
        """Replace a product; behind it, partial sums are resolved and the bias is added once."""
        adds_bias = self._sum(layer) is None
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
            bias: BiasOf = product.bias_and_factor
        else:
            operand = operands(Call.of(node, self._model))
            read = operand["bias"]
            name = self._add(f"products.{identifier(node.name)}_{len(self._modules)}", OfArguments(call))
            with self._graph.inserting_before(node):
                new = self._graph.call_module(
                    name, (tensor_inputs(node)[0], operand["weight"], read if adds_bias else None)
                )
            node = self._take_over(node, new)
            if adds_bias:
                return node
            bias = functools.partial(paired, None, 1.0) if read is None else self._reader(_target(read))
        return self._resolved(layer, node, bias, num_spatial)

    def _product_call(self, layer: Layer, op: Any) -> Local:
        """Return a product on this rank's piece, from its input, weight and bias."""
        piece = self._piece(layer, self._layouts[layer.id].computed)
        if not self._fetches_halo(layer):
            return on_piece(op, piece, torch.clone)  # it has a local form
        conversion, overlapped = self._conversion(layer, 0), layer.id in self._overlapped
        factor = self._input_factor(self._traced.layers[layer.inputs[0]].op)
        bound = None if factor is None else functools.partial(factor, conversion)
        in_place = is_sum(op, conversion.source, self._layouts[layer.id].computed)
        return HaloCall(conversion, Geometry.of(op, piece), overlapped, in_place, self._state, bound)

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
        """Return a function that returns a local parameter and this rank's factor of its gradient; it can be copied."""
        piece = self._params.pieces[id(attribute(self._model, name))]
        return functools.partial(paired, piece, self._params.factors.get(name, 1.0))

    def _batch_norm(self, layer: Layer, node: fx.Node, op: ir.BatchNorm, original: nn.Module | None) -> None:
        axes = reduced_axes(layer.output, self._layouts[layer.id].output) if self._plan.sync_batch_norm else ()
        if original is None:
            found = operands(Call.of(node, self._model))
            stand_in = Normalise(op, axes, self._state, layer.id)
            name = self._add(f"norms.{identifier(node.name)}_{len(self._modules)}", stand_in)
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
        self._add(name, original if plain else BatchNorm(op, tensors, axes, self._state, layer.id, factor))

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


def _target(node: fx.Node | None) -> str:
    assert node is not None
    return str(node.target)


def _reshapes(node: fx.Node, original: nn.Module | None) -> bool:
    return isinstance(original, nn.Flatten | nn.Unflatten) or function_name(node) in {"view", "reshape", "flatten"}


def _makes_new_memory(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Return whether a node's result is surely no view of anything that is read elsewhere."""
    fresh = (Product, PartialSum, BatchNorm, Normalise, nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    return node.op == "call_module" and isinstance(modules.get(str(node.target)), (*fresh, *norms))
