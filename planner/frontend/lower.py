"""From a module to the layer graph that planner and runtime share: trace, prepare, collect, merge."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from planner.errors import TraceError
from planner.frontend.calls import tensor_inputs
from planner.frontend.changes import changes_of
from planner.frontend.collect import Collector
from planner.frontend.drafts import Draft, Drafts, name_in_model
from planner.frontend.merge import merge
from planner.frontend.parameters import unify_uses
from planner.frontend.prepare import remove_shared_writes, split_tuples
from planner.frontend.samples import scaled
from planner.frontend.sizes import drop_unused, own_sizes
from planner.frontend.trace import NO_KEYWORDS, Inputs, Keywords, Tracer, trace
from planner.ir import ops
from planner.ir.graph import Absorbed, Layer, LayerGraph, is_boundary, share_transfers
from planner.ir.split import LayerId


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
        written_in_evaluation: buffers that the model writes into in evaluation too; only looked for where a
            plan is run (``runtime.parallel.trace_for``).
        changes: sentences of transforms that made the model another one than it was (``planner.frontend.changes``).
        evaluation: what the model is in evaluation, where its code asks for the mode and it is not the same; a
            sentence where that cannot be traced. Only looked for where a plan is run.
        traced_by: ``fx`` (the concrete tracer) or ``export`` (``torch.export``, the fallback).
    """

    graph: fx.Graph
    layers: LayerGraph
    nodes: Mapping[LayerId, tuple[str, ...]]
    sizes: Mapping[LayerId, tuple[str, ...]] = field(default_factory=dict)
    keywords: tuple[str, ...] = ()
    traced_by: str = "fx"
    written_in_evaluation: frozenset[str] = frozenset()
    changes: tuple[str, ...] = ()
    evaluation: "TracedModel | str | None" = None


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
    split_tuples(graph)
    remove_shared_writes(graph, module)
    found = Drafts(module, graph, batched[0].shape[0])
    collector = Collector(found)
    for node in list(graph.nodes):
        collector.add(node)
    merge(found)
    _name(found.drafts)
    unify_uses(found.drafts)
    saved, sizes = _saved_bytes(found), _own_sizes(found)
    concats: _Concats = {}
    layers = tuple(_layer(found, draft, concats, saved.get(draft, _Saved())) for draft in found.drafts)
    graph.lint()
    return TracedModel(
        graph,
        share_transfers(LayerGraph(name or type(module).__name__, layers, found.batch)),
        {d.id: tuple(n.name for n in d.nodes) for d in found.drafts if not isinstance(d.op, ops.Output)},
        sizes,
        tuple(keywords),
        getattr(graph, "traced_by", "fx"),
        changes=changes_of(module),
    )


def _name(drafts: list[Draft]) -> None:
    """Give every layer a name of its own."""
    taken: set[str] = set()
    for draft in drafts:
        found, count = draft.name, 1
        while found in taken:
            count += 1
            found = f"{draft.name}@{count}"
        taken.add(found)
        draft.id = LayerId(found)


def _own_sizes(found: Drafts) -> dict[LayerId, tuple[str, ...]]:
    """Let every layer have its own nodes for what depends on the batch; return their names."""
    copied: set[fx.Node] = set()
    layers = [draft for draft in found.drafts if not is_boundary(draft.op)]
    sizes = {draft.id: tuple(own_sizes(found, draft, copied)) for draft in layers}
    drop_unused(found.graph, copied)
    return sizes


_Concats = dict[tuple[int, tuple[fx.Node, ...]], fx.Node]
"""Earlier concatenations by dimension and parts."""


@dataclass(slots=True)
class _Saved:
    """Bytes that autograd keeps for a layer; ``constant`` are those of them that no split makes fewer."""

    num_bytes: int = 0
    constant: int = 0


def _layer(found: Drafts, draft: Draft, concats: _Concats, saved: _Saved) -> Layer:
    inner = zip(draft.nodes[1:], draft.ops[1:], strict=True)
    return Layer(
        id=draft.id,
        op=draft.op,
        inputs=tuple(found.of[n].id for n in _shared_prefix(draft, found.sources(draft), concats)),
        output=found.specs[draft.last],
        params=tuple(draft.params.values()),
        absorbed=tuple(Absorbed(name_in_model(n), op) for n, op in inner),
        follows=draft.follows.id if draft.follows else None,
        origin=str(draft.last.meta.get("origin", "")),
        saved_bytes=saved.num_bytes,
        saved_constant_bytes=saved.constant,
    )


def _shared_prefix(draft: Draft, sources: list[fx.Node], concats: _Concats) -> list[fx.Node]:
    """Let a concatenation read an earlier one that made its first part, as every layer of a DenseNet has it.

    Values and work are those of the concatenation of all, but the layer graph becomes a chain,
    which can be searched exactly: its treewidth is 3 instead of tens.
    """
    if not isinstance(draft.op, ops.Concat) or tensor_inputs(draft.nodes[0]) != sources:
        return sources
    parts = tuple(sources)
    for count in range(len(parts) - 1, 1, -1):
        earlier = concats.get((draft.op.dim, parts[:count]))
        if earlier is not None:
            sources = [earlier, *parts[count:]]
            break
    if len(draft.nodes) == 1:
        concats.setdefault((draft.op.dim, parts), draft.last)
    return sources


def _saved_bytes(found: Drafts) -> dict[Draft, _Saved]:
    """Return the bytes that autograd keeps of each layer's results, and of what its operators made beside.

    What is kept of constants (weights computed from weights) counts with the first layer that reads them.
    """
    owner: dict[int, Draft | None] = {}
    constants: set[int] = set()
    for node in found.graph.nodes:
        for storage, _ in _storages(node.meta.get("val")):
            owner.setdefault(storage, found.of.get(node))
            if node in found.constant:
                constants.add(storage)
    kept: dict[Draft, _Saved] = {}
    seen: set[int] = set()
    for node in found.graph.nodes:
        for storage, num_bytes in _storages(node.meta.get("saved", ())):
            draft = owner.get(storage) or found.of.get(node) or _first_reader(found, node)
            if storage not in seen and draft is not None:
                saved = kept.setdefault(draft, _Saved())
                size = scaled(num_bytes, found.batch)
                saved.num_bytes += size
                saved.constant += size if storage in constants or node in found.constant else 0
            seen.add(storage)
    return kept


def _first_reader(found: Drafts, node: fx.Node) -> Draft | None:
    """Return the first layer that reads a constant, directly or through other constants."""
    stack, behind = [node], {node}
    while stack:
        fresh = [user for user in stack.pop().users if user not in behind]
        behind.update(fresh)
        stack.extend(user for user in fresh if user not in found.of)
    return next((draft for draft in found.drafts if not behind.isdisjoint(draft.nodes)), None)


def _storages(value: Any) -> list[tuple[int, int]]:
    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage()
        return [(storage._cdata, storage.nbytes())]
    if isinstance(value, tuple | list):
        return [s for v in value for s in _storages(v)]
    return []
