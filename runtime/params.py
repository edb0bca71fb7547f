"""Parameters and buffers, cut as the plan says."""

import torch
from torch import nn

from planner.ir.layout import Layout
from runtime.communicator import Communicator


def local_piece(tensor: torch.Tensor, layout: Layout, position: int) -> torch.Tensor:
    """Return this rank's piece of a whole tensor: the tensor itself where it is not cut, else a copy."""
    region = layout.region(position)
    if region.shape == tuple(tensor.shape):
        return tensor.detach()
    part = tuple(slice(a, b) for a, b in zip(region.start, region.stop, strict=True))
    return tensor.detach()[part].clone(memory_format=torch.contiguous_format)


def local_parameter(parameter: nn.Parameter, layout: Layout, position: int) -> nn.Parameter:
    """Return this rank's piece of a parameter: the parameter itself where it is not cut."""
    piece = local_piece(parameter, layout, position)
    if piece.shape == parameter.shape:
        return parameter
    return nn.Parameter(piece, parameter.requires_grad)


def broadcast_state(module: nn.Module, communicator: Communicator) -> None:
    """Overwrite all parameters and buffers with those of mesh position 0, as DistributedDataParallel does."""
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            if tensor.is_contiguous():
                communicator.broadcast(tensor.detach())
            else:
                dense = tensor.detach().contiguous()
                communicator.broadcast(dense)
                tensor.copy_(dense)
