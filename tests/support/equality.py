"""A planned training run against one device: losses, every gradient, weights and buffers, in float64."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from planner.api import Machine, Options, Origin, Planner, machine_of, prepare
from planner.frontend.lower import TracedModel
from planner.ir.layout import Layout, Whole
from planner.ir.rules import layouts
from planner.models.alexnet import alexnet
from planner.models.lenet import lenet5
from planner.models.resnet import cifar_resnet
from planner.models.vgg import vgg
from planner.plan import Plan
from runtime.comm.threads import run_ranks as run_ranks
from runtime.data import own_samples
from runtime.launch import Process
from runtime.module import ParallelModule
from runtime.parallel import parallelize, trace_for

torch.set_num_threads(1)  # the ranks are the threads; small tensors gain nothing from more

STEPS = 3
CLASSES = 10
TOLERANCE = 1e-9
NOISE_FLOOR = 1e-5


@dataclass(frozen=True)
class Net:
    """A small network with every operator of its big sister."""

    build: Callable[[], nn.Module]
    input_shape: tuple[int, ...]
    batch: int = 8


NETS = {
    "lenet5": Net(lenet5, (1, 32, 32)),
    "alexnet": Net(lambda: alexnet(width=0.125, num_classes=CLASSES, hidden=48, dropout=0.0), (3, 63, 63)),
    "vgg": Net(
        lambda: vgg("a", batch_norm=True, width=0.125, num_classes=CLASSES, hidden=24, dropout=0.0),
        (3, 32, 32),
    ),
    "resnet20": Net(lambda: cifar_resnet(20, width=0.5), (3, 16, 16)),
}


def build(name: str) -> nn.Module:
    """Return the network with fixed weights."""
    torch.manual_seed(0)
    return NETS[name].build().double()


def data(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the global batch."""
    net = NETS[name]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(net.batch, *net.input_shape, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, CLASSES, (net.batch,), generator=generator)


def planner_for(name: str, num_ranks: int, mesh: str | None = None, **options: Any) -> Planner:
    """Return the planner of a network on equal devices, all of which are used."""
    machine: Machine = machine_of(devices=num_ranks)
    x, _ = data(name)
    return prepare(build(name), (x,), machine, Options(mesh=mesh, all_devices=True, **options), Origin(name, name))


def random_plan(planner: Planner, seed: int) -> Plan:
    """Return a plan with a random legal split for every layer, on a random candidate mesh."""
    rng = np.random.default_rng(seed)
    meshes = planner.meshes()
    search = planner.search(meshes[int(rng.integers(len(meshes)))])
    choice = tuple(int(rng.integers(len(costs))) for costs in search.table.layers)
    return planner.plan_of(search, search.forced(choice))


@dataclass(frozen=True)
class Reference:
    """What one device computes."""

    losses: list[float]
    tensors: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]


def train(net: nn.Module, x: torch.Tensor, target: torch.Tensor, share: float = 1.0) -> list[float]:
    """Train for some steps of SGD with momentum; return this rank's share of every loss."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = functional.cross_entropy(net(x), target)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()) * share)
    return losses


def reference(name: str) -> Reference:
    """Train on one device."""
    net = build(name)
    losses = train(net, *data(name))
    tensors = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    gradients = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
    return Reference(losses, {n: t.detach() for n, t in tensors.items()}, gradients)


def train_rank(net: ParallelModule, name: str, rank: int) -> list[float]:
    """Train this rank's part on its own samples."""
    x, target = data(name)
    part = own_samples(net.plan, rank)
    share = (part.stop - part.start) / len(x) if net.plan.io == "per-rank" else 1 / net.plan.mesh.size
    return train(net, x[part], target[part], share)


def own_parts(plan: Plan, traced: TracedModel, position: int) -> dict[str, tuple[slice, ...]]:
    """Return which part of every parameter and buffer a rank holds."""
    graph = traced.layers
    found: dict[str, tuple[slice, ...]] = {}
    for layer in graph.layers:
        mine = layouts(layer, graph.inputs_of(layer), plan.mesh, plan.strategy[layer.id])
        for parameter, layout in zip(layer.params, mine.params, strict=True):
            region = layout.region(position)
            part = [slice(a, b) for a, b in zip(region.start, region.stop, strict=True)]
            if plan.stages[0].parameter_sharding != "none" and parameter.trainable and part:
                part[0] = own_rows(layout, position)
            found.setdefault(parameter.name, tuple(part))
    return found


