"""Which operator kind an fx node is, in any spelling: module, function, method, operator of ATen.

An operator without a kind of its own is ``PerSample``: it can be split by samples where its tensors
hold them, and is run whole elsewhere. So every operator of torch can be planned.
"""

from collections.abc import Mapping
from typing import Any, Final, Literal

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from planner.frontend.calls import RANDOM, SPELLINGS, Call, is_in_place, name_of, shape_of
from planner.frontend.custom import custom_rule, is_custom
from planner.frontend.proxy import says_elementwise
from planner.frontend.views import each, interpolation, padding, reshape, view_operator
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
_LOSSES: Final = frozenset({
    "cross_entropy", "nll_loss", "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy",
    "binary_cross_entropy_with_logits", "kl_div", "soft_margin_loss",
})  # fmt: skip
_MODULE_LOSSES: Final = {
    "CrossEntropyLoss": "cross_entropy", "NLLLoss": "nll_loss", "MSELoss": "mse_loss", "L1Loss": "l1_loss",
    "SmoothL1Loss": "smooth_l1_loss", "HuberLoss": "huber_loss", "BCELoss": "binary_cross_entropy",
    "BCEWithLogitsLoss": "binary_cross_entropy_with_logits", "SoftMarginLoss": "soft_margin_loss",
}  # fmt: skip
_REDUCTIONS: Final = frozenset({
    "mean", "sum", "amax", "amin", "max", "min", "argmax", "argmin", "logsumexp", "prod", "std", "var", "all",
    "any", "median",
})  # fmt: skip


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
            plain = len(call.node.args) == 1 and not call.node.kwargs and len(call.source) == rank
            return _transposed(module) if plain else None
        case _BatchNorm():
            return ops.BatchNorm(call.shape[1], module.eps, module.momentum)
        case nn.GroupNorm():
            return ops.GroupNorm(module.num_groups, module.num_channels)
        case _InstanceNorm() if not module.track_running_stats:
            return ops.GroupNorm(call.shape[1], call.shape[1])
        case nn.LayerNorm() | nn.RMSNorm():
            return ops.Along(call.name, tuple(range(rank - len(module.normalized_shape), rank)))
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
            return interpolation(call, module.mode, module.align_corners, module.scale_factor, module.size)
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
            return reshape(call)
        case nn.Softmax() | nn.LogSoftmax() if module.dim is not None:
            return ops.Softmax(module.dim % rank, isinstance(module, nn.LogSoftmax))
        case nn.PReLU():
            return ops.Elementwise("prelu") if module.num_parameters == 1 else ops.Along("prelu", (1,))
        case nn.GLU():
            return ops.Along("glu", (module.dim % rank,))
        case nn.ZeroPad1d() | nn.ZeroPad2d() | nn.ZeroPad3d() | nn.ConstantPad1d() | nn.ConstantPad2d():
            return padding(call)
        case nn.ReflectionPad1d() | nn.ReflectionPad2d() | nn.ReplicationPad1d() | nn.ReplicationPad2d():
            return padding(call)
        case _:
            return _by_class_name(call)


def _has_plain_weight(module: nn.Module) -> bool:
    """Return whether a product holds its weight itself, not in pieces of which it is computed (weight norm)."""
    return {"weight"} <= {name for name, _ in module.named_parameters()} <= {"weight", "bias"}


