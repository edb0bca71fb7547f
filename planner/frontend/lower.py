"""From a traced ``fx.Graph`` to the layer graph that planner and runtime share."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from planner.errors import TraceError
from planner.frontend.recognize import function_name, is_in_place, recognize, tensor_inputs
from planner.frontend.trace import Inputs, trace
from planner.ir import ops
from planner.ir.graph import Absorbed, Layer, LayerGraph, Parameter, share_transfers
from planner.ir.rules import channel_dim
from planner.ir.split import LayerId
from planner.ir.tensor import DType, TensorSpec


@dataclass(frozen=True, slots=True)
class TracedModel:
    """A traced model and its layer graph.

    Attributes:
        graph: the fx graph, without in-place writes to tensors that others read.
        layers: the layer graph, with a redistribute layer behind every tensor with several readers.
        nodes: of every layer with fx nodes, their names: the operator first, then what it absorbed.
    """

    graph: fx.Graph
    layers: LayerGraph
    nodes: dict[LayerId, tuple[str, ...]]


def trace_layers(module: nn.Module, example_inputs: Inputs, name: str = "") -> TracedModel:
    """Trace a module and lower it to a layer graph.

    Args:
        module: any CNN; weights may be on the meta device.
        example_inputs: tensors with the global batch as their first size, on any device.
        name: of the model; its class by default.

    Raises:
        TraceError: it cannot be traced, or has an operator without a partition rule.
    """
    graph = trace(module, example_inputs)
    if not example_inputs or example_inputs[0].dim() == 0:
        raise TraceError("the model needs at least one input tensor with the batch as its first size")
    _remove_shared_writes(graph, module)
    builder = _Builder(module)
    for node in graph.nodes:
        builder.add(node)
    layers = LayerGraph(name or type(module).__name__, tuple(builder.layers()), example_inputs[0].shape[0])
    return TracedModel(graph, share_transfers(layers), builder.node_names())


def _submodule(root: nn.Module, node: fx.Node) -> nn.Module | None:
    return root.get_submodule(str(node.target)) if node.op == "call_module" else None


def _remove_shared_writes(graph: fx.Graph, root: nn.Module) -> None:
    """Let later readers of a tensor that is written in place read the written value by its own name.

    Afterwards a tensor that is written in place and has other readers is read by them before the
    write only, and the runtime may safely make that write out of place.

    Raises:
        TraceError: a view of another shape of the written tensor is read after the write.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if node.op in {"call_module", "call_function", "call_method"} and is_in_place(node, _submodule(root, node)):
            for alias in _aliases(tensor_inputs(node)[0], node, graph):
                later = [user for user in alias.users if order[user] > order[node]]
                if later and alias.meta["val"].shape != node.meta["val"].shape:
                    raise TraceError(
                        f"{node.meta.get('origin')}: {node.name!r} writes in place into a tensor of which "
                        f"{alias.name!r} is a view that is read afterwards. Make the operator out of place."
                    )
                for user in later:
                    user.replace_input_with(alias, node)


def _aliases(written: fx.Node, writer: fx.Node, graph: fx.Graph) -> list[fx.Node]:
    """Return the nodes in front of a write whose values share memory with the written tensor."""
    storage = written.meta["val"].untyped_storage()._cdata
    found = []
    for node in graph.nodes:
        if node is writer:
            break
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.untyped_storage()._cdata == storage:
            found.append(node)
    return found


