"""Which operator kind an fx node is, in any spelling: module, function, method, operator of ATen.

An operator without a kind of its own is ``PerSample``: it can be split by samples where its tensors
hold them, and is run whole elsewhere. So every operator of torch can be planned.
"""

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from planner.frontend.custom import custom_rule, is_custom
from planner.frontend.trace import write_items
from planner.ir import ops

_ELEMENTWISE: Final = frozenset({
    "relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "hardswish", "hardsigmoid",
    "hardtanh", "sigmoid", "tanh", "softplus", "softsign", "logsigmoid", "tanhshrink", "softshrink",
    "hardshrink", "threshold", "abs", "neg", "exp", "expm1", "log", "log1p", "log2", "log10", "sqrt", "rsqrt",
    "square", "pow", "clamp", "clip", "clamp_min", "clamp_max", "reciprocal", "sin", "cos", "tan", "atan",
    "erf", "sign", "floor", "ceil", "round", "contiguous", "clone", "identity", "to", "float", "double", "half",
    "bfloat16", "type", "long", "int", "bool", "type_as", "detach", "nan_to_num", "logical_not", "invert",
    "masked_fill", "bernoulli", "rrelu", "alpha_dropout", "fill", "zero", "copy", "requires_grad_",
    "zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like",
})  # fmt: skip
_ARITHMETIC: Final = frozenset({
    "add", "sub", "mul", "div", "rsub", "maximum", "minimum", "fmod", "remainder", "floordiv", "mod", "where",
    "lerp", "addcmul", "addcdiv", "atan2", "and", "or", "xor", "eq", "ne", "lt", "le", "gt", "ge",
    "logical_and", "logical_or", "copysign", "heaviside",
})  # fmt: skip
_SPELLINGS: Final = {
    "iadd": "add", "isub": "sub", "imul": "mul", "itruediv": "div", "truediv": "div", "true_divide": "div",
    "ifloordiv": "floordiv", "imod": "mod", "ipow": "pow", "iand": "and", "ior": "or", "ixor": "xor",
    "and_": "and", "or_": "or", "multiply": "mul", "divide": "div", "subtract": "sub", "swish": "silu",
    "leakyrelu": "leaky_relu", "concat": "cat", "concatenate": "cat", "swapaxes": "transpose", "movedim": "permute",
    "swapdims": "transpose", "view_as": "reshape", "reshape_as": "reshape", "view": "reshape", "unsafe_view": "reshape",
    "split_with_sizes": "split", "__getitem__": "getitem", "convolution": "conv",
}  # fmt: skip
_LOSSES: Final = frozenset({
    "cross_entropy", "nll_loss", "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy",
    "binary_cross_entropy_with_logits", "kl_div", "soft_margin_loss",
})  # fmt: skip
_MODULE_LOSSES: Final = {
    "CrossEntropyLoss": "cross_entropy", "NLLLoss": "nll_loss", "MSELoss": "mse_loss", "L1Loss": "l1_loss",
    "SmoothL1Loss": "smooth_l1_loss", "HuberLoss": "huber_loss", "BCELoss": "binary_cross_entropy",
    "BCEWithLogitsLoss": "binary_cross_entropy_with_logits", "SoftMarginLoss": "soft_margin_loss",
}  # fmt: skip
_RESHAPES: Final = frozenset({"reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "ravel"})
_SLICES: Final = frozenset({"chunk", "split", "unbind", "tensor_split", "narrow", "select", "glu"})
_ALONG_ONE: Final = frozenset({
    "cumsum", "cumprod", "flip", "roll", "sort", "argsort", "topk", "normalize", "logcumsumexp", "index_select",
    "gather", "repeat_interleave", "softmin",
})  # fmt: skip
_REDUCTIONS: Final = frozenset({
    "mean", "sum", "amax", "amin", "max", "min", "argmax", "argmin", "logsumexp", "prod", "std", "var", "norm", "all",
    "any", "median",
})  # fmt: skip
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
        name = type(module).__name__ if module is not None else plain_name(node)
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
    return _SPELLINGS.get(name, name)


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


# ---- kinds


def recognize(call: Call, data: int) -> ops.Op:
    """Return the operator of a call.

    Args:
        call: a call of a traced graph.
        data: how many of its tensors are not constants of the model.
    """
    op = _of_module(call) if call.module is not None else _of_function(call, data)
    return ops.PerSample(call.name) if op is None else op


def _of_module(call: Call) -> ops.Op | None:  # noqa: C901, PLR0911, PLR0912  # a table of kinds
    module, rank = call.module, len(call.shape)
    assert module is not None
    if is_custom(type(module)):
        return ops.Custom(type(module).__name__, custom_rule(type(module)).dimensions)
    match module:
        case nn.Conv1d() | nn.Conv2d() | nn.Conv3d() | nn.Linear() if _has_plain_weight(module):
            return _product(module, len(call.source))
        case nn.ConvTranspose1d() | nn.ConvTranspose2d() | nn.ConvTranspose3d() if _has_plain_weight(module):
            return _transposed(module) if len(call.node.args) == 1 and len(call.source) == rank else None
        case _BatchNorm():
            return ops.BatchNorm(call.shape[1], module.eps, module.momentum)
        case nn.GroupNorm():
            return ops.GroupNorm(module.num_groups, module.num_channels)
        case _InstanceNorm() if not module.track_running_stats:
            return ops.GroupNorm(call.shape[1], call.shape[1])
        case nn.LayerNorm() | nn.RMSNorm():
            return ops.Along(call.name.lower(), tuple(range(rank - len(module.normalized_shape), rank)))
        case nn.LocalResponseNorm() | nn.CrossMapLRN2d():
            return ops.Along("local_response_norm", (1,))
        case nn.MaxPool1d() | nn.MaxPool2d() | nn.MaxPool3d() if not module.return_indices:
            return _pool("max", rank - 2, _window(module), module.dilation, module.ceil_mode)
        case nn.AvgPool1d() | nn.AvgPool2d() | nn.AvgPool3d() if getattr(module, "divisor_override", None) is None:
            return _pool("avg", rank - 2, _window(module), 1, module.ceil_mode, module.count_include_pad)
        case nn.LPPool1d() | nn.LPPool2d():
            return _pool("lp", rank - 2, (module.kernel_size, module.stride, 0), 1, module.ceil_mode)
        case nn.AdaptiveAvgPool1d() | nn.AdaptiveAvgPool2d() | nn.AdaptiveAvgPool3d():
            return ops.AdaptivePool("avg", call.shape[2:])
        case nn.AdaptiveMaxPool1d() | nn.AdaptiveMaxPool2d() | nn.AdaptiveMaxPool3d() if not module.return_indices:
            return ops.AdaptivePool("max", call.shape[2:])
        case nn.Upsample():
            return _interpolation(call, module.mode, module.align_corners, module.scale_factor, module.size)
        case nn.PixelShuffle() if rank == 4:
            return ops.PixelShuffle(module.upscale_factor)
        case nn.PixelUnshuffle() if rank == 4:
            return ops.PixelShuffle(module.downscale_factor, unshuffle=True)
        case nn.ChannelShuffle():
            return ops.Along("channel_shuffle", (1,))
        case nn.Dropout():
            return ops.Dropout(module.p)
        case nn.Dropout1d() | nn.Dropout2d() | nn.Dropout3d():
            return ops.Dropout(module.p, "channel")
        case nn.Flatten() | nn.Unflatten():
            return _reshape(call)
        case nn.Softmax() | nn.LogSoftmax() if module.dim is not None:
            return ops.Softmax(module.dim % rank, isinstance(module, nn.LogSoftmax))
        case nn.PReLU():
            return ops.Elementwise("prelu") if module.num_parameters == 1 else ops.Along("prelu", (1,))
        case nn.GLU():
            return ops.Along("glu", (module.dim % rank,))
        case nn.ZeroPad1d() | nn.ZeroPad2d() | nn.ZeroPad3d() | nn.ConstantPad1d() | nn.ConstantPad2d():
            return _padding(call)
        case nn.ReflectionPad1d() | nn.ReflectionPad2d() | nn.ReplicationPad1d() | nn.ReplicationPad2d():
            return _padding(call)
        case _:
            return _by_class_name(call)


def _has_plain_weight(module: nn.Module) -> bool:
    """Return whether a product holds its weight itself, not in pieces of which it is computed (weight norm)."""
    return {"weight"} <= {name for name, _ in module.named_parameters()} <= {"weight", "bias"}


def _by_class_name(call: Call) -> ops.Op | None:
    module, name = call.module, call.name
    if name in _MODULE_LOSSES:
        return _loss(_MODULE_LOSSES[name], getattr(module, "reduction", None), getattr(module, "weight", None))
    if name == "StochasticDepth":
        unit: Literal["sample", "batch"] = "sample" if getattr(module, "mode", "row") == "row" else "batch"
        return ops.Dropout(float(getattr(module, "p", 0.0)), unit)
    if name == "DropPath":
        rescale = bool(getattr(module, "scale_by_keep", True))
        return ops.Dropout(float(getattr(module, "drop_prob", 0.0) or 0.0), "sample", rescale)
    lower = _SPELLINGS.get(name.lower(), name.lower())
    plain = module is not None and not list(module.parameters(recurse=False))
    if lower in _ELEMENTWISE and plain and call.source == call.shape:
        return ops.Elementwise(lower)
    return None


def _product(module: nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear, rank: int) -> ops.Op | None:
    if isinstance(module, nn.Linear):
        return ops.Linear(module.in_features, module.out_features)
    if rank != module.weight.dim():
        return None  # one sample without a batch
    return _conv(
        tuple(module.weight.shape), tuple(module.stride), module.padding, tuple(module.dilation), module.groups,
        module.padding_mode,
    )  # fmt: skip


def _conv(
    weight: tuple[int, ...], stride: Any, padding: Any, dilation: Any, groups: int, mode: str = "zeros"
) -> ops.Conv:
    kernel = weight[2:]
    strides, dilations = _each(stride, len(kernel)), _each(dilation, len(kernel))
    after = None
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
        before = tuple(t // 2 for t in total)
        uneven = tuple(t - b for t, b in zip(total, before, strict=True))
        after = uneven if uneven != before else None
    else:
        before = _each(0 if padding == "valid" else padding, len(kernel))
    return ops.Conv(weight[1] * groups, weight[0], kernel, strides, before, dilations, groups, mode, after)


def _transposed(module: nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d) -> ops.ConvTranspose:
    spatial = module.weight.dim() - 2
    return ops.ConvTranspose(
        module.in_channels, module.out_channels, tuple(module.weight.shape[2:]), tuple(module.stride),
        _each(module.padding, spatial), _each(module.output_padding, spatial), tuple(module.dilation), module.groups,
    )  # fmt: skip


def _of_function(call: Call, data: int) -> ops.Op | None:
    for recognizer in (
        _functional_product,
        _normalisation,
        _pooling,
        _shape_operator,
        _random,
        _classifier,
        _reduction,
    ):
        op = recognizer(call)
        if op is not None:
            return op
    of_one = call.name in _ELEMENTWISE and data <= 1 and call.source == call.shape
    many = call.name in _ARITHMETIC and all(_broadcasts(shape_of(t), call.shape) for t in call.tensors)
    return ops.Elementwise(call.name) if of_one or many else None


def _broadcasts(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    own = target[len(target) - len(shape) :]
    return len(shape) <= len(target) and all(a in (1, b) for a, b in zip(shape, own, strict=True))


_WEIGHTED: Final[Mapping[str, tuple[str, ...]]] = {
    "conv1d": ("weight", "bias"), "conv2d": ("weight", "bias"), "conv3d": ("weight", "bias"),
    "linear": ("weight", "bias"),
    "batch_norm": ("running_mean", "running_var", "weight", "bias"),
}  # fmt: skip
"""Functions whose operands behind the first are parameters and buffers of a product or batch norm, by name."""


def operands(call: Call) -> dict[str, fx.Node | None]:
    """Return the parameters that a functional product or batch norm reads, by their role."""
    if call.module is not None or call.name not in _WEIGHTED:
        return {}
    names = _WEIGHTED[call.name]
    if _is_low_level_norm(call):
        names = (*names[2:], *names[:2])
    found = call.arguments(**dict.fromkeys(names))
    return {name: n if isinstance(n, fx.Node) else None for name, n in zip(names, found, strict=True)}


def _is_low_level_norm(call: Call) -> bool:
    """Return whether a call is ATen's batch norm, whose arguments are in another order."""
    return call.name == "batch_norm" and getattr(call.node.target, "__module__", "") != "torch.nn.functional"


def _functional_product(call: Call) -> ops.Op | None:
    if call.name not in {"conv1d", "conv2d", "conv3d", "linear"} or len(call.tensors) < 2:
        return None
    found = {role: node for role, node in operands(call).items() if node is not None}
    if "weight" not in found:
        return None
    computed = any(node.op != "get_attr" for node in found.values())
    weight = shape_of(found["weight"])
    if call.name == "linear":
        return ops.Linear(weight[-1], weight[0], computed)
    _, _, stride, padding, dilation, groups = call.arguments(
        weight=None, bias=None, stride=1, padding=0, dilation=1, groups=1
    )
    if not isinstance(groups, int):
        return None  # a group for each sample: kernels that depend on the input
    op = _conv(weight, stride, padding, dilation, groups)
    return ops.Conv(
        op.in_channels, op.out_channels, op.kernel, op.stride, op.padding, op.dilation, op.groups,
        padding_after=op.padding_after, computed_weight=computed,
    )  # fmt: skip


def _normalisation(call: Call) -> ops.Op | None:
    rank = len(call.shape)
    match call.name:
        case "batch_norm" if all(n is None or n.op == "get_attr" for n in operands(call).values()):
            *_, training, momentum, eps = call.arguments(
                running_mean=None, running_var=None, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
            )  # both orders put four tensors first
            return ops.BatchNorm(call.shape[1], eps, momentum) if training else None
        case "group_norm":
            return ops.GroupNorm(call.arguments(num_groups=1)[0], call.shape[1])
        case "instance_norm" if call.arguments(running_mean=None)[0] is None:
            return ops.GroupNorm(call.shape[1], call.shape[1])
        case "layer_norm" | "rms_norm":
            (over,) = call.arguments(normalized_shape=())
            return ops.Along(call.name, tuple(range(rank - len(over), rank)))
        case "local_response_norm":
            return ops.Along(call.name, (1,))
        case _:
            return None


def _shape_operator(call: Call) -> ops.Op | None:  # noqa: PLR0911  # a table of kinds
    name, rank = call.name, len(call.shape)
    if name in _RESHAPES:
        return _reshape(call)
    if name == "cat":
        dim = call.node.kwargs.get("dim", call.node.kwargs.get("axis", (*call.node.args, 0)[1]))
        return ops.Concat(dim % rank) if isinstance(dim, int) else None
    if name in {"transpose", "permute", "t"}:
        return _permutation(call)
    if name == "getitem":
        return _index(call)
    if name in _SLICES or name in _ALONG_ONE:
        return _along(call)
    if name in {"pad", "constant_pad_nd"}:
        return _padding(call)
    if name in {"pixel_shuffle", "pixel_unshuffle"} and rank == 4:
        wide, narrow = sorted((call.source[2], call.shape[2]), reverse=True)
        return ops.PixelShuffle(wide // narrow, unshuffle=name == "pixel_unshuffle")
    if name in {"interpolate", "upsample"}:
        size, scale, mode, align, recomputes, antialias = call.arguments(
            size=None, scale_factor=None, mode="nearest", align_corners=None, recompute_scale_factor=None,
            antialias=False,
        )  # fmt: skip
        return None if antialias else _interpolation(call, mode, align, None if recomputes else scale, size)
    return None


def _reshape(call: Call) -> ops.Op:
    if call.source == call.shape:
        return ops.Elementwise("identity")
    return ops.Reshape(reshape_groups(call.source, call.shape))


def reshape_groups(before: tuple[int, ...], after: tuple[int, ...]) -> tuple[tuple[int, int, int, int], ...]:
    """Return the smallest ranges of dimensions of both shapes that hold the same elements; sizes of 1 apart."""
    groups = []
    i = j = 0
    while i < len(before) and j < len(after):
        if before[i] == 1 and after[j] != 1:
            i += 1
            continue
        if after[j] == 1 and before[i] != 1:
            j += 1
            continue
        a, b, first, out = before[i], after[j], i, j
        i, j = i + 1, j + 1
        while a != b:
            if a < b:
                a *= before[i]
                i += 1
            else:
                b *= after[j]
                j += 1
        groups.append((first, i, out, j))
    return tuple(groups)


def _permutation(call: Call) -> ops.Op | None:
    """Return the order of dimensions, found by moving numbers in place of sizes."""
    rank = len(call.source)
    marks = torch.empty(tuple(range(2, rank + 2)), device="meta")
    arguments = [marks if a is call.tensors[0] else a for a in call.node.args]
    target: Any = getattr(marks, str(call.node.target)) if call.node.op == "call_method" else call.node.target
    try:
        moved = target(*(arguments[1:] if call.node.op == "call_method" else arguments), **call.node.kwargs)
    except (TypeError, RuntimeError):
        return None
    return ops.Permute(tuple(size - 2 for size in moved.shape)) if moved.dim() == rank else None


def _index(call: Call) -> ops.Op | None:
    """Return the dimensions that an index touches; None where it is more than slices."""
    value = call.node.args[0]
    if isinstance(value, fx.Node) and not isinstance(value.meta["val"], torch.Tensor):
        return ops.Elementwise("identity")  # one of several results
    index = call.node.args[1]
    items = index if isinstance(index, tuple) else (index,)
    rank = len(call.source)
    if any(not isinstance(i, slice | int | type(None) | type(...)) for i in items) or len(call.shape) != rank:
        return None
    if any(i is None or isinstance(i, int) for i in items):
        return None
    if ... in items:
        at = items.index(...)
        items = (*items[:at], *[slice(None)] * (rank - len(items) + 1), *items[at + 1 :])
    touched = [d for d, i in enumerate(items) if i != slice(None)]
    return ops.Along("slice", tuple(touched)) if touched else ops.Elementwise("identity")


def _along(call: Call) -> ops.Op | None:
    places = {
        "chunk": 1, "split": 1, "unbind": 0, "tensor_split": 1, "narrow": 0, "select": 0, "glu": 0, "roll": 1,
        "topk": 1, "repeat_interleave": 1, "normalize": 1,
    }  # fmt: skip
    defaults = {"chunk": 0, "split": 0, "unbind": 0, "tensor_split": 0, "normalize": 1, "glu": -1, "sort": -1}
    place = places.get(call.name, 0) + 1
    given = call.node.args[place] if len(call.node.args) > place else defaults.get(call.name)
    dims = call.node.kwargs.get("dim", call.node.kwargs.get("dims", given))
    listed = dims if isinstance(dims, tuple | list) else (dims,)
    rank = len(call.source)
    over = tuple(sorted(d % rank for d in listed if isinstance(d, int)))
    if len(over) != len(listed) or call.name in {"unbind", "select"} or len(call.shape) != rank:
        return None
    return ops.Along("slice" if call.name in _SLICES - {"glu"} else call.name, over)


def _padding(call: Call) -> ops.Op | None:
    touched = [d for d, (a, b) in enumerate(zip(call.source, call.shape, strict=True)) if a != b]
    return ops.Along("pad", tuple(touched)) if touched else ops.Elementwise("identity")


def _interpolation(call: Call, mode: str, align: Any, scale: Any, size: Any) -> ops.Op | None:
    kind = {"bilinear": "linear", "trilinear": "linear", "bicubic": "cubic"}.get(mode, mode)
    spatial = len(call.shape) - 2
    scales = None if scale is None or size is not None else tuple(map(float, _each(scale, spatial)))
    return ops.Interpolate(kind, bool(align), scales)  # type: ignore[arg-type]  # torch knows no other modes


def _pooling(call: Call) -> ops.Op | None:
    name, spatial = call.name, len(call.shape) - 2
    if len(call.source) != len(call.shape) or spatial < 1:
        return None
    if name.startswith(("max_pool", "boolean_dispatch")) and isinstance(call.node.meta["val"], torch.Tensor):
        *window, dilation, ceil_mode = call.arguments(
            kernel_size=None, stride=None, padding=0, dilation=1, ceil_mode=False
        )
        return _pool("max", spatial, (window[0], window[1], window[2]), dilation, ceil_mode)
    if name.startswith("avg_pool"):
        kernel, stride, padding, ceil_mode, counts, divisor = call.arguments(
            kernel_size=None, stride=None, padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None
        )
        return None if divisor else _pool("avg", spatial, (kernel, stride, padding), 1, ceil_mode, counts)
    if name.startswith("adaptive_avg_pool"):
        return ops.AdaptivePool("avg", call.shape[2:])
    if name.startswith("adaptive_max_pool") and isinstance(call.node.meta["val"], torch.Tensor):
        return ops.AdaptivePool("max", call.shape[2:])
    return None


def _reduction(call: Call) -> ops.Op | None:
    if call.name not in _REDUCTIONS or not isinstance(call.node.meta["val"], torch.Tensor) or len(call.tensors) != 1:
        return None
    rank = len(call.source)
    dims, keepdim = call.arguments(dim=None, keepdim=False)
    dims = call.node.kwargs.get("axis", dims)
    if not isinstance(dims, int | tuple | list) or isinstance(dims, bool) or not isinstance(keepdim, bool):
        return None
    over = tuple(sorted(d % rank for d in ((dims,) if isinstance(dims, int) else dims)))
    if call.name == "mean" and over == tuple(range(2, rank)) and over:
        return ops.AdaptivePool("avg", (1,) * (rank - 2) if keepdim else ())
    return ops.Reduce(call.name, over, keepdim)


def _random(call: Call) -> ops.Op | None:
    if call.name in {"dropout", "dropout1d", "dropout2d", "dropout3d"}:
        probability, training = call.arguments(p=0.5, training=True)
        if not training:
            return ops.Elementwise("identity")
        return ops.Dropout(float(probability), "element" if call.name == "dropout" else "channel")
    if call.name == "stochastic_depth":
        p, mode, training = call.arguments(p=0.0, mode="row", training=True)
        return (
            ops.Dropout(float(p), "sample" if mode == "row" else "batch") if training else ops.Elementwise("identity")
        )
    return None


def _classifier(call: Call) -> ops.Op | None:
    if call.name in {"softmax", "log_softmax"}:
        (dim,) = call.arguments(dim=None)
        return None if dim is None else ops.Softmax(int(dim) % len(call.shape), call.name == "log_softmax")
    if call.name in _LOSSES:
        return _loss(call.name, call.node.kwargs.get("reduction", "mean"), call.node.kwargs.get("weight"))
    return None


def _loss(function: str, reduction: Any, weight: Any) -> ops.Op | None:
    return None if weight is not None or reduction not in {"mean", "sum"} else ops.Loss(function, reduction)


def _each(value: Any, count: int) -> tuple[int, ...]:
    if isinstance(value, tuple | list):
        return tuple(value) if len(value) == count else tuple(value) * count
    return (value,) * count


def _window(module: Any) -> tuple[Any, Any, Any]:
    return module.kernel_size, module.stride, module.padding


def _pool(
    function: Any, spatial: int, window: tuple[Any, Any, Any], dilation: Any, ceil_mode: Any, counts: Any = True
) -> ops.Op | None:
    kernel, stride, padding = window
    no_stride = stride is None or stride == []
    if spatial < 1:
        return None
    return ops.Pool(
        function, _each(kernel, spatial), _each(kernel if no_stride else stride, spatial), _each(padding, spatial),
        _each(dilation, spatial), bool(ceil_mode), bool(counts),
    )  # fmt: skip
