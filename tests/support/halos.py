"""Small convolutional networks cut in space, against one device, in float64."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import nn

from planner.api import Options, Origin, Planner, machine_of, prepare
from planner.frontend.lower import TracedModel
from planner.ir.dimension import Dimension
from planner.ir.rules import layouts
from planner.ir.split import LayerId, Split
from planner.ir.transfer import is_halo
from planner.models.cosmoflow import cosmoflow
from planner.models.resnet import Bottleneck, imagenet_resnet
from planner.models.unet3d import unet3d
from planner.plan import Plan
from runtime.comm.communicator import ThreadCommunicator
from runtime.launch import Process
from runtime.module import ParallelModule
from runtime.parallel import parallelize, trace_for
from support.equality import own_parts, run_ranks
from support.random_plans import DIMENSIONS, plan_with

TOLERANCE = 1e-12

VOLUME: Final = 128 if os.environ.get("LAYERWISE_FULL") else 64
"""Of CosmoFlow."""


class TwoSizes(nn.Module):
    """One convolution on two tensors of different sizes, as the heads of a detector."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.head = nn.Conv2d(4, 4, 3, padding=1)
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.head(x).sum((2, 3)) + self.head(self.pool(x)).sum((2, 3))


def _convolutions(dims: int, **options: Any) -> nn.Module:
    conv: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    norm: Any = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
    first = {k: v for k, v in options.items() if k != "groups"}
    return nn.Sequential(conv(2, 4, **first), norm(4), nn.ReLU(), conv(4, 4, **options), nn.Tanh())


@dataclass(frozen=True)
class Case:
    """A network, its input, and the dimensions that the axes of the mesh cut."""

    input_shape: tuple[int, ...]
    mesh: str
    cut: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    network: Callable[[], nn.Module] | None = None
    tolerance: float = TOLERANCE

    def build(self) -> nn.Module:
        """Return the network with fixed weights."""
        torch.manual_seed(0)
        made = self.network() if self.network else _convolutions(len(self.input_shape) - 2, **self.options)
        return made.double()

    def batches(self) -> list[torch.Tensor]:
        """Return the planned batch, and a larger one of small networks."""
        return [self.data(), *([self.data(self.input_shape[0] + 3)] if self.tolerance == TOLERANCE else [])]

    def data(self, batch: int | None = None) -> torch.Tensor:
        """Return a batch of the planned size, or another one."""
        generator = torch.Generator().manual_seed(1)
        shape = (batch or self.input_shape[0], *self.input_shape[1:])
        return torch.randn(shape, generator=generator, dtype=torch.float64)


CASES: dict[str, Case] = {
    "reaches past the next neighbour": Case((2, 2, 8), "gpu=4", ("length",), {"kernel_size": 7, "padding": 3}),
    "dilation reaches past the next": Case(
        (1, 2, 8, 5), "gpu=4", ("height",), {"kernel_size": 3, "padding": 4, "dilation": 4}
    ),
    "corners, uneven": Case((2, 2, 9, 11), "gpu=2x2", ("height", "width"), {"kernel_size": 3, "padding": 1}),
    "two neighbours, dilation": Case(
        (2, 2, 19, 6), "gpu=3", ("height",), {"kernel_size": 3, "padding": 2, "dilation": 2, "groups": 2}
    ),
    "even kernel, dilation": Case(
        (2, 2, 9, 6), "gpu=2x2", ("height", "width"), {"kernel_size": 2, "padding": 1, "dilation": 2}
    ),
    "corners, no padding, groups": Case(
        (2, 2, 12, 13), "gpu=2x2", ("height", "width"), {"kernel_size": (3, 5), "groups": 2}
    ),
    "both axes cut the height": Case((1, 2, 18, 6), "gpu=2x2", ("height", "height"), {"kernel_size": 3}),
    "gaps between windows": Case((2, 2, 41, 7), "gpu=4", ("height",), {"kernel_size": 2, "stride": 3}),
    "strides, depthwise": Case(
        (2, 2, 30, 9), "gpu=3", ("height",), {"kernel_size": 5, "stride": 2, "padding": 2, "groups": 4}
    ),
    "volumes": Case((1, 2, 10, 7, 6), "gpu=2x2", ("depth", "height"), {"kernel_size": 3, "padding": 1}),
    "volumes with strides, samples apart": Case(
        (4, 2, 13, 5, 4), "gpu=2x2", ("sample", "depth"), {"kernel_size": 3, "stride": 2, "padding": 1}
    ),
    "channels beside rows": Case((2, 2, 8, 6), "gpu=2x2", ("out_channel", "height"), {"kernel_size": 3}),
    "padding on one side more": Case((2, 2, 9, 8), "gpu=2", ("height",), {"kernel_size": 4, "padding": "same"}),
    "one convolution, two sizes": Case((2, 2, 14, 6), "gpu=2", ("height",), network=TwoSizes),
}

