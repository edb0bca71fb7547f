"""Numbers that are not finite, found on all ranks alike."""

import torch
from torch import nn

from planner.errors import RunError
from runtime.module import ParallelModule
from runtime.pipeline.holding import HeldStages

_LOSS = 1
_LISTED = 8


def require_finite(net: ParallelModule | HeldStages, loss: torch.Tensor | None = None) -> None:
    """Check that this step's loss and gradients are finite on all ranks; every rank must call it, behind backward.

    Without it a NaN on one rank reaches the weights of those that share a parameter, and then every rank's, without an
    error. A rank's own loss says where it came from (unless batch norm over the global batch has spread it): gradients
    are sums over ranks already. Costs one pass over the gradients and a number of every rank. With fp16,
    ``runtime.GradScaler`` skips such steps on all ranks instead.

    Args:
        net: of ``parallelize``, ``pipelined`` or ``variable_batch``.
        loss: of this rank, if it has one.

    Raises:
        RunError: on every rank, with the ranks whose loss or gradients are not finite, and the first parameter.
    """
    communicator = net.world if isinstance(net, HeldStages) else net._state.communicator
    names = sorted(net.whole if isinstance(net, HeldStages) else net.held)
    found = communicator.start_gather_ints(_first_bad(net, loss, names))()
    problems = [
        f"the loss of rank {rank}" if bad == _LOSS else f"the gradient of {names[bad - _LOSS - 1]} on rank {rank}"
        for rank, bad in zip(communicator.mesh.ranks, found, strict=True)
        if bad
    ]
    if problems:
        more = f" and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise RunError(
            f"infinite or not a number: {', '.join(problems[:_LISTED])}{more}. The weights were not updated."
        )


def _first_bad(net: nn.Module, loss: torch.Tensor | None, names: list[str]) -> int:
    """Return what is not finite on this rank: 0 for nothing, 1 for the loss, else 2 and the number of a parameter."""
    if loss is not None and not bool(torch.isfinite(loss.detach()).all()):
        return _LOSS
    gradients = {n: p.grad for n, p in net.named_parameters() if p.grad is not None and p.grad.numel()}
    largest = nn.utils.get_total_norm(list(gradients.values()), torch.inf) if gradients else torch.zeros(())
    if bool(torch.isfinite(largest)):
        return 0
    return next(
        (_LOSS + 1 + names.index(name) for name, g in gradients.items() if not bool(torch.isfinite(g).all())), 0
    )
