"""A small network that is trained with checkpoints, and what is done to one of its ranks: for ``fault_cases``.

    torchrun --nproc-per-node 2 --max-restarts 3 -m examples.benchmarks.fault_training JOB.json

Every step has a batch of its own, drawn from its number, so that a run that goes on from a checkpoint sees what an
uninterrupted one sees. A fault strikes once: it leaves a file that says so, before it strikes.
"""

import dataclasses
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from torch.nn import functional

import runtime
from planner.api import Options, Origin, machine_of, prepare
from planner.plan import Plan
from runtime import checkpoint
from runtime.checkpoint import storage
from runtime.checkpoint.whole import write_file
from runtime.comm.communicator import TorchCommunicator
from runtime.data import own_part, own_samples
from runtime.launch import Process, initialize
from runtime.pipeline.module import pipelined
from runtime.pipeline.transfers import Post

BATCH: Final = 8
CLASSES: Final = 10
FINAL: Final = "final.pt"
CHECKPOINT: Final = "checkpoint"

PLACES: Final = ("forward", "backward", "sync", "optimizer", "halo", "transfer", "save", "rename")
"""Where a fault strikes: in a layer's forward pass, at a gradient, when a reduction of gradients, an exchange of halos
or a message between stages starts, in front of the update, when a rank has written its file of a checkpoint, and
between the two renames that put a new checkpoint in the place of the old one (rank 0 only)."""


@dataclasses.dataclass(frozen=True)
class Fault:
    """What happens once to a rank.

    Attributes:
        kind: ``kill`` (SIGKILL), ``stop`` (SIGSTOP), ``memory`` (an allocation that fails), ``error`` (an exception),
            ``nan`` (in the rank's samples), or ``mark``: nothing, but the file is there.
        place: of ``PLACES``; ignored for ``nan``.
        rank, step: where and when it strikes: in this step or the first later one that comes to the place.
    """

    kind: str
    place: str
    rank: int
    step: int


@dataclasses.dataclass(frozen=True)
class Job:
    """A training run.

    Attributes:
        plan: JSON text.
        folder: of checkpoints and marks.
        steps: in all.
        every: so many steps, a checkpoint is saved; 0 for none.
        timeout_s: of collectives.
        faults: each strikes once.
        in_background: checkpoints are written while training goes on.
        kept: every checkpoint stays, under a name of its own, and the newest that is whole is loaded.
        checked: gradients are checked on all ranks before each update.
        other: what ranks have otherwise than the others, by their numbers: ``plan``, ``width`` of the network,
            ``compared_step``, ``shift`` of a weight. All ranks compare what they have behind the first step then.
    """

    plan: str
    folder: str
    steps: int = 6
    every: int = 2
    timeout_s: float = 20.0
    faults: tuple[Fault, ...] = ()
    in_background: bool = True
    kept: bool = False
    checked: bool = False
    other: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_json(cls, text: str) -> "Job":
        """Return what ``to_json`` wrote."""
        return cls.of(json.loads(text))

    @classmethod
    def of(cls, found: dict[str, Any]) -> "Job":
        """Return what ``dataclasses.asdict`` made plain values of."""
        return cls(**{**found, "faults": tuple(Fault(**each) for each in found["faults"])})

    def to_json(self) -> str:
        """Return it as JSON text."""
        return json.dumps(dataclasses.asdict(self))


