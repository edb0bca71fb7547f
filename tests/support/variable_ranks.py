"""What the ranks of ``tests/distributed/test_variable_batch.py`` run."""

import time
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from planner.errors import RunError
from planner.ir.turns import Scheme
from planner.models.lenet import lenet5
from planner.plan import Plan
from runtime import checkpoint
from runtime.launch import Process
from runtime.variable import variable_batch
from support.variable_batches import simulate

STEPS, SHARES, CLASSES = 3, (5, 3), 10
SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=1e-2)


def build() -> nn.Module:
    torch.manual_seed(0)
    return lenet5().double()


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    n = sum(SHARES)
    return [
        (
            torch.randn(n, 1, 32, 32, generator=generator, dtype=torch.float64),
            torch.randint(0, CLASSES, (n,), generator=generator),
        )
        for _ in range(STEPS)
    ]


def check(argument: dict[str, Any], process: Process) -> dict[str, Any]:
    """Return, for each scheme, how far weights and momentum are from the definition; saved and loaded on the way."""
    torch.set_num_threads(1)
    plan, rank = Plan.from_json(argument["plan"]), process.rank
    part = slice(sum(SHARES[:rank]), sum(SHARES[: rank + 1]))
    worst: dict[str, float] = {}
    schemes: tuple[tuple[Scheme, int], ...] = (("a", 1), ("b", 2), ("c", 3))
    for scheme, count in schemes:
        expected = build()
        linear = expected.get_submodule("classifier")
        front = nn.Sequential(*(m for name, m in expected.named_children() if name != "classifier"))
        losses = simulate(front, linear, batches(), SHARES, scheme, count, (SGD, SGD))
        found, folder = [], f"{argument['folder']}/{scheme}"
        for k, (x, target) in enumerate(batches()):
            if k in {0, 2}:  # a new module goes on from what the first one saved
                model = build()
                net = variable_batch(model, plan, functional.cross_entropy, scheme=scheme, num_turns=count)
                optimizer = SGD(net.parameters())
            if k == 2:
                assert checkpoint.load(net, optimizer, folder).step == k
            found.append(float(net.step(x[part], target=target[part], optimizer=optimizer)))
            if k == 1:
                checkpoint.save(net, optimizer, folder, step=k + 1)
        off = max(abs(a - b) / abs(b) for a, b in zip(found, losses, strict=True))
        whole, reference = checkpoint.full_state_dict(net), expected.state_dict()
        assert whole.keys() == (reference.keys() if rank == 0 else set())  # the first rank gets it
        for name, tensor in whole.items():
            off = max(off, float((reference[name] - tensor).abs().max()))
        worst[scheme] = off
    return worst


def fail(argument: dict[str, Any], process: Process) -> Any:
    """Rank 1 hangs in the middle of training; return what rank 0 says."""
    torch.set_num_threads(1)
    plan, (x, target) = Plan.from_json(argument["plan"]), batches()[0]
    net = variable_batch(build(), plan, functional.cross_entropy, timeout_s=argument["timeout_s"])
    net.step(x[:4], target=target[:4])
    if process.rank == 1:
        time.sleep(4 * argument["timeout_s"])
        return ""
    try:
        net.linear.train()
        net._turns.start_gathering(x[:4], [4, 4], "the samples of a turn")()
    except RunError as error:
        return str(error)
    return None
