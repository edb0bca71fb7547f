"""Training steps of torch's own ways to use several processes, to race plans against.

Every one trains the model of a plan, on its samples, with its optimizer, and computes the gradient of the mean loss
over the global batch.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, Final

from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from planner.ir.layout import balanced_pieces
from planner.ir.schedule import ScheduleKind
from planner.plan.schema import Plan
from runtime.launch import Process
from runtime.pipeline.module import pipelined
from runtime.training import (
    Step,
    build_model,
    compute_only,
    ddp_step,
    default_loss,
    make_optimizer,
    planned_step,
    set_precision,
    silent_step,
    synthetic_batch,
    timed_steps,
    training_step,
    whole_batch,
)

DDP: Final = "DDP"
FSDP: Final = "FSDP2"
TP: Final = "TP + DDP"
ALONE: Final = "one device"
UNDISTURBED: Final = "one device, other idle"
ENOUGH: Final = 2
"""Rounds in which all are timed."""
FAR: Final = 3.0
"""Times the first plan's step."""


def race(argument: dict[str, Any], process: Process) -> dict[str, list[float]]:
    """Time plans and contenders side by side: one step of each after the other, so that noise hits all of them.

    Args:
        argument: ``plans`` (name to JSON text), ``contenders`` (names of this module's constants, on the first plan's
            model and batch), ``compute_only`` (names of plans), ``warmup``, ``rounds``, and ``seconds``, after which no
            further round begins, the first ``ENOUGH`` not counted: behind these, what is ``FAR`` slower than the first
            plan takes no further step; if wanted ``steps``, that are timed together: pipelines that are never emptied
            go on from one to the next.
        process: of this rank.

    Returns:
        The seconds of every step on the slowest rank, by the names; of ``steps``, the mean.
    """
    plans = {name: Plan.from_json(text) for name, text in argument["plans"].items()}
    first = next(iter(plans.values()))
    set_precision(first)
    steps: dict[str, Step] = {
        name: (pipelined_step if plan.is_pipelined else planned_step)(plan, process) for name, plan in plans.items()
    }
    for name in argument["compute_only"]:
        steps[compute_only(name)] = silent_step(plans[name], process)
    for name in argument["contenders"]:
        steps[name] = CONTENDERS[name](first, process)
    for step in steps.values():
        timed_steps(step, argument["warmup"], process.device)
    found: dict[str, list[float]] = {name: [] for name in steps}
    spent_s, at_once = 0.0, argument.get("steps", 1)
    for turn in range(argument["rounds"]):
        if turn == ENOUGH:  # times are the same on every rank, so all of them drop the same
            least_s = min(found[next(iter(plans))])
            steps = {name: step for name, step in steps.items() if min(found[name]) < FAR * least_s}
            spent_s = 0.0
        for name, step in steps.items():
            (seconds,) = timed_steps(repeated(step, at_once), 1, process.device)
            found[name].append(seconds / at_once)
            spent_s += seconds
        if turn >= ENOUGH and spent_s >= argument["seconds"]:
            break
    return found


def repeated(step: Step, count: int) -> Step:
    """Return a step that is several ones."""

    def steps() -> None:
        for _ in range(count):
            step()

    return steps


def pipelined_step(plan: Plan, process: Process) -> Step:
    """Return a step of a pipelined plan on synthetic data; of a schedule in cycles, a cycle."""
    model, batch = build_model(plan, process.device), whole_batch(plan, process.device)
    if not ScheduleKind(plan.schedule.kind).is_synchronous:
        cycles = pipelined(model, plan, default_loss, optimizer=functools.partial(make_optimizer, plan.optimizer))
        return lambda: cycles.step(*batch.inputs, **batch.keywords)
    net = pipelined(model, plan, default_loss)
    optimizer = make_optimizer(plan.optimizer, net.parameters())

    def step() -> None:
        optimizer.zero_grad()
        net.step(*batch.inputs, **batch.keywords)
        optimizer.step()

    return step


