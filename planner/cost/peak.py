"""The bytes of a device while a step goes by, and the most of them.

Forward, every layer adds what autograd keeps of it. Backward, in reverse order, gradients appear and what was
kept is freed. So the most is held where backward begins, or at a layer with large tensors near it.
The walk never exceeds sum(resident) + max(transient), the bound of ``planner.cost.memory``.

Of the workspaces of kernels only the copies are counted that oneDNN makes (``LayerBytes.workspace``). Not counted:
what an optimizer makes for an update beside its state, and a result that autograd does not keep, or its gradient, while
it waits for a later reader (around a residual branch) longer than the layers in between run.

Of sharded parameters a layer's own and those of the next one to run are whole, and in backward the gradients of
its own and of the one that ran before (``planner.cost.sharding``).
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from planner.cost.memory import LayerBytes


class Phase(StrEnum):
    """Part of a step."""

    FORWARD = "forward"
    BACKWARD = "backward"
    UPDATE = "update"


@dataclass(frozen=True, slots=True)
class Moment:
    """What a device holds while one layer runs, in bytes.

    Attributes:
        name: of the layer; ``optimizer`` in the update.
        phase: part of the step.
        parameters: and buffers.
        state: of the optimizer.
        gradients: of parameters; those that are summed over ranks live in buckets and are never freed.
        activations: kept for backward.
        working: inputs, results and their gradients beside these; parameters and gradients that are whole for a while.
    """

    name: str
    phase: Phase
    parameters: int
    state: int
    gradients: int
    activations: int
    working: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.parameters + self.state + self.gradients + self.activations + self.working


@dataclass(frozen=True)
class StepMemory:
    """The memory of a device over a step: forward of every layer, backward of every layer, update."""

    moments: tuple[Moment, ...]

    @functools.cached_property
    def peak(self) -> Moment:
        """The first moment with the most bytes."""
        return max(self.moments, key=lambda moment: moment.total)

    @functools.cached_property
    def saved_bytes(self) -> int:
        """The most bytes of parameters, buffers and kept activations; what a count of saved tensors measures."""
        return max(moment.parameters + moment.activations for moment in self.moments)


def step_memory(names: Sequence[str], layers: Sequence[LayerBytes]) -> StepMemory:
    """Return the memory of a device over a step.

    Args:
        names: of the layers, in the order in which forward runs them.
        layers: their bytes.
    """
    return StepMemory(tuple(_moments(names, layers)))


def _moments(names: Sequence[str], layers: Sequence[LayerBytes]) -> Iterator[Moment]:
    """Yield the moments in order."""
    parameters, state = sum(m.parameters for m in layers), sum(m.state for m in layers)
    gradients = sum(m.reduced for m in layers)
    kept = 0
    sharded = [m.gathered for m in layers]
    before, after = _nearest(sharded), _nearest(sharded[::-1])[::-1]
    for j, (name, m) in enumerate(zip(names, layers, strict=True)):
        kept += m.activations
        made = max(m.computed + m.inputs - m.activations, 0)  # mostly, what it makes is what autograd keeps
        made += m.gathered + after[j]
        yield Moment(name, Phase.FORWARD, parameters, state, gradients, kept, made)
    for j in range(len(layers) - 1, -1, -1):
        name, m = names[j], layers[j]
        gradients += m.gradients - m.reduced
        # the gradient that came, and the next one: of an absorbed operator's input, or of the layer's
        working = m.computed + max(m.computed, m.inputs + m.framed) + m.workspace + m.reduced
        working += before[j] + 2 * m.gathered + after[j]
        yield Moment(name, Phase.BACKWARD, parameters, state, gradients, kept, working)
        kept -= m.activations
    yield Moment("optimizer", Phase.UPDATE, parameters, state, gradients, kept, 0)


def _nearest(sharded: Sequence[int]) -> list[int]:
    """Return for every position the last one before it that is not 0; 0 where there is none."""
    found, last = [], 0
    for num_bytes in sharded:
        found.append(last)
        last = num_bytes or last
    return found
