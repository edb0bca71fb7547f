"""Gives a model's parameters to torch's DTensor as a plan places them.

From there on everything is torch's: its tensor parallelism goes on with linear layers. Its convolution, though, is
right for splits by samples only (torch 2.13): those that the plan splits otherwise are for ``runtime.parallelize``.
"""

import itertools
import re

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor

from planner.errors import MismatchError, UsageError
from planner.plan.placements import Placements, StagePlacements


def device_mesh(stage: StagePlacements, device_type: str = "cpu") -> DeviceMesh:
    """Return the mesh of a stage; every rank of the job calls this, in the same order.

    Args:
        stage: of ``Placements.stages``.
        device_type: ``cpu`` or ``cuda``.
    """
    ranks = torch.tensor(stage.mesh_ranks, dtype=torch.int64).reshape(stage.mesh_shape)
    return DeviceMesh(device_type, ranks, mesh_dim_names=tuple(stage.mesh_dim_names))


def distribute_parameters(
    model: nn.Module, found: Placements, *, stage: int = 0, device_type: str = "cpu", src_rank: int | None = 0
) -> DeviceMesh:
    """Make the parameters and buffers of a model DTensors in place; return their mesh.

    Those that no layer of the plan reads, and in a pipeline those of other stages, stay as they are.

    Args:
        model: with whole tensors, on every rank of the mesh.
        found: what ``layerwise export PLAN --format dtensor`` wrote, or ``planner.api.export_placements`` returns.
        stage: of a pipeline; all ranks of the job call this for each of them, since making a mesh is collective.
        device_type: ``cpu`` or ``cuda``.
        src_rank: of the mesh, whose values all ranks get; None: each keeps its own, and they must be equal.

    Raises:
        UsageError: there is no such stage.
        MismatchError: the model has not these tensors, or some have no placements.
    """
    if not 0 <= stage < len(found.stages):
        raise UsageError(f"there are stages 0 to {len(found.stages) - 1}, not {stage}")
    wanted = found.stages[stage]
    _refuse_other_tensors(model, wanted, found.model)
    mesh = device_mesh(wanted, device_type)
    if mesh.get_coordinate() is None:
        return mesh
    with torch.no_grad():
        for name, placed in wanted.tensors.items():
            path, _, own = name.rpartition(".")
            module = model.get_submodule(path)
            tensor = getattr(module, own)
            cut = distribute_tensor(tensor, mesh, placements(placed.placements or ()), src_data_rank=src_rank)
            if isinstance(tensor, nn.Parameter):
                module.register_parameter(own, nn.Parameter(cut, requires_grad=tensor.requires_grad))
            else:
                module.register_buffer(own, cut, persistent=own not in module._non_persistent_buffers_set)
    return mesh


def placements(words: list[str] | tuple[str, ...]) -> list[Placement]:
    """Return torch's placements of words such as ``Shard(0)`` and ``Replicate()``."""
    dims = (re.fullmatch(r"Shard\((\d+)\)", word) for word in words)
    return [Replicate() if dim is None else Shard(int(dim[1])) for dim in dims]


def _refuse_other_tensors(model: nn.Module, stage: StagePlacements, name: str) -> None:
    """Check that a model has the tensors of a stage, and that DTensor can place them."""
    if lacking := [f"{key} ({tensor.why_not})" for key, tensor in stage.tensors.items() if tensor.placements is None]:
        others = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
        raise MismatchError(
            f"DTensor cannot place these as the plan does: {'; '.join(lacking[:3])}{others}. runtime.parallelize runs "
            "the plan as it is."
        )
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    known = {key: tuple(tensor.shape) for key, tensor in tensors}
    for key, placed in stage.tensors.items():
        if known.get(key) != tuple(placed.shape):
            has = f"has it with shape {known[key]}" if key in known else "has none"
            raise MismatchError(
                f"the placements of {name!r} are for a model with {key!r} of shape {tuple(placed.shape)}; this one "
                f"{has}. Export the plan of this model."
            )
