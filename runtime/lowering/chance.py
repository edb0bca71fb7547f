"""Operators that draw random numbers: replicas draw the same ones, other pieces others."""

import hashlib
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from planner.ir import ops as ir
from planner.ir.mesh import Mesh
from runtime.comm.communicator import Axes
from runtime.graphs import uncompiled
from runtime.state import StepState

_GENERATOR = threading.Lock()
"""torch's own generator is one for all threads of a process; ranks may be threads."""


class Dropout(nn.Module):
    """Dropout whose mask depends on the step, the layer and the shard: replicas agree, shards differ.

    Args:
        op: probability, and what is dropped at once: elements, channels (``nn.Dropout2d``), samples
            (stochastic depth) or everything.
        key: of layer and shard; equal on ranks that draw the same mask.
        state: of this rank.
    """

    def __init__(self, op: ir.Dropout, key: int, state: StepState) -> None:
        super().__init__()
        self._op, self._key, self._state = op, key, state

    @uncompiled
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        p = self._op.probability
        if not self.training or p == 0:
            return x
        if p == 1:
            return x * 0
        generator = torch.Generator(device=x.device)
        generator.manual_seed(self._state.seed_of(self._key))
        together = {"element": x.dim(), "channel": 2, "sample": 1, "batch": 0}[self._op.unit]
        shape = (*x.shape[:together], *[1] * (x.dim() - together))
        mask = x.new_empty(shape).bernoulli_(1 - p, generator=generator)
        return x * (mask.div_(1 - p) if self._op.rescale else mask)

    def extra_repr(self) -> str:
        return f"p={self._op.probability}, {self._op.unit}"


class Seeded(nn.Module):
    """Any call that draws random numbers, with a seed of step, layer and shard; torch's own generator is kept.

    Args:
        call: the function or module.
        key: of layer and shard; equal on ranks that need the same numbers.
        state: of this rank.
    """

    def __init__(self, call: Callable[..., Any], key: int, state: StepState) -> None:
        super().__init__()
        self.call, self._key, self._state = call, key, state

    @uncompiled
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        devices = {a.device for a in args if isinstance(a, torch.Tensor) and a.is_cuda}
        with _GENERATOR, torch.random.fork_rng(devices=sorted(d.index for d in devices)):
            torch.manual_seed(self._state.seed_of(self._key))
            return self.call(*args, **(kwargs if self.training else _without_chance(kwargs)))


def _without_chance(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a function as they are in evaluation; the graph was traced in training."""
    quiet: dict[str, Any] = {"dropout_p": 0.0} if "dropout_p" in kwargs else {}
    if "training" in kwargs:
        quiet["training"] = False
    return kwargs | quiet


def shard_key(name: str, mesh: Mesh, position: int, axes: Axes) -> int:
    """Return a number for a layer and the piece that a rank holds of it, equal on replicas."""
    coordinates = mesh.coordinates(position)
    text = f"{name}:{[coordinates[a] for a in axes]}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