def _by_class_name(call: Call) -> ops.Op | None:
    module, name = call.module, call.name
    if name in _MODULE_LOSSES:
        factors = getattr(module, "pos_weight", None)
        return _loss(_MODULE_LOSSES[name], getattr(module, "reduction", None), getattr(module, "weight", None), factors)
    if name == "StochasticDepth":
        unit: Literal["sample", "batch"] = "sample" if getattr(module, "mode", "row") == "row" else "batch"
        return ops.Dropout(float(getattr(module, "p", 0.0)), unit)
    if name == "DropPath":
        rescale = bool(getattr(module, "scale_by_keep", True))
        return ops.Dropout(float(getattr(module, "drop_prob", 0.0) or 0.0), "sample", rescale)
    lower = SPELLINGS.get(name.lower(), name.lower())
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
    strides, dilations = each(stride, len(kernel)), each(dilation, len(kernel))
    after = None
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
        before = tuple(t // 2 for t in total)
        uneven = tuple(t - b for t, b in zip(total, before, strict=True))
        after = uneven if uneven != before else None
    else:
        before = each(0 if padding == "valid" else padding, len(kernel))
    return ops.Conv(weight[1] * groups, weight[0], kernel, strides, before, dilations, groups, mode, after)


def _transposed(module: nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d) -> ops.ConvTranspose:
    spatial = module.weight.dim() - 2
    return ops.ConvTranspose(
        module.in_channels, module.out_channels, tuple(module.weight.shape[2:]), tuple(module.stride),
        each(module.padding, spatial), each(module.output_padding, spatial), tuple(module.dilation), module.groups,
    )  # fmt: skip


def _of_function(call: Call, data: int) -> ops.Op | None:
    for recognizer in (
        _functional_product,
        _normalisation,
        _pooling,
        view_operator,
        _random,
        _classifier,
        _reduction,
    ):
        op = recognizer(call)
        if op is not None:
            return op
    of_one = call.name in _ELEMENTWISE and data <= 1 and call.source == call.shape
    of_many = call.name in _ARITHMETIC or says_elementwise(call.node)
    many = of_many and all(_broadcasts(shape_of(t), call.shape) for t in call.tensors)
    return ops.Elementwise(call.name) if of_one or many else None


def is_of_elements(call: Call) -> bool:
    """Return whether every element of a function's result is computed of the same element of its inputs alone.

    Functions that draw numbers or write into their input are not, nor are modules.
    """
    if call.module is not None or call.name in RANDOM or is_in_place(call.node, None):
        return False
    return call.name in _ELEMENTWISE | _ARITHMETIC or says_elementwise(call.node)


def values_of(node: fx.Node) -> list[fx.Node]:
    """Return the inputs of a node that it computes with: numbers among them are values, not sizes."""
    name = name_of(node)
    if name in _ELEMENTWISE | _ARITHMETIC:
        return node.all_input_nodes
    place = {"full": 1, "new_full": 2, "tensor": 0, "as_tensor": 0, "scalar_tensor": 0}.get(name)
    given = [] if place is None else [*node.args[place : place + 1], node.kwargs.get("fill_value")]
    return [value for value in given if isinstance(value, fx.Node)]


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
            return ops.BatchNorm(call.shape[1], eps, momentum) if training else ops.Along(call.name, (1,))
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
    if not isinstance(dims, int | tuple | list) or isinstance(dims, bool):
        return None
    keepdim = len(call.shape) == rank  # some take another argument in its place
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
        return _functional_loss(call)
    return None


def _functional_loss(call: Call) -> ops.Op | None:
    """Return the loss of a call; None where an argument is given by its position, which differs between losses."""
    if any(not isinstance(a, fx.Node) for a in call.node.args) or len(call.node.args) > 2:
        return None
    given = call.node.kwargs
    if given.get("size_average") is not None or given.get("reduce") is not None:
        return None
    return _loss(call.name, given.get("reduction", "mean"), given.get("weight"), given.get("pos_weight"))


def _loss(function: str, reduction: Any, weight: Any, of_classes: Any = None) -> ops.Op | None:
    """Return a loss; None where its mean counts elements by a weight.

    Args:
        function: its name.
        reduction: as of torch's losses.
        weight: of classes or elements.
        of_classes: factors of single channels or positions, which do not count in the mean.
    """
    if weight is not None or reduction not in {"mean", "sum"}:
        return None
    return ops.Loss(function, reduction, of_classes is not None)


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
        function, each(kernel, spatial), each(kernel if no_stride else stride, spatial), each(padding, spatial),
        each(dilation, spatial), bool(ceil_mode), bool(counts),
    )  # fmt: skip
