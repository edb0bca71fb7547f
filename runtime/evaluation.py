"""The graph of evaluation, where the model's own code asks for its mode (auxiliary heads and the like).

It is lowered like that of training, on the same parameters and buffers. Layers that both graphs have keep the plan's
split and their modules. Others follow their producer where that is legal, and are replicated otherwise; what reads a
parameter takes a split under which the ranks hold it as they do.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from planner.errors import UsageError
from planner.frontend.lower import TracedModel
from planner.frontend.trace import attribute
from planner.ir.dimension import Dimension
from planner.ir.graph import Layer, is_pinned
from planner.ir.layout import Layout, Whole
from planner.ir.rules import InputOutput, io_splits, is_io_legal, is_legal, layouts, legal_splits
from planner.ir.split import LayerId, Split, Strategy
from planner.plan.schema import CostPart, LayerPart, Plan
from runtime.lowering.lower import Lowered, Lowering
from runtime.lowering.ops import PartialSum
from runtime.lowering.rewriting import LAYER
from runtime.state import StepState

_NO_COST = CostPart(compute_s=0, transfer_s=0, halo_s=0, sync_s=0, exposed_s=0)


@dataclass(frozen=True)
class Evaluation:
    """What runs in evaluation.

    Attributes:
        graph: calls modules and reads tensors by name.
        own: modules and tensors that only this graph has; all others are those of the parallel module.
    """

    graph: fx.Graph
    own: dict[str, Any]

    def bound(self, module: nn.Module) -> fx.GraphModule:
        """Return a module that runs the graph on the parts of the parallel module."""
        parts = dict(module.named_modules())
        for name, value in self.own.items():
            if isinstance(value, nn.Module) and name in parts:  # conversions put other buffers in their places
                value._buffers.update({n: b for n, b in parts[name]._buffers.items() if n in value._buffers})
        names = {str(node.target) for node in self.graph.nodes if node.op in {"call_module", "get_attr"}}
        return fx.GraphModule({n: self.own[n] if n in self.own else attribute(module, n) for n in names}, self.graph)

    def convert(self, fn: Any) -> None:
        """Convert tensors of its own, as ``nn.Module._apply``."""
        for name, value in self.own.items():
            if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
                self.own[name] = fn(value)


def evaluation_plan(traced: TracedModel, plan: Plan) -> Plan:
    """Return the plan with a split for every layer of the graph of evaluation.

    Raises:
        UsageError: a layer that only evaluation has needs parameters in other pieces than ranks hold.
    """
    assert isinstance(traced.evaluation, TracedModel)
    strategy = dict(_strategy(traced, traced.evaluation, plan))
    parts = []
    for layer in traced.evaluation.layers.layers:
        split = strategy[layer.id]
        shares = {axis: list(own) for axis, own in split.shares}
        part = LayerPart(
            id=layer.id, op=layer.op.kind, split=dict(split.axes), shares=shares, cost=_NO_COST, memory_bytes=0
        )
        parts.append(part)
    (stage,) = plan.stages
    return plan.model_copy(update={"stages": [stage.model_copy(update={"layers": parts})]})


def _strategy(traced: TracedModel, evaluation: TracedModel, plan: Plan) -> Iterator[tuple[LayerId, Split]]:
    mesh, planned, io = plan.mesh, plan.strategy, plan.input_output
    held = _held(traced, plan)
    graph = evaluation.layers
    found: dict[LayerId, Split] = {}
    for layer in graph.layers:
        follows = [found[layer.inputs[0]]] if layer.inputs else []
        if is_pinned(layer.op):
            options = io_splits(layer, mesh, io, frozenset(Dimension) if io is InputOutput.LOCAL else ())
            first = [planned[layer.id]] if layer.id in planned else follows
            wanted = [split for split in first if is_io_legal(layer, mesh, io, split)] or [options[0]]
        else:
            replicated = Split.of(mesh, (Dimension.REPLICATE,) * len(mesh.axes))
            first = [planned[layer.id]] if layer.id in planned else []
            wanted = [s for s in (*first, *follows, replicated) if is_legal(layer, graph, mesh, s)]
            if layer.params:
                wanted += legal_splits(layer, graph, mesh, io, Dimension)
                inputs = graph.inputs_of(layer)
                lie = {s: _params(layer, layouts(layer, inputs, mesh, s).params) for s in wanted}
                wanted = [s for s in wanted if all(held.get(n, layout) == layout for n, layout in lie[s].items())]
        if not wanted:
            raise UsageError(
                f"in evaluation the model has a layer {layer.id!r} that reads {layer.params[0].name!r} in a way that "
                "does not fit the pieces that this plan gives the ranks. Plan with the layers that read it replicated "
                "(--pin), or evaluate the unparallelized model."
            )
        split = found[layer.id] = wanted[0]
        held.update(_params(layer, layouts(layer, graph.inputs_of(layer), mesh, split).params))
        yield layer.id, split


def _held(traced: TracedModel, plan: Plan) -> dict[str, Layout]:
    """Return how the ranks hold the parameters and buffers that training reads."""
    found: dict[str, Layout] = {}
    graph, strategy = traced.layers, plan.strategy
    for layer in graph.layers:
        mine = layouts(layer, graph.inputs_of(layer), plan.mesh, strategy[layer.id])
        found = {**_params(layer, mine.params), **found}
    return found


def _params(layer: Layer, found: tuple[Layout, ...]) -> dict[str, Layout]:
    """Return how parameters lie, by name; of what has no gradient, copies are copies."""
    return {
        parameter.name: layout
        if parameter.trainable
        else layout.with_placements(tuple(Whole.EQUAL if p is Whole.SHARED else p for p in layout.placements))
        for parameter, layout in zip(layer.params, found, strict=True)
    }


def lower_evaluation(
    model: nn.Module, traced: TracedModel, plan: Plan, state: StepState, training: Lowered
) -> Evaluation:
    """Return the lowered graph of evaluation; what it adds to ``training`` are parameters that only it reads.

    Args:
        model: the user's.
        traced: with the graph of evaluation.
        plan: for training.
        state: of this rank.
        training: the lowered graph of training.

    Raises:
        UsageError: as ``evaluation_plan``.
    """
    assert isinstance(traced.evaluation, TracedModel)
    own_plan = evaluation_plan(traced, plan)
    lowering = Lowering(traced.evaluation, model, own_plan, state)
    lowering.share(training, state.gradient_scale)
    found = lowering.run()
    known = {id(parameter) for _, parameter, _ in training.synchronised}
    training.synchronised.extend(each for each in found.synchronised if id(each[1]) not in known)
    alike = _alike(traced, plan.enlarged(traced.layers), own_plan.strategy)
    differing = {str(n.target) for n in found.graph.nodes if n.op == "call_module" and n.meta.get(LAYER) not in alike}
    originals = {name for name, _ in model.named_modules()}
    own: dict[str, Any] = {}
    replaced: dict[int, nn.Module] = {}
    for name, value in found.state.items():
        there = training.state.get(name)
        if isinstance(value, nn.Module):
            if name in originals and there is not None and name not in differing:
                replaced[id(value)] = there
                continue
            own[name] = value if there is None or name not in originals else _on_buffers_of(value, there)
            own[name].eval()
        elif there is None:
            own[name] = value
    for value in own.values():
        if isinstance(value, PartialSum) and (product := replaced.get(id(value.product))) is not None:
            value.product = product  # type: ignore[assignment]  # a product, as what it replaces
    return Evaluation(found.graph, own)


def _alike(traced: TracedModel, planned: Strategy, strategy: Strategy) -> set[LayerId]:
    """Return the layers that are the same in both graphs, and split alike."""
    assert isinstance(traced.evaluation, TracedModel)
    mine, theirs = traced.evaluation.layers, traced.layers
    found = set()
    for layer in mine.layers:
        if layer.id in theirs.index:
            other = theirs[layer.id]
            same = (layer.op, layer.output, layer.params) == (other.op, other.output, other.params)
            same = same and mine.inputs_of(layer) == theirs.inputs_of(other)
            same = same and not any(planned[producer].tiles for producer in other.inputs)  # it fetches no halo
            if same and strategy[layer.id] == planned[layer.id]:
                found.add(layer.id)
    return found


def _on_buffers_of(module: nn.Module, other: nn.Module) -> nn.Module:
    """Return a module with the buffers of another, which has the same pieces of them."""
    found = copy.copy(module)
    found._buffers = {name: other._buffers.get(name, buffer) for name, buffer in module._buffers.items()}
    return found
