"""What the cost model says that ranks copy for a step, against the operators that the runtime runs for it."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from planner.cost.moves import copied_elements
from planner.ir.halo import Window
from planner.ir.layout import BALANCED, CHUNK, Cut, Layout, Placement, Whole
from planner.ir.mesh import Mesh
from planner.ir.transfer import Step, StepKind, steps
from runtime.comm.communicator import Axes
from runtime.comm.exchange import compile_steps
from runtime.training import SilentCommunicator

SHAPE = (16, 24, 16)
PLACEMENTS: list[Placement] = [0, 1, 2, Whole.EQUAL, Whole.PARTIAL]
PASSES = {"clone": 2, "_to_copy": 2, "copy_": 2, "cat": 2, "zero_": 1, "zeros_like": 1, "add_": 3}
"""How often an operator reads or writes an element of its result."""
FREE = {"view", "_unsafe_view", "slice", "narrow", "split", "split_with_sizes", "empty", "new_empty", "alias", "detach"}


class Counter(TorchDispatchMode):
    """Counts the elements that operators of this thread read or write, while it is on.

    ``piece`` is where the tensor is that a step begins with.
    """

    def __init__(self) -> None:
        super().__init__()
        self.elements, self.is_on, self.piece = 0, True, 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if self.is_on and name not in FREE:
            self.elements += PASSES[name] * found.numel()  # what is not listed is an error
        return found


class OtherRanks(SilentCommunicator):
    """Stands in for the other ranks; what it does itself is not counted."""

    def __init__(self, mesh: Mesh, position: int, counter: Counter) -> None:
        super().__init__(mesh, position)
        self._counter = counter

    def _aside(self, call: Callable[..., Any], *args: Any) -> Any:
        self._counter.is_on = False
        try:
            return call(*args)
        finally:
            self._counter.is_on = True

    def all_gather(self, buffer: torch.Tensor, counts: Sequence[int], axes: Axes) -> torch.Tensor:
        found: torch.Tensor = self._aside(super().all_gather, buffer, counts, axes)
        return found

    def reduce_scatter(self, buffer: torch.Tensor, counts: Sequence[int], axes: Axes) -> torch.Tensor:
        found: torch.Tensor = self._aside(super().reduce_scatter, buffer, counts, axes)
        return found

    def exchange(
        self, buffer: torch.Tensor, send_counts: Sequence[int], receive_counts: Sequence[int], axes: Axes
    ) -> torch.Tensor:
        if buffer.numel() and buffer.untyped_storage().data_ptr() == self._counter.piece:
            self._counter.elements += 2 * buffer.numel()  # priced as packed; a part that lies together is sent as is
        found: torch.Tensor = self._aside(super().exchange, buffer, send_counts, receive_counts, axes)
        return found


def counted(step: Step) -> int:
    """Return the most elements that the operators of a rank read or write in a step."""
    found = []
    for position in range(step.source.mesh.size):
        counter = Counter()
        runs = compile_steps(step.source, step.target, OtherRanks(step.source.mesh, position, counter), "x")
        assert len(runs) == 1
        x = torch.zeros(step.source.region(position).shape)
        counter.piece = x.untyped_storage().data_ptr()
        with counter:
            runs[0](x)
        found.append(counter.elements)
    return max(found)


def all_steps(mesh: Mesh, before: tuple[Cut, ...], after: tuple[Cut, ...]) -> set[Step]:
    """Return the steps between any two layouts of which no piece is empty, that are a conversion by themselves."""
    ways = list(itertools.product(PLACEMENTS, repeat=len(mesh.axes)))
    layouts = [[Layout(SHAPE, mesh, way, cuts) for way in ways] for cuts in (before, after)]
    sound = [[x for x in each if not x.has_empty_piece()] for each in layouts]
    found = {step for source, target in itertools.product(*sound) for step in steps(source, target)}
    return {step for step in found if len(steps(step.source, step.target)) == 1}


def test_what_a_step_copies_is_what_its_operators_read_and_write() -> None:
    """On pieces of several elements in every dimension, so that no copy can be left out."""
    window = Cut(window=Window(SHAPE[2], 3, 1, 1, 1))
    plain, wide = (BALANCED, CHUNK, BALANCED), (BALANCED, CHUNK, window)
    found = all_steps(Mesh.of(node=2, gpu=2), plain, plain)
    found |= all_steps(Mesh.of(gpu=4), plain, wide) | all_steps(Mesh.of(gpu=4), wide, plain)
    assert {step.kind for step in found} == set(StepKind)
    for step in found:
        assert counted(step) == copied_elements(step), (step.kind, step.source.placements, step.target.placements)
    assert sum(step.kind is StepKind.EXCHANGE for step in found) > 50
