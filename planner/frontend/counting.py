"""FLOP of operators that have no formula here: counted by torch on the meta device."""

import functools
import math
from typing import Any, Final

import torch
from torch import fx
from torch.utils.flop_counter import FlopCounterMode

from planner.frontend.recognize import METADATA, Call, holds_tensor, plain_name

_PRODUCTS: Final = frozenset({
    "matmul", "bmm", "mm", "addmm", "baddbmm", "addbmm", "mv", "dot", "einsum", "linear", "bilinear",
    "tensordot", "conv", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d",
    "conv_transpose3d", "scaled_dot_product_attention", "multi_head_attention_forward", "chain_matmul", "inner",
    "outer", "cdist",
})  # fmt: skip


def flop_of(call: Call) -> tuple[int, int]:
    """Return the FLOP of a call forward and backward for the traced batch, as ``FlopCounterMode`` counts them.

    Backward counts gradients of what carries one only; that of grouped convolutions is right, unlike torch's.
    """
    target = call.node.target
    if call.module is None and call.name not in _PRODUCTS and not _is_foreign(target):
        return 0, 0
    if call.module is not None and not any(True for _ in call.module.parameters()):
        return 0, 0
    return _counted(call)


def _is_foreign(target: Any) -> bool:
    """Return whether a function is no operator of torch itself, such as one that a library wrapped."""
    home = (getattr(target, "__module__", None) or "torch").partition(".")[0]
    return callable(target) and home not in {"torch", "_operator", "builtins"}


def _counted(call: Call) -> tuple[int, int]:
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
    with torch.enable_grad():
        with FlopCounterMode(display=False) as ahead:
            result = function(*args, **kwargs)
        tensors = [
            t for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, torch.Tensor) and t.requires_grad
        ]
        with FlopCounterMode(display=False, custom_mapping=_CORRECTED) as back:
            if tensors and holds_tensor(result):
                torch.autograd.backward(tensors, [torch.empty_like(t) for t in tensors])
    return ahead.get_total_flops(), back.get_total_flops()


def _conv_backward_flop(  # noqa: PLR0913  # the signature of aten.convolution_backward
    grad_out_shape: Any, x_shape: Any, w_shape: Any, bias: Any, stride: Any, padding: Any, dilation: Any,
    transposed: bool, output_padding: Any, groups: int, output_mask: Any, **others: Any,
) -> int:  # fmt: skip
    """Return the FLOP of a convolution's backward; torch's own formula forgets to divide by the groups."""
    del bias, stride, padding, dilation, output_padding, groups, others  # a weight's second size is that of one group
    positions = x_shape if transposed else grad_out_shape
    each = 2 * positions[0] * math.prod(positions[2:]) * math.prod(w_shape)
    return each * sum(map(bool, output_mask[:2]))


_CORRECTED: Final = {torch.ops.aten.convolution_backward: _conv_backward_flop}


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
