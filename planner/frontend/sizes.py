"""Each layer gets its own copies of what depends on the size of the batch: it may work on a piece of it."""

from collections.abc import Iterator

from torch import fx

from planner.frontend.batch import PROBE, is_count, sample_dim_of, sample_size, size_node
from planner.frontend.calls import METADATA, name_of
from planner.frontend.drafts import Draft, Drafts
from planner.frontend.recognize import values_of


def own_sizes(found: Drafts, draft: Draft, copied: set[fx.Node]) -> Iterator[str]:
    """Copy what a layer's nodes read and what depends on the batch; yield the names of the copies.

    Args:
        found: all layers.
        draft: the layer.
        copied: takes the nodes that were copied.
    """
    graph = found.graph
    needed = sorted(_size_dependent(found, draft))
    users = [node for node in draft.nodes if any(source in needed for source in _sizes(node))]
    carriers = [n for n in (*found.sources(draft), *draft.nodes) if sample_dim_of(n) is not None]
    if not users or not carriers or min(carriers) >= min(users):
        return  # nothing it works on has samples: sizes are those of the whole batch
    carrier = min(carriers)
    copies: dict[fx.Node, fx.Node] = {}
    behind: dict[fx.Node, fx.Node] = {}
    for node in needed:
        anchor = max(node, carrier)
        with graph.inserting_after(behind.get(anchor, anchor)):
            if node.target is sample_size:
                copies[node] = size_node(graph, carrier, node.meta["val"] // PROBE)
            else:
                copies[node] = graph.node_copy(node, lambda n: copies.get(n, n))
        behind[anchor] = copies[node]
        copied.add(node)
        yield copies[node].name
    for node in draft.nodes:
        for source in _sizes(node):
            node.replace_input_with(source, copies.get(source, source))
    draft.constants = [copies.get(constant, constant) for constant in draft.constants]
    found.constant.update(copies.values())


def drop_unused(graph: fx.Graph, copied: set[fx.Node]) -> None:
    """Remove what was copied for every reader and is read by nobody any more."""
    for node in reversed(list(graph.nodes)):
        if node in copied and not node.users:
            graph.erase_node(node)


def _sizes(node: fx.Node) -> list[fx.Node]:
    """Return what a node reads, numbers of samples that it computes with left out: those are of the whole batch."""
    counts = {value for value in values_of(node) if is_count(value)}
    return [source for source in node.all_input_nodes if source not in counts]


def _size_dependent(found: Drafts, draft: Draft) -> set[fx.Node]:
    """Return size nodes and the constants behind a layer's nodes whose values depend on the batch."""
    known: dict[fx.Node, bool] = {}

    def depends(node: fx.Node) -> bool:
        if node not in known:
            sources: list[fx.Node] = []
            if node in found.constant:
                metadata = name_of(node) in METADATA
                sources = [n for n in _sizes(node) if not metadata or n.target is sample_size]
            of_sources = [depends(n) for n in sources]  # all of them: each is to be known
            known[node] = node.target is sample_size or any(of_sources)
        return known[node]

    for node in draft.nodes:
        for source in _sizes(node):
            depends(source)
    return {node for node, is_needed in known.items() if is_needed}