class Net(nn.Module):
    """Layers of every kind that ranks talk in: convolutions, batch norm, a linear layer."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.head = nn.Linear(width * 64, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.norm(self.first(x)))
        x = functional.max_pool2d(functional.relu(self.second(x)), 2)
        return self.head(x.flatten(1))


def build(width: int = 8) -> nn.Module:
    """Return the network with the same weights in every process; float64, so that plans can be held to 1e-6."""
    torch.manual_seed(0)
    return Net(width).double()


def batch_of(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the batch of a step, of all ranks."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(BATCH, 3, 16, 16, generator=generator, dtype=torch.float64)
    return images, torch.randint(0, CLASSES, (BATCH,), generator=generator)


def plan_of(strategy: str, num_ranks: int, width: int = 8) -> Plan:
    """Return a plan of a fixed strategy, or ``gpipe`` with two stages."""
    options = Options(solver=strategy, all_devices=True, halo_recompute="never")
    if strategy == "gpipe":
        options = Options(all_devices=True, stages=2, schedule="gpipe", microbatches=2)
    origin = Origin("net", "examples.benchmarks.fault_training:build")
    return prepare(build(width), (batch_of(0)[0],), machine_of(devices=num_ranks), options, origin).plan()


class Armed:
    """Waits for the moments at which this rank's faults strike."""

    def __init__(self, job: Job, rank: int) -> None:
        self._marks, self.step = Path(job.folder), 0
        self._faults = [(i, fault) for i, fault in enumerate(job.faults) if fault.rank == rank]

    def due(self, place: str) -> Iterator[Fault]:
        """Yield the faults whose moment this is; they are marked."""
        for index, fault in self._faults:
            mark = self._marks / f"fault-{index}"
            if fault.place == place and self.step >= fault.step and not mark.exists():
                mark.with_suffix(".part").write_text(str(time.monotonic()))
                mark.with_suffix(".part").rename(mark)
                yield fault

    def strike(self, place: str) -> None:
        """Let happen what is due."""
        for fault in self.due(place):
            if fault.kind in {"kill", "stop"}:
                os.kill(os.getpid(), signal.SIGKILL if fault.kind == "kill" else signal.SIGSTOP)
            elif fault.kind == "memory":
                torch.empty(2**50)
            elif fault.kind == "error":
                raise ValueError("a fault")

    def hold(self, model: nn.Module, net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Put the traps."""
        for layer in (model.second, model.head):
            layer.register_forward_pre_hook(lambda *_: self.strike("forward"))
        next(net.parameters()).register_hook(lambda _: self.strike("backward"))
        optimizer.register_step_pre_hook(lambda *_: self.strike("optimizer"))
        self._before(TorchCommunicator, "start_all_reduce", "sync")
        self._before(TorchCommunicator, "start_exchange", "halo")
        self._before(Post, "send", "transfer")
        self._before(storage._Writer, "finish", "save")
        self._after(storage._Writer, "write_data", "save")
        renamed: list[Path] = []

        def between(path: Path, target: Path) -> Path:
            if path.name == f".{CHECKPOINT}.unfinished" and path.with_name(f".{CHECKPOINT}.previous").exists():
                renamed.append(path)
                self.strike("rename")
            return rename(path, target)

        rename, Path.rename = Path.rename, between

    def _before(self, owner: type, name: str, place: str) -> None:
        self._wrap(owner, name, lambda: self.strike(place), lambda: None)

    def _after(self, owner: type, name: str, place: str) -> None:
        self._wrap(owner, name, lambda: None, lambda: self.strike(place))

    def _wrap(self, owner: type, name: str, before: Callable[[], None], after: Callable[[], None]) -> None:
        call = getattr(owner, name)

        def trapped(*args: Any, **kwargs: Any) -> Any:
            before()
            found = call(*args, **kwargs)
            after()
            return found

        setattr(owner, name, trapped)


def train(job: Job, process: Process) -> None:
    """Train from the start or the last checkpoint to the end; leave the final weights in the folder."""
    torch.use_deterministic_algorithms(True)
    own, folder = job.other.get(str(process.rank), {}), Path(job.folder)
    plan, model, armed = Plan.from_json(own.get("plan", job.plan)), build(own.get("width", 8)), Armed(job, process.rank)
    net: Any
    if plan.is_pipelined:
        net = pipelined(model, plan, functional.cross_entropy, timeout_s=job.timeout_s)
    else:
        net = runtime.parallelize(model, plan, timeout_s=job.timeout_s)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    first = resumed_step(job, net, optimizer)
    armed.hold(model, net, optimizer)
    for armed.step in range(first, job.steps):
        if job.other and armed.step:
            with torch.no_grad():
                net.get_parameter("head.weight")[0, 0] += own.get("shift", 0.0)
            runtime.require_agreement(net, step=own.get("compared_step", armed.step))
        optimizer.zero_grad()
        loss = gradients(net, armed, process.rank)
        if job.checked:
            runtime.require_finite(net, loss)
        optimizer.step()
        if job.every and (armed.step + 1) % job.every == 0:
            save = checkpoint.start_saving if job.in_background else checkpoint.save
            name = f"{CHECKPOINT}-{armed.step + 1}" if job.kept else CHECKPOINT
            save(net, optimizer, folder / name, step=armed.step + 1, timeout_s=job.timeout_s)
    checkpoint.Saving.finish()
    full = checkpoint.full_state_dict(net)
    if process.rank == 0:
        write_file(full, folder / FINAL)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def resumed_step(job: Job, net: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load the last checkpoint of a job if there is one; return the step to go on with."""
    folder = Path(job.folder)
    if job.kept:
        resumed = checkpoint.load_newest(net, optimizer, folder)
        return resumed.step if resumed else 0
    if checkpoint.exists(folder / CHECKPOINT):
        return checkpoint.load(net, optimizer, folder / CHECKPOINT).step
    return 0


def gradients(net: Any, armed: Armed, rank: int) -> torch.Tensor | None:
    """Do forward and backward of a step; return this rank's loss, of a pipeline on the last stage only."""
    plan = net.plan
    images, labels = batch_of(armed.step)
    for _ in armed.due("batch"):
        images[own_samples(plan, rank)] = torch.nan
    if plan.is_pipelined:
        return net.step(images, target=labels)
    loss = functional.cross_entropy(net(images[own_part(plan, rank)]), labels[own_samples(plan, rank)])
    loss.backward()
    return loss


def run(argument: dict[str, Any]) -> None:
    """Do a job, given as plain values, as one of its ranks."""
    job = Job.of(argument)
    torch.set_num_threads(1)
    train(job, initialize(timeout_s=job.timeout_s))


def plans(argument: dict[str, Any]) -> None:
    """Write plans: by file name, strategy, number of ranks and width."""
    for name, (strategy, num_ranks, width) in argument.items():
        Path(name).write_text(plan_of(strategy, num_ranks, width).to_json())


def main() -> None:
    run(json.loads(Path(sys.argv[1]).read_text()))


if __name__ == "__main__":
    main()
