"""Keys are equal where pieces take equally long, and different where they do not."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from planner.api import Machine, Options, Origin, Planner, data_sheet_profile, prepare
from planner.devices.library import equal_devices
from planner.ir import ops as ir
from planner.ir.dimension import Dimension
from planner.ir.split import Split
from planner.ir.tensor import DType
from planner.profile.key import AbsorbedKey, LocalLayer, PieceKey, family_of


def planner_of(module: nn.Module, shape: tuple[int, ...], devices: int = 1, **options: object) -> Planner:
    graph = equal_devices(devices)
    machine = Machine(graph, data_sheet_profile(graph, "fp32"))
    asked = Options(**options)  # type: ignore[arg-type]  # its fields
    return prepare(module, (torch.empty(shape, device="meta"),), machine, asked, Origin("n"))


def local(planner: Planner, index: int, dimension: Dimension | None = None) -> LocalLayer:
    (mesh, *_) = planner.meshes()
    layer = planner.traced.layers.layers[index]
    split = Split(tuple((axis.name, dimension) for axis in mesh.axes) if dimension else ())
    return planner.cost_model(mesh).local(layer, split)


def key_of(
    *modules: nn.Module, shape: tuple[int, ...] = (2, 4, 6, 6), behind: bool = False,
    memory_format: str = "contiguous", **options: object,
) -> str:  # fmt: skip
    """Return the key of the first module, or of the one behind a convolution."""
    first = [nn.Conv2d(shape[1], shape[1], 1)] if behind else []
    planner = planner_of(nn.Sequential(*first, *modules), shape, 1, **options)
    return replace(local(planner, 2 if behind else 1), memory_format=memory_format).key


def frozen(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False)


Make = Callable[[], nn.Module]
CONV: Make = lambda: nn.Conv2d(4, 6, 3)  # noqa: E731  # a table of modules
EQUAL: dict[str, tuple[list[Make], list[Make]]] = {
    "eps and momentum of a norm": (
        [CONV, lambda: nn.BatchNorm2d(6)], [CONV, lambda: nn.BatchNorm2d(6, eps=1e-3, momentum=0.01)],
    ),
    "probability of a dropout": ([CONV, lambda: nn.Dropout(0.5)], [CONV, lambda: nn.Dropout(0.2)]),
    "a dropout of nothing": ([CONV], [CONV, lambda: nn.Dropout(0.0)]),
    "an identity": ([CONV], [CONV, nn.Identity]),
    "in place or not": ([CONV, nn.ReLU], [CONV, lambda: nn.ReLU(inplace=True)]),
    "values of weights": ([CONV], [CONV]),
}  # fmt: skip
DIFFERENT: dict[str, tuple[list[Make], list[Make]]] = {
    "bias": ([CONV], [lambda: nn.Conv2d(4, 6, 3, bias=False)]),
    "training of weights": ([CONV], [lambda: frozen(CONV())]),
    "kernel": ([CONV], [lambda: nn.Conv2d(4, 6, 5)]),
    "padding": ([CONV], [lambda: nn.Conv2d(4, 6, 3, padding=1)]),
    "groups": ([CONV], [lambda: nn.Conv2d(4, 6, 3, groups=2)]),
    "channels": ([CONV], [lambda: nn.Conv2d(4, 8, 3)]),
    "the absorbed function": ([CONV, nn.ReLU], [CONV, nn.SiLU]),
    "that anything is absorbed": ([CONV], [CONV, nn.ReLU]),
    "the order of what is absorbed": (
        [CONV, lambda: nn.BatchNorm2d(6), nn.ReLU, nn.Sigmoid], [CONV, lambda: nn.BatchNorm2d(6), nn.Sigmoid, nn.ReLU],
    ),
    "training of an absorbed norm": (
        [CONV, lambda: nn.BatchNorm2d(6)], [CONV, lambda: frozen(nn.BatchNorm2d(6))],
    ),
    "what a dropout drops": ([CONV, lambda: nn.Dropout(0.5)], [CONV, lambda: nn.Dropout2d(0.5)]),
    "function of a pool": ([lambda: nn.MaxPool2d(2)], [lambda: nn.AvgPool2d(2)]),
}  # fmt: skip


@pytest.mark.parametrize("what", EQUAL)
def test_what_changes_values_only_is_no_part_of_a_key(what: str) -> None:
    one, other = EQUAL[what]
    assert key_of(*(make() for make in one)) == key_of(*(make() for make in other))


@pytest.mark.parametrize("what", DIFFERENT)
def test_what_changes_the_time_is_part_of_a_key(what: str) -> None:
    one, other = DIFFERENT[what]
    assert key_of(*(make() for make in one)) != key_of(*(make() for make in other))


@pytest.mark.parametrize(
    "other",
    [
        {"precision": "bf16"},
        {"precision": "tf32"},
        {"memory_format": "channels_last"},
        {"shape": (3, 4, 6, 6)},
        {"behind": True},
    ],
)
def test_keys_depend_on_precision_format_samples_and_the_gradient_of_inputs(other: dict[str, object]) -> None:
    assert key_of(CONV()) != key_of(CONV(), **other)  # type: ignore[arg-type]  # options of key_of


def test_memory_format_is_no_part_where_there_is_no_space() -> None:
    asked = {"shape": (2, 5), "memory_format": "channels_last"}
    assert key_of(nn.Linear(5, 3), shape=(2, 5)) == key_of(nn.Linear(5, 3), **asked)  # type: ignore[arg-type]


def test_the_bias_of_a_product_is_told_from_that_of_its_norm() -> None:
    without = local(planner_of(nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6)), (2, 4, 6, 6)), 1)
    beside = local(planner_of(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)), (2, 4, 6, 6)), 1)
    assert (without.piece.bias, beside.piece.bias) == (False, True)


def test_a_trained_bias_does_not_train_a_frozen_norm_or_weight() -> None:
    net = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6))
    net.requires_grad_(False)
    net[0].bias.requires_grad_(True)
    piece = local(planner_of(net, (2, 4, 6, 6)), 1).piece
    assert (piece.weight_gradient, piece.absorbed[0].weight_gradient) == (False, False)


def test_nothing_flows_back_through_a_detached_layer() -> None:
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.two(self.one(x).detach())

    planner = planner_of(Detached(), (2, 4, 6, 6))
    one, two = local(planner, 1).piece, local(planner, 2).piece
    assert (one.input_gradient, one.weight_gradient) == (False, False)
    assert (two.input_gradient, two.weight_gradient) == (False, True)


def test_a_piece_has_the_key_of_a_layer_of_its_size() -> None:
    piece = local(planner_of(nn.Linear(8, 6), (4, 8), 2), 1, Dimension.OUT_CHANNEL)
    assert piece.key == local(planner_of(nn.Linear(8, 3), (4, 8)), 1).key
    groups = local(planner_of(nn.Conv2d(8, 8, 3, groups=8), (4, 8, 6, 6), 2), 1, Dimension.OUT_CHANNEL)
    assert groups.key == local(planner_of(nn.Conv2d(4, 4, 3, groups=4), (4, 4, 6, 6)), 1).key


def test_norms_are_synchronised_where_ranks_hold_other_samples() -> None:
    def synchronised(dimension: Dimension, **options: object) -> bool | None:
        net = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6))
        return local(planner_of(net, (4, 4, 6, 6), 2, **options), 1, dimension).piece.synchronised

    assert synchronised(Dimension.SAMPLE) is True
    assert synchronised(Dimension.OUT_CHANNEL) is False
    assert synchronised(Dimension.SAMPLE, sync_batch_norm=False) is False
    assert local(planner_of(nn.Conv2d(4, 6, 3), (4, 4, 6, 6), 2), 1, Dimension.SAMPLE).piece.synchronised is None


def test_partial_sums_are_resolved_before_bias_and_absorbed_operators() -> None:
    planner = planner_of(nn.Sequential(nn.Conv2d(4, 6, 1), nn.Conv2d(6, 8, 1), nn.ReLU()), (4, 4, 6, 6), 2)
    plain, scattered = (local(planner, 2, d).piece for d in (Dimension.IN_CHANNEL, Dimension.IN_CHANNEL_SCATTER))
    assert (plain.inputs, plain.output, plain.resolved) == (((4, 3, 6, 6),), (4, 8, 6, 6), (4, 8, 6, 6))
    assert scattered.resolved == (4, 4, 6, 6)
    assert local(planner, 2, Dimension.SAMPLE).piece.resolved is None


# text


@pytest.mark.parametrize("model", ["alexnet", "resnet18"])
def test_a_key_is_read_back_as_it_was_written(model: str) -> None:
    from planner.api import example_inputs
    from planner.frontend.source import load_model

    loaded, graph = load_model(model), equal_devices(4)
    machine = Machine(graph, data_sheet_profile(graph, "fp32"))
    inputs = example_inputs(loaded.input_shapes, 32)
    for piece in prepare(loaded.module, inputs, machine, Options(), Origin("n")).layer_pieces():
        assert PieceKey.of_text(piece.text) == piece
        assert PieceKey.of_text(piece.text).text == piece.text


def test_plans_are_priced_contiguously_and_other_pieces_are_for_measuring_only() -> None:
    planner = planner_of(nn.Sequential(nn.Conv2d(4, 6, 1), nn.Flatten(), nn.Linear(216, 2)), (4, 4, 6, 6), 2)
    with pytest.raises(TypeError, match="memory_format"):
        Options(memory_format="channels_last")  # type: ignore[call-arg]
    plain, last = planner.layer_pieces(), planner.layer_pieces(memory_format="channels_last")
    assert {piece.memory_format for piece in plain} == {"contiguous"}
    assert {piece.memory_format for piece in last if len(piece.output) == 4} == {"channels_last"}
    assert [replace(piece, memory_format="contiguous") for piece in last] == plain


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Expecting property name"),
        ("[]", "is no key"),
        ('{"op":"conv"}', "is no key"),
        ('{"op":"gemm","attributes":{},"absorbed":[],"inputs":[],"output":[],"dtype":"float32"}', "no kind"),
        ('{"op":"softmax","attributes":{"dim":1},"absorbed":[],"inputs":[],"output":[2],"dtype":"x"}', "not a valid"),
    ],
)
def test_what_is_no_key_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PieceKey.of_text(text)


# families


def conv_piece(samples: int) -> PieceKey:
    return PieceKey(
        ir.Conv(4, 6, (3, 3), (1, 1), (1, 1), (1, 1)), (AbsorbedKey(ir.Elementwise("relu")),),
        ((samples, 4, 5, 5),), (samples, 6, 5, 5), bias=True,
    )  # fmt: skip


def test_pieces_that_differ_in_samples_only_are_one_family() -> None:
    names = {conv_piece(n).family[0] for n in (1, 2, 32)}  # type: ignore[index]  # they have one
    assert len(names) == 1
    assert family_of(conv_piece(32).text) == (names.pop(), 32)
    assert conv_piece(32).with_samples(4) == conv_piece(4)


def piece(op: ir.Op, inputs: tuple[tuple[int, ...], ...], output: tuple[int, ...]) -> PieceKey:
    return PieceKey(op, (), inputs, output, DType.FLOAT32, weight_gradient=False)


def test_broadcast_inputs_keep_their_sizes() -> None:
    scaled = piece(ir.Elementwise("mul"), ((8, 4, 5, 5), (1, 4, 1, 1), (5,)), (8, 4, 5, 5))
    assert scaled.with_samples(2).inputs == ((2, 4, 5, 5), (1, 4, 1, 1), (5,))


@pytest.mark.parametrize(
    "odd",
    [
        piece(ir.Concat(0), ((2, 3), (2, 3)), (4, 3)),
        piece(ir.Softmax(0), ((2, 3),), (2, 3)),
        piece(ir.Reduce("sum", (0,), keepdim=False), ((2, 3),), (3,)),
        piece(ir.Permute((1, 0)), ((2, 3),), (3, 2)),
        piece(ir.Along("flip", (0, 1)), ((2, 3),), (2, 3)),
        piece(ir.Reshape(((0, 2, 0, 1),)), ((2, 3),), (6,)),
        piece(ir.PerSample("attention"), ((2, 3),), (2, 3)),
        piece(ir.Loss("mse_loss", "mean"), ((2, 3),), ()),
    ],
)
def test_operators_that_look_at_several_samples_have_no_family(odd: PieceKey) -> None:
    assert (odd.samples, odd.family) == (None, None)
    with pytest.raises(ValueError, match="does not treat samples alone"):
        odd.with_samples(1)
