"""What lowering works on and with: the graph of one rank, its layers' layouts, and the ways to change a node."""

import copy
import functools
import types
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import fx, nn

from planner.frontend.calls import RANDOM, plain_name, tensor_inputs
from planner.frontend.lower import TracedModel
from planner.ir import ops as ir
from planner.ir.branches import moves_at_reader
from planner.ir.dimension import Dimension
from planner.ir.graph import Layer
from planner.ir.layout import Layout, Whole
from planner.ir.rules import layouts
from planner.ir.split import LayerId
from planner.ir.tensor import TensorSpec
from planner.ir.transfer import is_halo, steps
from planner.plan.schema import Plan
from runtime.comm.communicator import Axes
from runtime.comm.exchange import Conversion
from runtime.lowering.chance import Seeded, shard_key
from runtime.lowering.ops import BiasOf, PartialSum, Redistribution
from runtime.lowering.pieces import Piece
from runtime.parameters.local import LocalParameters
from runtime.state import StepState

Factor = Callable[[Conversion, StepState], float]
"""What gradients are multiplied by at an end of the network, for a conversion there."""
LAYER: Final = "layer"
"""In ``meta`` of every node that belongs to a layer: its id. A move belongs to the layer that it is for."""


class Rewriting:
    """One traced model that is being rewritten for one rank."""

    def __init__(self, traced: TracedModel, model: nn.Module, plan: Plan, state: StepState) -> None:
        self._traced, self._model, self._plan, self._state = traced, model, plan, state
        self._graph = traced.graph
        self._nodes = {node.name: node for node in self._graph.nodes}
        self._in_layers = {name for names in traced.nodes.values() for name in names}
        self._mesh, self._strategy = plan.mesh, plan.enlarged(traced.layers)
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

    def _conversion(self, layer: Layer, position: int) -> Conversion:
        producer = self._traced.layers[layer.inputs[position]]
        have, need = self._layouts[producer.id].output, self._layouts[layer.id].inputs[position]
        return Conversion(have, need, f"{producer.id} for {layer.id}", samples_of(producer.output))

    def _converted(self, layer: Layer, position: int) -> fx.Node:
        """Return the node that gives a layer's input in the layout it asks for."""
        graph = self._traced.layers
        producer = graph[layer.inputs[position]]
        have, need = self._layouts[producer.id].output, self._layouts[layer.id].inputs[position]
        value = self._values[producer.id]
        source_factor, target_factor = self._input_factor(producer.op), self._output_factor(layer.op)
        stays = not steps(have, need) and not steps(need.gradient, have.gradient)
        if stays and source_factor is None and target_factor is None:
            return value
        if self._fetches_halo(layer):
            return value
        conversion = self._conversion(layer, position)
        move = Redistribution(
            conversion, self._state,
            None if source_factor is None else functools.partial(source_factor, conversion),
            None if target_factor is None else functools.partial(target_factor, conversion),
        )  # fmt: skip
        before = self._first_node(layer) if self._leaves_branch(producer, layer) else None
        return self._insert(layer, f"transfers.{identifier(layer.id)}", move, value, before)

    def _input_factor(self, op: ir.Op) -> Factor | None:
        """Return what multiplies gradients that leave the network where an operator's tensor enters it."""
        if isinstance(op, ir.Receive) and self._params.gradient_scale != 1.0:
            return of_received
        return of_input if isinstance(op, ir.Input) else None

    def _output_factor(self, op: ir.Op) -> Factor | None:
        """Return what multiplies gradients that enter the network where an operator's tensor leaves it."""
        if isinstance(op, ir.Send) and self._params.gradient_scale != 1.0:
            return of_sent
        return of_output if isinstance(op, ir.Output) else None

    def _fetches_halo(self, layer: Layer) -> bool:
        """Return whether a layer's operator gets the rows of neighbours itself (``runtime.lowering.halo``)."""
        if not isinstance(layer.op, ir.Conv) or layer.op.computed_weight or layer.op.padding_mode != "zeros":
            return False
        return is_halo(self._layouts[layer.inputs[0]].output, self._layouts[layer.id].inputs[0])

    def _leaves_branch(self, producer: Layer, reader: Layer) -> bool:
        """Return whether ranks that compute other branches meanwhile get a tensor (``planner.ir.branches``)."""
        have, need = self._layouts[producer.id].output, self._layouts[reader.id].output
        if not have.has_idle:
            return False
        made_by, read_by = ([p for p in range(self._mesh.size) if not x.is_idle(p)] for x in (have, need))
        return moves_at_reader(made_by, read_by)

    def _first_node(self, layer: Layer) -> fx.Node:
        """Return the first node of the graph that belongs to a layer, or to one that reads it where it has none."""
        graph, traced = self._traced.layers, self._traced
        if isinstance(layer.op, ir.Redistribute):
            found = [self._first_node(reader) for reader in graph.layers if layer.id in reader.inputs]
        elif isinstance(layer.op, ir.Output | ir.Send):
            found = list(self._graph.find_nodes(op="output"))
        else:
            found = [self._nodes[name] for name in (*traced.nodes[layer.id], *traced.sizes.get(layer.id, ()))]
        order = {node: k for k, node in enumerate(self._graph.nodes)}
        return min(found, key=order.__getitem__)

    def _insert(
        self, layer: Layer, name: str, module: nn.Module, value: fx.Node, before: fx.Node | None = None
    ) -> fx.Node:
        """Call a new module of a layer on a value, right behind it or before a node; return the result's node."""
        behind = value if value.op != "placeholder" else list(self._graph.find_nodes(op="placeholder"))[-1]
        with self._graph.inserting_after(behind) if before is None else self._graph.inserting_before(before):
            node = self._graph.call_module(self._add(f"{name}_{len(self._modules)}", module), (value,))
        node.meta |= {"val": value.meta.get("val"), LAYER: layer.id}
        return node

    def _sum(self, layer: Layer) -> Conversion | None:
        """Return what turns what a layer computes into what its consumers see; None where that is the same."""
        mine = self._layouts[layer.id]
        if not steps(mine.computed, mine.output):
            return None
        return Conversion(mine.computed, mine.output, f"the partial sums of {layer.id}", samples_of(layer.output))

    def _resolved(self, layer: Layer, node: fx.Node, bias: BiasOf | None = None, num_spatial: int = 0) -> fx.Node:
        """Turn what a layer computes into what its consumers see; behind it a bias is added."""
        conversion = self._sum(layer)
        if conversion is None:
            return node
        users = list(node.users)
        resolve = Redistribution(conversion, self._state)
        if bias is not None and (conversion.summed_axes or bias()[0] is not None):
            resolve = PartialSum(conversion, self._state, bias, num_spatial)
        result = self._insert(layer, f"sums.{identifier(layer.id)}", resolve, node)
        for user in users:
            user.replace_input_with(node, result)
        return result

    def _add(self, name: str, module: nn.Module) -> str:
        assert name not in self._modules, f"two modules called {name}"
        self._modules[name] = module
        return name

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

    def _piece(self, layer: Layer, output: Layout | None = None) -> Piece:
        """Return what this rank reads of a layer, and its region of the output: as consumers see it, or as given."""
        mine, position = self._layouts[layer.id], self._state.communicator.position
        sources = tuple(layout.region(position) for layout in mine.inputs)
        inputs = self._traced.layers.inputs_of(layer)
        return Piece(inputs, sources, layer.output, (output or mine.output).region(position))

    def _cut_axes(self, layer: Layer, unit: str) -> Axes:
        """Return the mesh axes along which ranks draw other numbers, where so much is drawn at once."""
        spec, placements = layer.output, self._layouts[layer.id].output.placements
        drawn: set[int | None] = {spec.sample_dim} if unit == "sample" else set()
        if unit == "channel":
            drawn = {spec.sample_dim, spec.dim_of(Dimension.OUT_CHANNEL)}
        return tuple(
            i for i, p in enumerate(placements) if isinstance(p, int) and (unit == "element" or p in drawn)
        )  # fmt: skip

    def _is_constant(self, node: fx.Node) -> bool:
        """Return whether a node is one of the traced ones that belong to no layer."""
        traced = self._nodes.get(node.name) is node and node.op != "placeholder"
        return traced and node.name not in self._in_layers and isinstance(node.meta.get("val"), torch.Tensor)

    def _seed(self, layer: Layer, node: fx.Node) -> None:
        """Let a call that draws random numbers draw the same ones on replicas, others on other pieces."""
        module = self._modules.get(str(node.target)) if node.op == "call_module" else None
        if not draws(node, module) or isinstance(module, Seeded):
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
        name = self._add(f"random.{identifier(node.name)}_{len(self._modules)}", Seeded(call, key, self._state))
        node.op, node.target = "call_module", name

    def _swap_call(self, node: fx.Node, function: Any, *arguments: Any) -> fx.Node:
        with self._graph.inserting_after(node):
            new = self._graph.call_function(function, (tensor_inputs(node)[0], *arguments))
        return self._take_over(node, new)

    def _take_over(self, node: fx.Node, new: fx.Node) -> fx.Node:
        new.meta |= {key: node.meta[key] for key in ("val", LAYER) if key in node.meta}
        node.replace_all_uses_with(new, lambda user: user is not new)
        self._graph.erase_node(node)
        return new


