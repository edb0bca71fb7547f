"""What is timed is the operator that a network runs: same shapes, same gradients, for every kind."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from planner.api import Machine, Options, Origin, data_sheet_profile, prepare
from planner.devices.library import equal_devices
from planner.ir import ops as ir
from planner.ir.tensor import DType
from planner.measure.kernels import Kernel, Maker, kernel_of
from planner.profile.key import AbsorbedKey, LocalLayer, PieceKey
from runtime.measuring import norm_of_several_ranks

RELU = AbsorbedKey(ir.Elementwise("relu"))
PLANE = ((2, 4, 6, 6),)


def conv(**changes: object) -> ir.Conv:
    plain = ir.Conv(4, 6, (3, 3), (1, 1), (1, 1), (1, 1))
    return replace(plain, **changes)  # type: ignore[arg-type]  # fields of Conv


def piece(op: ir.Op, inputs: tuple[tuple[int, ...], ...], output: tuple[int, ...], **more: object) -> PieceKey:
    absorbed = more.pop("absorbed", ())
    return PieceKey(op, absorbed, inputs, output, **more)  # type: ignore[arg-type]  # fields of PieceKey


def kernel(key: PieceKey) -> Kernel | None:
    device = torch.device("cpu")
    make = Maker(device, getattr(torch, key.dtype), key.memory_format == "channels_last", torch.Generator(device))
    return kernel_of(key, make, norm_of_several_ranks)


def shapes(tensors: list[torch.Tensor]) -> list[tuple[int, ...]]:
    return [tuple(t.shape) for t in tensors]


NO_PARAMS: dict[str, object] = {"weight_gradient": False}
CASES = {
    "conv": (piece(conv(), PLANE, (2, 6, 6, 6), bias=True), [(6, 4, 3, 3), (6,)]),
    "conv without bias": (piece(conv(), PLANE, (2, 6, 6, 6), bias=False), [(6, 4, 3, 3)]),
    "conv of groups": (piece(conv(groups=2), PLANE, (2, 6, 6, 6), bias=False), [(6, 2, 3, 3)]),
    "depthwise": (piece(conv(out_channels=4, groups=4), PLANE, (2, 4, 6, 6), bias=False), [(4, 1, 3, 3)]),
    "strided conv": (piece(conv(stride=(2, 2)), PLANE, (2, 6, 3, 3), bias=False), [(6, 4, 3, 3)]),
    "conv padded on one side": (
        piece(conv(kernel=(2, 2), padding=(0, 0), padding_after=(1, 1)), PLANE, (2, 6, 6, 6), bias=False),
        [(6, 4, 2, 2)],
    ),
    "conv padded by reflection": (
        piece(conv(padding_mode="reflect"), PLANE, (2, 6, 6, 6), bias=False), [(6, 4, 3, 3)],
    ),
    "conv on rows with both neighbours": (
        piece(conv(), ((2, 4, 5, 6),), (2, 6, 3, 6), bias=False), [(6, 4, 3, 3)],
    ),
    "conv on the first rows": (piece(conv(), ((2, 4, 4, 6),), (2, 6, 3, 6), bias=False), [(6, 4, 3, 3)]),
    "conv1d": (
        piece(ir.Conv(4, 6, (3,), (1,), (0,), (1,)), ((2, 4, 8),), (2, 6, 6), bias=False), [(6, 4, 3)],
    ),
    "conv3d": (
        piece(ir.Conv(1, 2, (2,) * 3, (1,) * 3, (0,) * 3, (1,) * 3), ((2, 1, 4, 4, 4),), (2, 2, 3, 3, 3), bias=False),
        [(2, 1, 2, 2, 2)],
    ),
    "transposed conv": (
        piece(ir.ConvTranspose(4, 6, (2, 2), (2, 2), (0, 0), (0, 0), (1, 1)), PLANE, (2, 6, 12, 12), bias=True),
        [(4, 6, 2, 2), (6,)],
    ),
    "linear": (piece(ir.Linear(5, 3), ((4, 5),), (4, 3), bias=True), [(3, 5), (3,)]),
    "linear of tokens": (piece(ir.Linear(5, 3), ((4, 7, 5),), (4, 7, 3), bias=False), [(3, 5)]),
    "batch norm": (piece(ir.BatchNorm(4), PLANE, PLANE[0], synchronised=False), [(4,), (4,)]),
    "batch norm over ranks": (piece(ir.BatchNorm(4), PLANE, PLANE[0], synchronised=True), [(4,), (4,)]),
    "group norm": (piece(ir.GroupNorm(2, 4), PLANE, PLANE[0]), [(4,), (4,)]),
    "layer norm": (piece(ir.Along("layer_norm", (2,)), ((2, 3, 5),), (2, 3, 5)), [(5,), (5,)]),
    "glu": (piece(ir.Along("glu", (1,)), PLANE, (2, 2, 6, 6), **NO_PARAMS), []),
    "max pool": (piece(ir.Pool("max", (3, 3), (2, 2), (1, 1), (1, 1)), PLANE, (2, 4, 3, 3), **NO_PARAMS), []),
    "max pool of a last part": (
        piece(ir.Pool("max", (3, 3), (2, 2), (0, 0), (1, 1), ceil_mode=True), PLANE, (2, 4, 3, 3), **NO_PARAMS), [],
    ),
    "average pool": (piece(ir.Pool("avg", (2, 2), (2, 2), (0, 0), (1, 1)), PLANE, (2, 4, 3, 3), **NO_PARAMS), []),
    "average pool on the first rows": (
        piece(ir.Pool("avg", (3, 3), (1, 1), (1, 1), (1, 1)), ((2, 4, 4, 6),), (2, 4, 3, 6), **NO_PARAMS), [],
    ),
    "power pool": (piece(ir.Pool("lp", (2, 2), (2, 2), (0, 0), (1, 1)), PLANE, (2, 4, 3, 3), **NO_PARAMS), []),
    "adaptive pool": (piece(ir.AdaptivePool("avg", (2, 2)), PLANE, (2, 4, 2, 2), **NO_PARAMS), []),
    "largest of a plane": (piece(ir.AdaptivePool("max", (1, 1)), PLANE, (2, 4, 1, 1), **NO_PARAMS), []),
    "mean over space": (piece(ir.AdaptivePool("avg", ()), PLANE, (2, 4), **NO_PARAMS), []),
    "interpolation": (piece(ir.Interpolate("linear"), PLANE, (2, 4, 12, 12), **NO_PARAMS), []),
    "nearest neighbours": (piece(ir.Interpolate("nearest"), PLANE, (2, 4, 12, 12), **NO_PARAMS), []),
    "pixel shuffle": (piece(ir.PixelShuffle(2), PLANE, (2, 1, 12, 12), **NO_PARAMS), []),
    "pixel unshuffle": (piece(ir.PixelShuffle(2, unshuffle=True), PLANE, (2, 16, 3, 3), **NO_PARAMS), []),
    "sum of two": (piece(ir.Elementwise("add"), PLANE * 2, PLANE[0], **NO_PARAMS), []),
    "product with weights of channels": (
        piece(ir.Elementwise("mul"), (*PLANE, (2, 4, 1, 1)), PLANE[0], **NO_PARAMS), [],
    ),
    "sum with a number": (piece(ir.Elementwise("add"), PLANE, PLANE[0], **NO_PARAMS), []),
    "choice of three": (piece(ir.Elementwise("where"), PLANE * 3, PLANE[0], **NO_PARAMS), []),
    "dropout": (piece(ir.Dropout(0.5), PLANE, PLANE[0], **NO_PARAMS), []),
    "stochastic depth": (piece(ir.Dropout(0.5, "sample", rescale=False), PLANE, PLANE[0], **NO_PARAMS), []),
    "concatenation": (piece(ir.Concat(1), (*PLANE, (2, 3, 6, 6)), (2, 7, 6, 6), **NO_PARAMS), []),
    "softmax": (piece(ir.Softmax(1), ((2, 5),), (2, 5), **NO_PARAMS), []),
    "mean over channels": (piece(ir.Reduce("mean", (1,), keepdim=True), PLANE, (2, 1, 6, 6), **NO_PARAMS), []),
    "largest over space": (piece(ir.Reduce("max", (3,), keepdim=False), PLANE, (2, 4, 6), **NO_PARAMS), []),
    "permutation": (piece(ir.Permute((0, 2, 3, 1)), PLANE, (2, 6, 6, 4), **NO_PARAMS), []),
    "cross entropy": (piece(ir.Loss("cross_entropy", "mean"), ((4, 3),), (), **NO_PARAMS), []),
    "squares": (piece(ir.Loss("mse_loss", "sum"), ((4, 3), (4, 3)), (), **NO_PARAMS), []),
    "dropout behind a view": (
        piece(
            ir.Reshape(((0, 1, 0, 1), (1, 4, 1, 2))), PLANE, (2, 144), absorbed=(AbsorbedKey(ir.Dropout(0.5)),),
            **NO_PARAMS,
        ),
        [],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_kernel_makes_the_keys_output_and_every_gradient_that_is_asked(name: str) -> None:
    key, params = CASES[name]
    made = kernel(key)
    assert made is not None
    assert shapes(made.inputs) == list(key.inputs)
    assert shapes(made.params) == params
    (y,) = made.forward()
    assert tuple(y.shape) == key.output
    y.sum().backward()
    assert any(x.grad is not None for x in made.inputs)
    assert all(p.grad is not None for p in made.params)


@pytest.mark.parametrize(
    "name",
    [
        "relu", "relu6", "leaky_relu", "elu", "gelu", "silu", "mish", "hardswish", "hardsigmoid", "sigmoid", "tanh",
        "softplus", "threshold", "abs", "exp", "sqrt", "pow", "clamp", "prelu", "clone",
    ],
)  # fmt: skip
@pytest.mark.parametrize("is_absorbed", [False, True])
def test_element_wise_functions_are_their_own_and_not_relu(name: str, is_absorbed: bool) -> None:
    op = ir.Elementwise(name)
    key = piece(op, PLANE, PLANE[0], **NO_PARAMS)
    if is_absorbed:
        key = piece(ir.Concat(1), PLANE, PLANE[0], absorbed=(AbsorbedKey(op),), **NO_PARAMS)
    made = kernel(key)
    assert made is not None
    with torch.no_grad():
        made.inputs[0].copy_(torch.linspace(-2, 2, math.prod(PLANE[0])).view(PLANE[0]))
    (y,) = made.forward()
    x = made.inputs[0].detach()
    oracle = {
        "threshold": lambda: nn.functional.threshold(x, 0.1, 0.0), "pow": lambda: x**3, "clamp": lambda: x.clamp(0, 1),
        "prelu": lambda: torch.where(x > 0, x, 0.25 * x), "clone": lambda: x,
    }  # fmt: skip
    call = getattr(torch, name, None) or getattr(nn.functional, name)
    expected = oracle[name]() if name in oracle else call(x)
    torch.testing.assert_close(y.detach(), expected, equal_nan=True)


def test_absorbed_operators_run_in_order_behind_the_operator() -> None:
    norm = AbsorbedKey(ir.BatchNorm(6), weight_gradient=True)
    made = kernel(piece(conv(), PLANE, (2, 6, 6, 6), bias=False, absorbed=(norm, RELU), synchronised=False))
    assert made is not None
    assert shapes(made.params) == [(6, 4, 3, 3), (6,), (6,)]
    x, (weight, gain, shift) = made.inputs[0], made.params
    expected = nn.functional.batch_norm(
        nn.functional.conv2d(x, weight, padding=1), None, None, gain, shift, training=True
    ).relu()
    torch.testing.assert_close(made.forward()[0], expected)


def test_frozen_weights_have_no_gradient_and_a_frozen_norm_neither() -> None:
    norm = AbsorbedKey(ir.BatchNorm(6), weight_gradient=False)
    key = piece(conv(), PLANE, (2, 6, 6, 6), bias=True, absorbed=(norm,), synchronised=False, **NO_PARAMS)
    made = kernel(key)
    assert made is not None
    assert made.params == []
    assert made.forward()[0].requires_grad  # because of the inputs


def test_the_first_layer_has_no_gradient_of_its_inputs() -> None:
    made = kernel(piece(conv(), PLANE, (2, 6, 6, 6), bias=True, input_gradient=False))
    assert made is not None
    assert not made.inputs[0].requires_grad
    assert all(p.requires_grad for p in made.params)


def test_a_partial_sum_ends_one_part_and_its_resolved_piece_begins_another() -> None:
    key = piece(conv(), PLANE, (2, 6, 6, 6), bias=True, absorbed=(RELU,), resolved=(2, 3, 6, 6))
    made = kernel(key)
    assert made is not None
    assert shapes(made.params) == [(6, 4, 3, 3), (3,)]
    total, behind = made.forward()
    assert (tuple(total.shape), tuple(behind.shape)) == ((2, 6, 6, 6), (2, 3, 6, 6))
    torch.testing.assert_close(behind, (made.inputs[1] + made.params[1].view(-1, 1, 1)).relu())


def test_channels_last_reaches_inputs_and_weights() -> None:
    made = kernel(piece(conv(), PLANE, (2, 6, 6, 6), bias=True, memory_format="channels_last"))
    assert made is not None
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in (made.inputs[0], made.params[0]))
    assert made.forward()[0].is_contiguous(memory_format=torch.channels_last)


def test_half_precision_is_autocast_on_fp32_parameters() -> None:
    made = kernel(piece(conv(), PLANE, (2, 6, 6, 6), bias=True, dtype=DType.BFLOAT16, precision="bf16"))
    assert made is not None
    assert {p.dtype for p in made.params} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        (y,) = made.forward()
    assert (made.inputs[0].dtype, y.dtype) == (torch.bfloat16, torch.bfloat16)


@pytest.mark.parametrize(
    "op", [ir.PerSample("attention"), ir.Custom("Mine"), ir.Along("roll", (1,)), ir.Loss("x", "mean")]
)
def test_what_a_name_does_not_tell_has_no_kernel(op: ir.Op) -> None:
    assert kernel(piece(op, PLANE, PLANE[0], **NO_PARAMS)) is None


class _Network(nn.Module):
    """Layers of many kinds, under every split that a mesh of two allows."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, 2, 1, groups=8, bias=False)
        self.up = nn.ConvTranspose2d(8, 8, 2, 2)
        self.groups = nn.GroupNorm(4, 8)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.linear = nn.Linear(8 * 9, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.first(x)).relu()
        y = torch.sigmoid(self.up(self.depthwise(x)))
        x = self.groups(x * y) + x
        x = torch.cat([self.pool(x), nn.functional.avg_pool2d(x, 2)], 1)
        return self.linear(nn.functional.dropout((x[:, :8] + x[:, 8:]).flatten(1)))


