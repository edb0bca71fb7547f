"""Pipelines in cycles, simulated in one process: plain loops over cycles, weights as values, backward layer by layer.

Shares nothing with ``runtime.pipeline``: no autograd, no modules, no messages. A backward pass of a layer is a function
of its weights, which the simulation chooses, and of what its forward pass stored.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

LR, MOMENTUM, DECAY = 0.05, 0.9, 1e-2


def forward(layer: nn.Module, weights: Sequence[Tensor], x: Tensor) -> tuple[Tensor, Any]:  # noqa: PLR0911  # a table
    """Return the output of a layer and what its backward pass needs beside the weights."""
    match layer:
        case nn.Conv2d():
            kernel, bias = weights
            columns = functional.unfold(x, 3, padding=1)
            y = kernel.flatten(1) @ columns + bias[:, None]
            return y.view(len(x), -1, *x.shape[2:]), (columns, x.shape)
        case nn.BatchNorm2d():
            mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), unbiased=False, keepdim=True)
            normal = (x - mean) / torch.sqrt(variance + layer.eps)
            gamma, beta = (w.view(1, -1, 1, 1) for w in weights)
            return normal * gamma + beta, (normal, torch.sqrt(variance + layer.eps), mean, x.var((0, 2, 3)))
        case nn.ReLU():
            return x.clamp(min=0), x > 0
        case nn.MaxPool2d():
            return functional.max_pool2d(x, 2, return_indices=True)
        case nn.AvgPool2d():
            return functional.avg_pool2d(x, 2), None
        case nn.Flatten():
            return x.flatten(1), x.shape
        case nn.Linear():
            matrix, bias = weights
            return x @ matrix.T + bias, x
        case _:
            pass
    raise NotImplementedError(layer)


def backward(  # noqa: PLR0911  # a table
    layer: nn.Module, weights: Sequence[Tensor], stored: Any, g: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Return the gradients of a layer's input and weights: those weights, on what was stored."""
    match layer:
        case nn.Conv2d():
            columns, shape = stored
            flat = g.flatten(2)
            kernel = (flat @ columns.mT).sum(0).view_as(weights[0])
            back = weights[0].flatten(1).T @ flat
            return functional.fold(back, shape[2:], 3, padding=1), [
                kernel,
                flat.sum((0, 2)),
            ]
        case nn.BatchNorm2d():
            normal, deviation, *_ = stored
            d_beta, d_gamma = g.sum((0, 2, 3)), (g * normal).sum((0, 2, 3))
            scaled, over = g * weights[0].view(1, -1, 1, 1), (0, 2, 3)
            means = scaled.mean(over, keepdim=True) + normal * (scaled * normal).mean(over, keepdim=True)
            return (scaled - means) / deviation, [d_gamma, d_beta]
        case nn.ReLU():
            return g * stored, []
        case nn.MaxPool2d():
            return functional.max_unpool2d(g, stored, [2, 2]), []
        case nn.AvgPool2d():
            return g.repeat_interleave(2, 2).repeat_interleave(2, 3) / 4, []
        case nn.Flatten():
            return g.view(stored), []
        case nn.Linear():
            return g @ weights[0], [g.T @ stored, g.sum(0)]
        case _:
            pass
    raise NotImplementedError(layer)


@dataclass
class Simulated:
    """What came out.

    Attributes:
        weights: by stage, after each of its updates, the weights in the order of ``parameters()``.
        running: by stage, in the end, running means and variances in the order of its batch norms.
        losses: by batch.
    """

    weights: list[list[list[Tensor]]]
    running: list[list[Tensor]]
    losses: list[float] = field(default_factory=list)


def entries(num_batches: int, stages: int, pipelined: int | None) -> list[int | None]:
    """Return the batch that enters in each cycle, or None."""
    wait: list[int | None] = [None] * (2 * (stages - 1))
    found: list[int | None] = []
    for b in range(num_batches):
        found.append(b)
        if pipelined is not None and b + 1 >= pipelined:
            found += wait
    return found + wait


def simulate(
    stages: Sequence[nn.Sequential], batches: Sequence[tuple[Tensor, Tensor]], mode: str, pipelined: int | None = None
) -> Simulated:
    """Run all batches through; the modules give layers and start values and stay as they are."""
    k = len(stages) - 1
    current = [[p.detach().clone() for p in stage.parameters()] for stage in stages]
    speed = [[torch.zeros_like(w) for w in weights] for weights in current]
    norms = [[layer for layer in stage if isinstance(layer, nn.BatchNorm2d)] for stage in stages]
    running = [[t.clone() for n in each for t in (n.running_mean, n.running_var) if t is not None] for each in norms]
    found = Simulated([[] for _ in stages], running)
    entered = entries(len(batches), k + 1, pipelined)
    values: dict[tuple[int, int], Tensor] = {}  # what stage i returned for batch b
    gradients: dict[tuple[int, int], Tensor] = {}  # of that
    stored: dict[tuple[int, int], list[Any]] = {}
    versions: dict[tuple[int, int], list[Tensor]] = {}
    for c in range(len(entered)):
        updated = list(current)
        for i, stage in enumerate(stages):
            b = entered[c - i] if c >= i else None
            if b is not None:
                x = values.pop((i - 1, b)) if i else batches[b][0]
                versions[i, b] = current[i]
                values[i, b], stored[i, b] = stage_forward(stage, current[i], x, running[i])
                if i == k:
                    logits, target = values.pop((i, b)), batches[b][1]
                    shares = logits.softmax(1)
                    found.losses.append(float(-shares[torch.arange(len(target)), target].log().mean()))
                    gradients[i, b] = (shares - functional.one_hot(target, logits.shape[1])) / len(target)
            b = entered[c - (2 * k - i)] if c >= 2 * k - i else None
            if b is not None:
                kept = versions.pop((i, b))
                read = kept if mode == "pipedream" else current[i]
                g, own = stage_backward(stage, read, stored.pop((i, b)), gradients.pop((i, b)))
                gradients[i - 1, b] = g
                speed[i] = [MOMENTUM * v + d + DECAY * w for v, d, w in zip(speed[i], own, current[i], strict=True)]
                updated[i] = [w - LR * v for w, v in zip(current[i], speed[i], strict=True)]
                found.weights[i].append(updated[i])
        current = updated
    return found


def counts(stage: nn.Sequential) -> list[int]:
    return [len(list(layer.parameters())) for layer in stage]


def stage_forward(
    stage: nn.Sequential, weights: list[Tensor], x: Tensor, running: list[Tensor]
) -> tuple[Tensor, list[Any]]:
    kept, at, norm = [], 0, 0
    for layer, count in zip(stage, counts(stage), strict=True):
        x, stored = forward(layer, weights[at : at + count], x)
        at += count
        kept.append(stored)
        if isinstance(layer, nn.BatchNorm2d):
            for j, value in enumerate((stored[2].flatten(), stored[3])):
                running[norm + j] = running[norm + j] * 0.9 + value * 0.1
            norm += 2
    return x, kept


def stage_backward(
    stage: nn.Sequential, weights: list[Tensor], stored: list[Any], g: Tensor
) -> tuple[Tensor, list[Tensor]]:
    found: list[Tensor] = []
    at = len(weights)
    for layer, count, kept in reversed(list(zip(stage, counts(stage), stored, strict=True))):
        g, own = backward(layer, weights[at - count : at], kept, g)
        at -= count
        found = own + found
    return g, found
