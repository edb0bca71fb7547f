"""Every operator under every legal split, computed piece by piece, against the whole operator."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from planner.frontend.lower import trace_layers
from planner.ir import ops
from planner.ir.graph import Layer, LayerGraph
from planner.ir.layout import Layout, Whole
from planner.ir.mesh import Mesh
from planner.ir.rules import InputOutput, LayerLayouts, layouts, legal_splits, reduced_axes
from planner.ir.split import Dimension, Split
from planner.ir.transfer import steps
from support import interpreter

MESHES = (Mesh.of(gpu=3), Mesh.of(node=2, gpu=2))

BIAS = "0.bias"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Pieces of a few elements are faster without a pool of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


Local = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Case:
    """A module with one layer under test.

    Attributes:
        module: computes the whole.
        shapes: of its inputs.
        local: from local inputs and local parameters to what one rank computes, without bias.
    """

    module: nn.Module
    shapes: tuple[tuple[int, ...], ...]
    local: Local


class One(nn.Module):
    """A module around a function of one tensor."""

    def __init__(self, function: Local) -> None:
        super().__init__()
        self._function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._function(x)


class Two(One):
    """A module around a function of two tensors."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:  # type: ignore[override]  # one more
        return self._function(x, y)


def conv(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, *space: int) -> Case:
    function = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}[len(space)]

    def local(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        groups = x.shape[1] // weight.shape[1]
        return function(x, weight, None, module.stride, module.padding, module.dilation, groups)

    return Case(nn.Sequential(module.double()), ((6, module.in_channels, *space),), local)


def linear(module: nn.Linear, *before: int) -> Case:
    return Case(nn.Sequential(module.double()), ((*before, module.in_features),), functional.linear)


def pure(function: Local, *shapes: tuple[int, ...]) -> Case:
    return Case((One if len(shapes) == 1 else Two)(function), shapes, function)


def normalise(x: torch.Tensor, *params: torch.Tensor) -> torch.Tensor:
    weight, bias, mean, variance = params
    return functional.batch_norm(x, mean, variance, weight, bias, False)


IMAGE = (6, 8, 5, 4)
CASES = {
    "conv1d": conv(nn.Conv1d(4, 6, 3), 9),
    "conv2d": conv(nn.Conv2d(6, 8, 3, padding=1), 6, 5),
    "conv3d": conv(nn.Conv3d(4, 5, 2, bias=False), 3, 4, 3),
    "strided conv": conv(nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0)), 7, 5),
    "dilated conv": conv(nn.Conv2d(4, 6, 3, dilation=2, padding=2), 7, 7),
    "grouped conv": conv(nn.Conv2d(8, 12, 3, groups=4), 5, 5),
    "depthwise conv": conv(nn.Conv2d(6, 6, 3, groups=6), 5, 5),
    "depthwise conv with two outputs a channel": conv(nn.Conv2d(6, 12, 3, groups=6), 5, 5),
    "conv with uneven channels": conv(nn.Conv2d(5, 7, 1), 3, 3),
    "linear": linear(nn.Linear(12, 10), 6),
    "linear over the last of three": linear(nn.Linear(6, 8), 6, 5),
    "batch norm": Case(nn.Sequential(nn.BatchNorm2d(8).double()), (IMAGE,), normalise),
    "batch norm of vectors": Case(nn.Sequential(nn.BatchNorm1d(8).double()), ((6, 8),), normalise),
    "max pool": pure(lambda x: functional.max_pool2d(x, 3, 2, 1), IMAGE),
    "max pool rounded up": pure(lambda x: functional.max_pool2d(x, 2, ceil_mode=True), IMAGE),
    "average pool": pure(lambda x: functional.avg_pool2d(x, 3, 2, 1), IMAGE),
    "adaptive pool": pure(lambda x: functional.adaptive_avg_pool2d(x, (2, 3)), IMAGE),
    "mean over space": pure(lambda x: x.mean((2, 3)), IMAGE),
    "flatten": pure(lambda x: x.flatten(1), IMAGE),
    "flatten of uneven channels": pure(lambda x: x.flatten(1), (6, 5, 3, 2)),
    "relu": pure(torch.relu, IMAGE),
    "relu of a vector": pure(torch.relu, (6,)),
    "add": pure(torch.add, IMAGE, IMAGE),
    "softmax over channels": pure(lambda x: x.softmax(1), (6, 8)),
    "log softmax over rows": pure(lambda x: functional.log_softmax(x, dim=2), IMAGE),
    "concat of channels": pure(lambda x, y: torch.cat((x, y), 1), IMAGE, (6, 3, 5, 4)),
    "concat of columns": pure(lambda x, y: torch.cat((x, y), -1), IMAGE, (6, 8, 5, 2)),
}  # fmt: skip


