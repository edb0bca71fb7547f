"""A training step on synthetic or given data, and its time: what `run`, `demo` and the benchmarks share."""

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from planner.frontend.source import load_model
from planner.ir.layout import balanced_pieces
from planner.ir.mesh import Mesh
from planner.plan.schema import Plan
from runtime.agreement import start_together
from runtime.comm.communicator import Axes, Pending
from runtime.data import own_part
from runtime.launch import Process
from runtime.parallel import joined, lower, parallelize, trace_for
from runtime.timing import Span, Tape, TimedCommunicator, seconds_of, watched

Step = Callable[[], object]

DDP: Final = "torch DDP"
"""What ``race`` calls torch's DistributedDataParallel."""
MAX_INSTRUMENTED_STEPS: Final = 30
"""Of a run; more plain steps may be asked for."""


def make_optimizer(name: str, parameters: Any, learning_rate: float = 1e-2) -> torch.optim.Optimizer:
    """Return the optimizer that a plan names."""
    if name == "adam":
        return torch.optim.Adam(parameters, lr=learning_rate)
    return torch.optim.SGD(parameters, lr=learning_rate, momentum=0.9 if name == "momentum" else 0.0)


def build_model(plan: Plan, device: torch.device, seed: int = 0) -> nn.Module:
    """Return the planned model with weights drawn from a seed, from the source that the plan names."""
    torch.manual_seed(seed)
    return load_model(plan.model.source, dict(plan.model.arguments), device=str(device)).module.to(device)


@dataclass(frozen=True)
class Batch:
    """What one rank passes to the model: positional inputs, and those by keyword."""

    inputs: list[torch.Tensor]
    keywords: dict[str, torch.Tensor] = field(default_factory=dict)


def synthetic_batch(plan: Plan, process: Process, part: slice | None = None) -> Batch:
    """Return random inputs of the planned shapes: these samples, or what the plan has this rank pass."""

    def part_of(name: str) -> tuple[slice, ...]:
        return (part,) if part is not None else own_part(plan, process.rank, name)

    return _drawn(plan, process.device, part_of)


def whole_batch(plan: Plan, device: torch.device) -> Batch:
    """Return random inputs of the planned shapes, whole."""
    return _drawn(plan, device, lambda _: ())


def _drawn(plan: Plan, device: torch.device, part_of: Callable[[str], tuple[slice, ...]]) -> Batch:
    generator = torch.Generator().manual_seed(1)
    found = Batch([])
    for spec in plan.model.inputs:
        whole = torch.randn(spec.shape, generator=generator)
        dtype = getattr(torch, spec.dtype)
        piece = (whole if dtype.is_floating_point else whole.abs())[part_of(spec.name)].to(device, dtype)
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


def training_step(net: nn.Module, plan: Plan, batch: Batch) -> tuple[Step, torch.optim.Optimizer]:
    """Return a function that runs forward, backward and the optimizer once as a plan asks for, and the optimizer."""
    optimizer = make_optimizer(plan.optimizer, net.parameters())
    device = next(net.parameters()).device.type

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=plan.precision == "bf16"):
            loss = default_loss(net(*batch.inputs, **batch.keywords))
        loss.backward()
        optimizer.step()

    return step, optimizer


def set_precision(plan: Plan) -> None:
    """Let products of fp32 numbers on this process's GPU be computed as a plan asks for."""
    torch.backends.cuda.matmul.allow_tf32 = plan.precision == "tf32"
    torch.backends.cudnn.allow_tf32 = plan.precision == "tf32"


def planned_step(plan: Plan, process: Process) -> Step:
    """Return a step of a plan on synthetic data."""
    net = parallelize(build_model(plan, process.device), plan)
    return training_step(net, plan, synthetic_batch(plan, process))[0]


def ddp_step(plan: Plan, process: Process) -> Step:
    """Return a step of torch's DistributedDataParallel on the model and batch of a plan."""
    ids = [process.device] if process.device.type == "cuda" else None
    net: nn.Module = DistributedDataParallel(build_model(plan, process.device), device_ids=ids)
    part = slice(*balanced_pieces(plan.batch, process.world_size)[process.rank])
    return training_step(net, plan, synthetic_batch(plan, process, part))[0]


def timed_steps(step: Step, count: int, device: torch.device) -> list[float]:
    """Return the seconds of each of several steps on the slowest rank; every rank must call it."""
    found = []
    for _ in range(count):
        meet()
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


