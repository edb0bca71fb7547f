"""Operators that only split by samples become one layer with their neighbours, as attention blocks have them."""

from torch import fx

from planner.frontend.batch import sample_size
from planner.frontend.calls import Call
from planner.frontend.drafts import Draft, Drafts, name_in_model
from planner.ir import ops

_VIEWS = ops.Reshape | ops.Permute
_INNER = ops.Elementwise | ops.Softmax | ops.Along | ops.Reduce


def merge(found: Drafts) -> None:
    """Join layers into their only reader, where nothing is lost."""
    followed = {draft.follows for draft in found.drafts}
    for draft in reversed(found.drafts):
        reader = None if draft in followed or draft.follows is not None else _only_reader(found, draft)
        if reader is None or _by_sample(found, draft) != _by_sample(found, reader):
            continue  # what mixes samples would seem to be split by them
        if _by_sample(found, draft) and not _reads(found, draft):
            continue  # made for the whole batch, of constants or at random
        if not _belongs_inside(found, draft, reader):
            continue
        if not isinstance(reader.op, ops.PerSample):
            reader.ops[0] = ops.PerSample(Call.of(reader.nodes[0], found.root).name)
        reader.nodes[:0], reader.ops[:0] = draft.nodes, draft.ops
        reader.params = {**draft.params, **reader.params}
        reader.constants[:0] = draft.constants
        for node in draft.nodes:
            found.of[node] = reader
        draft.nodes = []
    found.drafts = [draft for draft in found.drafts if draft.nodes]
    for draft in found.drafts:
        if any(isinstance(op, ops.PerSample) for op in draft.ops):
            _combine(draft)


def _by_sample(found: Drafts, draft: Draft) -> bool:
    """Return whether a layer's result holds whole samples."""
    samples = found.samples[draft.last]
    return samples is not None and samples.dim is not None


def _reads(found: Drafts, draft: Draft) -> bool:
    """Return whether a layer reads results of others."""
    own = set(draft.nodes)
    return any(n not in own for node in draft.nodes for n in found.data(Call.of(node, found.root)))


def _only_reader(found: Drafts, draft: Draft) -> Draft | None:
    """Return the only layer that reads a layer's results."""
    layers = {_layer_of(found, user, draft) for node in draft.nodes for user in node.users} - {draft}
    return layers.pop() if len(layers) == 1 else None


def _layer_of(found: Drafts, user: fx.Node, draft: Draft) -> Draft | None:
    """Return the layer that a user of a draft's node belongs to; the draft itself for what does not count."""
    if user.op == "output":
        return None
    if user.target is sample_size or user in found.constant:
        return draft
    return found.of.get(user, draft)


def _belongs_inside(found: Drafts, draft: Draft, reader: Draft) -> bool:
    """Return whether nothing is lost where a layer joins its only reader: no split of its own is likely."""
    if isinstance(reader.op, _VIEWS):
        return isinstance(draft.op, _VIEWS | ops.PerSample)
    if not isinstance(reader.op, ops.PerSample):
        return False
    if isinstance(draft.op, ops.PerSample | _VIEWS):
        return True
    sources = found.sources(draft)
    return isinstance(draft.op, _INNER) and all(isinstance(found.of[n].op, ops.PerSample | _VIEWS) for n in sources)


def _combine(draft: Draft) -> None:
    """Give a layer of several per-sample operators one operator, with their work."""
    pairs = sorted(zip(draft.nodes, draft.ops, strict=True), key=lambda pair: pair[0])
    draft.nodes, draft.ops = [n for n, _ in pairs], [o for _, o in pairs]
    inner = [op for op in draft.ops if isinstance(op, ops.PerSample)]
    heaviest = max(inner, key=lambda op: op.forward_flop)
    if len(draft.nodes) > 1:
        draft.name = name_in_model(draft.nodes[draft.ops.index(heaviest)])
    forward, backward = sum(op.forward_flop for op in inner), sum(op.backward_flop for op in inner)
    draft.ops = [ops.PerSample(heaviest.function, forward, backward), *draft.ops[1:]]