def whole_layer(case: Case) -> tuple[LayerGraph, Layer]:
    traced = trace_layers(case.module, tuple(torch.empty(s, dtype=torch.float64, device="meta") for s in case.shapes))
    (layer,) = (x for x in traced.layers.layers if not isinstance(x.op, ops.Input | ops.Output))
    return traced.layers, layer


def torch_piece(tensor: torch.Tensor, layout: Layout, position: int) -> torch.Tensor:
    return torch.from_numpy(interpreter.cut(tensor.detach().numpy(), layout, position).copy())


def values_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


@dataclass(frozen=True)
class Operand:
    """A tensor that an operator reads, whole, and how the ranks hold it."""

    whole: torch.Tensor
    layout: Layout
    differentiable: bool

    def piece(self, position: int) -> torch.Tensor:
        found = torch_piece(self.whole, self.layout, position)
        return found.requires_grad_(self.differentiable)


def operands(case: Case, layer: Layer, mine: LayerLayouts, inputs: Sequence[torch.Tensor]) -> list[Operand]:
    """Return what the operator reads; the bias of a product is added later."""
    values = values_of(case.module)
    late = set() if isinstance(layer.op, ops.BatchNorm) else {BIAS}
    params = [
        Operand(values[p.name], layout, p.trainable)
        for p, layout in zip(layer.params, mine.params, strict=True)
        if p.name not in {*late, "0.num_batches_tracked"}
    ]
    return [*(Operand(x, at, True) for x, at in zip(inputs, mine.inputs, strict=True)), *params]


def bias_of_rank(case: Case, layer: Layer, mine: LayerLayouts, position: int) -> interpreter.Array | float:
    """Return a rank's piece of the bias of a product, shaped to be added to its output."""
    for parameter, layout in zip(layer.params, mine.params, strict=True):
        if parameter.name == BIAS and isinstance(layer.op, ops.Conv | ops.Linear):
            piece = torch_piece(values_of(case.module)[BIAS], layout, position).numpy()
            space = 0 if isinstance(layer.op, ops.Linear) else len(layer.output.shape) - 2
            return piece.reshape(-1, *[1] * space)
    return 0.0


def randomised(case: Case) -> list[torch.Tensor]:
    """Give the parameters and buffers of a case random values; return random inputs."""
    torch.manual_seed(0)
    for value in values_of(case.module.eval()).values():
        if value.is_floating_point():
            value.data.uniform_(0.5, 2)
    return [torch.randn(s, dtype=torch.float64) for s in case.shapes]


every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
every_mesh = pytest.mark.parametrize("mesh", MESHES, ids=lambda mesh: "x".join(map(str, mesh.shape)))


