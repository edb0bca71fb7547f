"""What the processes of ``layerwise demo`` do: train a small CNN on real images under several plans."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from planner.ir.layout import balanced_pieces
from planner.plan.schema import Plan
from runtime.data import own_samples
from runtime.launch import Process
from runtime.parallel import parallelize
from runtime.training import build_model, make_optimizer

TEST_SHARE: Final = 5
"""Every fifth image is for testing: 360 of the 1,797 digits."""
WARM_UP_STEPS: Final = 3
"""Steps that are trained but not timed."""


@dataclass(frozen=True)
class Digits:
    """scikit-learn's hand-written digits, 8 x 8 pixels, scaled to [0, 1].

    Attributes:
        images: (N, 1, 8, 8), float32.
        labels: (N,), int64.
    """

    images: torch.Tensor
    labels: torch.Tensor


def load_digits() -> tuple[Digits, Digits]:
    """Return the training and test images; they come with scikit-learn, nothing is downloaded."""
    from sklearn import datasets

    found = datasets.load_digits()
    images = torch.tensor(np.asarray(found.images) / 16, dtype=torch.float32).unsqueeze(1)
    labels = torch.tensor(np.asarray(found.target), dtype=torch.int64)
    test = torch.arange(len(labels)) % TEST_SHARE == 0
    return Digits(images[~test], labels[~test]), Digits(images[test], labels[test])


class _Run:
    """One strategy in training on this rank."""

    def __init__(self, net: nn.Module, plan: Plan, part: Callable[[int], slice], learning_rate: float) -> None:
        self.net, self._part = net, part
        self._optimizer = make_optimizer(plan.optimizer, net.parameters(), learning_rate)
        self.losses: list[float] = []
        self.steps_s: list[float] = []

    def step(self, images: torch.Tensor, labels: torch.Tensor, device: torch.device) -> None:
        """Train on a global batch; keep this rank's loss and the seconds."""
        part = self._part(len(labels))
        x, target = images[part].to(device), labels[part].to(device)
        start = time.perf_counter()
        self._optimizer.zero_grad()
        loss = functional.cross_entropy(self.net(x), target)
        loss.backward()
        self._optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.steps_s.append(time.perf_counter() - start)
        self.losses.append(float(loss.detach()) * len(target) / len(labels))

    def correct(self, data: Digits, device: torch.device) -> int:
        """Return how many of this rank's share of the images are classified rightly."""
        part = self._part(len(data.labels))
        self.net.eval()
        with torch.no_grad():
            scores = self.net(data.images[part].to(device))
        self.net.train()
        return int((scores.argmax(1).cpu() == data.labels[part]).sum())


def train_digits(argument: dict[str, Any], process: Process) -> dict[str, Any]:
    """Train under several strategies step by step in turn, and one device beside them.

    Args:
        argument: ``plans`` (name to JSON text, all for one model and batch), ``ddp`` (also run torch's
            DistributedDataParallel), ``steps``, ``learning_rate``.
        process: of this rank.

    Returns:
        By strategy ``losses`` (of the global batch), ``step_s`` (median of the slowest rank),
        ``accuracy``; ``one-device`` has losses and accuracy only.
    """
    plans = {name: Plan.from_json(text) for name, text in argument["plans"].items()}
    first = next(iter(plans.values()))
    train, test = load_digits()
    rate = argument["learning_rate"]
    runs = {name: _planned_run(plan, process, rate) for name, plan in plans.items()}
    if argument["ddp"]:
        runs["torch DDP"] = _ddp_run(first, process, rate)
    alone = _Run(build_model(first, process.device).train(), first, lambda size: slice(0, size), rate)
    for batch in _batches(len(train.labels), first.batch, argument["steps"]):
        images, labels = train.images[batch], train.labels[batch]
        for run in runs.values():
            dist.barrier()
            run.step(images, labels, process.device)
        if process.rank == 0:
            alone.step(images, labels, process.device)
    found: dict[str, Any] = {name: _summary(run, test, process) for name, run in runs.items()}
    if process.rank == 0:
        found["one-device"] = {
            "losses": alone.losses, "accuracy": alone.correct(test, process.device) / len(test.labels)
        }  # fmt: skip
    return found


def _planned_run(plan: Plan, process: Process, learning_rate: float) -> _Run:
    net = parallelize(build_model(plan, process.device).train(), plan)
    return _Run(net, plan, lambda size: own_samples(plan, process.rank, size), learning_rate)


def _ddp_run(plan: Plan, process: Process, learning_rate: float) -> _Run:
    ids = [process.device] if process.device.type == "cuda" else None
    net = DistributedDataParallel(build_model(plan, process.device).train(), device_ids=ids)
    pieces = process.world_size
    return _Run(net, plan, lambda size: slice(*balanced_pieces(size, pieces)[process.rank]), learning_rate)


def _batches(num_samples: int, batch: int, steps: int) -> list[torch.Tensor]:
    """Return the samples of every step: whole shuffled epochs, the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    found: list[torch.Tensor] = []
    while len(found) < steps:
        order = torch.randperm(num_samples, generator=generator)
        found += [part for part in order.split(batch) if len(part) == batch]
    return found[:steps]


def _summary(run: _Run, test: Digits, process: Process) -> dict[str, Any]:
    losses = torch.tensor(run.losses, dtype=torch.float64)
    slowest = torch.tensor(run.steps_s, dtype=torch.float64)
    correct = torch.tensor(run.correct(test, process.device), dtype=torch.float64)
    dist.all_reduce(losses)
    dist.all_reduce(correct)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return {
        "losses": losses.tolist(),
        "step_s": statistics.median(slowest.tolist()[WARM_UP_STEPS:]),
        "accuracy": float(correct) / len(test.labels),
    }


def largest_difference(losses: Sequence[float], reference: Sequence[float]) -> float:
    """Return the largest difference between two loss curves."""
    return max(abs(a - b) for a, b in zip(losses, reference, strict=True))
