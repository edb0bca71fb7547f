"""Which operator kind an fx node is, in any spelling: module, function, method, operator."""

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

from planner.errors import TraceError
from planner.ir import ops

_Recognizer = Callable[[fx.Node, nn.Module | None], ops.Op | None]

_ELEMENTWISE = frozenset(
    [
        "relu",
        "relu_",
        "relu6",
        "leaky_relu",
        "elu",
        "selu",
        "celu",
        "gelu",
        "silu",
        "mish",
        "hardswish",
        "hardsigmoid",
        "hardtanh",
        "sigmoid",
        "tanh",
        "softplus",
        "softsign",
        "logsigmoid",
        "tanhshrink",
        "softshrink",
        "hardshrink",
        "abs",
        "neg",
        "exp",
        "log",
        "sqrt",
        "rsqrt",
        "square",
        "pow",
        "clamp",
        "clamp_",
        "reciprocal",
        "sin",
        "cos",
        "erf",
        "contiguous",
        "clone",
        "identity",
        "leakyrelu",
        "to",
        "float",
        "double",
        "half",
    ]
)
_SPELLINGS = {
    "iadd": "add",
    "isub": "sub",
    "imul": "mul",
    "itruediv": "div",
    "truediv": "div",
    "leaky_relu": "leakyrelu",
}
_ARITHMETIC = frozenset(
    [
        "add",
        "add_",
        "iadd",
        "sub",
        "sub_",
        "isub",
        "mul",
        "mul_",
        "imul",
        "truediv",
        "div",
        "div_",
        "itruediv",
        "maximum",
        "minimum",
    ]
)
_LOSSES = frozenset(
    [
        "cross_entropy",
        "nll_loss",
        "mse_loss",
        "l1_loss",
        "smooth_l1_loss",
        "binary_cross_entropy",
        "binary_cross_entropy_with_logits",
    ]
)
_MODULE_LOSSES = {
    "CrossEntropyLoss": "cross_entropy", "NLLLoss": "nll_loss", "MSELoss": "mse_loss", "L1Loss": "l1_loss",
    "SmoothL1Loss": "smooth_l1_loss", "BCELoss": "binary_cross_entropy",
    "BCEWithLogitsLoss": "binary_cross_entropy_with_logits",
}  # fmt: skip


def tensor_inputs(node: fx.Node) -> list[fx.Node]:
    """Return the nodes whose tensors a node reads, in order, nested ones (concat) included."""
    return [n for n in _flat([*node.args, *node.kwargs.values()]) if isinstance(n.meta.get("val"), torch.Tensor)]


def _flat(arguments: Any) -> list[fx.Node]:
    found: list[fx.Node] = []

    def visit(node: fx.Node) -> fx.Node:
        found.append(node)
        return node

    fx.node.map_arg(arguments, visit)
    return found


def recognize(node: fx.Node, module: nn.Module | None) -> ops.Op:
    """Return the operator of a node.

    Args:
        node: a call of a traced graph.
        module: the module that a ``call_module`` node calls.

    Raises:
        TraceError: the operator has no partition rule; names it, its place and what to do.
    """
    op = _of_module(node, module) if module is not None else _of_function(node)
    if op is None:
        what = type(module).__name__ if module is not None else function_name(node)
        raise TraceError(
            f"{node.meta.get('origin', node.name)}: no partition rule for operator {what!r} (node {node.name!r}"
            f"{f', module {node.target!r}' if module is not None else ''}). Replace it by operators with a rule, plan "
            "the part of the model without it, or add a rule to planner/ir/rules.py."
        )
    return op


