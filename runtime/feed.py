"""What a rank passes to the model: how many samples all ranks pass together, and whether its region is the plan's."""

from collections.abc import Mapping, Sequence
from typing import Final

import torch

from planner.errors import MismatchError
from planner.ir.dimension import Dimension, image_roles
from planner.ir.layout import Layout
from planner.ir.mesh import Mesh
from planner.ir.region import Region
from planner.ir.rules import InputOutput, io_layout
from planner.ir.split import LayerId
from planner.ir.tensor import TensorSpec
from planner.plan.schema import Plan
from runtime.comm.exchange import Batch

REFUSED: Final = -1
"""A rank says so in place of its number of samples, so that no rank waits for it."""


def input_layouts(plan: Plan) -> dict[str, Layout]:
    """Return, by the name of every input, which region each rank passes in the planned batch.

    With ``io: per-rank`` and ``io: local`` regions are pieces, with ``io: global`` all ranks pass everything.
    """
    found = {}
    for each in plan.model.inputs:
        shape = tuple(each.shape)
        roles = image_roles(len(shape)) if shape[0] == plan.batch else (None,) * len(shape)
        found[each.name] = io_layout(TensorSpec(shape, each.dtype, roles), plan.mesh, plan.strategy[LayerId(each.name)])
    return found


def own_region(layout: Layout, position: int, batch: int | None = None) -> Region:
    """Return a mesh position's region of an input, for the planned batch or another one."""
    return (layout if batch is None else layout.with_size(0, batch)).region(position)


def takes_other_sizes(plan: Plan) -> bool:
    """Return whether samples may have other sizes than planned: where nothing but samples is split, and in no loss."""
    layers = [layer for stage in plan.stages for layer in stage.layers]
    return all(layer.op != "loss" and set(layer.split.values()) <= {Dimension.SAMPLE} for layer in layers)


def batch_of(io: InputOutput, first: Layout, samples: Sequence[int]) -> Batch:
    """Return the global batch.

    Args:
        io: how ranks pass it.
        first: layout of the first input with samples.
        samples: that each mesh position passes.

    Raises:
        MismatchError: a rank passes none, or not those that its region has.
    """
    if io is InputOutput.GLOBAL:
        return Batch(samples[0])
    if min(samples) < 1:
        refused = ", where -1 stands for what a rank refused: see its own message" if min(samples) == REFUSED else ""
        raise MismatchError(f"the ranks passed {tuple(samples)} samples{refused}; every rank needs at least one")
    if io is InputOutput.PER_RANK:
        return _own_samples(first, samples)
    return _of_regions(first, samples)


def _own_samples(first: Layout, samples: Sequence[int]) -> Batch:
    size = sum(samples)
    planned = first.with_size(0, size)
    is_planned = all(planned.region(p).shape[0] == own for p, own in enumerate(samples))
    return Batch(size, None if is_planned else tuple(samples))


def _of_regions(first: Layout, samples: Sequence[int]) -> Batch:
    mesh, cutting = first.mesh, first.axes_of(0)
    heads = [p for p in range(mesh.size) if not any(c for a, c in enumerate(mesh.coordinates(p)) if a not in cutting)]
    size = sum(samples[p] for p in heads)
    whole = first.with_size(0, size)
    wanted = tuple(whole.region(p).shape[0] for p in range(mesh.size))
    if tuple(samples) != wanted:
        raise MismatchError(
            f"the ranks passed {tuple(samples)} samples; with io: local, ranks of one group pass the same samples, and "
            f"groups pass the shares of the plan: {wanted} of {size}"
        )
    return Batch(size)


def refuse_other_region(
    layouts: Mapping[str, Layout],
    mesh: Mesh,
    position: int,
    passed: Mapping[str, torch.Tensor],
    batch: int | None = None,
) -> None:
    """Check that what a rank passes has the sizes of its regions, samples apart unless their number is known.

    Args:
        layouts: of the inputs.
        mesh: the ranks.
        position: of this rank.
        passed: tensors by the inputs' names.
        batch: samples of all ranks together.

    Raises:
        MismatchError: with the region that the plan wants.
    """
    for name, x in passed.items():
        layout = layouts[name]
        region = own_region(layout, position, batch)
        first = 1 if batch is None else 0
        if tuple(x.shape[first:]) != region.shape[first:]:
            part = ", ".join(f"{a}:{b}" for a, b in zip(region.start[first:], region.stop[first:], strict=True))
            of = "sample" if batch is None else f"batch of {batch}"
            raise MismatchError(
                f"input {name!r} is {tuple(x.shape)} on rank {mesh.ranks[position]}; its part of a {of} is [{part}], "
                f"of samples of {tuple(layout.shape[1:])}. runtime.data cuts batches as a plan wants them; samples of "
                "another size need a plan of their own, unless every layer is split by samples alone."
            )