@pytest.mark.parametrize("dims", ["sample", "out_channel", "in_channel", "in_channel_scatter", "height"])
def test_every_piece_of_a_network_has_the_shapes_of_its_layouts(dims: str) -> None:
    graph = equal_devices(2)
    machine = Machine(graph, data_sheet_profile(graph, "fp32"))
    options = Options(dimensions=frozenset({dims}))  # type: ignore[arg-type]  # a StrEnum
    planner = prepare(_Network(), (torch.empty(4, 4, 6, 6, device="meta"),), machine, options, Origin("n"))
    num_kernels = 0
    for found in planner.layer_pieces():
        made = kernel(found)
        if made is not None:
            num_kernels += 1
            y = made.forward()
            assert tuple(y[0].shape) == found.output, found
            torch.autograd.backward(y, [torch.ones_like(each) for each in y])
    assert num_kernels >= 10


def test_pieces_have_the_parameters_of_their_layouts() -> None:
    graph = equal_devices(2)
    machine = Machine(graph, data_sheet_profile(graph, "fp32"))
    planner = prepare(_Network(), (torch.empty(4, 4, 6, 6, device="meta"),), machine, Options(), Origin("n"))
    (mesh,) = planner.meshes()
    model, space = planner.cost_model(mesh), planner.space(mesh)
    num_seen = 0
    for layer in planner.traced.layers.layers:
        for split in space.splits[layer.id]:
            local: LocalLayer = model.local(layer, split)
            trained = [shape for shape, p in zip(local.params, layer.params, strict=True) if p.trainable]
            made = kernel(local.piece) if local.has_kernel else None
            if made is not None and trained and not any(p.whole for p in layer.params):
                num_seen += 1
                assert sorted(shapes(made.params)) == sorted(trained), (layer.id, split)
    assert num_seen > 10
