"""The second way to a graph: ``torch.export``, for modules that the concrete tracer cannot follow.

The exported graph consists of operators of ATen under the user's parameter names. It is turned into
one that looks like a traced graph, and run once on the meta device for what its nodes carry. It is
also what the tracer is checked against.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.fx.graph import CodeGen
from torch.utils import _pytree as pytree

Keywords = Mapping[str, torch.Tensor]


def trace_by_export(root: nn.Module, values: tuple[torch.Tensor, ...], keywords: Keywords) -> fx.Graph:
    """Return the graph of a module on the meta device, as ``torch.export`` sees it.

    Raises:
        Exception: whatever ``torch.export`` raises.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(root, values, dict(keywords), strict=False)
        exported = program.module(check_guards=False)
    graph = exported.graph
    for node in reversed(list(graph.nodes)):
        if node.op == "call_module" and not node.users:  # checks of the input shapes
            graph.erase_node(node)
    for node in graph.nodes:
        node.meta = {"scope": _scope(node), "origin": _origin(node)}
    _restore_structure(graph)
    with torch.enable_grad():
        _Replay(root, graph).run(*values, *keywords.values())
    return graph


class _Replay(fx.Interpreter):
    """Runs a graph on meta tensors and notes every node's value and what its backward needs."""

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        super().__init__(root, garbage_collect_values=False, graph=graph)
        self._state = {t.untyped_storage()._cdata for t in (*root.parameters(), *root.buffers())}

    def run_node(self, n: fx.Node) -> Any:
        """Run a node as usual."""
        state: set[int] = self._state
        saved: list[torch.Tensor] = []

        def keep(tensor: torch.Tensor) -> torch.Tensor:  # autograd keeps it: with self in it, nothing would be freed
            if tensor.untyped_storage()._cdata not in state:
                saved.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            value = super().run_node(n)
        if n.op != "output":
            n.meta.update(val=value, saved=tuple(saved))
        saved.clear()
        return value


def _scope(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values()]
    return str(paths[-1]).removeprefix("L['self']").removeprefix(".") if paths else ""


def _origin(node: fx.Node) -> str:
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines()]
    places = [line for line in lines if line.startswith("File ")]
    if not places:
        return "forward()"
    path, line, *_ = places[-1].removeprefix("File ").split(", ")
    return f"{path.strip(chr(34))}:{line.removeprefix('line ')}"


def _restore_structure(graph: fx.Graph) -> None:
    """Return results in the model's own structure, not as a flat list."""
    spec = graph._codegen.pytree_info.out_spec  # type: ignore[attr-defined]  # exported graphs have it
    (output,) = graph.find_nodes(op="output")
    output.args = (pytree.tree_unflatten(list(output.args[0]), spec),)
    graph.set_codegen(CodeGen())
