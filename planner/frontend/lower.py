"""From a traced ``fx.Graph`` to the layer graph that planner and runtime share."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from planner.errors import TraceError
from planner.frontend.batch import PROBE, sample_dim_of, sample_size, size_node
from planner.frontend.counting import flop_of
from planner.frontend.custom import custom_rule
from planner.frontend.recognize import (
    METADATA,
    VIEWS_OF_PARTS,
    Call,
    function_name,
    holds_tensor,
    is_in_place,
    operands,
    plain_name,
    recognize,
    tensor_inputs,
)
from planner.frontend.samples import (
    MIXED,
    Samples,
    differs_by_sample,
    mixed_if_grown,
    roles_of,
    samples_of,
    scaled,
    spec_of,
)
from planner.frontend.trace import NO_KEYWORDS, Inputs, Keywords, Tracer, attribute, trace
from planner.ir import ops
from planner.ir.dimension import Dimension
from planner.ir.graph import Absorbed, Layer, LayerGraph, Parameter, share_transfers
from planner.ir.ops import Op
from planner.ir.split import LayerId
from planner.ir.tensor import DType, TensorSpec


@dataclass(frozen=True, slots=True)
class TracedModel:
    """A traced model and its layer graph.

    Attributes:
        graph: the fx graph, without in-place writes to tensors that others read.
        layers: the layer graph, with a redistribute layer behind every tensor with several readers.
        nodes: of every layer with fx nodes, their names: the operator first, then what it absorbed.
        sizes: of every layer, the names of the nodes in front of them that depend on the sizes of the
            layer's own piece of the batch: size literals, class tokens repeated for each sample.
        keywords: names of the inputs that are passed by keyword.
        traced_by: ``fx`` (the concrete tracer) or ``export`` (``torch.export``, the fallback).
    """

    graph: fx.Graph
    layers: LayerGraph
    nodes: Mapping[LayerId, tuple[str, ...]]
    sizes: Mapping[LayerId, tuple[str, ...]] = field(default_factory=dict)
    keywords: tuple[str, ...] = ()
    traced_by: str = "fx"


def trace_layers(
    module: nn.Module,
    example_inputs: Inputs,
    name: str = "",
    *,
    keywords: Keywords = NO_KEYWORDS,
    training: bool = True,
    tracer: Tracer = "auto",
) -> TracedModel:
    """Trace a module and lower it to a layer graph.

    Args:
        module: any CNN; weights may be on the meta device.
        example_inputs: tensors with the global batch as their first size, on any device.
        name: of the model; its class by default.
        keywords: further inputs by argument name.
        training: trace what it does in training, or else in evaluation.
        tracer: ``fx`` (the concrete tracer), ``export`` (``torch.export``), or export where fx fails.

    Raises:
        TraceError: it cannot be traced.
    """
    batched = [x for x in (*example_inputs, *keywords.values()) if x.dim()]
    if not batched:
        raise TraceError("the model needs at least one input tensor with the batch as its first size")
    graph = trace(module, example_inputs, keywords, training=training, tracer=tracer)
    _split_tuples(graph)
    _remove_shared_writes(graph, module)
    builder = _Builder(module, graph, batched[0].shape[0])
    for node in list(graph.nodes):
        builder.add(node)
    return builder.finish(name or type(module).__name__, tuple(keywords))


def _split_tuples(graph: fx.Graph) -> None:
    """Give every part of a tensor that is cut in views (``chunk``, ``unbind``) its own cut."""
    for node in list(graph.nodes):
        if node.op not in {"call_function", "call_method"} or plain_name(node) not in VIEWS_OF_PARTS:
            continue
        for user in list(node.users)[1:]:
            with graph.inserting_after(node):
                twin = graph.node_copy(node)
            user.replace_input_with(node, twin)


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
    constant, by_storage = _constants(graph), _by_storage(graph)
    for node in graph.nodes:
        writes = node.op in {"call_module", "call_function", "call_method"} and is_in_place(
            node, _submodule(root, node)
        )
        if not writes or not isinstance(node.meta["val"], torch.Tensor):
            continue
        storage = tensor_inputs(node)[0].meta["val"].untyped_storage()._cdata
        aliases = [n for n in by_storage[storage] if order[n] < order[node]]
        if any(alias.op == "get_attr" for alias in aliases):
            continue  # writes into buffers are meant to be seen
        for alias in aliases:
            later = [user for user in alias.users if order[user] > order[node] and user.target is not sample_size]
            if later and alias.meta["val"].shape != node.meta["val"].shape:
                if node in constant:
                    continue  # constants are never cut, and stay in order
                raise TraceError(
                    f"{node.meta.get('origin')}: {node.name!r} writes in place into a tensor of which "
                    f"{alias.name!r} is a view that is read afterwards. Make the operator out of place."
                )
            for user in later:
                user.replace_input_with(alias, node)


def _constants(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes that are computed from parameters, buffers and factories only."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op in {"call_function", "call_method", "call_module", "get_attr"}:
            reads = [] if _name_of(node) in METADATA else tensor_inputs(node)
            if all(n in found for n in reads):
                found.add(node)
    return found


def _by_storage(graph: fx.Graph) -> dict[int, list[fx.Node]]:
    """Return the nodes whose values share memory, in order, by their storage."""
    found: dict[int, list[fx.Node]] = {}
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            found.setdefault(value.untyped_storage()._cdata, []).append(node)
    return found


@dataclass(eq=False, slots=True)
class _Draft:
    """A layer in the making.

    Attributes:
        name: not yet unique.
        nodes: with their operators, in order; an input's or output's node has no call.
        ops: of the nodes.
        params: by name.
        constants: nodes that its nodes read and that are computed from parameters and factories only.
        follows: the layer whose call made its tensor as a further result.
        id: its name, made unique.
    """

    name: str
    nodes: list[fx.Node]
    ops: list[Op]
    params: dict[str, Parameter] = field(default_factory=dict)
    constants: list[fx.Node] = field(default_factory=list)
    follows: "_Draft | None" = None
    id: LayerId = field(default=LayerId(""))  # a string

    @property
    def op(self) -> Op:
        return self.ops[0]

    @property
    def last(self) -> fx.Node:
        return self.nodes[-1]


class _Builder:
    """Collects layers while the nodes pass in order."""

    def __init__(self, root: nn.Module, graph: fx.Graph, batch: int) -> None:
        self._root, self._graph, self._batch = root, graph, batch
        self._names = parameter_names(root)
        self._drafts: list[_Draft] = []
        self._of: dict[fx.Node, _Draft] = {}
        self._samples: dict[fx.Node, Samples | None] = {}
        self._specs: dict[fx.Node, TensorSpec] = {}
        self._constant: set[fx.Node] = set()
        self._copied: list[fx.Node] = []
        self._concats: dict[tuple[int, tuple[fx.Node, ...]], fx.Node] = {}

    # ---- nodes

    def add(self, node: fx.Node) -> None:
        """Take in the next node."""
        match node.op:
            case "placeholder":
                self._input(node)
            case "output":
                found = list(_outputs(node.args[0]))
                if not found:
                    raise TraceError("the model returns no tensor, so there is no output to plan for")
                for path, value in found:
                    self._output(value, path)
            case "get_attr":
                self._constant.add(node)
            case _ if not holds_tensor(node.meta.get("val")) and not is_in_place(node, None):
                pass  # sizes, devices, the class of a structured result
            case _:
                self._call(Call.of(node, self._root))

    def _input(self, node: fx.Node) -> None:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            return
        samples = Samples(0) if value.dim() and value.shape[0] == PROBE else None
        self._place(node, samples, (None,) * value.dim() if samples is None else ())
        self._start(node, ops.Input(), str(node.target))

    def _output(self, node: fx.Node, path: str) -> None:
        if node in self._constant:
            raise TraceError(f"output{path} of the model does not depend on its inputs; return it apart")
        draft = _Draft("output" + path, [node], [ops.Output()])
        self._drafts.append(draft)

    def _place(self, node: fx.Node, samples: Samples | None, roles: Any) -> None:
        self._samples[node] = samples
        self._specs[node] = spec_of(node, samples, roles, self._batch)

    def _call(self, call: Call) -> None:
        data = self._data(call)
        if not data and self._is_light(call) and not differs_by_sample(call):
            self._constant.add(call.node)
            return
        op = self._recognized(call, data)
        samples = samples_of(call, op, [(n, self._samples[n]) for n in data]) if data else mixed_if_grown(call)
        if samples is MIXED or (samples is None and not isinstance(op, ops.Loss)):
            op = self._whole(op, call)
        specs = [self._specs[n] for n in data]
        self._place(call.node, samples, roles_of(op, specs, call.shape, samples))
        draft = self._absorber(call, op, data)
        if draft is None:
            draft = self._start(call.node, op, self._name(call.node))
            if data and not isinstance(data[0].meta["val"], torch.Tensor):
                draft.follows = self._of[data[0]]
                draft.ops[0] = ops.PerSample("result")
        else:
            draft.nodes.append(call.node)
            draft.ops.append(op)
            self._of[call.node] = draft
        self._add_parameters(draft, call, op)

    def _data(self, call: Call) -> list[fx.Node]:
        """Return the tensors that a call reads, each once, without constants of the model."""
        if call.name in METADATA:
            return []
        return [n for n in dict.fromkeys(call.tensors) if n not in self._constant]

    def _is_light(self, call: Call) -> bool:
        """Return whether a function of constants is best computed by every reader: no products, no layers."""
        return call.module is None and flop_of(call) == (0, 0)

    def _recognized(self, call: Call, data: list[fx.Node]) -> ops.Op:
        op = recognize(call, len(data))
        several = ops.Elementwise | ops.Concat | ops.PerSample | ops.Loss | ops.Custom
        if len(data) != 1 and not isinstance(op, several):
            op = ops.PerSample(call.name)
        if isinstance(op, ops.Concat) and len(data) != len(call.tensors):
            op = ops.Along("cat", (op.dim,)) if len(data) == 1 else op
        if isinstance(op, ops.PerSample):
            return ops.PerSample(op.function, *self._flop(call))
        if isinstance(op, ops.Custom):
            return ops.Custom(op.name, op.dimensions, *self._flop(call))
        return op

    def _flop(self, call: Call) -> tuple[int, int]:
        forward, backward = flop_of(call)
        return scaled(forward, self._batch), scaled(backward, self._batch)

    def _whole(self, op: ops.Op, call: Call) -> ops.Op:
        """Return an operator that is not split at all: its result does not hold whole samples."""
        if isinstance(op, ops.PerSample):
            return op
        return ops.PerSample(call.name, *self._flop(call))

    def _absorber(self, call: Call, op: ops.Op, data: list[fx.Node]) -> _Draft | None:
        """Return the layer that takes in an operator: its only input's, read by nobody else."""
        if not data or any(n not in self._of for n in data):
            return None
        draft = self._of[data[0]]
        if not isinstance(data[0].meta["val"], torch.Tensor):  # one of several results
            return draft if draft.last is data[0] else None
        if len(data) != 1 or len(_readers(data[0])) != 1 or isinstance(draft.op, ops.Input | ops.Loss):
            return None
        before, after = self._specs[data[0]], self._specs[call.node]
        if (before.shape, before.sample_rows) != (after.shape, after.sample_rows):
            return None
        return draft if self._joins(draft, call, op, before) else None

    def _joins(self, draft: _Draft, call: Call, op: ops.Op, before: TensorSpec) -> bool:
        channel = before.dim_of(Dimension.OUT_CHANNEL)
        by_channel = isinstance(op, ops.BatchNorm) or (isinstance(op, ops.Dropout) and op.unit == "channel")
        if by_channel and channel != 1:
            return False  # a linear layer on (N, L, F) has its channels last
        if isinstance(op, ops.BatchNorm):
            return isinstance(draft.op, ops.Conv | ops.ConvTranspose | ops.Linear) and len(draft.ops) == 1
        if isinstance(op, ops.Elementwise) and isinstance(draft.op, ops.AdaptivePool | ops.Reduce):
            return len(call.tensors) == 1
        return isinstance(op, ops.Elementwise | ops.Dropout)

    def _start(self, node: fx.Node, op: ops.Op, name: str) -> _Draft:
        draft = _Draft(name, [node], [op])
        self._drafts.append(draft)
        self._of[node] = draft
        return draft

    def _name(self, node: fx.Node) -> str:
        if node.op == "call_module":
            return str(node.target)
        scope = node.meta.get("scope") or ""
        return f"{scope}.{function_name(node)}" if scope else function_name(node)

    # ---- parameters

    def _add_parameters(self, draft: _Draft, call: Call, op: ops.Op) -> None:
        constants = [n for n in call.tensors if n in self._constant]
        by_role = operands(call) if isinstance(op, ops.Conv | ops.Linear | ops.BatchNorm) else {}
        roles = {n: role for role, n in by_role.items() if n is not None and n.op == "get_attr"}
        computed = isinstance(op, ops.Conv | ops.Linear) and op.computed_weight
        for node in constants:
            role = roles.get(node, "") if not computed else ""
            for source in _attributes_behind(node):
                tensor = attribute(self._root, str(source.target))
                self._add_parameter(draft, op, tensor, role if source is node else "", split=bool(role))
        draft.constants.extend(constants)
        if call.module is not None:
            own = not isinstance(op, _WITH_PIECES | ops.Custom)
            for name, tensor in [*call.module.named_parameters(), *call.module.named_buffers()]:
                self._add_parameter(draft, op, tensor, name, split=not own, module=call.module)

    def _add_parameter(
        self,
        draft: _Draft,
        op: ops.Op,
        tensor: torch.Tensor,
        role: str,
        *,
        split: bool,
        module: nn.Module | None = None,
    ) -> None:
        name = self._names.get(id(tensor))
        if name is None or name in draft.params:
            return  # a plain attribute is no state
        trainable = isinstance(tensor, nn.Parameter) and tensor.requires_grad
        spec = TensorSpec(tuple(tensor.shape), DType(str(tensor.dtype).removeprefix("torch.")))
        out_dim: int | None = 0 if spec.shape else None
        in_dim = 1 if role == "weight" and isinstance(op, ops.Conv | ops.Linear) else None
        if isinstance(op, ops.ConvTranspose) and role == "weight":
            out_dim, in_dim = (1, 0) if op.groups == 1 else (0, None)
        if isinstance(op, ops.Custom) and module is not None:
            out_dim = custom_rule(type(module)).channel_params.get(role)
            split = out_dim is not None
        draft.params[name] = Parameter(
            name, spec, out_dim if split else None, in_dim if split else None, trainable, role, whole=not split
        )

    # ---- layers

    def finish(self, name: str, keywords: tuple[str, ...]) -> TracedModel:
        """Return everything; inserts the nodes that depend on the sizes of a layer's own piece."""
        self._merge()
        self._name_drafts()
        saved = self._saved_bytes()
        sizes: dict[LayerId, tuple[str, ...]] = {}
        layers = []
        for draft in self._drafts:
            if not isinstance(draft.op, ops.Input | ops.Output):
                sizes[draft.id] = tuple(self._own_sizes(draft))
            layers.append(self._layer(draft, saved.get(draft, 0)))
        graph = share_transfers(LayerGraph(name, tuple(layers), self._batch))
        nodes = {d.id: tuple(n.name for n in d.nodes) for d in self._drafts if not isinstance(d.op, ops.Output)}
        self._drop_unused_sizes()
        self._graph.lint()
        return TracedModel(self._graph, graph, nodes, sizes, keywords, getattr(self._graph, "traced_by", "fx"))

    def _merge(self) -> None:
        """Join per-sample operators whose results only one other per-sample layer reads, as attention has them."""
        for draft in reversed(self._drafts):
            reader = self._only_reader(draft)
            if reader is None or not self._belongs_inside(draft, reader):
                continue
            if not isinstance(reader.op, ops.PerSample):
                reader.ops[0] = ops.PerSample(_name_of(reader.nodes[0]))
            reader.nodes[:0], reader.ops[:0] = draft.nodes, draft.ops
            reader.params = {**draft.params, **reader.params}
            reader.constants[:0] = draft.constants
            for node in draft.nodes:
                self._of[node] = reader
            draft.nodes = []
        self._drafts = [d for d in self._drafts if d.nodes]
        for draft in self._drafts:
            if any(isinstance(op, ops.PerSample) for op in draft.ops):
                self._combine(draft)

    def _only_reader(self, draft: _Draft) -> _Draft | None:
        """Return the only layer that reads a layer's results."""
        if draft.follows is not None or any(d.follows is draft for d in self._drafts):
            return None
        readers = {self._reader(user, draft) for node in draft.nodes for user in node.users} - {draft}
        return readers.pop() if len(readers) == 1 else None

    def _belongs_inside(self, draft: _Draft, reader: _Draft) -> bool:
        """Return whether nothing is lost where a layer joins its only reader: no split of its own is likely."""
        views = ops.Reshape | ops.Permute
        if isinstance(draft.op, views) and isinstance(reader.op, views):
            return True
        if not isinstance(reader.op, ops.PerSample):
            return isinstance(draft.op, ops.PerSample) and isinstance(reader.op, views)
        if isinstance(draft.op, ops.PerSample | views):
            return True
        own = isinstance(draft.op, ops.Elementwise | ops.Softmax | ops.Along | ops.Reduce)
        return own and all(isinstance(self._of[n].op, ops.PerSample | views) for n in self._sources(draft))

    def _reader(self, user: fx.Node, draft: _Draft) -> _Draft | None:
        """Return the layer that a user of a draft's node belongs to; the draft itself for what does not count."""
        if user.op == "output":
            return None
        if user.target is sample_size or user in self._constant:
            return draft
        return self._of.get(user, draft)

    def _combine(self, draft: _Draft) -> None:
        """Give a layer of several per-sample operators one operator, with their work."""
        order = {node: i for i, node in enumerate(self._graph.nodes)}
        pairs = sorted(zip(draft.nodes, draft.ops, strict=True), key=lambda pair: order[pair[0]])
        draft.nodes, draft.ops = [n for n, _ in pairs], [o for _, o in pairs]
        inner = [o for o in draft.ops if isinstance(o, ops.PerSample)]
        heaviest = max(inner, key=lambda o: o.forward_flop)
        if len(draft.nodes) > 1:
            draft.name = self._name(draft.nodes[draft.ops.index(heaviest)])
        first = ops.PerSample(
            heaviest.function, sum(o.forward_flop for o in inner), sum(o.backward_flop for o in inner)
        )
        draft.ops = [first, *draft.ops[1:]]

    def _name_drafts(self) -> None:
        taken: set[str] = set()
        for draft in self._drafts:
            found, count = draft.name, 1
            while found in taken:
                count += 1
                found = f"{draft.name}@{count}"
            taken.add(found)
            draft.id = LayerId(found)

    def _layer(self, draft: _Draft, saved_bytes: int) -> Layer:
        absorbed = tuple(Absorbed(self._name(n), o) for n, o in zip(draft.nodes[1:], draft.ops[1:], strict=True))
        sources = self._shared_prefix(draft, self._sources(draft))
        return Layer(
            draft.id,
            draft.op,
            tuple(self._of[n].id for n in sources),
            self._specs[draft.last],
            tuple(draft.params.values()),
            absorbed,
            draft.follows.id if draft.follows else None,
            str(draft.last.meta.get("origin", "")),
            saved_bytes,
        )

    def _sources(self, draft: _Draft) -> list[fx.Node]:
        """Return the nodes of other layers that a layer reads, each once, in order."""
        if isinstance(draft.op, ops.Output):
            node = draft.last
            if node not in self._of:
                raise TraceError(
                    f"{node.meta.get('origin', node.name)}: {node.name!r} is no tensor of a known operator"
                )
            return [node]
        own = set(draft.nodes)
        reads = [n for node in draft.nodes for n in self._data(Call.of(node, self._root)) if node.op != "placeholder"]
        found = [n for n in dict.fromkeys(reads) if n not in own]
        for n in found:
            if self._of[n].last is not n and self._of[n] is not draft.follows:
                raise TraceError(
                    f"{n.meta.get('origin', n.name)}: several results of {n.name!r} are used by different layers. "
                    "Make the module around it a leaf with planner.frontend.custom.register_module."
                )
        return found

    def _shared_prefix(self, draft: _Draft, sources: list[fx.Node]) -> list[fx.Node]:
        """Let a concatenation read an earlier one that made its first part, as every layer of a DenseNet has it.

        Values and work are those of the concatenation of all, but the layer graph becomes a chain,
        which can be searched exactly: its treewidth is 3 instead of tens.
        """
        if not isinstance(draft.op, ops.Concat) or list(dict.fromkeys(tensor_inputs(draft.nodes[0]))) != sources:
            return sources
        for count in range(len(sources) - 1, 1, -1):
            earlier = self._concats.get((draft.op.dim, tuple(sources[:count])))
            if earlier is not None:
                sources = [earlier, *sources[count:]]
                break
        if len(draft.nodes) == 1:
            self._concats.setdefault((draft.op.dim, tuple(tensor_inputs(draft.nodes[0]))), draft.last)
        return sources

    def _own_sizes(self, draft: _Draft) -> Iterator[str]:
        """Give a layer its own copies of what depends on the batch it works on; yield their names."""
        needed = self._size_dependent(draft)
        if not needed:
            return
        position = {node: i for i, node in enumerate(self._graph.nodes)}
        needed.sort(key=position.__getitem__)
        inside = [*self._sources(draft), *draft.nodes]
        carriers = sorted((n for n in inside if sample_dim_of(n) is not None), key=position.__getitem__)
        first = min(position[n] for n in draft.nodes if any(source in needed for source in n.all_input_nodes))
        if not carriers or position[carriers[0]] >= first:
            return  # nothing it works on has samples: sizes are those of the whole batch
        copies: dict[fx.Node, fx.Node] = {}
        behind: dict[fx.Node, fx.Node] = {}
        for node in needed:
            anchor = max(node, carriers[0], key=position.__getitem__)
            with self._graph.inserting_after(behind.get(anchor, anchor)):
                if node.target is sample_size:
                    copies[node] = size_node(self._graph, carriers[0], node.meta["val"] // PROBE)
                else:
                    copies[node] = self._graph.node_copy(node, lambda n: copies.get(n, n))
            behind[anchor] = copies[node]
            self._copied.append(node)
            yield copies[node].name
        for node in draft.nodes:
            for old, new in copies.items():
                node.replace_input_with(old, new)
        for i, constant in enumerate(draft.constants):
            draft.constants[i] = copies.get(constant, constant)
        self._constant.update(copies.values())

    def _drop_unused_sizes(self) -> None:
        """Remove what was copied for every reader and is read by nobody any more."""
        copied = set(self._copied)
        for node in reversed(list(self._graph.nodes)):
            if node in copied and not node.users:
                self._graph.erase_node(node)

    def _size_dependent(self, draft: _Draft) -> list[fx.Node]:
        """Return size nodes and the constants behind a layer's nodes whose values depend on the batch."""
        found: dict[fx.Node, bool] = {}

        def depends(node: fx.Node) -> bool:
            if node not in found:
                if node.target is sample_size:
                    found[node] = True
                elif node in self._constant:
                    metadata = _name_of(node) in METADATA
                    sources = [n for n in node.all_input_nodes if not metadata or n.target is sample_size]
                    found[node] = any([depends(n) for n in sources])  # noqa: C419  # every source is looked at
                else:
                    found[node] = False
            return found[node]

        for node in draft.nodes:
            for source in node.all_input_nodes:
                depends(source)
        return [n for n, is_needed in found.items() if is_needed]

    # ---- bytes

    def _saved_bytes(self) -> dict[_Draft, int]:
        """Return the bytes that autograd keeps of each layer's results, and of what its operators made beside."""
        owner: dict[int, _Draft | None] = {}
        for node in self._graph.nodes:
            for storage, _ in _storages(node.meta.get("val")):
                owner.setdefault(storage, self._of.get(node))  # None for constants of the model
        found: dict[_Draft, int] = {}
        seen: set[int] = set()
        for node in self._graph.nodes:
            for storage, num_bytes in _storages(node.meta.get("saved", ())):
                draft = owner.get(storage, self._of.get(node))
                if storage not in seen and draft is not None:
                    found[draft] = found.get(draft, 0) + scaled(num_bytes, self._batch)
                seen.add(storage)
        return found


_WITH_PIECES = ops.Conv | ops.ConvTranspose | ops.Linear | ops.BatchNorm
"""Operators whose parameters are cut where the channels are."""


def _storages(value: Any) -> list[tuple[int, int]]:
    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage()
        return [(storage._cdata, storage.nbytes())]
    if isinstance(value, tuple | list):
        return [s for v in value for s in _storages(v)]
    return []


def _readers(node: fx.Node) -> list[fx.Node]:
    """Return the nodes that read a tensor's elements."""
    return [u for u in node.users if u.op == "output" or _name_of(u) not in METADATA]


def _name_of(node: fx.Node) -> str:
    """Return the plain name of a called function, or nothing for other nodes."""
    return plain_name(node) if node.op in {"call_function", "call_method"} else ""


def _attributes_behind(node: fx.Node) -> list[fx.Node]:
    """Return the parameters and buffers that a constant is computed from."""
    found: dict[fx.Node, None] = {}
    stack = [node]
    seen: set[fx.Node] = set()
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        if current.op == "get_attr":
            found[current] = None
        elif _name_of(current) not in METADATA:
            stack.extend(reversed(current.all_input_nodes))
    return list(found)


def parameter_names(root: nn.Module) -> dict[int, str]:
    """Return one name for every parameter and buffer, by identity: the first, where modules share it."""
    return {id(t): name for name, t in [*root.named_parameters(), *root.named_buffers()]}


def is_structure(node: fx.Node) -> bool:
    """Return whether a node makes a named tuple of results."""
    return node.op == "call_function" and isinstance(node.target, type) and issubclass(node.target, tuple)


def _outputs(structure: Any, path: str = "") -> Iterator[tuple[str, fx.Node]]:
    """Yield every tensor of the model's result with the path that leads to it."""
    if isinstance(structure, fx.Node) and is_structure(structure):
        names = getattr(structure.target, "_fields", ())
        for name, value in zip(names, structure.args, strict=False):
            yield from _outputs(value, f"{path}.{name}")
        for name, value in structure.kwargs.items():
            yield from _outputs(value, f"{path}.{name}")
    elif isinstance(structure, fx.Node):
        yield path, structure
    elif isinstance(structure, dict):
        for key, value in structure.items():
            yield from _outputs(value, f"{path}.{key}")
    elif isinstance(structure, tuple | list):
        for i, value in enumerate(structure):
            yield from _outputs(value, f"{path}.{i}")
    elif structure is not None:
        raise TraceError(f"the model returns {structure!r}, which is not a tensor, in place output{path}")