@every_mesh
@every_case
def test_the_pieces_of_all_ranks_give_the_whole(case: Case, mesh: Mesh) -> None:
    graph, layer = whole_layer(case)
    inputs = randomised(case)
    expected = case.module(*inputs).detach().numpy()
    splits = legal_splits(layer, graph, mesh, InputOutput.PER_RANK, Dimension)
    assert len(splits) == len(set(splits)) > 1
    for split in splits:
        mine = layouts(layer, graph.inputs_of(layer), mesh, split)
        read = operands(case, layer, mine, inputs)
        pieces = [case.local(*(operand.piece(p) for operand in read)).detach().numpy() for p in range(mesh.size)]
        interpreter.check_shapes(pieces, mine.computed)
        resolved = interpreter.run(steps(mine.computed, mine.output), pieces)
        assert not mine.output.axes_with(Whole.PARTIAL)
        for position, found in enumerate(resolved):
            whole = found + bias_of_rank(case, layer, mine, position)
            wanted = interpreter.cut(expected, mine.output, position)
            np.testing.assert_allclose(whole, wanted, rtol=1e-9, atol=1e-9, err_msg=str(split))


@every_mesh
@every_case
def test_the_gradients_of_all_ranks_give_the_whole(case: Case, mesh: Mesh) -> None:
    """Gradients are addends over SHARED axes and pieces or equal copies elsewhere."""
    graph, layer = whole_layer(case)
    inputs = randomised(case)
    for split in legal_splits(layer, graph, mesh, InputOutput.PER_RANK, Dimension):
        mine = layouts(layer, graph.inputs_of(layer), mesh, split)
        read = operands(case, layer, mine, inputs)
        wholes = [o.whole.detach().clone().requires_grad_(o.differentiable) for o in read]
        output = case.local(*wholes)
        upstream = torch.randn(output.shape, dtype=torch.float64)
        expected = gradients(output, wholes, upstream)
        found = []
        for p in range(mesh.size):
            local = [operand.piece(p) for operand in read]
            found.append(gradients(case.local(*local), local, torch_piece(upstream, mine.computed, p)))
        for k, layout in enumerate([o.layout for o in read if o.differentiable]):
            whole = Layout(layout.shape, mesh, (Whole.EQUAL,) * len(mesh.axes), layout.cuts)
            for joined in interpreter.run(steps(layout.gradient, whole), [g[k] for g in found]):
                np.testing.assert_allclose(joined, expected[k], rtol=1e-9, atol=1e-9, err_msg=str(split))


def gradients(
    output: torch.Tensor, operands: Sequence[torch.Tensor], upstream: torch.Tensor
) -> list[interpreter.Array]:
    wanted = [x for x in operands if x.requires_grad]
    return [g.numpy() for g in torch.autograd.grad(output, wanted, upstream)]


@every_mesh
def test_a_mean_loss_is_the_sum_of_the_shares_of_the_samples(mesh: Mesh) -> None:
    case = pure(functional.mse_loss, (7, 5), (7, 5))
    graph, layer = whole_layer(case)
    inputs = [torch.randn(7, 5, dtype=torch.float64) for _ in range(2)]
    expected = functional.mse_loss(inputs[0], inputs[1]).numpy()
    for split in legal_splits(layer, graph, mesh, InputOutput.PER_RANK, Dimension):
        mine = layouts(layer, graph.inputs_of(layer), mesh, split)
        read = operands(case, layer, mine, inputs)
        shares = [
            (case.local(*local) * local[0].shape[0] / 7).detach().numpy()
            for local in ([operand.piece(p) for operand in read] for p in range(mesh.size))
        ]
        for found in interpreter.run(steps(mine.computed, mine.output), shares):
            np.testing.assert_allclose(found, expected, err_msg=str(split))


SAMPLE, OUT, IN = Dimension.SAMPLE, Dimension.OUT_CHANNEL, Dimension.IN_CHANNEL
SCATTER, REPLICATE = Dimension.IN_CHANNEL_SCATTER, Dimension.REPLICATE


def legal(name: str, mesh: Mesh) -> set[tuple[Dimension, ...]]:
    graph, layer = whole_layer(CASES[name])
    return {s.dimensions for s in legal_splits(layer, graph, mesh, InputOutput.PER_RANK, Dimension)}


