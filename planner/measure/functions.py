"""What the operators that are named by a function compute: element by element, along dimensions, losses.

Arguments that a name does not tell (an exponent, the bounds of a clamp) are stand-ins: they do not change the time.
"""

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch.nn import functional

from planner.ir.ops import Along, Loss, Reduce

Tensors = Sequence[torch.Tensor]
Function = Callable[[Tensors], torch.Tensor]

_SCALAR: Final = 0.75
"""The second operand where an operator of two tensors has a number or a constant instead of one of them."""

_OF_ONE: Final[Mapping[str, Callable[[torch.Tensor], Any]]] = {
    **{name: getattr(functional, name) for name in (
        "relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "hardswish", "hardsigmoid",
        "hardtanh", "softplus", "softsign", "logsigmoid", "tanhshrink", "softshrink", "hardshrink",
    )},
    **{name: getattr(torch, name) for name in (
        "sigmoid", "tanh", "abs", "neg", "exp", "expm1", "log", "log1p", "log2", "log10", "sqrt", "rsqrt", "square",
        "reciprocal", "sin", "cos", "tan", "atan", "erf", "sign", "floor", "ceil", "round", "clone", "nan_to_num",
        "logical_not", "zeros_like", "ones_like", "rand_like", "randn_like",
    )},
    "threshold": lambda x: functional.threshold(x, 0.1, 0.0),
    "pow": lambda x: x.pow(3.0),
    "clamp": lambda x: x.clamp(0.0, 1.0),
    "clip": lambda x: x.clamp(0.0, 1.0),
    "clamp_min": lambda x: x.clamp_min(0.0),
    "clamp_max": lambda x: x.clamp_max(1.0),
    "prelu": lambda x: functional.prelu(x, x.detach().new_full((1,), 0.25)),
    "rrelu": lambda x: functional.rrelu(x, training=True),
    "alpha_dropout": lambda x: functional.alpha_dropout(x, training=True),
    "bernoulli": lambda x: x.detach().clamp(0.0, 1.0).bernoulli(),
    "full_like": lambda x: torch.full_like(x, _SCALAR),
    "fill": lambda x: torch.full_like(x, _SCALAR),
    "zero": torch.zeros_like,
    "empty_like": torch.empty_like,
    "copy": torch.clone,
    "double": lambda x: x.double(),
    "float": lambda x: x.float().clone(),
    "half": lambda x: x.half(),
    "bfloat16": lambda x: x.bfloat16(),
    "long": lambda x: x.long(),
    "int": lambda x: x.int(),
    "bool": lambda x: x.bool(),
}  # fmt: skip

_OF_TWO: Final[Mapping[str, Callable[[Any, Any], Any]]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv,
    "rsub": lambda a, b: b - a, "floordiv": operator.floordiv, "mod": operator.mod, "fmod": torch.fmod,
    "remainder": torch.remainder, "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le,
    "gt": operator.gt, "ge": operator.ge,
    "maximum": lambda a, b: torch.maximum(a, _tensor(b, a)), "minimum": lambda a, b: torch.minimum(a, _tensor(b, a)),
    "atan2": lambda a, b: torch.atan2(a, _tensor(b, a)), "copysign": torch.copysign,
    "heaviside": lambda a, b: torch.heaviside(a, _tensor(b, a)),
    "and": lambda a, b: torch.logical_and(a, _tensor(b, a)), "or": lambda a, b: torch.logical_or(a, _tensor(b, a)),
    "xor": lambda a, b: torch.logical_xor(a, _tensor(b, a)),
    "logical_and": lambda a, b: torch.logical_and(a, _tensor(b, a)),
    "logical_or": lambda a, b: torch.logical_or(a, _tensor(b, a)),
    "masked_fill": lambda a, b: a.masked_fill(_tensor(b, a).detach() > 0, 0.0),
    "where": lambda a, b: torch.where(a.detach() > 0, a, _tensor(b, a)),
}  # fmt: skip

_OF_THREE: Final[Mapping[str, Callable[[Any, Any, Any], torch.Tensor]]] = {
    "where": lambda a, b, c: torch.where(a.detach() > 0, b, c),
    "lerp": torch.lerp,
    "addcmul": torch.addcmul,
    "addcdiv": torch.addcdiv,
}

_LOSSES: Final = frozenset({
    "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy_with_logits", "kl_div",
    "soft_margin_loss",
})  # fmt: skip


def elementwise(name: str, count: int) -> Function | None:
    """Return a function of equal positions of so many tensors; None where the name is not known.

    A number stands for the second operand where there is but one tensor. More than three are joined by two.
    """
    if count == 1 and name in _OF_ONE:
        return lambda xs: _OF_ONE[name](xs[0])
    if count == 1 and name in _OF_TWO:
        return lambda xs: _OF_TWO[name](xs[0], _SCALAR)
    if count == 3 and name in _OF_THREE:
        return lambda xs: _OF_THREE[name](xs[0], xs[1], xs[2])
    if count > 1 and name in _OF_TWO:
        return lambda xs: functools.reduce(_OF_TWO[name], xs)
    return None


def reduction(op: Reduce) -> Function:
    """Return a reduction over dimensions."""
    call: Any = getattr(torch.Tensor, op.function)
    one = op.function in {"max", "min", "median", "prod", "argmax", "argmin"}

    def reduce(xs: Tensors) -> torch.Tensor:
        y = xs[0]
        for dim in reversed(op.dims) if one else (op.dims,):
            found = call(y, dim, keepdim=op.keepdim)
            y = found if isinstance(found, torch.Tensor) else found[0]
        return y

    return reduce


def along(op: Along, shape: tuple[int, ...]) -> Function | None:
    """Return a function along some dimensions of a tensor of this shape; None where the name does not say enough."""
    over = [shape[d] for d in op.dims]
    match op.function:
        case "layer_norm":
            return lambda xs: functional.layer_norm(xs[0], over, *_pair(xs))
        case "rms_norm":
            return lambda xs: functional.rms_norm(xs[0], over, _pair(xs)[0])
        case "glu":
            return lambda xs: functional.glu(xs[0], op.dims[0])
        case "local_response_norm":
            return lambda xs: functional.local_response_norm(xs[0], 5)
        case _:
            return None


def _pair(xs: Tensors) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return weight and bias, where they are given."""
    return (xs[1], xs[2]) if len(xs) > 2 else (None, None)


def loss(op: Loss, shapes: Sequence[tuple[int, ...]]) -> Function | None:
    """Return a loss of its first input; a missing second one is made of the shape that the first asks for."""
    if op.function in {"cross_entropy", "nll_loss"}:
        scores = shapes[0]
        target = torch.zeros((scores[0], *scores[2:]), dtype=torch.long)

        def classify(xs: Tensors) -> torch.Tensor:
            given = xs[1].long() if len(xs) > 1 and xs[1].dim() < xs[0].dim() else target.to(xs[0].device)
            found: torch.Tensor = getattr(functional, op.function)(xs[0], given % scores[1], reduction=op.reduction)
            return found

        return classify
    if op.function not in _LOSSES:
        return None
    return lambda xs: getattr(functional, op.function)(xs[0], xs[-1].detach(), reduction=op.reduction)


def _tensor(value: Any, like: torch.Tensor) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=like.dtype, device=like.device)
