"""What the ranks of ``tests/distributed/test_training.py`` run."""

from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import TensorDataset

from planner.plan import Plan
from runtime.amp import GradScaler
from runtime.data import loader
from runtime.launch import Process
from runtime.module import ParallelModule
from runtime.parallel import parallelize
from support.loops import build, images, loss_of, piece

SAMPLES, STEPS, LIMIT = 21, 3, 0.3
HIT = 1
"""The step in which a gradient overflows on the last rank."""


def train(net: nn.Module, batches: Any, scaler: torch.amp.GradScaler, rank: int | None = None) -> dict[str, Any]:
    """Train with scaled losses, clipping, an average of the weights; return it and its scores of the first batch."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    average = AveragedModel(net, use_buffers=True)
    norms, scales = [], []
    for k, (x, target) in enumerate(batches):
        optimizer.zero_grad()
        scaler.scale(loss_of(net, x, target)).backward()
        if k == HIT and rank in {None, 1}:
            last = [p.grad for p in net.parameters() if p.grad is not None][-1]
            last.view(-1)[-1] = torch.inf
        scaler.unscale_(optimizer)
        clip = net.clip_grad_norm_ if isinstance(net, ParallelModule) else None
        norm = clip(LIMIT) if clip else nn.utils.clip_grad_norm_(net.parameters(), LIMIT)
        scaler.step(optimizer)
        scaler.update()
        average.update_parameters(net)
        norms.append(float(norm))
        scales.append(scaler.get_scale())
    state = {n: t.detach() for n, t in average.module.state_dict().items()}
    return {"norms": norms, "scales": scales, "state": state, "weights": net.state_dict()}


def worst(net: ParallelModule, mine: dict[str, torch.Tensor], whole: dict[str, torch.Tensor]) -> float:
    """Return the largest difference of a rank's tensors from its parts of whole ones."""
    skipped = {"conv1.bias", "bn.running_mean"}  # rounding noise in front of a batch norm, which Adam blows up
    return max(float((t - piece(net, n, whole[n])).abs().max()) for n, t in mine.items() if n not in skipped)


def loops(argument: dict[str, Any], process: Process) -> list[dict[str, Any]]:
    """Return, for each plan, by how much this rank differs from one device; compiled last."""
    torch.set_num_threads(1)
    x, target = images(SAMPLES)
    scaler: dict[str, Any] = {"init_scale": 2.0**8, "growth_interval": 100}
    whole = [(x[k : k + 8], target[k : k + 8]) for k in range(0, SAMPLES, 8)]
    expected = train(build(), whole, torch.amp.GradScaler("cpu", **scaler))
    found = []
    for text in argument["plans"]:
        plan = Plan.from_json(text)
        net = parallelize(build(), plan)
        batches = list(loader(TensorDataset(x, target), plan))
        mine = train(net, batches, GradScaler(net, **scaler), process.rank)
        found.append({
            "norms": [mine["norms"], expected["norms"]],
            "scales": [mine["scales"], expected["scales"]],
            "average": worst(net, mine["state"], expected["state"]),
            "weights": worst(net, mine["weights"], expected["weights"]),
            "half": half_precision(net, batches[0]),
            "compiled": compiled(plan, batches),
        })  # fmt: skip
    return found


def half_precision(net: ParallelModule, batch: Any) -> dict[str, list[str]]:
    """Return the types of scores and gradients under autocast, where all of them are finite."""
    found = {}
    for dtype in (torch.bfloat16, torch.float16):
        net.zero_grad()
        with torch.autocast("cpu", dtype):
            scores = net.float()(batch[0].float())
        nn.functional.cross_entropy(scores.float(), batch[1]).backward()
        kinds = {str(p.grad.dtype) for p in net.parameters() if p.grad is not None and bool(p.grad.isfinite().all())}
        found[str(dtype)] = [str(scores.dtype), *sorted(kinds)]
    net.double()
    return found


def compiled(plan: Plan, batches: Any) -> float:
    """Return the largest difference of gradients and buffers of a compiled module from those of a plain one."""
    plain, other = parallelize(build(), plan), parallelize(build(), plan)
    faster = torch.compile(other, backend="aot_eager")
    assert isinstance(faster, nn.Module)
    for batch in batches[:2]:
        for net in (plain, faster):
            net.zero_grad()
            loss_of(net, *batch).backward()
    pairs = [(a, b) for a, b in zip(plain.buffers(), other.buffers(), strict=True)]
    for a, b in zip(plain.parameters(), other.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        pairs.append((a.grad, b.grad))
    scores = [net.eval()(batches[0][0]).detach() for net in (plain, faster)]
    return max(float((a - b).abs().max()) for a, b in [*pairs, tuple(scores)])