def fsdp_step(plan: Plan, process: Process) -> Step:
    """Return a step of FSDP2: ``fully_shard`` on every block and the rest; parameters stay whole until backward.

    That moves fewer bytes than freeing them behind forward, which is the default and saves memory instead.
    """
    mesh = init_device_mesh(process.device.type, (process.world_size,))
    net = build_model(plan, process.device)
    for block in blocks(net):
        fully_shard(block, mesh=mesh, reshard_after_forward=False)
    fully_shard(net, mesh=mesh, reshard_after_forward=False)
    for module in net.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # gloo cannot average
    return training_step(net, plan, synthetic_batch(plan, process, own_part(plan, process)))[0]


def blocks(net: nn.Module) -> Iterator[nn.Module]:
    """Yield the children with parameters; of a list or sequence, its members."""
    for child in net.children():
        if type(child) in {nn.Sequential, nn.ModuleList}:
            yield from blocks(child)
        elif any(True for _ in child.parameters()):
            yield child


def tensor_parallel_step(plan: Plan, process: Process) -> Step:
    """Return a step of one weird trick in torch's own terms: linear layers tensor-parallel, all else under DDP.

    Linear layers take turns in being split by their columns and by their rows. The first of a pair gathers the samples
    of all ranks, the second one scatters the sums of its partial products back to them. DDP leaves their parameters
    alone. Their gradients are sums over the ranks' mean losses, so their learning rate is smaller by the number of
    ranks, instead of one more pass over the gradients.
    """
    mesh = init_device_mesh(process.device.type, (process.world_size,))
    net = build_model(plan, process.device)
    names = split_linears(net, mesh)
    split = [n for n, _ in net.named_parameters() if n.rpartition(".")[0] in names]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(net, split)
    wrapped = DistributedDataParallel(net)
    kept = [p for n, p in net.named_parameters() if n not in split]
    cut = [p for n, p in net.named_parameters() if n in split]
    rate, count = 1e-2, process.world_size
    optimizers = [make_optimizer(plan.optimizer, kept, rate), make_optimizer(plan.optimizer, cut, rate / count)]
    batch = synthetic_batch(plan, process, own_part(plan, process))

    def step() -> None:
        for optimizer in optimizers:
            optimizer.zero_grad()
        default_loss(wrapped(*batch.inputs, **batch.keywords)).backward()
        for optimizer in optimizers:
            optimizer.step()

    return step


def split_linears(net: nn.Module, mesh: DeviceMesh) -> list[str]:
    """Split linear layers over a mesh, with nothing but element-wise layers between them; return their names."""
    names = [name for name, module in net.named_modules() if isinstance(module, nn.Linear)]
    for pair in (names[k : k + 2] for k in range(0, len(names), 2)):
        if len(pair) == 2:
            first = ColwiseParallel(input_layouts=Shard(0), output_layouts=Shard(-1))
            second = RowwiseParallel(input_layouts=Shard(-1), output_layouts=Shard(0))
            parallelize_module(net, mesh, {pair[0]: first, pair[1]: second})
        else:
            parallelize_module(net, mesh, {pair[0]: ColwiseParallel(input_layouts=Shard(0), output_layouts=Shard(0))})
    return names


def alone_step(plan: Plan, process: Process) -> Step:
    """Return a step of one device on the whole batch: every rank takes it by itself, at the same time.

    So a host is as fast as in all other rows: on one machine, hosts share caches, memory and, as two threads of one
    core, arithmetic units, which hosts of their own do not.
    """
    net = build_model(plan, process.device)
    return training_step(net, plan, synthetic_batch(plan, process, slice(0, plan.batch)))[0]


def undisturbed_step(plan: Plan, process: Process) -> Step:
    """Return a step of one device on the whole batch while the other ranks look on."""
    return alone_step(plan, process) if process.rank == 0 else lambda: None


def own_part(plan: Plan, process: Process) -> slice:
    """Return the samples of a rank."""
    return slice(*balanced_pieces(plan.batch, process.world_size)[process.rank])


CONTENDERS: Final[dict[str, Callable[[Plan, Process], Step]]] = {
    DDP: ddp_step,
    FSDP: fsdp_step,
    TP: tensor_parallel_step,
    ALONE: alone_step,
    UNDISTURBED: undisturbed_step,
}