NETWORKS = {
    "resnet50": Case(
        (2, 3, 64, 64), "gpu=2x2x2", ("sample", "height", "width"),
        network=lambda: imagenet_resnet(Bottleneck, (3, 4, 6, 3), width=0.0625, num_classes=5), tolerance=1e-8,
    ),
    "cosmoflow": Case(
        (2, 4, VOLUME, VOLUME, VOLUME), "gpu=2x2", ("sample", "depth"),
        network=lambda: _certain(cosmoflow(0.0625, size=VOLUME)),
        tolerance=1e-9,
    ),
    "unet3d": Case(
        (2, 1, 16, 16, 16), "gpu=2x2", ("sample", "depth"), network=lambda: unet3d(0.0625), tolerance=1e-8,
    ),
}  # fmt: skip


def _certain(net: nn.Module) -> nn.Module:
    """Return a network without dropout: its masks are not those of one device."""
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return net


def planner_for(case: Case) -> Planner:
    """Return the planner of a network on equal devices, all of which are used; every rank passes everything."""
    num_ranks = math.prod(int(factor) for factor in case.mesh.partition("=")[2].split("x"))
    options = Options(dimensions=DIMENSIONS, all_devices=True, io="global", mesh=case.mesh)
    return prepare(case.build(), (case.data(),), machine_of(devices=num_ranks), options, Origin("halo", "halo"))


def spatial_plan(planner: Planner, wanted: Sequence[str], overlapped: bool) -> Plan:
    """Return the plan that cuts every layer as wanted, or as much so as is legal."""
    (mesh,) = planner.meshes()
    space, graph = planner.space(mesh), planner.traced.layers
    names = [axis.name for axis in mesh.axes]
    strategy: dict[LayerId, Split] = {}

    def rank(split: Split) -> tuple[int, int]:
        own = dict(split.axes)
        fits = sum(own.get(name) == Dimension(dim) for name, dim in zip(names, wanted, strict=True))
        return fits, split.dimensions.count(Dimension.REPLICATE)

    for i, (layer, leader) in enumerate(zip(graph.layers, space.leaders, strict=True)):
        lead = graph.layers[leader].id
        strategy[layer.id] = strategy[lead] if leader != i else max(space.splits[layer.id], key=rank)
    plan = plan_with(planner, mesh, space.io, strategy, lambda n: n - 1)
    return plan.with_overlap({layer.id for layer in graph.layers} if overlapped else set())


@dataclass(frozen=True)
class Result:
    """Outputs, input gradients and parameters' gradients of passes with batches of several sizes."""

    outputs: list[torch.Tensor]
    inputs: list[torch.Tensor]
    gradients: dict[str, torch.Tensor]
    buffers: dict[str, torch.Tensor]


def passes(net: nn.Module, batches: Sequence[torch.Tensor]) -> Result:
    """Run forward and backward once for each batch; gradients of parameters add up."""
    outputs, inputs = [], []
    for x in batches:
        given = x.clone().requires_grad_()
        y = net(given)
        weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)
        (y * y * weights).mean().backward()
        assert given.grad is not None
        outputs.append(y.detach())
        inputs.append(given.grad)
    gradients = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
    return Result(outputs, inputs, gradients, {n: b.detach() for n, b in net.named_buffers()})


def reference(case: Case) -> Result:
    """Return what one device computes."""
    return passes(case.build(), case.batches())


def differences(
    net: ParallelModule, traced: TracedModel, position: int, case: Case, expected: Result
) -> dict[str, float]:
    """Return what differs on a rank from one device."""
    found = passes(net, case.batches())
    parts = own_parts(net.plan, traced, position)
    pairs = {f"output {k}": pair for k, pair in enumerate(zip(found.outputs, expected.outputs, strict=True))}
    pairs |= {f"input {k}": pair for k, pair in enumerate(zip(found.inputs, expected.inputs, strict=True))}
    for mine, whole in ((found.gradients, expected.gradients), (found.buffers, expected.buffers)):
        assert set(mine) == set(whole)
        pairs |= {name: (mine[name], t[parts[name]] if name in parts else t) for name, t in whole.items()}
    each = {name: float((a - b).abs().max() / b.abs().max().clamp(min=1e-3)) for name, (a, b) in pairs.items()}
    return {name: value for name, value in each.items() if not value < case.tolerance}


def on_threads(case: Case, plan: Plan, communicator: Any = ThreadCommunicator) -> list[dict[str, float]]:
    """Return what differs on every rank; the ranks are threads."""
    expected = reference(case)
    return run_ranks(
        case.build, plan, lambda net, traced, position: differences(net, traced, position, case, expected), communicator
    )


def on_process(argument: dict[str, Any], process: Process) -> list[dict[str, float]]:
    """Return, for each case, what differs on this rank; cases are names and texts of plans."""
    torch.set_num_threads(1)
    found = []
    for each in argument["cases"]:
        case, plan = CASES[each["case"]], Plan.from_json(each["plan"])
        model = case.build()
        traced = trace_for(model, plan)
        net = parallelize(model, plan)
        found.append(differences(net, traced, plan.mesh.ranks.index(process.rank), case, reference(case)))
    return found


def num_halos(planner: Planner, plan: Plan) -> int:
    """Return how many layers of a plan get rows of neighbours by themselves."""
    graph = planner.traced.layers
    of = {x.id: layouts(x, graph.inputs_of(x), plan.mesh, plan.strategy[x.id]) for x in graph.layers}
    convs = [x for x in graph.layers if x.op.kind == "conv"]
    return sum(is_halo(of[x.inputs[0]].output, of[x.id].inputs[0]) for x in convs)
