"""Layers in the making, and what is known of the nodes that they consist of."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from planner.errors import TraceError
from planner.frontend.calls import METADATA, Call, function_name, name_of
from planner.frontend.samples import Samples, spec_of
from planner.ir import ops
from planner.ir.dimension import Roles
from planner.ir.graph import Parameter
from planner.ir.ops import Op
from planner.ir.split import LayerId
from planner.ir.tensor import TensorSpec


@dataclass(eq=False, slots=True)
class Draft:
    """A layer in the making.

    Attributes:
        name: not yet unique.
        nodes: of the graph, in order; those of an input or output compute nothing.
        ops: of the nodes; the first is the layer's.
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
    follows: "Draft | None" = None
    id: LayerId = field(default=LayerId(""))  # a string

    @property
    def op(self) -> Op:
        """The layer's operator."""
        return self.ops[0]

    @property
    def last(self) -> fx.Node:
        """The node whose tensor is the layer's output."""
        return self.nodes[-1]


@dataclass
class Drafts:
    """All drafts of a graph, and what is known of its nodes.

    Attributes:
        root: the module.
        graph: its graph.
        batch: samples of the user's batch.
        drafts: in the order of their first nodes.
        of: the draft that a node belongs to.
        samples: how a node's tensor holds the samples.
        specs: a node's tensor for the user's batch.
        constant: nodes that are computed from parameters, buffers and factories only.
    """

    root: nn.Module
    graph: fx.Graph
    batch: int
    drafts: list[Draft] = field(default_factory=list)
    of: dict[fx.Node, Draft] = field(default_factory=dict)
    samples: dict[fx.Node, Samples | None] = field(default_factory=dict)
    specs: dict[fx.Node, TensorSpec] = field(default_factory=dict)
    constant: set[fx.Node] = field(default_factory=set)

    def start(self, node: fx.Node, op: Op, name: str) -> Draft:
        """Begin a layer."""
        draft = Draft(name, [node], [op])
        self.drafts.append(draft)
        self.of[node] = draft
        return draft

    def place(self, node: fx.Node, samples: Samples | None, roles: Roles) -> None:
        """Note what is known of a node's tensor."""
        self.samples[node] = samples
        self.specs[node] = spec_of(node, samples, roles, self.batch)

    def data(self, call: Call) -> list[fx.Node]:
        """Return the tensors that a call reads, each once, without constants of the model."""
        if call.name in METADATA:
            return []
        return [n for n in dict.fromkeys(call.tensors) if n not in self.constant]

    def sources(self, draft: Draft) -> list[fx.Node]:
        """Return the nodes of other layers that a layer reads, each once, in order.

        Raises:
            TraceError: one of them is not the result of its layer.
        """
        if isinstance(draft.op, ops.Output):
            return [draft.last]
        own = set(draft.nodes)
        reads = [n for node in draft.nodes for n in self.data(Call.of(node, self.root)) if node.op != "placeholder"]
        found = [n for n in dict.fromkeys(reads) if n not in own]
        for n in found:
            if self.of[n].last is not n and self.of[n] is not draft.follows:
                raise TraceError(
                    f"{n.meta.get('origin', n.name)}: several results of {n.name!r} are used by different layers. "
                    "Make the module around it a leaf with planner.frontend.custom.register_module."
                )
        return found


def name_in_model(node: fx.Node) -> str:
    """Return the user's name of a module, or the path of the module that calls a function and the function's name."""
    if node.op == "call_module":
        return str(node.target)
    scope = node.meta.get("scope") or ""
    return f"{scope}.{function_name(node)}" if scope else function_name(node)


def readers(node: fx.Node) -> list[fx.Node]:
    """Return the nodes that read a tensor's elements."""
    return [u for u in node.users if u.op == "output" or name_of(u) not in METADATA]


def is_structure(node: fx.Node) -> bool:
    """Return whether a node makes a named tuple of results."""
    return node.op == "call_function" and isinstance(node.target, type) and issubclass(node.target, tuple)


def outputs(structure: Any, path: str = "") -> Iterator[tuple[str, fx.Node]]:
    """Yield every tensor of the model's result with the path that leads to it."""
    if isinstance(structure, fx.Node) and is_structure(structure):
        names = getattr(structure.target, "_fields", ())
        for name, value in zip(names, structure.args, strict=False):
            yield from outputs(value, f"{path}.{name}")
        for name, value in structure.kwargs.items():
            yield from outputs(value, f"{path}.{name}")
    elif isinstance(structure, fx.Node):
        yield path, structure
    elif isinstance(structure, dict):
        for key, value in structure.items():
            yield from outputs(value, f"{path}.{key}")
    elif isinstance(structure, tuple | list):
        for i, value in enumerate(structure):
            yield from outputs(value, f"{path}.{i}")
    elif structure is not None:
        raise TraceError(f"the model returns {structure!r}, which is not a tensor, in place output{path}")