def meet() -> None:
    """Wait until all ranks are here."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def race(argument: dict[str, Any], process: Process) -> dict[str, list[float]]:
    """Time strategies side by side: one step of each after the other, so that noise hits all of them.

    Args:
        argument: ``plans`` (name to JSON text, of one precision), ``rounds``, ``warmup``; if wanted, ``ddp``: the name
            of the plan whose model and batch torch's DistributedDataParallel trains, and ``compute_only``: names of
            plans that also run without sending anything.
        process: of this rank.

    Returns:
        The seconds of every step on the slowest rank, by the names of the plans, ``DDP`` and ``compute_only(name)``.
    """
    plans = {name: Plan.from_json(text) for name, text in argument["plans"].items()}
    set_precision(next(iter(plans.values())))
    steps = {name: planned_step(plan, process) for name, plan in plans.items()}
    if argument.get("ddp"):
        steps[DDP] = ddp_step(plans[argument["ddp"]], process)
    for name in argument.get("compute_only", ()):
        steps[compute_only(name)] = silent_step(plans[name], process)
    for step in steps.values():
        timed_steps(step, argument["warmup"], process.device)
    found: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(argument["rounds"]):
        for name, step in steps.items():
            found[name] += timed_steps(step, 1, process.device)
    return found


def compute_only(name: str) -> str:
    """Return what ``race`` calls a plan that sends nothing."""
    return f"{name}, compute only"


def measure_plan(argument: dict[str, Any], process: Process) -> dict[str, Any]:
    """Run a plan on synthetic data on this rank; the function that local ranks are started with.

    Plain steps and steps with marks (at most ``MAX_INSTRUMENTED_STEPS``) take turns, in one module. Of pipelined plans
    whose schedule is in cycles, a step is a cycle of the full pipeline.

    Args:
        argument: ``plan`` (JSON text), ``steps``, ``warmup``.
        process: of this rank.

    Returns:
        ``measured``: a ``planner.plan.measured.Measured`` as JSON, or of a pipelined plan ``pipeline``: a
        ``MeasuredPipeline``; ``spans``: for every rank those of its last step with marks, and the reductions beside
        them, each as phase, layer (or stage), start and stop in seconds. The same on every rank.
    """
    plan = Plan.from_json(argument["plan"])
    set_precision(plan)
    if plan.is_pipelined:
        from runtime.pipeline.measuring import measured_pipeline  # loads torch's pipelining

        return measured_pipeline(plan, process, argument["steps"], argument["warmup"])
    plain_s, watched_steps, reductions = _measured_steps(plan, process, argument["steps"], argument["warmup"])
    alone = silent_step(plan, process)
    timed_steps(alone, 1, process.device)
    alone_s = statistics.median(timed_steps(alone, 3, process.device))
    everyone: list[Any] = [(process.rank, seconds_of(watched_steps), _plain([*watched_steps[-1], *reductions]))]
    if process.world_size > 1:
        (mine,) = everyone
        everyone = [None] * process.world_size
        dist.all_gather_object(everyone, mine)
    everyone.sort(key=lambda each: each[0])
    rank, seconds, _ = max(everyone, key=lambda each: each[1].compute_s)
    facts = {**environment_of(process), "precision": plan.precision}
    measured = seconds.measured(plan, rank, plain_s, alone_s, facts)
    return {"measured": measured.model_dump(mode="json"), "spans": [spans for _, _, spans in everyone]}


def _measured_steps(
    plan: Plan, process: Process, count: int, warmup: int
) -> tuple[list[float], list[tuple[Span, ...]], tuple[Span, ...]]:
    """Return the seconds of plain steps on the slowest rank, this rank's spans of others, and the last's reductions."""
    model, tape = build_model(plan, process.device), Tape(process.device)
    traced = start_together("run", model, plan, lambda: trace_for(model, plan))
    net = lower(model, traced, plan, TimedCommunicator(joined(traced, plan), tape))
    step, optimizer = training_step(net, plan, synthetic_batch(plan, process))
    timed_steps(step, warmup, process.device)
    plain_s: list[float] = []
    spans: list[tuple[Span, ...]] = []
    for k in range(count):
        plain_s += timed_steps(step, 1, process.device)
        if k < MAX_INSTRUMENTED_STEPS:
            with watched(net, optimizer, tape):
                meet()
                tape.start()
                step()
                spans.append(tape.stop())
    return plain_s, spans, tape.reductions()


def _plain(spans: Sequence[Span]) -> list[list[str | float]]:
    return [[span.part.phase.value, span.part.layer, span.start_s, span.stop_s] for span in spans]


def environment_of(process: Process) -> dict[str, str]:
    """Return what a rank's seconds depend on."""
    device = process.device
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": str(torch.get_num_threads()),
        "ranks": str(process.world_size),
    }


def silent_step(plan: Plan, process: Process) -> Step:
    """Return a step of a plan on synthetic data in which nothing is sent: its compute alone (with wrong values)."""
    model, position = build_model(plan, process.device), plan.mesh.ranks.index(process.rank)
    net = lower(model, trace_for(model, plan), plan, SilentCommunicator(plan.mesh, position))
    return training_step(net, plan, synthetic_batch(plan, process))[0]


class SilentCommunicator:
    """Gives tensors of the right shape without talking to anyone; only for timing compute."""

    def __init__(self, mesh: Mesh, position: int) -> None:
        self.mesh, self.position = mesh, position

    def all_reduce(self, buffer: torch.Tensor, axes: Axes) -> None:
        del buffer, axes

    def start_all_reduce(self, buffer: torch.Tensor, axes: Axes) -> Pending:
        del buffer, axes
        return _Nothing()

    def start_reduce_scatter(self, buffer: torch.Tensor, own: torch.Tensor, axes: Axes) -> Pending:
        del axes
        own.copy_(buffer[: own.numel()])
        return _Nothing()

    def start_all_gather(self, result: torch.Tensor, own: torch.Tensor, axes: Axes) -> Pending:
        del axes
        result.view(-1, own.numel()).copy_(own)
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

    def start_exchange(
        self,
        buffer: torch.Tensor,
        send_counts: Sequence[int],
        receive_counts: Sequence[int],
        axes: Axes,
    ) -> Callable[[], torch.Tensor]:
        found = self.exchange(buffer, send_counts, receive_counts, axes)
        return lambda: found

    def start_gather_ints(self, value: int) -> Callable[[], list[int]]:
        return lambda: [value] * self.mesh.size

    def broadcast(self, tensor: torch.Tensor) -> None:
        del tensor


class _Nothing:
    def wait(self) -> None:
        return None