@pytest.mark.parametrize(
    ("name", "dimensions"),
    [
        ("conv2d", {SAMPLE, OUT, IN, SCATTER, REPLICATE}),
        ("linear", {SAMPLE, OUT, IN, SCATTER, REPLICATE}),
        ("grouped conv", {SAMPLE, OUT, REPLICATE}),
        ("depthwise conv", {SAMPLE, OUT, REPLICATE}),
        ("batch norm", {SAMPLE, OUT, REPLICATE}),
        ("max pool", {SAMPLE, OUT, REPLICATE}),
        ("adaptive pool", {SAMPLE, OUT, REPLICATE}),
        ("flatten", {SAMPLE, OUT, REPLICATE}),
        ("add", {SAMPLE, OUT, REPLICATE}),
        ("relu of a vector", {SAMPLE, REPLICATE}),
        ("softmax over channels", {SAMPLE, REPLICATE}),
        ("log softmax over rows", {SAMPLE, OUT, REPLICATE}),
        ("concat of channels", {SAMPLE, REPLICATE}),
        ("concat of columns", {SAMPLE, OUT, REPLICATE}),
    ],
)
def test_the_dimensions_of_an_operator(name: str, dimensions: set[Dimension]) -> None:
    assert legal(name, Mesh.of(gpu=2)) == {(d,) for d in dimensions}


def test_splits_that_leave_a_rank_empty_are_absent() -> None:
    assert (OUT,) in legal("conv with uneven channels", Mesh.of(gpu=4))  # 7 is 2, 2, 2, 1
    assert (IN,) not in legal("conv with uneven channels", Mesh.of(gpu=4))  # 5 is 2, 2, 1 and nothing
    assert (SAMPLE,) not in legal("linear", Mesh.of(gpu=7))
    assert (SAMPLE, SAMPLE) not in legal("linear", Mesh.of(node=2, gpu=4))


def test_groups_are_never_cut() -> None:
    assert (OUT,) not in legal("grouped conv", Mesh.of(gpu=3))  # 4 groups are 2, 2 and nothing
    assert (OUT, OUT) in legal("grouped conv", Mesh.of(node=2, gpu=2))
    assert (OUT, OUT) not in legal("grouped conv", Mesh.of(node=4, gpu=2))  # 8 ranks, 4 groups


def test_allowed_dimensions_restrict_the_space_but_never_exclude_replicas() -> None:
    graph, layer = whole_layer(CASES["conv2d"])
    found = legal_splits(layer, graph, Mesh.of(gpu=2), InputOutput.PER_RANK, {SAMPLE})
    assert [s.dimensions for s in found] == [(SAMPLE,), (REPLICATE,)]


def test_parameters_are_synchronised_where_samples_are_split() -> None:
    graph, layer = whole_layer(CASES["conv2d"])
    mesh = Mesh.of(node=2, gpu=2)
    wanted = {
        (SAMPLE, OUT): ((Whole.SHARED, 0), (Whole.SHARED, 0)),
        (SAMPLE, IN): ((Whole.SHARED, 1), (Whole.SHARED, Whole.EQUAL)),
        (SAMPLE, SCATTER): ((Whole.SHARED, 1), (Whole.SHARED, 0)),
        (REPLICATE, SAMPLE): ((Whole.EQUAL, Whole.SHARED), (Whole.EQUAL, Whole.SHARED)),
    }
    for dimensions, (weight, bias) in wanted.items():
        mine = layouts(layer, graph.inputs_of(layer), mesh, Split.of(mesh, dimensions))
        assert [p.placements for p in mine.params] == [weight, bias]


def test_batch_norm_statistics_are_sums_over_the_axes_of_samples() -> None:
    mesh = Mesh.of(node=2, gpu=2)
    assert reduced_axes(Split.of(mesh, (OUT, SAMPLE))) == (1,)
    assert reduced_axes(Split.of(mesh, (REPLICATE, IN))) == ()
