"""What the ranks of ``tests/distributed/test_stale_pipelines.py`` run."""

import os
import socket
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torch.optim import SGD

import runtime
from planner.errors import RunError
from planner.ir.mesh import Mesh, MeshAxis
from planner.ir.region import Region
from planner.ir.split import LayerId
from planner.plan import Plan
from runtime import checkpoint
from runtime.comm.groups import ProcessGroups
from runtime.launch import Process
from runtime.pipeline.build import Copy, Port
from runtime.pipeline.cycles import CyclePipeline, PortLink
from runtime.pipeline.stale import CycleStage, StalePipeline
from runtime.pipeline.transfers import MANY_SENT, Post
from support.loops import piece
from support.pipeline_ranks import Skips, error_of
from support.pipelines import Stages, staged_plan
from support.stale_oracle import simulate
from support.stale_pipelines import Log, batches, furthest, live_bytes, loss_fn, net, running, sgd

CPU = torch.device("cpu")
BATCH = 8
"""Samples of the planned pipelines' batches."""
OPTIMIZER = partial(SGD, lr=0.05, momentum=0.9)
MEASURED = (15, 39)
"""Steps of a long run behind which memory is looked at."""


def check(argument: dict[str, Any], process: Process) -> dict[str, Any]:
    """Train in cycles, with a rank for each stage and then under plans; return how far this rank is off."""
    group = group_of(process.world_size, 60.0)
    return {
        "off": against_the_oracle(process.rank, process.world_size, group),
        "bytes": long_run(process.rank, process.world_size, group),
        "planned": [planned(**case) for case in argument["plans"]],
        "bare": saved_without_parameters(argument["folder"] + "bare") if process.world_size == 2 else None,
        "resumed": resumed(argument["folder"], **argument["resumed"]),
        "under way": most_under_way(process.rank, group) if process.world_size == 2 else None,
    }


def group_of(num_ranks: int, timeout_s: float) -> dist.ProcessGroup:
    mesh = Mesh((MeshAxis("rank", num_ranks),), tuple(range(num_ranks)))
    return ProcessGroups(mesh, [(0,)], timeout_s).blocking((0,))


# ---- a rank for each stage


def links(rank: int, stages: list[nn.Sequential], group: dist.ProcessGroup) -> tuple[PortLink | None, PortLink | None]:
    """Return the links of a rank, for whole tensors."""
    shapes, x = [], batches(1)[0][0]
    for stage in stages[:-1]:
        x = stage(x)
        shapes.append(x.shape)

    def link(boundary: int) -> PortLink:
        found = PortLink(group, CPU, to_next=boundary == rank)
        shape = tuple(shapes[boundary])
        whole = Region((0,) * len(shape), shape)
        copy = Copy(2 * boundary + 1 - rank, whole.slices_in(whole), whole)
        found.ports = (Port(LayerId(f"cut{boundary}"), shape, torch.float64, True, (copy,), (copy,)),)
        return found

    return (link(rank - 1) if rank else None, link(rank) if rank < len(stages) - 1 else None)


def own_stage(
    rank: int, num_ranks: int, group: dist.ProcessGroup, mode: Any, pipelined: int | None = None
) -> tuple[StalePipeline, Log]:
    """Return a pipeline with the stage of this rank."""
    stages = net(num_ranks)
    optimizer = sgd(stages[rank])
    stage = CycleStage(
        stages[rank], optimizer, stage=rank, num_stages=num_ranks, mode=mode, links=links(rank, net(num_ranks), group),
        loss_fn=loss_fn if rank == num_ranks - 1 else None,
    )  # fmt: skip
    return StalePipeline(stage, pipelined), Log(stages[rank], optimizer)