def samples_of(spec: TensorSpec) -> tuple[int, int] | None:
    """Return the dimension of the samples and its rows for each, None where a tensor has none."""
    return None if spec.sample_dim is None else (spec.sample_dim, spec.sample_rows)


_DRAWING = (
    nn.Dropout | nn.Dropout1d | nn.Dropout2d | nn.Dropout3d | nn.AlphaDropout | nn.FeatureAlphaDropout | nn.RReLU
    | nn.FractionalMaxPool2d | nn.FractionalMaxPool3d
)  # fmt: skip


def draws(node: fx.Node, module: nn.Module | None) -> bool:
    """Return whether a call draws random numbers."""
    if module is not None:
        rates = [getattr(part, "dropout", 0) for part in module.modules()]
        drops = any(isinstance(rate, int | float) and rate > 0 for rate in rates)
        return drops or any(isinstance(part, _DRAWING) for part in module.modules())
    drops = any(isinstance(v, float) and v > 0 for k, v in node.kwargs.items() if "dropout" in k)
    return plain_name(node) in RANDOM or drops


def identifier(name: str) -> str:
    """Return a name that a module may have, for any name of a layer or node."""
    return "".join(c if c.isalnum() else "_" for c in name)


def of_input(conversion: Conversion, state: StepState) -> float:
    """Return what undoes ``of_output``: a gradient of this rank's input is that of its own loss, as under DDP."""
    share = conversion.share(conversion.source, state.current_batch(), state.communicator)
    return 1.0 / (share * state.gradient_scale)


def of_output(conversion: Conversion, state: StepState) -> float:
    """Return the share of an output that this rank's loss is the mean of, times the scale of all gradients."""
    return conversion.share(conversion.target, state.current_batch(), state.communicator) * state.gradient_scale


def of_received(_conversion: Conversion, state: StepState) -> float:
    """Return what undoes ``of_sent``: between stages, gradients are those of the mean loss over the global batch."""
    return 1.0 / state.gradient_scale


def of_sent(_conversion: Conversion, state: StepState) -> float:
    """Return the scale of all gradients inside the stage."""
    return state.gradient_scale
