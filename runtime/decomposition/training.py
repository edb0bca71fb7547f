"""Training one network alone: from names and a seed, resumable after every epoch, without communication."""

import hashlib
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import nn
from torch.nn import functional

from planner.errors import UsageError
from planner.ir.canonical import sha256_of
from runtime.checkpoint.whole import write_file
from runtime.training import make_optimizer

_log = logging.getLogger(__name__)

_FORMAT: Final = 1


@dataclass(frozen=True)
class Samples:
    """Labelled images or volumes.

    Attributes:
        inputs: (N, C, *space), floating point; for the coarse network (N, parts * K).
        labels: (N,), int64, from 0.
    """

    inputs: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True)
class Settings:
    """How a network is trained.

    Attributes:
        epochs: over all samples.
        batch: samples a step.
        learning_rate: constant.
        optimizer: as a plan names it.
        seed: of start values, order of the samples, and dropout, together with the network's name.
    """

    epochs: int = 20
    batch: int = 64
    learning_rate: float = 0.05
    optimizer: Literal["sgd", "momentum", "adam"] = "momentum"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 0 or self.batch < 1 or not self.learning_rate > 0:
            raise UsageError(
                f"training for {self.epochs} epochs with batch {self.batch} and learning rate {self.learning_rate} is "
                "not possible: epochs must be at least 0, the batch at least 1, the rate above 0"
            )


@dataclass(frozen=True)
class Recipe:
    """How a CNN-DNN is trained.

    Attributes:
        local: its local networks.
        coarse: its coarse network; as the local ones if None.
        hidden: sizes of the coarse network's hidden layers.
    """

    local: Settings = Settings()
    coarse: Settings | None = None
    hidden: tuple[int, ...] = (64,)


@dataclass(frozen=True)
class Trained:
    """What came of training.

    Attributes:
        state: ``state_dict()`` on the CPU.
        losses: mean over the samples of every epoch.
        seconds: of all epochs, those before a restart too; without writing files.
    """

    state: dict[str, torch.Tensor]
    losses: list[float]
    seconds: float


def train(
    build: Callable[[], nn.Module],
    samples: Samples,
    settings: Settings,
    name: str,
    *,
    file: Path | None = None,
    device: torch.device | None = None,
    replaces: bool = False,
) -> Trained:
    """Train a network with cross-entropy.

    All that is random is drawn from (seed, name, epoch), so a network does not depend on what else is trained, where
    and in which order, nor on restarts. A last batch of a single sample is left out: batch norm may not take it.

    Args:
        build: makes the network; drawn from torch's generator, which is seeded for it.
        samples: to train on.
        settings: how.
        name: of the network.
        file: saved after every epoch, atomically; training goes on from what is there.
        device: to train on; the CPU if left out.
        replaces: start anew where the file was saved by another training.

    Raises:
        UsageError: the file is no saved training, or was saved by another training.
    """
    place = device or torch.device("cpu")
    key = _key(samples, settings, name)
    with _own_generator(place):
        torch.manual_seed(_seed(settings, name, "start"))
        net = build().to(place).train()
        optimizer = make_optimizer(settings.optimizer, net.parameters(), settings.learning_rate)
        stored = _stored(file, key, name, replaces)
        losses, seconds = _resumed(net, optimizer, file, stored, name) if stored else ([], 0.0)
        inputs, labels = samples.inputs.to(place), samples.labels.to(place)
        for epoch in range(len(losses), settings.epochs):
            start = time.perf_counter()
            torch.manual_seed(_seed(settings, name, epoch))
            losses.append(_epoch(net, optimizer, inputs, labels, settings.batch))
            seconds += time.perf_counter() - start
            _log.info("%s: epoch %d of %d, loss %.4f", name, epoch + 1, settings.epochs, losses[-1])
            if file is not None:
                _save(net, optimizer, file, {"key": key, "losses": losses, "seconds": seconds})
        return Trained({n: t.detach().cpu() for n, t in net.state_dict().items()}, losses, seconds)


@contextmanager
def _own_generator(device: torch.device) -> Iterator[None]:
    """Leave torch's generators as they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


def _epoch(
    net: nn.Module, optimizer: torch.optim.Optimizer, inputs: torch.Tensor, labels: torch.Tensor, batch: int
) -> float:
    """Train on all samples once; return the mean loss."""
    total, count = torch.zeros((), device=inputs.device, dtype=torch.float64), 0
    for chosen in torch.randperm(len(labels)).split(batch):
        if len(chosen) == 1 < len(labels):
            continue
        part = chosen.to(inputs.device)
        optimizer.zero_grad()
        loss = functional.cross_entropy(net(inputs[part]), labels[part])
        loss.backward()
        optimizer.step()
        total += loss.detach() * len(chosen)
        count += len(chosen)
    return float(total / max(count, 1))


def _seed(settings: Settings, name: str, what: str | int) -> int:
    text = f"{settings.seed}:{name}:{what}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def _key(samples: Samples, settings: Settings, name: str) -> str:
    """Return a digest of what must be the same for training to go on; more epochs may be asked for."""
    how = {k: v for k, v in asdict(settings).items() if k != "epochs"}
    content = hashlib.sha256(samples.labels.cpu().numpy().tobytes())
    content.update(samples.inputs.detach().contiguous().cpu().numpy().tobytes())
    return sha256_of([_FORMAT, name, how, list(samples.inputs.shape), content.hexdigest()])


def _stored(file: Path | None, key: str, name: str, replaces: bool) -> dict[str, Any] | None:
    """Return what a file holds for this training; None where there is nothing to go on from."""
    if file is None or not file.exists():
        return None
    try:
        found: dict[str, Any] = torch.load(file, weights_only=True)
        stored = found["key"]
    except Exception as error:  # torch raises what pickle, zip and its own checks raise
        raise UsageError(
            f"{str(file)!r} is no saved training: {type(error).__name__}: {error}. {_advice(file, name)}"
        ) from error
    if stored == key:
        return found
    if replaces:
        return None
    raise UsageError(f"{str(file)!r} was saved by a training of other samples or settings. {_advice(file, name)}")


def _resumed(
    net: nn.Module, optimizer: torch.optim.Optimizer, file: Path | None, stored: dict[str, Any], name: str
) -> tuple[list[float], float]:
    """Load what was stored; return the losses of its epochs and their seconds."""
    try:
        net.load_state_dict(stored["net"])
        optimizer.load_state_dict(stored["optimizer"])
    except (RuntimeError, ValueError) as error:
        raise UsageError(
            f"{str(file)!r} was saved by a training of another network: {error}. {_advice(file, name)}"
        ) from error
    return list(stored["losses"]), float(stored["seconds"])


def _advice(file: Path | None, name: str) -> str:
    return f"Give another folder, or remove {str(file)!r} to train {name} anew"


def _save(net: nn.Module, optimizer: torch.optim.Optimizer, file: Path, progress: dict[str, Any]) -> None:
    write_file({"net": net.state_dict(), "optimizer": optimizer.state_dict(), **progress}, file)


def outputs_of(call: Callable[[torch.Tensor], torch.Tensor], inputs: torch.Tensor, batch: int = 256) -> torch.Tensor:
    """Return what a function gives for all samples, in batches and without gradients; on the CPU."""
    with torch.no_grad():
        return torch.cat([call(part).cpu() for part in inputs.split(batch)])