def against_the_oracle(rank: int, num_ranks: int, group: dist.ProcessGroup) -> dict[str, float]:
    """Return the largest difference of any weight after any cycle, by mode."""
    found = {}
    data = batches(9)
    for mode, pipelined in [("stale", None), ("pipedream", None), ("stale", 4), ("pipedream", 4)]:
        expected = simulate(net(num_ranks), data, mode, pipelined)
        trained, log = own_stage(rank, num_ranks, group, mode, pipelined)
        losses = trained.run(data)
        off = furthest(log.weights, expected.weights[rank])
        off = max(off, furthest([running(trained.stages[0].module)], [expected.running[rank]]))
        if rank == num_ranks - 1:
            off = max(off, furthest([losses], [[torch.tensor(v, dtype=torch.float64) for v in expected.losses]]))
        found[f"{mode} {pipelined}"] = off
        scores = trained.evaluate(data[0][0])
        assert (scores is not None) == (rank == num_ranks - 1)
    return found


def long_run(rank: int, num_ranks: int, group: dist.ProcessGroup) -> dict[str, list[int]]:
    """Return the bytes of all tensors in the middle and near the end of a run, by mode."""
    found: dict[str, list[int]] = {}
    data = batches(MEASURED[-1] + 1)
    for mode in ("stale", "pipedream"):
        stages = own_stage(rank, num_ranks, group, mode)[0].stages
        trained = StalePipeline(stages)
        optimizer = stages[0].optimizer
        assert optimizer is not None
        optimizer._optimizer_step_post_hooks.clear()  # the log
        sizes = found[mode] = []
        for k, (x, y) in enumerate(data):
            trained.step(x, y)
            if k in MEASURED:
                sizes.append(live_bytes())
        trained.drain()
    return found


def most_under_way(rank: int, group: dist.ProcessGroup) -> int:
    """Send far more messages than may be under way; return the most that were, or received ones that differ."""
    post, count = Post(group, CPU), 2 * MANY_SENT
    whole = Region((0,), (1,))
    copies = (Copy(1 - rank, whole.slices_in(whole), whole),)
    if rank == 0:
        most = 0
        for k in range(count):
            post.send(torch.tensor([float(k)]), copies, "a number")
            most = max(most, len(post._sent))
        post.flush()
        return most
    arrivals = [post.receive((1,), torch.float32, copies, "a number") for _ in range(count)]
    return sum(float(arrival.wait()) != k for k, arrival in enumerate(arrivals))


# ---- stages of several ranks


def planned(meshes: list[list[int]], kind: str, pipelined: int | None) -> dict[str, Any]:
    """Return how far a planned pipeline is from one with a rank for each stage, in one process."""
    data = staged_data(6)
    alone = in_process(len(meshes), kind, pipelined)
    expected = alone.run(data)
    net = over_ranks(meshes, kind, pipelined)
    losses = net.run(data)
    worst = furthest_of(net, alone)
    if losses:
        worst["loss"] = float((torch.stack(losses) - torch.stack(expected)).abs().max())
    return {"worst": max(worst.values()), "names": sorted(worst), "losses": len(losses)}


def resumed(
    folder: str, meshes: list[list[int]], onto: list[list[int]], kind: str, pipelined: int | None
) -> dict[str, Any]:
    """Save, load under other meshes and go on; return how far that is from draining at the same place."""
    data, saved = staged_data(6), 3
    alone = in_process(len(meshes), kind, pipelined)
    expected = [alone.run(part) for part in (data[:saved], data[saved:])]
    first, early = over_ranks(meshes, kind, pipelined), ""
    for x, y in data[:saved]:
        first.step(x, target=y)
    if first.in_flight:
        early = error_of(lambda: checkpoint.save(first, first.optimizer, folder, step=saved))
    first.drain()
    checkpoint.save(first, first.optimizer, folder, step=first.num_steps)
    second = over_ranks(onto, kind, pipelined, blank=True)
    checkpoint.load(second, second.optimizer, folder)
    assert second.num_steps == saved
    losses = second.run(data[saved:])
    worst = furthest_of(second, alone)
    if losses:
        worst["loss"] = float((torch.stack(losses) - torch.stack(expected[1])).abs().max())
    return {"worst": max(worst.values()), "names": sorted(worst), "early": early}