class _Builder:
    """Collects layers while the nodes pass in order."""

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self._names = parameter_names(root)
        self._layers: list[_Draft] = []
        self._layer_of: dict[fx.Node, _Draft] = {}
        self._ids: set[str] = set()

    def add(self, node: fx.Node) -> None:
        match node.op:
            case "placeholder":
                if isinstance(node.meta["val"], torch.Tensor):
                    self._start(node, ops.Input(), [], str(node.target))
            case "output":
                for path, value in _outputs(node.args[0]):
                    self._finish(value, path)
            case "get_attr":
                raise TraceError(
                    f"{node.meta.get('origin', 'forward()')}: forward() uses the tensor {node.target!r} directly; only "
                    "the parameters of torch.nn layers can be planned so far. Wrap it in a torch.nn layer."
                )
            case _:
                self._call(node)

    def _call(self, node: fx.Node) -> None:
        module = _submodule(self._root, node)
        op = recognize(node, module)
        sources = tensor_inputs(node)
        if (draft := self._absorber(op, sources)) is not None:
            draft.absorbed.append(Absorbed(self._name(node), op))
            draft.nodes.append(node)
            draft.params.extend(_parameters(module, self._names))
            self._layer_of[node] = draft
        else:
            draft = self._start(node, op, sources, self._name(node))
            draft.params.extend(_parameters(module, self._names))

    def _absorber(self, op: ops.Op, sources: list[fx.Node]) -> "_Draft | None":
        """Return the layer that takes in an operator: its only input's, read by nobody else."""
        if len(sources) != 1 or len(sources[0].users) != 1 or sources[0] not in self._layer_of:
            return None
        draft = self._layer_of[sources[0]]
        if isinstance(draft.op, ops.Input | ops.Loss):
            return None
        shape = tuple(sources[0].meta["val"].shape)
        by_channel = isinstance(op, ops.BatchNorm) or (isinstance(op, ops.Dropout) and op.whole_channels)
        if by_channel and channel_dim(draft.op, shape) != 1:
            return None  # a linear layer on (N, L, F) has its channels last
        joins = isinstance(op, ops.Elementwise | ops.Dropout)
        follows = isinstance(op, ops.BatchNorm) and isinstance(draft.op, ops.Conv | ops.Linear)
        return draft if joins or (follows and not draft.absorbed) else None

    def _start(self, node: fx.Node, op: ops.Op, sources: list[fx.Node], name: str) -> "_Draft":
        draft = _Draft(self._unique(name), op, [self._source(n) for n in sources], [node], [], [])
        self._layers.append(draft)
        self._layer_of[node] = draft
        return draft

    def _finish(self, node: fx.Node, path: str) -> None:
        draft = _Draft(self._unique("output" + path), ops.Output(), [self._source(node)], [], [], [], node)
        self._layers.append(draft)

    def _source(self, node: fx.Node) -> "_Draft":
        if node not in self._layer_of:
            raise TraceError(f"{node.meta.get('origin', node.name)}: {node.name!r} is not a tensor of a known operator")
        return self._layer_of[node]

    def _name(self, node: fx.Node) -> str:
        if node.op == "call_module":
            return str(node.target)
        scope = node.meta.get("scope") or ""
        return f"{scope}.{function_name(node)}" if scope else function_name(node)

    def _unique(self, name: str) -> LayerId:
        found, count = name, 1
        while found in self._ids:
            count += 1
            found = f"{name}@{count}"
        self._ids.add(found)
        return LayerId(found)

    def layers(self) -> Iterator[Layer]:
        for draft in self._layers:
            yield Layer(
                draft.id, draft.op, tuple(source.id for source in draft.sources), _spec(draft.last),
                tuple(draft.params), tuple(draft.absorbed), str(draft.last.meta.get("origin", "")),
            )  # fmt: skip

    def node_names(self) -> dict[LayerId, tuple[str, ...]]:
        return {draft.id: tuple(node.name for node in draft.nodes) for draft in self._layers}


@dataclass(slots=True)
class _Draft:
    id: LayerId
    op: ops.Op
    sources: list["_Draft"]
    nodes: list[fx.Node]
    params: list[Parameter]
    absorbed: list[Absorbed]
    value: fx.Node | None = None

    @property
    def last(self) -> fx.Node:
        return self.nodes[-1] if self.nodes else self.value  # type: ignore[return-value]  # one of both is there


def _spec(node: fx.Node) -> TensorSpec:
    value = node.meta["val"]
    name = str(value.dtype).removeprefix("torch.")
    try:
        return TensorSpec(tuple(value.shape), DType(name))
    except ValueError as error:
        raise TraceError(f"{node.meta.get('origin', node.name)}: {node.name!r} is a {name} tensor of shape "
                         f"{tuple(value.shape)}: {error}") from error  # fmt: skip


def parameter_names(root: nn.Module) -> dict[int, str]:
    """Return one name for every parameter and buffer, by identity: the first, where modules share it."""
    return {id(t): name for name, t in [*root.named_parameters(), *root.named_buffers()]}


def _parameters(module: nn.Module | None, names: dict[int, str]) -> list[Parameter]:
    if module is None:
        return []
    is_product = isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
    found = []
    named: list[tuple[str, torch.Tensor, bool]] = [
        *((n, p, p.requires_grad) for n, p in module.named_parameters(recurse=False)),
        *((n, b, False) for n, b in module.named_buffers(recurse=False)),
    ]
    for name, tensor, trainable in named:
        spec = TensorSpec(tuple(tensor.shape), DType(str(tensor.dtype).removeprefix("torch.")))
        out_dim = 0 if spec.shape else None
        in_dim = 1 if is_product and name == "weight" else None
        found.append(Parameter(names[id(tensor)], spec, out_dim, in_dim, trainable))
    return found


def _outputs(structure: Any, path: str = "") -> Iterator[tuple[str, fx.Node]]:
    """Yield every tensor of the model's result with the path that leads to it."""
    if isinstance(structure, fx.Node):
        yield path, structure
    elif isinstance(structure, dict):
        for key, value in structure.items():
            yield from _outputs(value, f"{path}.{key}")
    elif isinstance(structure, tuple | list):
        for i, value in enumerate(structure):
            yield from _outputs(value, f"{path}.{i}")
    else:
        raise TraceError(f"the model returns {structure!r}, which is not a tensor, in place output{path}")
