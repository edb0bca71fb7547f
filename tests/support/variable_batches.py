"""Batches in turns on ranks that are threads, and what one device makes of the definition."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from planner.ir.turns import Scheme, turns
from planner.plan import Plan
from runtime.comm.communicator import ThreadCommunicator, ThreadWorld
from runtime.parallel import trace_for
from runtime.variable import VariableBatch, assembled, cut_in_two, in_a_row, number_of_turns

Update = Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]


def on_threads(
    build: Callable[[], nn.Module],
    plan: Plan,
    work: Callable[[VariableBatch, int], Any],
    scheme: Scheme,
    num_turns: int | None,
    first: str | None = None,
) -> list[Any]:
    """Call a function with the module of every rank; the ranks are threads of this process."""
    worlds = ThreadWorld(plan.mesh), ThreadWorld(in_a_row(plan))
    models = [build() for _ in range(plan.num_ranks)]
    parts = [cut_in_two(trace_for(model, plan), plan, first) for model in models]
    count = number_of_turns(plan, scheme, num_turns)
    results: dict[int, Any] = {}
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            inner, outer = (ThreadCommunicator(world, rank) for world in worlds)
            net = assembled(models[rank], parts[rank], plan, (inner, outer), functional.cross_entropy, scheme, count)
            results[rank] = work(net, rank)
        except BaseException as error:
            errors.append(error)
            for world in worlds:
                world.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(plan.num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [results[rank] for rank in range(plan.num_ranks)]


def simulate(
    front: nn.Module,
    linear: nn.Module,
    batches: Sequence[tuple[torch.Tensor, torch.Tensor]],
    shares: Sequence[int],
    scheme: Scheme,
    num_turns: int,
    updates: tuple[Update, Update],
) -> list[float]:
    """Train by the definition of (m, n), sample by sample as the scheme hands them over; return the losses.

    Shares nothing with the runtime but the scheme: features are kept, each turn's gradient of them is a sum over its
    samples divided by m, and each part has an optimizer of its own.
    """
    of_front, of_linear = updates[0](list(front.parameters())), updates[1](list(linear.parameters()))
    losses = []
    for x, target in batches:
        starts = [sum(shares[:r]) for r in range(len(shares))]
        features = front(x)
        gradient, total = torch.zeros_like(features), 0.0
        for turn in turns(scheme, shares, num_turns):
            own = [i for start, (a, b) in zip(starts, turn, strict=True) for i in range(start + a, start + b)]
            here = features.detach()[own].requires_grad_()
            of_linear.zero_grad()
            loss = functional.cross_entropy(linear(here), target[own], reduction="sum")
            (loss / len(own)).backward()
            of_linear.step()
            assert here.grad is not None
            gradient[own] = here.grad * len(own) / len(x)
            total += float(loss.detach())
        of_front.zero_grad()
        features.backward(gradient)
        of_front.step()
        losses.append(total / len(x))
    return losses
