"""Executes the steps between two layouts for all ranks at once, on numpy arrays.

A twin of what the runtime does, small enough to be checked by reading: it knows what each kind of
step does to the pieces and nothing of how the steps were chosen.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from planner.ir.layout import Layout, Whole
from planner.ir.transfer import Step, StepKind, transfers

Array = NDArray[np.float64]
Pieces = list[Array]
"""What every mesh position holds."""


def spread(tensor: Array, layout: Layout, rng: np.random.Generator) -> Pieces:
    """Return the pieces of a tensor in a layout; partial sums become random integer addends."""
    pieces = [cut(tensor, layout, position).copy() for position in range(layout.mesh.size)]
    for *others, last in layout.mesh.groups(layout.axes_with(Whole.PARTIAL)):
        for position in others:
            addend = rng.integers(-9, 10, pieces[position].shape).astype(np.float64)
            pieces[last] -= addend
            pieces[position] = addend
    return pieces


def cut(tensor: Array, layout: Layout, position: int) -> Array:
    """Return the region of a whole tensor that a mesh position holds."""
    region = layout.region(position)
    return tensor[tuple(slice(a, b) for a, b in zip(region.start, region.stop, strict=True))]


def anything(layout: Layout, rng: np.random.Generator) -> Pieces:
    """Return random pieces that a layout allows: copies agree, all else is independent."""
    found = [rng.integers(-9, 10, layout.region(p).shape).astype(np.float64) for p in range(layout.mesh.size)]
    for group in layout.mesh.groups(layout.axes_with(Whole.EQUAL, Whole.SHARED)):
        for position in group:
            found[position] = found[group[0]].copy()
    return found


def inner_product(values: Pieces, gradients: Pieces, layout: Layout) -> float:
    """Return <values, gradients>; equal copies with equal gradients count once."""
    firsts = [group[0] for group in layout.mesh.groups(layout.axes_with(Whole.EQUAL))]
    return float(sum((values[p] * gradients[p]).sum() for p in firsts))


def run(steps: Iterable[Step], pieces: Pieces) -> Pieces:
    """Return the pieces behind all steps."""
    for step in steps:
        check_shapes(pieces, step.source)
        pieces = _run(step, pieces)
        check_shapes(pieces, step.target)
    return pieces


def check_shapes(pieces: Pieces, layout: Layout) -> None:
    """Assert that the pieces have the shapes that a layout says."""
    assert [p.shape for p in pieces] == [layout.region(i).shape for i in range(layout.mesh.size)]


def _run(step: Step, pieces: Pieces) -> Pieces:
    source, target, mesh = step.source, step.target, step.source.mesh
    positions = range(mesh.size)
    match step.kind:
        case StepKind.SLICE:
            return [pieces[p][target.region(p).slices_in(source.region(p))] for p in positions]
        case StepKind.PAD:
            padded = [np.zeros(target.region(p).shape) for p in positions]
            for p in positions:
                padded[p][source.region(p).slices_in(target.region(p))] = pieces[p]
            return padded
        case StepKind.MASK:
            firsts = {group[0] for group in mesh.groups(step.axes)}
            return [x if p in firsts else np.zeros_like(x) for p, x in enumerate(pieces)]
        case StepKind.EXCHANGE:
            return _exchange(step, pieces)
        case _:
            return _collective(step, pieces)


def _collective(step: Step, pieces: Pieces) -> Pieces:
    found: Pieces = [np.empty(0)] * len(pieces)
    for group in step.source.mesh.groups(step.axes):
        members = [pieces[p] for p in group]
        for p in group:
            match step.kind:
                case StepKind.ALL_GATHER:
                    found[p] = np.concatenate(members, step.dim)
                case StepKind.ALL_REDUCE:
                    found[p] = np.sum(members, axis=0)
                case _:
                    part = step.target.region(p).slices_in(step.source.region(p))
                    found[p] = np.sum(members, axis=0)[part]
    return found


def _exchange(step: Step, pieces: Pieces) -> Pieces:
    source, target = step.source, step.target
    group_of = {p: group for group in source.mesh.groups(step.axes) for p in group}
    found = [np.zeros(target.region(p).shape) for p in range(len(pieces))]
    for copy in transfers(source, target):
        assert copy.source in group_of[copy.target], "a copy leaves the group of its step"
        sent = pieces[copy.source][copy.region.slices_in(source.region(copy.source))]
        found[copy.target][copy.region.slices_in(target.region(copy.target))] += sent
    return found
