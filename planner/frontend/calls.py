"""Nodes that compute something: one name for all spellings of a function, what it reads, whether it writes."""

import operator
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import fx, nn

from planner.frontend.proxy import write_items

SPELLINGS: Final = {
    "iadd": "add", "isub": "sub", "imul": "mul", "itruediv": "div", "truediv": "div", "true_divide": "div",
    "ifloordiv": "floordiv", "imod": "mod", "ipow": "pow", "iand": "and", "ior": "or", "ixor": "xor",
    "and_": "and", "or_": "or", "multiply": "mul", "divide": "div", "subtract": "sub", "swish": "silu",
    "leakyrelu": "leaky_relu", "concat": "cat", "concatenate": "cat", "swapaxes": "transpose", "movedim": "permute",
    "swapdims": "transpose", "view_as": "reshape", "reshape_as": "reshape", "view": "reshape", "unsafe_view": "reshape",
    "split_with_sizes": "split", "__getitem__": "getitem", "convolution": "conv",
}  # fmt: skip

VIEWS_OF_PARTS: Final = frozenset({"chunk", "split", "unbind", "tensor_split"})
"""Functions whose result is a tuple of views; running one once for each part costs nothing."""

METADATA: Final = frozenset({"new_zeros", "new_ones", "new_full", "new_empty", "new_tensor", "sample_size", "device"})
"""Functions that read no element of their tensor, only its type, device or sizes."""

RANDOM: Final = frozenset({
    "bernoulli", "rand", "randn", "randint", "rand_like", "randn_like", "randint_like", "randperm", "normal", "uniform",
    "rrelu", "alpha_dropout", "feature_alpha_dropout", "gumbel_softmax", "dropout", "multinomial", "exponential",
})  # fmt: skip
"""Functions that draw random numbers."""


@dataclass(frozen=True, slots=True)
class Call:
    """A node that computes something, in any spelling.

    Attributes:
        node: the node.
        module: that it calls, if it does.
        name: the function's plain name, without underscores of in-place forms; the class of a module.
        tensors: nodes whose tensors it reads, in order, constants included.
    """

    node: fx.Node
    module: nn.Module | None
    name: str
    tensors: tuple[fx.Node, ...]

    @staticmethod
    def of(node: fx.Node, root: nn.Module) -> "Call":
        """Return the view of a node."""
        module = root.get_submodule(str(node.target)) if node.op == "call_module" else None
        name = _of_class(module) if module is not None else plain_name(node)
        return Call(node, module, name, tuple(tensor_inputs(node)))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the result; of its first tensor, where there are several."""
        return shape_of(self.node)

    @property
    def source(self) -> tuple[int, ...]:
        """The shape of the first tensor that it reads."""
        return shape_of(self.tensors[0]) if self.tensors else ()

    def arguments(self, **defaults: Any) -> list[Any]:
        """Return the arguments behind the first one (the tensor), by position or by name."""
        given = dict(zip(defaults, self.node.args[1:], strict=False)) | dict(self.node.kwargs)
        return [given.get(name, default) for name, default in defaults.items()]


_FUNCTIONS: Final = {
    "Softmin": "softmin", "Softmax": "softmax", "LogSoftmax": "log_softmax", "LayerNorm": "layer_norm",
    "RMSNorm": "rms_norm",
}  # fmt: skip


def _of_class(module: nn.Module) -> str:
    """Return the name of a module's class; of torch's own ones, that of the function, where there is one."""
    name = type(module).__name__
    function = _FUNCTIONS.get(name, name)
    return function if type(module).__module__.startswith("torch.nn.") else name


def tensor_inputs(node: fx.Node) -> list[fx.Node]:
    """Return the nodes whose tensors a node reads, in order, nested ones (concat) included."""
    found: list[fx.Node] = []

    def visit(n: fx.Node) -> fx.Node:
        if holds_tensor(n.meta.get("val")):
            found.append(n)
        return n

    fx.node.map_arg((node.args, node.kwargs), visit)
    return found


def holds_tensor(value: Any) -> bool:
    """Return whether a value is a tensor or a tuple or dict with one."""
    if isinstance(value, dict):
        return any(map(holds_tensor, value.values()))
    return isinstance(value, torch.Tensor) or (isinstance(value, tuple | list) and any(map(holds_tensor, value)))


def function_name(node: fx.Node) -> str:
    """Return the name of the function or method that a node calls, as the user wrote it."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return name.partition(".")[0]  # operators of ATen are called such as add.Tensor


def plain_name(node: fx.Node) -> str:
    """Return one name for all spellings of a function."""
    if node.target is getattr:
        return str(node.args[1])
    name = function_name(node)
    name = name if name.startswith("__") else name.rstrip("_").lstrip("_") or name
    name = name.removeprefix("fft_").removeprefix("linalg_")
    return SPELLINGS.get(name, name)


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Return the shape of a node's tensor, or of the first of a tuple."""
    value = node.meta.get("val")
    while isinstance(value, tuple | list) and value:
        value = value[0]
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


IN_PLACE = frozenset({
    operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod, operator.ipow,
    operator.iand, operator.ior, operator.ixor, write_items,
})  # fmt: skip


def is_in_place(node: fx.Node, module: nn.Module | None) -> bool:
    """Return whether a node writes into its first input."""
    if module is not None:
        return bool(getattr(module, "inplace", False))
    name = function_name(node)
    by_name = name.endswith("_") and not name.endswith("__") and name not in {"and_", "or_", "requires_grad_"}
    return node.target in IN_PLACE or by_name or bool(node.kwargs.get("inplace", False))


def name_of(node: fx.Node) -> str:
    """Return the plain name of a called function, or nothing for other nodes."""
    return plain_name(node) if node.op in {"call_function", "call_method"} else ""