def own_rows(layout: Layout, position: int) -> slice:
    """Return the rows of a sharded parameter on a rank, worked out rank by rank."""
    mesh, shared = layout.mesh, layout.axes_with(Whole.SHARED)
    group = next(group for group in mesh.groups(shared) if position in group)
    bounds = [(layout.region(p).start[0], layout.region(p).stop[0]) for p in range(mesh.size)]
    first, last = bounds[position]
    if min(b - a for a, b in bounds) < len(group):
        return slice(first, last)
    cuts = [first + (last - first) * i // len(group) for i in range(len(group) + 1)]
    i = group.index(position)
    return slice(cuts[i], cuts[i + 1])


def worst_difference(net: ParallelModule, traced: TracedModel, expected: Reference, position: int) -> float:
    """Return the largest relative difference of a rank's weights, buffers and gradients from one device's."""
    worst = 0.0
    gradients = {n: p.grad for n, p in net.named_parameters()}
    tensors = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    for name, part in own_parts(net.plan, traced, position).items():
        pairs = [(tensors[name].detach(), expected.tensors)]
        if name in expected.gradients:
            gradient = gradients[name]
            assert gradient is not None, f"{name} has no gradient"
            pairs.append((gradient, expected.gradients))
        for mine, everything in pairs:
            whole = everything[name]
            worst = max(worst, relative(mine, whole[part], _scale(whole, everything)))
    return worst


def _scale(whole: torch.Tensor, everything: dict[str, torch.Tensor]) -> float:
    """Return the largest value of a tensor, but at least a small share of the largest of all tensors.

    The gradient of a bias in front of a batch norm is zero; what is computed is rounding noise.
    """
    largest = max(float(t.abs().max()) for t in everything.values() if t.is_floating_point())
    return max(float(whole.abs().max()), NOISE_FLOOR * largest)


def relative(found: torch.Tensor, expected: torch.Tensor, scale: float) -> float:
    """Return the largest difference, relative to a scale."""
    assert found.shape == expected.shape, f"{tuple(found.shape)} instead of {tuple(expected.shape)}"
    if not expected.numel():
        return 0.0  # of a layer that the rank is idle in
    return float((found - expected).abs().max()) / scale


def on_threads(name: str, plan: Plan) -> float:
    """Return the largest relative difference from one device over all ranks."""
    expected = reference(name)

    def work(net: ParallelModule, traced: TracedModel, position: int) -> tuple[list[float], float]:
        losses = train_rank(net, name, plan.mesh.ranks[position])
        return losses, worst_difference(net, traced, expected, position)

    found = run_ranks(lambda: build(name), plan, work)
    losses = [sum(column) for column in zip(*(losses for losses, _ in found), strict=True)]
    return max(loss_difference(losses, expected), *(worst for _, worst in found))


def loss_difference(losses: list[float], expected: Reference) -> float:
    """Return the largest relative difference of the losses."""
    return max(abs(a - b) / abs(b) for a, b in zip(losses, expected.losses, strict=True))


def on_process(argument: dict[str, Any], process: Process) -> list[dict[str, Any]]:
    """Return, for each case, this rank's losses and largest difference; cases are net and plan text."""
    torch.set_num_threads(1)
    found = []
    references: dict[str, Reference] = {}
    for case in argument["cases"]:
        name, plan = case["net"], Plan.from_json(case["plan"])
        expected = references.setdefault(name, reference(name))
        model = build(name)
        traced = trace_for(model, plan)
        net = parallelize(model, plan)
        losses = train_rank(net, name, process.rank)
        position = plan.mesh.ranks.index(process.rank)
        found.append({"losses": losses, "worst": worst_difference(net, traced, expected, position)})
    return found