def saved_without_parameters(folder: str) -> dict[str, bool]:
    """Save and load a pipeline whose last stage has no parameters, and so no optimizer; return what came back here."""

    def trained() -> CyclePipeline:
        torch.manual_seed(4)
        net = nn.Sequential(nn.Conv2d(3, 10, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()
        plan = staged_plan(net, (3, 6, 6), BATCH, 1, ["2"], [(1,), (1,)], "stale")
        return runtime.pipelined(net, plan, functional.cross_entropy, optimizer=OPTIMIZER)

    first, second = trained(), trained()
    first.run(staged_data(3))
    checkpoint.save(first, first.optimizer, folder, step=3)
    checkpoint.load(second, second.optimizer, folder)
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    found = {"weights": all(torch.equal(a, b) for a, b in pairs), "has none": first.optimizer is None}
    if first.optimizer is not None and second.optimizer is not None:
        states = zip(first.optimizer.state.values(), second.optimizer.state.values(), strict=True)
        found["momentum"] = all(torch.equal(a["momentum_buffer"], b["momentum_buffer"]) for a, b in states)
    return found


def staged_data(steps: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        (
            torch.randn(BATCH, 3, 6, 6, generator=generator, dtype=torch.float64),
            torch.randint(10, (BATCH,), generator=generator),
        )
        for _ in range(steps)
    ]  # fmt: skip


def plan_on(meshes: list[list[int]], kind: str, seed: int | None) -> Plan:
    return staged_plan(build(), (3, 6, 6), BATCH, 1, len(meshes), [tuple(s) for s in meshes], kind, seed)


def in_process(num_stages: int, kind: str, pipelined: int | None) -> StalePipeline:
    stages = Stages(build, plan_on([[1]] * num_stages, kind, None))
    modules = [each[0] for each in stages.modules]
    optimizers = [OPTIMIZER(m.parameters()) for m in modules]
    return StalePipeline.in_process(modules, optimizers, functional.cross_entropy, kind, pipelined)  # type: ignore[arg-type]  # a mode


def over_ranks(meshes: list[list[int]], kind: str, pipelined: int | None, *, blank: bool = False) -> CyclePipeline:
    net = build()
    if blank:
        for tensor in (*net.parameters(), *net.buffers()):
            tensor.detach().fill_(3)
    loss = functional.cross_entropy
    return runtime.pipelined(net, plan_on(meshes, kind, 3), loss, optimizer=OPTIMIZER, pipelined_steps=pipelined)


def furthest_of(net: CyclePipeline, alone: StalePipeline) -> dict[str, float]:
    """Return by name how far this rank's weights and buffers are off."""
    whole = {n: t for stage in alone.stages for n, t in stage.module.state_dict().items()}
    (module,) = net.held_stages
    worst = {}
    for name, tensor in net.state_dict().items():
        want = piece(module, name, whole[name])
        worst[name] = float((tensor - want).abs().max() / max(float(want.abs().max()), 1e-3)) if want.numel() else 0.0
    return worst


def build() -> nn.Module:
    torch.manual_seed(2)
    return Skips().double()


# ---- failures


def fail(argument: dict[str, Any], process: Process) -> dict[str, list[Any]]:
    """The last rank hangs, and in another run dies; return what the others are told, and after how many seconds."""
    rank, last = process.rank, process.world_size - 1
    found = {}
    for kind in ("hang", "death"):
        group = group_of(process.world_size, argument["timeout_s"][kind])
        trained, _ = own_stage(rank, process.world_size, group, "stale")
        start, message = time.monotonic(), ""
        try:
            for k, (x, y) in enumerate(batches(12)):
                if rank == last and k == 7:
                    break
                trained.step(x, y)
        except RunError as error:
            message = str(error)
        found[kind] = [message, time.monotonic() - start]
        if kind == "hang":
            wait_for_all(Path(argument["folder"]), rank, process.world_size)
        else:
            close_sockets()
    return found


def wait_for_all(folder: Path, rank: int, count: int) -> None:
    """Wait until every rank has come here."""
    (folder / str(rank)).touch()
    while len(list(folder.iterdir())) < count:
        time.sleep(0.02)


def close_sockets() -> None:
    """Do to this process's connections what the system does when a process dies."""
    for place in list(Path("/proc/self/fd").iterdir()):
        with suppress(OSError), socket.socket(fileno=os.dup(int(place.name))) as connection:
            connection.getpeername()  # fails where nobody is at the other end, as of listening sockets
            connection.shutdown(socket.SHUT_RDWR)
