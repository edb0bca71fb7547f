"""What stands for operators that meta tensors cannot run, or only slowly: results and saved tensors alike."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class Unseen(torch.autograd.Function):
    """Stands for a module of the user's own that cannot run on meta tensors; keeps its inputs for backward."""

    @staticmethod
    def forward(ctx: Any, shape_of: Callable[..., Any], *given: Any) -> torch.Tensor:
        """Return an empty tensor of the declared shape."""
        tensors = [x for x in given if isinstance(x, torch.Tensor)]
        inputs = [x for x in tensors if not isinstance(x, nn.Parameter)]
        ctx.save_for_backward(*inputs)
        return inputs[0].new_empty(shape_of(*(tuple(x.shape) for x in inputs)))


class LightBatchNorm(torch.autograd.Function):
    """What batch norm returns and keeps on the meta device, where torch's own takes milliseconds."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        """Return an empty tensor like the input."""
        mean = x.new_empty(x.shape[1])
        ctx.save_for_backward(x, weight, mean, torch.empty_like(mean))
        return torch.empty_like(x)


class LightAttention(torch.autograd.Function):
    """What fused attention returns and keeps; on meta tensors torch would run the formula, which keeps more."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Return an empty tensor with a row for every query."""
        same = query.shape[-1] == value.shape[-1]
        result = torch.empty_like(query) if same else query.new_empty((*query.shape[:-1], value.shape[-1]))
        log_sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, result, log_sums, *([] if mask is None else [mask]))
        return result


def light_attention(
    attention: Callable[..., Any],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Return what attention gives on meta tensors, where a fused kernel runs it elsewhere; else call it."""
    learned = attn_mask is not None and attn_mask.requires_grad
    if query.dim() != 4 or dropout_p > 0 or learned or query.shape[:-2] != key.shape[:-2]:
        return attention(query, key, value, attn_mask, dropout_p, *args, **kwargs)
    return LightAttention.apply(query, key, value, attn_mask)
