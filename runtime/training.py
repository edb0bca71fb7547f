"""A training step on synthetic or given data, and its time: what `run`, `demo` and the benchmarks share."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from planner.frontend.source import load_model
from planner.ir.layout import balanced_pieces
from planner.ir.mesh import Mesh
from planner.ir.rules import InputOutput
from planner.plan.schema import Plan
from runtime.communicator import Axes, Pending
from runtime.launch import Process
from runtime.parallel import lower, parallelize, trace_for

Step = Callable[[], object]


def make_optimizer(name: str, parameters: Any, learning_rate: float = 1e-2) -> torch.optim.Optimizer:
    """Return the optimizer that a plan names."""
    if name == "adam":
        return torch.optim.Adam(parameters, lr=learning_rate)
    return torch.optim.SGD(parameters, lr=learning_rate, momentum=0.9 if name == "momentum" else 0.0)


def build_model(plan: Plan, device: torch.device, seed: int = 0) -> nn.Module:
    """Return the planned model with weights drawn from a seed, from the source that the plan names."""
    torch.manual_seed(seed)
    return load_model(plan.model.source, dict(plan.model.arguments), device=str(device)).module.to(device)


def own_samples(plan: Plan, rank: int, size: int | None = None) -> slice:
    """Return which samples of a global batch a rank passes."""
    total = plan.batch if size is None else size
    if plan.input_output is InputOutput.GLOBAL:
        return slice(0, total)
    return slice(*balanced_pieces(total, plan.mesh.size)[plan.mesh.ranks.index(rank)])


@dataclass(frozen=True)
class Batch:
    """What one rank passes to the model: positional inputs, and those by keyword."""

    inputs: list[torch.Tensor]
    keywords: dict[str, torch.Tensor] = field(default_factory=dict)


def synthetic_batch(plan: Plan, process: Process) -> Batch:
    """Return random inputs of the planned shapes, this rank's samples only."""
    generator = torch.Generator().manual_seed(1)
    part = own_samples(plan, process.rank)
    found = Batch([])
    for spec in plan.model.inputs:
        whole = torch.randn(spec.shape, generator=generator)
        dtype = getattr(torch, spec.dtype)
        piece = (whole if dtype.is_floating_point else whole.abs())[part].to(process.device, dtype)
        if spec.keyword:
            found.keywords[spec.name] = piece
        else:
            found.inputs.append(piece)
    return found


def default_loss(output: Any) -> Any:
    """Return a scalar for any output: cross-entropy on class scores, else the mean of squares."""
    if isinstance(output, dict):
        output = list(output.values())
    if isinstance(output, tuple | list):
        return sum((default_loss(o) for o in output), torch.zeros(()))
    if output.dim() == 2:
        target = torch.arange(output.shape[0], device=output.device) % output.shape[1]
        return functional.cross_entropy(output, target)
    return output if output.dim() == 0 else output.square().mean()


def training_step(net: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> Step:
    """Return a function that runs forward, backward and the optimizer once."""

    def step() -> None:
        optimizer.zero_grad()
        default_loss(net(*batch.inputs, **batch.keywords)).backward()
        optimizer.step()

    return step


def timed_steps(step: Step, count: int, device: torch.device) -> list[float]:
    """Return the seconds of each of several steps on the slowest rank; every rank must call it."""
    found = []
    for _ in range(count):
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.barrier()
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - start)
    if dist.is_initialized() and dist.get_world_size() > 1:
        slowest = torch.tensor(found, device=device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        found = slowest.tolist()
    return found


def measure_plan(argument: dict[str, Any], process: Process) -> dict[str, Any]:
    """Run a plan on synthetic data on this rank; the function that local ranks are started with.

    Args:
        argument: ``plan`` (JSON text), ``steps``, ``warmup``.
        process: of this rank.

    Returns:
        ``steps_s`` of the slowest rank, and ``compute_s``, the median step without communication.
    """
    plan = Plan.from_json(argument["plan"])
    model = build_model(plan, process.device)
    batch = synthetic_batch(plan, process)
    net = parallelize(model, plan)
    step = training_step(net, make_optimizer(plan.optimizer, net.parameters()), batch)
    timed_steps(step, argument["warmup"], process.device)
    steps_s = timed_steps(step, argument["steps"], process.device)
    alone = silent_step(build_model(plan, process.device), plan, process, batch)
    timed_steps(alone, 1, process.device)
    return {
        "steps_s": steps_s,
        "compute_s": statistics.median(timed_steps(alone, 3, process.device)),
    }


def silent_step(model: nn.Module, plan: Plan, process: Process, batch: Batch) -> Step:
    """Return a step of the same plan in which nothing is sent: its compute alone (with wrong values).

    The model must be its own: a parameter that two parallel modules hold would be reduced by both.
    """
    position = plan.mesh.ranks.index(process.rank)
    net = lower(model, trace_for(model, plan), plan, SilentCommunicator(plan.mesh, position))
    return training_step(net, make_optimizer(plan.optimizer, net.parameters()), batch)


class SilentCommunicator:
    """Gives tensors of the right shape without talking to anyone; only for timing compute."""

    def __init__(self, mesh: Mesh, position: int) -> None:
        self.mesh, self.position = mesh, position

    def all_reduce(self, buffer: torch.Tensor, axes: Axes) -> None:
        del buffer, axes

    def start_all_reduce(self, buffer: torch.Tensor, axes: Axes) -> Pending:
        del buffer, axes
        return _Nothing()

    def all_gather(self, buffer: torch.Tensor, counts: Sequence[int], axes: Axes) -> torch.Tensor:
        del axes
        return buffer.new_full((sum(counts),), 0.5)

    def reduce_scatter(self, buffer: torch.Tensor, counts: Sequence[int], axes: Axes) -> torch.Tensor:
        index = self.mesh.groups(axes)[0].index(self._first(axes))
        part: torch.Tensor = buffer.split(list(counts))[index].clone()
        return part

    def _first(self, axes: Axes) -> int:
        own = self.mesh.coordinates(self.position)
        return self.mesh.position(tuple(c if a in axes else 0 for a, c in enumerate(own)))

    def exchange(
        self,
        buffer: torch.Tensor,
        send_counts: Sequence[int],
        receive_counts: Sequence[int],
        axes: Axes,
    ) -> torch.Tensor:
        del send_counts, axes
        return buffer.new_full((sum(receive_counts),), 0.5)

    def start_gather_ints(self, value: int) -> Callable[[], list[int]]:
        return lambda: [value] * self.mesh.size

    def broadcast(self, tensor: torch.Tensor) -> None:
        del tensor


class _Nothing:
    def wait(self) -> None:
        return None
