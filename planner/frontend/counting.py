"""FLOP of operators that have no formula here: counted by torch on the meta device."""

import functools
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import fx
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from planner.frontend.batch import PROBE
from planner.frontend.calls import METADATA, Call, plain_name, shape_of
from planner.frontend.custom import custom_rule, is_custom
from planner.frontend.samples import scaled

_log = logging.getLogger(__name__)

_PRODUCTS: Final = frozenset({
    "matmul", "bmm", "mm", "addmm", "baddbmm", "addbmm", "mv", "dot", "einsum", "linear", "bilinear",
    "tensordot", "conv", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d",
    "conv_transpose3d", "scaled_dot_product_attention", "multi_head_attention_forward", "chain_matmul", "inner",
    "outer", "cdist", "linalg_multi_dot", "linalg_matmul", "linalg_matrix_power", "matrix_power", "linalg_pinv",
    "cov", "corrcoef", "affine_grid", "lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell",
})  # fmt: skip
"""Functions of torch with matrix products or convolutions in them."""
_TRANSFORMS: Final = frozenset({
    "fft", "ifft", "rfft", "irfft", "hfft", "ihfft", "fft2", "ifft2", "rfft2", "irfft2", "hfft2", "ihfft2", "fftn",
    "ifftn", "rfftn", "irfftn", "hfftn", "ihfftn", "stft", "istft",
})  # fmt: skip
"""Functions of torch with Fourier transforms in them."""
_COMPLEX_PRODUCT: Final = 4
"""Products of real numbers, and as many sums, in one of complex numbers."""


def flop_of(call: Call, batch: int = PROBE) -> tuple[int, int]:
    """Return the FLOP of a call forward and backward for a batch, as ``FlopCounterMode`` counts them.

    Backward counts gradients of what carries one only; that of grouped convolutions is right, unlike torch's. Fourier
    transforms, which torch's counter does not know, count as ``fourier_flop``, and a product of complex matrices as the
    four of real ones that it takes.

    Args:
        call: of the traced graph.
        batch: samples; those that were traced if left out.
    """
    target = call.node.target
    if call.module is None and call.name not in _PRODUCTS | _TRANSFORMS and not _is_foreign(target):
        return 0, 0
    if call.module is not None and not _is_foreign(type(call.module)) and not list(call.module.parameters()):
        return 0, 0
    if call.module is not None and is_custom(type(call.module)) and custom_rule(type(call.module)).output_shape:
        of_shapes = custom_rule(type(call.module)).forward_flop
        forward = scaled(of_shapes(*map(shape_of, call.tensors)), batch) if of_shapes else 0
        return forward, 2 * forward
    ahead, back = _counted(call)
    return sum(scaled(n, batch) for n in ahead), sum(scaled(n, batch) for n in back)


def is_transform(call: Call) -> bool:
    """Return whether a call is a Fourier transform, which costs little more than an element-wise operator."""
    return call.module is None and call.name in _TRANSFORMS


def fourier_flop(sizes: Sequence[int], *, of_real: bool) -> int:
    """Return the nominal FLOP of one fast Fourier transform over n points: 5 n log2 n, half of it for real ones.

    The convention of FFTW's benchmark [Frigo05]; the algorithm that a library takes needs somewhat fewer or more.

    Args:
        sizes: points in each dimension, as real numbers where one side is real.
        of_real: whether input or output is real.
    """
    points = math.prod(sizes)
    return round(5 * points * math.log2(points) / (2 if of_real else 1)) if points > 1 else 0


def _is_foreign(target: Any) -> bool:
    """Return whether a function is no operator of torch itself, such as one that a library wrapped."""
    home = (getattr(target, "__module__", None) or "torch").partition(".")[0]
    return callable(target) and home not in {"torch", "_operator", "builtins"}


def _counted(call: Call) -> tuple[list[int], list[int]]:
    """Return the FLOP of every product, forward and backward: some grow with the batch, those of weights do not."""

    def value(node: fx.Node) -> Any:
        fresh = functools.partial(_fresh, gradient=_carries_gradient(node))
        return torch.utils._pytree.tree_map_only(torch.Tensor, fresh, node.meta["val"])

    args = fx.node.map_arg(call.node.args, value)
    kwargs = fx.node.map_arg(call.node.kwargs, value)
    if call.module is not None:
        function: Any = _on_meta(call)
    elif call.node.op == "call_method":
        function = functools.partial(_method, str(call.node.target))
    else:
        function = call.node.target
    ahead: list[int] = []
    with torch.enable_grad():
        with _counter(ahead):
            result = function(*args, **kwargs)
        return ahead, _counted_backward(call, result, ahead)


