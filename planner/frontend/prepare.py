"""What is changed in a traced graph before layers are made of it; it computes the same bit for bit."""

import torch
from torch import fx, nn

from planner.errors import TraceError
from planner.frontend.batch import sample_size
from planner.frontend.calls import METADATA, VIEWS_OF_PARTS, is_in_place, name_of, plain_name, tensor_inputs


def split_tuples(graph: fx.Graph) -> None:
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


def remove_shared_writes(graph: fx.Graph, root: nn.Module) -> None:
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
            reads = [] if name_of(node) in METADATA else tensor_inputs(node)
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


def buffers_written(graph: fx.Graph) -> frozenset[str]:
    """Return the names of the buffers that a graph writes into in place, torch's own layers left out."""
    found: set[str] = set()
    for node in graph.nodes:
        source = node.args[0] if node.args else None
        while isinstance(source, fx.Node) and source.op != "get_attr" and is_in_place(source, None):
            source = source.args[0]
        calls = node.op in {"call_function", "call_method"} and is_in_place(node, None)
        if calls and isinstance(source, fx.Node) and source.op == "get_attr":
            found.add(str(source.target))
    return frozenset(found)