def function_name(node: fx.Node) -> str:
    """Return the plain name of the function or method that a node calls."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def _of_module(node: fx.Node, module: nn.Module) -> ops.Op | None:  # noqa: C901, PLR0911  # a table of kinds
    rank = _shape(node)
    match module:
        case nn.Conv1d() | nn.Conv2d() | nn.Conv3d() | nn.Linear():
            return _product(node, module)
        case nn.BatchNorm1d() | nn.BatchNorm2d() | nn.BatchNorm3d():
            return ops.BatchNorm(module.num_features) if module.affine and module.track_running_stats else None
        case nn.MaxPool1d() | nn.MaxPool2d() | nn.MaxPool3d() if not module.return_indices:
            return _pool("max", len(rank) - 2, _window(module), module.dilation, module.ceil_mode)
        case nn.AvgPool1d() | nn.AvgPool2d() | nn.AvgPool3d():
            return _pool("avg", len(rank) - 2, _window(module), 1, module.ceil_mode)
        case nn.AdaptiveAvgPool1d() | nn.AdaptiveAvgPool2d() | nn.AdaptiveAvgPool3d():
            return ops.AdaptivePool("avg", rank[2:])
        case nn.AdaptiveMaxPool1d() | nn.AdaptiveMaxPool2d() | nn.AdaptiveMaxPool3d() if not module.return_indices:
            return ops.AdaptivePool("max", rank[2:])
        case nn.Dropout():
            return ops.Dropout(module.p)
        case nn.Dropout1d() | nn.Dropout2d() | nn.Dropout3d():
            return ops.Dropout(module.p, whole_channels=True)
        case nn.Flatten() | nn.Unflatten():
            return _reshape(node)
        case nn.Softmax() | nn.LogSoftmax() if module.dim is not None:
            return ops.Softmax(module.dim % len(rank), isinstance(module, nn.LogSoftmax))
        case _:
            return _by_class_name(module)


def _by_class_name(module: nn.Module) -> ops.Op | None:
    name = type(module).__name__
    if name in _MODULE_LOSSES:
        return _loss(
            _MODULE_LOSSES[name],
            module.reduction,
            weighted=getattr(module, "weight", None) is not None,
        )
    if name.lower() in _ELEMENTWISE and not list(module.parameters(recurse=False)):
        return ops.Elementwise(name.lower())
    return None


def _product(node: fx.Node, module: nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear) -> ops.Conv | ops.Linear | None:
    if not {"weight"} <= {name for name, _ in module.named_parameters()} <= {"weight", "bias"}:
        return None  # the weight is computed from others (spectral norm)
    if isinstance(module, nn.Linear):
        return ops.Linear(module.in_features, module.out_features)
    if module.padding_mode != "zeros":
        return None
    spatial = len(_shape(node)) - 2
    padding = module.padding
    if padding == "valid":
        padding = (0,) * spatial
    if isinstance(padding, str):
        return None
    return ops.Conv(
        module.in_channels, module.out_channels, tuple(module.kernel_size), tuple(module.stride),
        tuple(padding), tuple(module.dilation), module.groups,
    )  # fmt: skip


def _of_function(node: fx.Node) -> ops.Op | None:
    name = function_name(node)
    tensors = tensor_inputs(node)
    for recognizer in (_shape_operator, _pooling, _random, _classifier):
        op = recognizer(node, name)
        if op is not None:
            return op
    of_one = name in _ELEMENTWISE and len(tensors) == 1
    if (of_one or name in _ARITHMETIC) and all(_shape(t) == _shape(node) for t in tensors):
        plain = name.rstrip("_")
        return ops.Elementwise(_SPELLINGS.get(plain, plain))
    return None


def _shape_operator(node: fx.Node, name: str) -> ops.Op | None:
    if name in {"flatten", "view", "reshape"}:
        return _reshape(node)
    if name in {"cat", "concat", "concatenate"}:
        dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
        return ops.Concat(int(dim) % len(_shape(node)))  # type: ignore[arg-type]  # a literal of the user's call
    return None


def _reshape(node: fx.Node) -> ops.Op | None:
    before, after = _shape(tensor_inputs(node)[0]), _shape(node)
    if before == after:
        return ops.Elementwise("identity")
    joins = len(after) == 2 and len(before) > 2 and before[0] == after[0] and math.prod(before[1:]) == after[1]
    return ops.Flatten() if joins else None


def _pooling(node: fx.Node, name: str) -> ops.Op | None:
    spatial = len(_shape(node)) - 2
    if name.startswith(("max_pool", "boolean_dispatch")) or node.target in _MAX_POOLS:
        *window, dilation, ceil_mode = _arguments(
            node, kernel_size=None, stride=None, padding=0, dilation=1, ceil_mode=False
        )
        return _pool("max", spatial, (window[0], window[1], window[2]), dilation, ceil_mode)
    if name.startswith("avg_pool"):
        kernel, stride, padding, ceil_mode = _arguments(node, kernel_size=None, stride=None, padding=0, ceil_mode=False)
        return _pool("avg", spatial, (kernel, stride, padding), 1, ceil_mode)
    if name.startswith("adaptive_avg_pool"):
        return ops.AdaptivePool("avg", _shape(node)[2:])
    if name.startswith("adaptive_max_pool"):
        return ops.AdaptivePool("max", _shape(node)[2:])
    if name == "mean":
        before = _shape(tensor_inputs(node)[0])
        dims, keepdim = _arguments(node, dim=None, keepdim=False)
        listed = sorted(d % len(before) for d in ((dims,) if isinstance(dims, int) else dims or ()))
        if listed and listed == list(range(2, len(before))):
            return ops.AdaptivePool("avg", (1,) * (len(before) - 2) if keepdim else ())
    return None


_MAX_POOLS = {functional.max_pool1d, functional.max_pool2d, functional.max_pool3d}


def _random(node: fx.Node, name: str) -> ops.Op | None:
    if name in {"dropout", "dropout1d", "dropout2d", "dropout3d"}:
        probability, training = _arguments(node, p=0.5, training=True)
        if not training:
            return ops.Elementwise("identity")
        return ops.Dropout(float(probability), whole_channels=name != "dropout")
    return None


def _classifier(node: fx.Node, name: str) -> ops.Op | None:
    if name in {"softmax", "log_softmax"}:
        (dim,) = _arguments(node, dim=None)
        return None if dim is None else ops.Softmax(int(dim) % len(_shape(node)), name == "log_softmax")
    if name in _LOSSES:
        return _loss(
            name,
            node.kwargs.get("reduction", "mean"),
            weighted=node.kwargs.get("weight") is not None,
        )
    return None


def _loss(function: str, reduction: Any, *, weighted: bool) -> ops.Op | None:
    return None if weighted or reduction not in {"mean", "sum"} else ops.Loss(function, reduction)


def _arguments(node: fx.Node, **defaults: Any) -> list[Any]:
    """Return the arguments behind the first one (the tensor), by position or by name."""
    given = dict(zip(defaults, node.args[1:], strict=False)) | dict(node.kwargs)
    return [given.get(name, default) for name, default in defaults.items()]


def _window(module: Any) -> tuple[Any, Any, Any]:
    return module.kernel_size, module.stride, module.padding


def _pool(function: Any, spatial: int, window: tuple[Any, Any, Any], dilation: Any, ceil_mode: bool) -> ops.Pool:
    def each(value: Any) -> tuple[int, ...]:
        return tuple(value) if isinstance(value, tuple | list) else (int(value),) * spatial

    kernel, stride, padding = window
    no_stride = stride is None or stride == []
    return ops.Pool(
        function, each(kernel), each(kernel if no_stride else stride), each(padding), each(dilation), bool(ceil_mode)
    )


def _shape(node: fx.Node) -> tuple[int, ...]:
    value = node.meta["val"]
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


IN_PLACE = frozenset({operator.iadd, operator.isub, operator.imul, operator.itruediv})


def is_in_place(node: fx.Node, module: nn.Module | None) -> bool:
    """Return whether a node writes into its first input."""
    if module is not None:
        return bool(getattr(module, "inplace", False))
    name = function_name(node)
    by_name = isinstance(node.target, str) and name.endswith("_") and not name.endswith("__")
    return node.target in IN_PLACE or by_name or bool(node.kwargs.get("inplace", False)) or name == "relu_"
