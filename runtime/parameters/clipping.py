"""Clipping gradients by a norm over all ranks, where ranks hold different pieces or copies."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from planner.errors import UsageError

Gathered = Callable[[torch.Tensor], torch.Tensor]
"""From a scalar of this rank to those of all ranks, as a vector."""


def clip_grad_norm(
    parameters: Sequence[tuple[nn.Parameter, int]],
    gathered: Gathered,
    max_norm: float,
    norm_type: float,
    error_if_nonfinite: bool,
    foreach: bool | None,
) -> torch.Tensor:
    """Scale the gradients so that the norm of all of them, over all ranks, is at most ``max_norm``.

    Args:
        parameters: of this rank, each with how many ranks hold the same piece.
        gathered: every rank must come to call it.
        max_norm: the largest norm that is left as it is.
        norm_type: the p of the p-norm; may be infinite, but not 0.
        error_if_nonfinite: raise where the norm is infinite or not a number, on every rank.
        foreach: as of torch's function.

    Returns:
        The norm before, equal on all ranks; a scalar tensor.

    Raises:
        UsageError: ``norm_type`` is 0, which counts tensors.
        RuntimeError: as ``error_if_nonfinite`` says.
    """
    if norm_type == 0:
        raise UsageError("clip_grad_norm_: norm_type 0 counts tensors, not their elements. Use another norm.")
    kept: dict[int, list[torch.Tensor]] = defaultdict(list)
    for parameter, copies in parameters:
        if parameter.grad is not None and parameter.grad.numel():
            kept[copies].append(parameter.grad)
    norms = {count: nn.utils.get_total_norm(grads, norm_type, False, foreach) for count, grads in kept.items()}
    like = parameters[0][0] if parameters else torch.zeros(())
    total = _norm_over_ranks(norms, float(norm_type), like, gathered)
    if error_if_nonfinite and not total.isfinite():
        raise RuntimeError(
            f"The total norm of order {norm_type} for gradients from `parameters` is non-finite, so it cannot be "
            "clipped. To disable this error and scale the gradients by the non-finite norm anyway, set "
            "`error_if_nonfinite=False`"
        )
    nn.utils.clip_grads_with_norm_([parameter for parameter, _ in parameters], max_norm, total, foreach)
    return total


def _norm_over_ranks(
    norms: Mapping[int, torch.Tensor], p: float, like: torch.Tensor, gathered: Gathered
) -> torch.Tensor:
    """Return the norm over all ranks, of norms over what so many ranks hold each."""
    mine = torch.stack(
        [n.double() for n in norms.values()] or [torch.zeros((), dtype=torch.double, device=like.device)]
    )
    if p == torch.inf:
        total = gathered(mine.max()).max()
    elif p == -torch.inf:
        total = gathered(mine.min() if norms else mine.new_full((), torch.inf)).min()
    else:
        counts = mine.new_tensor(list(norms) or [1])
        addend = (mine**p / counts).sum() if norms else mine.new_zeros(())
        total = gathered(addend).sum() ** (1.0 / p)
    dtypes = [n.dtype for n in norms.values()] or [like.dtype]
    return total.to(max(dtypes, key=lambda dtype: torch.finfo(dtype).bits))
