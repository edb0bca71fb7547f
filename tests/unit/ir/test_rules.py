"""Which splits of an operator are legal, and how its parameters are held.

That what a rule says is right is tested in tests/properties/test_rules.py.
"""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional

from planner.frontend.lower import trace_layers
from planner.ir import ops
from planner.ir.dimension import Dimension
from planner.ir.graph import Layer, LayerGraph
from planner.ir.layout import Whole
from planner.ir.mesh import Mesh
from planner.ir.rules import InputOutput, layouts, legal_splits, partition, reduced_axes
from planner.ir.split import LayerId, Split
from planner.ir.tensor import DType, TensorSpec


class Of(nn.Module):
    """A module around a function of its inputs."""

    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self._function = function

    def forward(self, *xs: torch.Tensor) -> torch.Tensor:
        return self._function(*xs)


IMAGE = (6, 8, 5, 4)
CASES: dict[str, tuple[nn.Module | Callable[..., torch.Tensor], *tuple[tuple[int, ...], ...]]] = {
    "conv1d": (nn.Conv1d(4, 6, 3), (6, 4, 9)),
    "conv2d": (nn.Conv2d(6, 8, 3, padding=1), (6, 6, 6, 5)),
    "conv3d": (nn.Conv3d(4, 5, 2), (6, 4, 3, 4, 3)),
    "reflecting conv": (nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"), (6, 6, 6, 5)),
    "grouped conv": (nn.Conv2d(8, 12, 3, groups=4), (6, 8, 5, 5)),
    "depthwise conv": (nn.Conv2d(6, 6, 3, groups=6), (6, 6, 5, 5)),
    "conv with uneven channels": (nn.Conv2d(5, 7, 1), (6, 5, 3, 3)),
    "transposed conv": (nn.ConvTranspose2d(6, 8, 2, 2), (6, 6, 5, 4)),
    "linear": (nn.Linear(12, 10), (6, 12)),
    "linear over columns": (nn.Linear(4, 7), IMAGE),
    "batch norm": (nn.BatchNorm2d(8), IMAGE),
    "group norm": (nn.GroupNorm(4, 8), IMAGE),
    "max pool": (nn.MaxPool2d(3, 2, 1), IMAGE),
    "adaptive pool": (nn.AdaptiveAvgPool2d((2, 3)), IMAGE),
    "mean over space": (lambda x: x.mean((2, 3)), IMAGE),
    "maximum over space": (nn.AdaptiveMaxPool2d(1), IMAGE),
    "bilinear": (nn.Upsample(scale_factor=2, mode="bilinear"), IMAGE),
    "bicubic": (nn.Upsample(scale_factor=2, mode="bicubic"), IMAGE),
    "flatten": (nn.Flatten(), IMAGE),
    "frames to samples": (lambda x: x.flatten(0, 1), (6, 3, 8, 5, 4)),
    "add": (torch.add, IMAGE, IMAGE),
    "relu of a vector": (torch.relu, (6,)),
    "softmax over channels": (nn.Softmax(1), (6, 8)),
    "log softmax over rows": (nn.LogSoftmax(2), IMAGE),
    "concat of channels": (lambda x, y: torch.cat((x, y), 1), IMAGE, (6, 3, 5, 4)),
    "concat of columns": (lambda x, y: torch.cat((x, y), -1), IMAGE, (6, 8, 5, 2)),
    "rows of a slice": (lambda x: x[:, :, 1:], IMAGE),
    "matrix product": (torch.matmul, IMAGE, (6, 8, 4, 3)),
    "sum over rows": (lambda x: x.sum(2), IMAGE),
    "deviation over rows": (lambda x: x.std(2), IMAGE),
    "loss": (functional.mse_loss, (6, 5), (6, 5)),
    "loss of images": (functional.l1_loss, IMAGE, IMAGE),
    "loss with factors of channels": (
        lambda x, y: functional.binary_cross_entropy_with_logits(x, y, pos_weight=torch.ones(8, 1, 1)),
        IMAGE,
        IMAGE,
    ),
}


def layer_of(name: str) -> tuple[LayerGraph, Layer]:
    called, *shapes = CASES[name]
    module = nn.Sequential(called) if isinstance(called, nn.Module) else Of(called)
    traced = trace_layers(module, tuple(torch.empty(s, device="meta") for s in shapes))
    (layer,) = (x for x in traced.layers.layers if not isinstance(x.op, ops.Input | ops.Output))
    return traced.layers, layer


SAMPLE, OUT, IN = Dimension.SAMPLE, Dimension.OUT_CHANNEL, Dimension.IN_CHANNEL
SCATTER, REPLICATE = Dimension.IN_CHANNEL_SCATTER, Dimension.REPLICATE
DEPTH, HEIGHT, WIDTH, LENGTH = Dimension.DEPTH, Dimension.HEIGHT, Dimension.WIDTH, Dimension.LENGTH


def legal(name: str, mesh: Mesh) -> set[tuple[Dimension, ...]]:
    graph, layer = layer_of(name)
    return {s.dimensions for s in legal_splits(layer, graph, mesh, InputOutput.PER_RANK, Dimension)}


@pytest.mark.parametrize(
    ("name", "dimensions"),
    [
        ("conv1d", {SAMPLE, OUT, IN, SCATTER, LENGTH}),
        ("conv2d", {SAMPLE, OUT, IN, SCATTER, HEIGHT, WIDTH}),
        ("conv3d", {SAMPLE, OUT, IN, SCATTER, DEPTH, HEIGHT, WIDTH}),
        ("reflecting conv", {SAMPLE, OUT, IN, SCATTER, HEIGHT, WIDTH}),
        ("grouped conv", {SAMPLE, OUT, HEIGHT, WIDTH}),
        ("depthwise conv", {SAMPLE, OUT, HEIGHT, WIDTH}),
        ("transposed conv", {SAMPLE, OUT, IN, SCATTER, HEIGHT, WIDTH}),
        ("linear", {SAMPLE, OUT, IN, SCATTER}),
        ("linear over columns", {SAMPLE, OUT, IN, SCATTER, HEIGHT}),
        ("batch norm", {SAMPLE, OUT, HEIGHT, WIDTH}),
        ("group norm", {SAMPLE, OUT, HEIGHT, WIDTH}),
        ("max pool", {SAMPLE, OUT, HEIGHT, WIDTH}),
        ("adaptive pool", {SAMPLE, OUT, HEIGHT, WIDTH}),
        ("mean over space", {SAMPLE, OUT, HEIGHT, WIDTH}),
        ("maximum over space", {SAMPLE, OUT}),
        ("bilinear", {SAMPLE, OUT, HEIGHT, WIDTH}),
        ("bicubic", {SAMPLE, OUT}),
        ("flatten", {SAMPLE, OUT}),
        ("frames to samples", {SAMPLE, DEPTH, HEIGHT, WIDTH}),
        ("add", {SAMPLE, OUT, HEIGHT, WIDTH}),
        ("relu of a vector", {SAMPLE}),
        ("softmax over channels", {SAMPLE}),
        ("log softmax over rows", {SAMPLE, OUT, WIDTH}),
        ("concat of channels", {SAMPLE, HEIGHT, WIDTH}),
        ("concat of columns", {SAMPLE, OUT, HEIGHT}),
        ("rows of a slice", {SAMPLE, OUT, WIDTH}),
        ("matrix product", {SAMPLE}),
        ("sum over rows", {SAMPLE, OUT, HEIGHT, WIDTH}),
        ("deviation over rows", {SAMPLE, OUT, WIDTH}),
        ("loss", {SAMPLE, OUT}),
        ("loss of images", {SAMPLE, OUT, HEIGHT, WIDTH}),
        ("loss with factors of channels", {SAMPLE}),
    ],
)
def test_the_dimensions_of_an_operator(name: str, dimensions: set[Dimension]) -> None:
    assert legal(name, Mesh.of(gpu=2)) == {(d,) for d in {*dimensions, REPLICATE}}


def test_a_loss_of_classes_is_split_by_all_but_the_classes_and_its_targets_are_cut_alike() -> None:
    x, target = TensorSpec((6, 8, 5, 4), DType.FLOAT32), TensorSpec((6, 5, 4), DType.INT64)
    loss = Layer(LayerId("loss"), ops.Loss("cross_entropy", "mean"), (), TensorSpec((), DType.FLOAT32, ()))
    found = partition(loss, (x, target), Mesh.of(gpu=2))
    assert set(found.effects) == {SAMPLE, HEIGHT, WIDTH, REPLICATE}
    mine = found.layouts(Split.of(found.mesh, (HEIGHT,)))
    assert mine.computed.placements == (Whole.PARTIAL,)
    assert [layout.pieces(dim) for layout, dim in zip(mine.inputs, (2, 1), strict=True)] == [((0, 2), (2, 5))] * 2


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
    graph, layer = layer_of("conv2d")
    found = legal_splits(layer, graph, Mesh.of(gpu=2), InputOutput.PER_RANK, {SAMPLE})
    assert [s.dimensions for s in found] == [(SAMPLE,), (REPLICATE,)]


def test_parameters_are_synchronised_where_samples_or_space_are_split() -> None:
    graph, layer = layer_of("conv2d")
    mesh = Mesh.of(node=2, gpu=2)
    wanted = {
        (SAMPLE, OUT): ((Whole.SHARED, 0), (Whole.SHARED, 0)),
        (SAMPLE, IN): ((Whole.SHARED, 1), (Whole.SHARED, Whole.EQUAL)),
        (SAMPLE, SCATTER): ((Whole.SHARED, 1), (Whole.SHARED, 0)),
        (REPLICATE, SAMPLE): ((Whole.EQUAL, Whole.SHARED), (Whole.EQUAL, Whole.SHARED)),
        (HEIGHT, IN): ((Whole.SHARED, 1), (Whole.SHARED, Whole.EQUAL)),
    }
    for dimensions, (weight, bias) in wanted.items():
        mine = layouts(layer, graph.inputs_of(layer), mesh, Split.of(mesh, dimensions))
        assert [p.placements for p in mine.params] == [weight, bias]


def test_what_works_behind_resolved_sums_needs_no_synchronisation() -> None:
    """A scale that a layer absorbed is whole on every rank: the sums are equal on all of them, or cut by channel."""
    module = nn.Sequential(nn.Conv2d(6, 8, 3), nn.PReLU())
    traced = trace_layers(module, (torch.empty(6, 6, 6, 5, device="meta"),))
    (layer,) = (x for x in traced.layers.layers if isinstance(x.op, ops.Conv))
    wanted = {IN: Whole.EQUAL, SCATTER: Whole.SHARED, OUT: Whole.SHARED, HEIGHT: Whole.SHARED}
    for dimension, placement in wanted.items():
        mine = layouts(layer, traced.layers.inputs_of(layer), Mesh.of(gpu=2), Split.of(Mesh.of(gpu=2), (dimension,)))
        assert mine.params[-1].placements == (placement,)


def test_batch_norm_statistics_are_sums_over_the_axes_of_samples_and_space() -> None:
    graph, layer = layer_of("batch norm")
    mesh = Mesh.of(node=2, gpu=2)
    wanted = {(OUT, SAMPLE): (1,), (HEIGHT, SAMPLE): (0, 1), (REPLICATE, OUT): ()}
    for dimensions, axes in wanted.items():
        mine = layouts(layer, graph.inputs_of(layer), mesh, Split.of(mesh, dimensions))
        assert reduced_axes(layer.output, mine.output) == axes