def _counted_backward(call: Call, result: Any, ahead: list[int]) -> list[int]:
    leaves = torch.utils._pytree.tree_leaves(result)
    tensors = [t for t in leaves if isinstance(t, torch.Tensor) and t.requires_grad]
    back: list[int] = []
    try:
        with _counter(back):
            torch.autograd.backward(tensors, [torch.empty_like(t) for t in tensors])
    except Exception as error:  # whatever the user's backward() raises on meta tensors
        _log.info("backward of %s counts as twice its forward pass, because it fails: %s", call.name, error)
        return [2 * flop for flop in ahead]
    return back


def _counter(counts: list[int]) -> FlopCounterMode:
    """Return a counter that appends the FLOP of every product to a list."""

    def recording(formula: Callable[..., int]) -> Callable[..., int]:
        def record(*args: Any, **kwargs: Any) -> int:
            is_complex = any(isinstance(a, torch.Tensor) and a.is_complex() for a in args) and formula is not _transform
            counts.append(formula(*args, **kwargs) * (_COMPLEX_PRODUCT if is_complex else 1))
            return counts[-1]

        record._get_raw = True  # type: ignore[attr-defined]  # as formulas of torch say that they take tensors
        return record

    aten = torch.ops.aten
    transforms = dict.fromkeys((aten._fft_r2c, aten._fft_c2r, aten._fft_c2c), _transform)
    formulas = {**flop_registry, aten.convolution_backward: _conv_backward_flop, **transforms}
    return FlopCounterMode(display=False, custom_mapping={name: recording(f) for name, f in formulas.items()})


def _conv_backward_flop(*arguments: Any, **results: Any) -> int:
    """Return the FLOP of ``aten.convolution_backward``; torch's own formula forgets to divide by the groups.

    Each gradient costs as much as the forward pass. A weight's second size is that of one group.
    """
    del results
    gradient, x, weight, *_, transposed, _, _, wanted = arguments
    positions = (x if transposed else gradient).shape
    each: int = 2 * positions[0] * math.prod(positions[2:]) * math.prod(weight.shape)
    return each * sum(map(bool, wanted[:2]))


def _transform(x: torch.Tensor, dims: Sequence[int], *_: Any, out_val: torch.Tensor) -> int:
    """Return the FLOP of ATen's Fourier transforms along some dimensions, one for every other position."""
    of_real = not (x.is_complex() and out_val.is_complex())
    longer = out_val if x.is_complex() and of_real else x
    sizes = [longer.shape[d] for d in dims]
    return longer.numel() // math.prod(sizes) * fourier_flop(sizes, of_real=of_real)


def _on_meta(call: Call) -> torch.nn.Module:
    from planner.frontend.trace import on_meta

    assert call.module is not None
    return on_meta(call.module).train()


def _method(name: str, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    return getattr(tensor, name)(*args, **kwargs)


def _carries_gradient(node: fx.Node) -> bool:
    """Return whether a node's result depends on something trainable.

    Values of exported graphs do not say it themselves, so the nodes before are asked too.
    """
    open_nodes = [node]
    while open_nodes:
        current = open_nodes[-1]
        missing = [n for n in current.all_input_nodes if "carries_gradient" not in n.meta]
        if missing:
            open_nodes.extend(missing)
            continue
        passes = current.op in {"call_function", "call_method"} and plain_name(current) not in {"detach", *METADATA}
        before = passes and any(n.meta["carries_gradient"] for n in current.all_input_nodes)
        current.meta["carries_gradient"] = before or _requires_grad(current.meta.get("val"))
        open_nodes.pop()
    return bool(node.meta["carries_gradient"])


def _requires_grad(value: Any) -> bool:
    leaves = torch.utils._pytree.tree_leaves(value)
    return any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in leaves)


def _fresh(tensor: torch.Tensor, *, gradient: bool) -> torch.Tensor:
    """Return a tensor like this one, for which a gradient is computed or not."""
    differentiable = tensor.is_floating_point() or tensor.is_complex()
    leaf = tensor.detach().requires_grad_(gradient and differentiable)
    return leaf.clone()  # functions may write into what is no leaf
