"""The stages of a CNN-DNN: local networks on their ranks without a word, then the coarse network on rank 0.

Rank r of N trains the local networks r, r + N, … The processes do not even join a group before the last one of their
networks is trained; then every rank gets the weights of all of them and their class probabilities for the training
samples, rank 0 trains the coarse network, and every rank gets that.
"""

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import torch
from torch import nn

from planner.errors import UsageError
from planner.frontend.decomposition import (
    CnnDnn,
    Decomposition,
    Factory,
    assemble,
    dense_network,
    local_network,
    num_classes_of,
    transfer,
)
from runtime.decomposition.link import Link
from runtime.decomposition.training import Recipe, Samples, Settings, Trained, outputs_of, train
from runtime.launch import Process, own_process

TIMEOUT_S: Final = 86_400.0
"""For a rank whose networks are trained to wait for the others."""


@dataclass(frozen=True)
class Fitted:
    """A trained CNN-DNN, the same on every rank.

    Attributes:
        net: with all weights; in evaluation mode, on the CPU.
        probabilities: (N, parts * K), of the local networks for the training samples.
        local: what came of every local network.
        coarse: what came of the coarse network.
        gather_s: of sending weights and probabilities once all ranks were ready.
    """

    net: CnnDnn
    probabilities: torch.Tensor
    local: list[Trained]
    coarse: Trained
    gather_s: float

    def seconds(self, num_ranks: int) -> float:
        """Return the seconds of all stages one after the other, had so many ranks trained the local networks."""
        ranks = (sum(each.seconds for each in self.local[rank::num_ranks]) for rank in range(num_ranks))
        return max(ranks) + self.gather_s + self.coarse.seconds


def fit(
    factory: Factory,
    decomposition: Decomposition,
    samples: Samples,
    recipe: Recipe,
    *,
    folder: Path | None = None,
    timeout_s: float = TIMEOUT_S,
) -> Fitted:
    """Train a CNN-DNN, with the ranks of a job (``torchrun``) or alone; every rank calls this with the same arguments.

    The result does not depend on the number of ranks, bit for bit, where they have as many threads each.

    Args:
        factory: of the local networks, from the shape of one sample.
        decomposition: of the samples.
        samples: all training samples, on every rank.
        recipe: of its networks.
        folder: for what is trained so far: ``local-0.pt`` …, ``coarse.pt``; started again, training goes on from there.
        timeout_s: for ranks to wait for each other.

    Raises:
        UsageError: samples, decomposition and networks do not fit, or the folder holds another training.
    """
    process = _process()
    parts = len(decomposition.regions)
    mine = range(process.rank, parts, process.world_size)
    _refuse_misfits(factory, decomposition, samples, mine)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    own = {}
    for index in mine:
        trained = train_local(factory, decomposition, samples, recipe.local, index, folder, process.device)
        own[index] = (trained, _shares(factory, decomposition, samples.inputs, index, trained, process.device))

    link = Link(process.world_size, timeout_s) if process.world_size > 1 else None
    found, gather_s = _everyones(own, link)
    local, shares = [found[i][0] for i in range(parts)], [found[i][1] for i in range(parts)]
    net = assemble(decomposition, [_untrained(factory, decomposition, i) for i in range(parts)], recipe.hidden)
    probabilities, last = torch.cat(shares, 1), None
    if process.rank == 0:
        last = train(
            lambda: dense_network(probabilities.shape[1], shares[0].shape[1], recipe.hidden),
            Samples(probabilities, samples.labels), recipe.coarse or recipe.local, "coarse",
            file=None if folder is None else folder / "coarse.pt", device=process.device,
            replaces=True,  # where the local networks were trained further
        )  # fmt: skip
    if link is not None:
        last = Trained(**link.of_first(None if last is None else asdict(last)))
    assert last is not None
    transfer(net, [each.state for each in local], last.state)
    return Fitted(net.eval(), probabilities, local, last, gather_s)


def train_local(
    factory: Factory, decomposition: Decomposition, samples: Samples, settings: Settings, index: int,
    folder: Path | None = None, device: torch.device | None = None,
) -> Trained:  # fmt: skip
    """Train the local network of one part on its part of the samples, with their global labels; raises as ``train``."""
    part = Samples(decomposition.part(samples.inputs, index).contiguous(), samples.labels)
    return train(
        lambda: local_network(factory, decomposition, index), part, settings, f"local-{index}",
        file=None if folder is None else folder / f"local-{index}.pt", device=device,
    )  # fmt: skip


_Found = dict[int, tuple[Trained, torch.Tensor]]
"""Of local networks: what came of them, and their (N, K) probabilities for the training samples."""


def _process() -> Process:
    """Return the place in the job without joining it; outside of a job, that of the only rank."""
    if "RANK" in os.environ or torch.distributed.is_initialized():
        return own_process()
    return Process(0, 1, 0, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def _refuse_misfits(factory: Factory, decomposition: Decomposition, samples: Samples, mine: range) -> None:
    """Check everything that can be known before the first epoch."""
    if tuple(samples.inputs.shape[1:]) != decomposition.input_shape:
        raise UsageError(
            f"the samples have shape {tuple(samples.inputs.shape[1:])}, but {decomposition.input_shape} is decomposed"
        )
    if len(samples.inputs) != len(samples.labels) or not len(samples.labels):
        raise UsageError(f"{len(samples.inputs)} samples with {len(samples.labels)} labels cannot be trained on")
    low, high = int(samples.labels.min()), int(samples.labels.max())
    for index in mine:
        classes = num_classes_of(_untrained(factory, decomposition, index), decomposition.local_shapes[index])
        if low < 0 or high >= classes:
            raise UsageError(f"labels are {low} to {high}, but local network {index} scores {classes} classes")


def _untrained(factory: Factory, decomposition: Decomposition, index: int) -> nn.Module:
    with torch.random.fork_rng([]):
        return local_network(factory, decomposition, index)


def _shares(
    factory: Factory, decomposition: Decomposition, inputs: torch.Tensor, index: int, trained: Trained,
    device: torch.device,
) -> torch.Tensor:  # fmt: skip
    """Return the (N, K) class probabilities that a trained local network gives."""
    net = _untrained(factory, decomposition, index)
    net.load_state_dict(trained.state)
    net.eval().to(device)
    return outputs_of(lambda part: torch.softmax(net(decomposition.part(part, index).to(device)), 1), inputs)


def _everyones(own: _Found, link: Link | None) -> tuple[_Found, float]:
    """Return what all ranks found, and the seconds of sending it."""
    if link is None:
        return own, 0.0
    sent = {index: {"trained": asdict(trained), "shares": shares} for index, (trained, shares) in own.items()}
    received, seconds = link.gathered(sent)
    found = {
        index: (Trained(**each["trained"]), each["shares"]) for part in received for index, each in part.items()
    }  # fmt: skip
    return found, seconds
