"""Tracing and lowering: every spelling, what each operator can be split by, what is refused and why, and that the graph
computes what eager does."""

import copy
import operator
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional

from planner.errors import TraceError
from planner.frontend.batch import PROBE
from planner.frontend.lower import trace_layers
from planner.frontend.trace import on_meta, trace
from planner.ir import ops
from planner.ir.dimension import Dimension
from planner.ir.graph import Layer, LayerGraph, tied_layers
from planner.ir.rules import effects
from planner.ir.split import LayerId
from planner.models import entry

IMAGE = (4, 8, 6, 6)


class Net(nn.Module):
    """Modules by name around a forward that is given as a function."""

    def __init__(self, forward: Callable[..., object], **modules: nn.Module) -> None:
        super().__init__()
        self.forward_function = forward
        for name, module in modules.items():
            self.add_module(name, module)


class OneInput(Net):
    def forward(self, x: torch.Tensor) -> object:
        return self.forward_function(self, x)


class TwoInputs(Net):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> object:
        return self.forward_function(self, x, y)


def net(forward: Callable[..., object], **modules: nn.Module) -> nn.Module:
    return OneInput(forward, **modules)


def conv() -> nn.Conv2d:
    return nn.Conv2d(8, 8, 1)


def layers(module: nn.Module, *shapes: tuple[int, ...]) -> LayerGraph:
    inputs = tuple(torch.empty(shape, device="meta") for shape in shapes or (IMAGE,))
    return trace_layers(module, inputs).layers


def operators(graph: LayerGraph) -> list[tuple[object, ...]]:
    """Return operator, inputs by position and absorbed operators of every layer: all but the names."""
    return [
        (x.op, tuple(graph.index[i] for i in x.inputs), tuple(a.op for a in x.absorbed), x.output) for x in graph.layers
    ]


def assert_same(*spellings: Callable[..., object] | nn.Module, shape: tuple[int, ...] = IMAGE) -> ops.Op:
    """Assert that all spellings give the same layers; return the operator behind the input."""
    modules = [s if isinstance(s, nn.Module) else net(lambda _, x, s=s: s(x)) for s in spellings]
    graphs = [layers(nn.Sequential(module), shape) for module in modules]
    for graph in graphs[1:]:
        assert operators(graph) == operators(graphs[0])
    return graphs[0].layers[1].op


# ---- spellings


def test_relu() -> None:
    spellings = (
        nn.ReLU(),
        nn.ReLU(inplace=True),
        functional.relu,
        lambda x: functional.relu(x, True),
        functional.relu_,
        torch.relu,
        torch.relu_,
        lambda x: x.relu(),
        lambda x: x.relu_(),
    )
    assert assert_same(*spellings) == ops.Elementwise("relu")


def test_leaky_relu() -> None:
    assert_same(nn.LeakyReLU(0.2), lambda x: functional.leaky_relu(x, 0.2))


def test_sum_of_two() -> None:
    def iadd(x: torch.Tensor) -> torch.Tensor:
        y = x.sigmoid()
        y += x
        return y

    spellings = (
        lambda x: x.sigmoid() + x,
        lambda x: torch.add(x.sigmoid(), x),
        lambda x: x.sigmoid().add(x),
        lambda x: x.sigmoid().add_(x),
        lambda x: operator.add(x.sigmoid(), x),
        iadd,
    )
    assert_same(*spellings)


def test_quotient() -> None:
    def itruediv(x: torch.Tensor) -> torch.Tensor:
        x /= 2
        return x

    assert_same(lambda x: x / 2, lambda x: x.div(2), lambda x: torch.div(x, 2), itruediv)


def test_flatten() -> None:
    spellings = (
        nn.Flatten(),
        lambda x: x.flatten(1),
        lambda x: torch.flatten(x, 1),
        lambda x: x.view(x.size(0), -1),
        lambda x: x.reshape(x.shape[0], -1),
        lambda x: x.view(len(x), x.shape[1] * x.shape[2] * x.shape[3]),
        lambda x: torch.reshape(x, (-1, 8 * 36)),
    )
    assert assert_same(*spellings) == ops.Reshape(((0, 1, 0, 1), (1, 4, 1, 2)))


def test_order_of_dimensions() -> None:
    spellings = (
        lambda x: x.transpose(1, 2),
        lambda x: torch.swapaxes(x, -3, 2),
        lambda x: x.permute(0, 2, 1, 3),
        lambda x: torch.permute(x, (0, 2, 1, 3)),
        lambda x: x.movedim(1, 2),
    )
    assert assert_same(*spellings) == ops.Permute((0, 2, 1, 3))


def test_max_pool() -> None:
    spellings = (
        nn.MaxPool2d(3, 2, 1),
        lambda x: functional.max_pool2d(x, 3, 2, 1),
        lambda x: functional.max_pool2d(x, kernel_size=(3, 3), stride=(2, 2), padding=1),
        lambda x: torch.max_pool2d(x, 3, 2, 1),
    )
    assert isinstance(assert_same(*spellings), ops.Pool)


def test_pool_without_a_stride() -> None:
    assert_same(nn.MaxPool2d(2), nn.MaxPool2d(2, 2), lambda x: functional.max_pool2d(x, 2))
    assert_same(nn.AvgPool2d(2), lambda x: functional.avg_pool2d(x, 2), lambda x: functional.avg_pool2d(x, 2, stride=2))


def test_pools_over_one_and_three_dimensions() -> None:
    assert_same(nn.AvgPool1d(2), lambda x: functional.avg_pool1d(x, 2), shape=(4, 8, 6))
    assert_same(nn.MaxPool3d(2, 1), lambda x: functional.max_pool3d(x, 2, 1), shape=(4, 8, 6, 6, 6))


def test_mean_over_space() -> None:
    spellings = (
        nn.AdaptiveAvgPool2d(1),
        lambda x: functional.adaptive_avg_pool2d(x, (1, 1)),
        lambda x: x.mean((2, 3), keepdim=True),
        lambda x: torch.mean(x, [-1, -2], True),
    )
    assert assert_same(*spellings) == ops.AdaptivePool("avg", (1, 1))
    assert_same(lambda x: x.mean([2, 3]), lambda x: torch.mean(x, dim=(-2, -1)))


def test_adaptive_max_pool() -> None:
    assert_same(nn.AdaptiveMaxPool2d(2), lambda x: functional.adaptive_max_pool2d(x, 2))


def test_dropout() -> None:
    spellings = (
        nn.Dropout(0.3),
        nn.Dropout(0.3, inplace=True),
        lambda x: functional.dropout(x, 0.3),
        lambda x: functional.dropout(x, p=0.3, training=True, inplace=True),
        lambda x: torch.dropout(x, 0.3, True),
    )
    assert assert_same(*spellings) == ops.Dropout(0.3)
    assert_same(nn.Dropout2d(0.3), lambda x: functional.dropout2d(x, 0.3))


def test_dropout_that_is_switched_off_is_the_identity() -> None:
    assert assert_same(lambda x: functional.dropout(x, 0.3, False)) == ops.Elementwise("identity")


def test_concat() -> None:
    spellings = (
        lambda x: torch.cat([x, x], 1),
        lambda x: torch.cat((x, x), dim=-3),
        lambda x: torch.concat([x, x], dim=1),
        lambda x: torch.concatenate([x, x], 1),
    )
    assert_same(*spellings)


def test_softmax() -> None:
    spellings = (
        nn.Softmax(-1),
        lambda x: functional.softmax(x, 3),
        lambda x: torch.softmax(x, dim=-1),
        lambda x: x.softmax(3),
    )
    assert assert_same(*spellings) == ops.Softmax(3)
    assert_same(nn.LogSoftmax(1), lambda x: functional.log_softmax(x, dim=1), lambda x: x.log_softmax(1))


@pytest.mark.parametrize(
    ("module", "function"),
    [
        (nn.MSELoss(), functional.mse_loss),
        (nn.L1Loss(reduction="sum"), lambda x, y: functional.l1_loss(x, y, reduction="sum")),
    ],
)
def test_losses(module: nn.Module, function: Callable[..., torch.Tensor]) -> None:
    graphs = [
        layers(TwoInputs(lambda self, x, y: self.loss(x, y), loss=module), (4, 3), (4, 3)),
        layers(TwoInputs(lambda _, x, y: function(x, y)), (4, 3), (4, 3)),
    ]
    assert operators(graphs[0]) == operators(graphs[1])
    assert isinstance(graphs[0].layers[2].op, ops.Loss)


def test_a_loss_of_classes_reads_integers() -> None:
    inputs = torch.empty(4, 3), torch.empty(4, dtype=torch.int64)
    graphs = [
        trace_layers(TwoInputs(f, loss=nn.CrossEntropyLoss()), inputs).layers
        for f in (lambda self, x, y: self.loss(x, y), lambda _, x, y: functional.cross_entropy(x, y))
    ]
    assert operators(graphs[0]) == operators(graphs[1])
    assert graphs[0].layers[2].op == ops.Loss("cross_entropy", "mean")


# ---- what the layer graph says


def test_element_wise_operators_are_absorbed_by_the_layer_before_them() -> None:
    module = nn.Sequential(conv(), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.1), nn.Flatten())
    graph = layers(module)
    assert [x.id for x in graph.layers] == ["input", "0", "3", "5", "output"]
    assert [a.id for a in graph[LayerId("0")].absorbed] == ["1", "2"]
    assert [p.name for p in graph[LayerId("0")].params][:4] == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_batch_norm_over_another_dimension_than_the_channels_is_not_absorbed() -> None:
    graph = layers(nn.Sequential(nn.Linear(8, 5), nn.BatchNorm1d(6)), (4, 6, 8))
    assert [x.op.kind for x in graph.layers] == ["input", "linear", "batch_norm", "output"]


def test_a_module_called_twice_is_two_tied_layers() -> None:
    graph = layers(net(lambda self, x: self.a(self.a(x).relu()), a=conv()))
    assert [x.id for x in graph.layers] == ["x", "a", "a@2", "output"]
    assert tied_layers(graph) == (0, 1, 1, 3)
    assert graph.num_params == 72


def test_layers_that_share_a_weight_are_tied() -> None:
    first, second = conv(), conv()
    second.weight = first.weight
    graph = layers(nn.Sequential(first, second))
    assert tied_layers(graph) == (0, 1, 1, 3)
    assert graph.num_params == 64 + 8 + 8


def test_outputs_in_tuples_and_dicts_are_named_by_their_path() -> None:
    graph = layers(net(lambda self, x: {"main": self.a(x), "rest": (x.exp(), [x.neg()])}, a=conv()))
    names = [x.id for x in graph.layers if isinstance(x.op, ops.Output)]
    assert names == ["output.main", "output.rest.0", "output.rest.1.0"]


def test_layer_names_are_stable() -> None:
    def names() -> list[str]:
        return [x.id for x in layers(entry("resnet20").build(), (2, 3, 32, 32)).layers]

    assert names() == names()
    assert len(names()) == len(set(names()))


def test_origins_point_into_the_code_of_the_user() -> None:
    graph = layers(net(lambda self, x: self.a(x), a=conv()))
    assert graph[LayerId("a")].origin.startswith(f"{__file__}:")


# ---- what every operator can be split by


def dimensions(graph: LayerGraph, layer: str) -> str:
    """Return what a layer can be split by, beside replicas."""
    found = graph[LayerId(layer)]
    allowed = effects(found.op, graph.inputs_of(found), found.output)
    return " ".join(sorted(d for d in allowed if d is not Dimension.REPLICATE))


def only_layer(graph: LayerGraph) -> Layer:
    (found,) = (x for x in graph.layers if x.op.kind not in {"input", "output", "redistribute"})
    return found


CHANNELS = "in_channel in_channel_scatter out_channel"


@pytest.mark.parametrize(
    ("function", "op", "split_by"),
    [
        (torch.fft.fft, ops.PerSample("fft", 4 * 8 * 6 * 39), "sample"),  # 2.5 x 6 log2 6 for each row of six
        (torch.special.erfcx, ops.PerSample("special_erfcx"), "sample"),
        (functional.softmax, ops.PerSample("softmax"), "sample"),
        (lambda x: x.mean(0), ops.PerSample("mean"), ""),
        (lambda x: x.softmax(0), ops.PerSample("softmax"), ""),
        (lambda x: torch.roll(x, 1, 0), ops.PerSample("roll"), ""),
        (lambda x: x[1:], ops.PerSample("getitem"), ""),
        (lambda x: x.cumsum(2), ops.Along("cumsum", (2,)), "out_channel sample width"),
        (lambda x: x[:, 1:], ops.Along("slice", (1,)), "height sample width"),
        (lambda x: x.sum((2, 3)), ops.Reduce("sum", (2, 3), keepdim=False), "height out_channel sample width"),
        (lambda x: x.amax(1, keepdim=True), ops.Reduce("amax", (1,), keepdim=True), "height sample width"),
        (lambda x: torch.cat([x, x], 1), ops.Along("cat", (1,)), "height sample width"),
        (lambda x: x.transpose(1, 2), ops.Permute((0, 2, 1, 3)), "height out_channel sample width"),
        (nn.GroupNorm(2, 8), ops.GroupNorm(2, 8), "height out_channel sample width"),
        (nn.BatchNorm2d(8, affine=False), ops.BatchNorm(8), "height out_channel sample width"),
        (conv(), ops.Conv(8, 8, (1, 1), (1, 1), (0, 0), (1, 1)), f"height {CHANNELS} sample width"),
        (nn.Conv2d(8, 8, 1, groups=2), ops.Conv(8, 8, (1, 1), (1, 1), (0, 0), (1, 1), 2),
         "height out_channel sample width"),
        (nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"),
         ops.Conv(8, 8, (3, 3), (1, 1), (1, 1), (1, 1), padding_mode="circular"), f"height {CHANNELS} sample width"),
        (nn.Flatten(), ops.Reshape(((0, 1, 0, 1), (1, 4, 1, 2))), "out_channel sample"),
        (nn.utils.spectral_norm(conv()), ops.PerSample("Conv2d", 2 * 4 * 8 * 36 * 8, 2 * 4 * 8 * 36 * 8), "sample"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Implicit dimension choice")
def test_every_operator_is_a_layer_and_says_what_it_can_be_split_by(
    function: Callable[[torch.Tensor], object], op: ops.Op, split_by: str
) -> None:
    graph = layers(nn.Sequential(function if isinstance(function, nn.Module) else net(lambda _, x: function(x))))
    layer = only_layer(graph)
    assert layer.op == op
    assert dimensions(graph, layer.id) == split_by


def test_a_tensor_that_is_read_twice_by_one_operator_is_one_input() -> None:
    graph = layers(net(lambda _, x: x + x))
    assert graph.layers[1].inputs == ("x",)
    assert dimensions(graph, "add") == "height out_channel sample width"


def test_what_an_operator_mixes_is_not_split_and_later_readers_know() -> None:
    def forward(_: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        similarity = x @ x.t()
        return similarity.exp(), similarity.mean(1)

    graph = layers(net(forward), (4, 8))
    matmul, mean = graph[LayerId("matmul")], graph[LayerId("mean")]
    assert (matmul.op, mean.op) == (ops.PerSample("matmul", 2 * 16 * 8), ops.PerSample("mean"))
    assert (matmul.output.shape, matmul.output.roles, matmul.output.sample_rows) == ((4, 4), (None, None), 0)
    assert (mean.output.shape, mean.output.roles, mean.output.sample_rows) == ((4,), (None,), 0)
    behind = graph.layers[graph.index[matmul.id] :]
    assert {dimensions(graph, x.id) for x in behind} <= {"", "broadcast"}


def test_frames_that_are_folded_into_the_batch_are_rows_of_their_sample() -> None:
    graph = layers(net(lambda self, x: self.a(x.flatten(0, 1)).unflatten(0, (-1, 3)), a=conv()), (4, 3, *IMAGE[1:]))
    rows = {x.id: (x.output.shape[0], x.output.sample_rows) for x in graph.layers}
    assert rows == {"x": (4, 1), "flatten": (12, 3), "a": (12, 3), "unflatten": (4, 1), "output": (4, 1)}
    assert [dimensions(graph, x).split()[-2] for x in ("flatten", "a", "unflatten")] == ["sample"] * 3


def test_channels_and_space_keep_their_meaning_wherever_they_are_moved() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.a(x.permute(0, 2, 3, 1)).permute(2, 0, 3, 1).exp()

    graph = layers(net(forward, a=nn.Linear(8, 5)))
    roles = [" ".join(map(str, x.output.roles)) for x in graph.layers]
    assert roles[:3] == [
        "sample out_channel height width", "sample height width out_channel", "sample height width out_channel",
    ]  # fmt: skip
    assert roles[3] == "width sample out_channel height"
    assert dimensions(graph, "a") == f"height {CHANNELS} sample width"


# ---- parameters outside of layers


class Direct(nn.Module):
    """Parameters and a buffer that no module of torch owns, in a convolution and outside of one."""

    shift: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))
        self.weight, self.bias = nn.Parameter(torch.ones(5, 8, 1, 1)), nn.Parameter(torch.ones(5))
        self.register_buffer("shift", torch.ones(5, 1, 1))
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.conv2d(x * self.scale, self.weight, self.bias).relu() + self.shift
        return y.mean((2, 3)) * self.scale[:5]


def test_a_parameter_outside_of_a_layer_belongs_to_every_layer_that_reads_it() -> None:
    graph = layers(Direct())
    assert {x.id: [p.name for p in x.params] for x in graph.layers if x.params} == {
        "mul": ["scale"], "conv2d": ["weight", "bias", "shift"], "mul@2": ["scale"],
    }  # fmt: skip
    assert [graph.layers[i].id for i in tied_layers(graph)] == ["x", "mul", "conv2d", "mean", "mul", "output"]
    assert graph.num_params == 6 + 40 + 5


def test_only_operands_of_products_are_cut_with_the_channels() -> None:
    found = {p.name: p for p in layers(Direct())[LayerId("conv2d")].params}
    weight, bias, shift = found["weight"], found["bias"], found["shift"]
    assert (weight.role, weight.whole, weight.out_dim, weight.in_dim) == ("weight", False, 0, 1)
    assert (bias.role, bias.whole, bias.out_dim, bias.in_dim) == ("bias", False, 0, None)
    assert (shift.role, shift.whole, shift.out_dim, shift.trainable) == ("", True, None, False)


def test_what_a_weight_is_computed_from_is_whole_and_the_channels_are_not_split() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return functional.conv2d(x, self.a.weight - self.a.weight.mean((1, 2, 3), keepdim=True), self.a.bias)

    graph = layers(net(forward, a=conv()))
    layer = only_layer(graph)
    assert layer.op == ops.Conv(8, 8, (1, 1), (1, 1), (0, 0), (1, 1), computed_weight=True)
    assert [(p.name, p.role, p.whole, p.out_dim) for p in layer.params] == [
        ("a.weight", "", True, None), ("a.bias", "", True, None),
    ]  # fmt: skip
    assert dimensions(graph, layer.id) == "height sample width"


def test_parameters_of_modules_have_roles() -> None:
    graph = layers(nn.Sequential(conv(), nn.BatchNorm2d(8), nn.MaxPool2d(2), nn.GroupNorm(2, 8)))
    assert [(p.name, p.role, p.whole) for x in graph.layers for p in x.params] == [
        ("0.weight", "weight", False), ("0.bias", "bias", False),
        ("1.weight", "weight", False), ("1.bias", "bias", False),
        ("1.running_mean", "running_mean", False), ("1.running_var", "running_var", False),
        ("1.num_batches_tracked", "num_batches_tracked", False),
        ("3.weight", "weight", True), ("3.bias", "bias", True),
    ]  # fmt: skip


# ---- sizes, arguments


def test_arithmetic_with_sizes_is_concrete() -> None:
    def forward(_: nn.Module, x: torch.Tensor) -> torch.Tensor:
        half = x.shape[-1] // 2
        assert isinstance(half, int)
        if x.size(1) == 8 and x.dim() == 4 and len(x) > 3:
            x = functional.adaptive_avg_pool2d(x, half)
        for _times in range(x.shape[1] // 4):
            x = torch.relu(x)
        return x.view(x.size(0), x.numel() // x.size(0))

    graph = layers(net(forward))
    assert graph.layers[1].op == ops.AdaptivePool("avg", (3, 3))
    assert len(graph.layers[1].absorbed) == 2
    assert graph.layers[-1].output.shape == (4, 72)


class Defaults(nn.Module):
    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None, times: int = 2) -> torch.Tensor:
        return (x if mask is None else x * mask) * times


def test_arguments_with_defaults_need_no_input() -> None:
    assert operators(layers(Defaults()))[1][0] == ops.Elementwise("mul")
    graph = layers(Defaults(), IMAGE, IMAGE)
    assert [x.id for x in graph.layers if isinstance(x.op, ops.Input)] == ["x", "mask"]
    bound = fx.GraphModule(Defaults(), trace(Defaults(), (torch.empty(IMAGE),)))
    assert torch.equal(bound(torch.ones(3)), torch.full((3,), 2.0))


def test_attributes_that_are_tensors_are_operators() -> None:
    graph = trace(net(lambda _, x: x.T.relu()), (torch.empty(3, 5),))
    assert [tuple(n.meta["val"].shape) for n in graph.nodes if "val" in n.meta] == [
        (PROBE, 5), (5, PROBE), (5, PROBE),
    ]  # fmt: skip


# ---- in-place writes


def test_readers_behind_a_write_read_what_was_written() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        functional.relu_(y)
        return y * y.exp()

    graph = layers(net(forward, a=conv()))
    assert [a.op for a in graph[LayerId("a")].absorbed] == [ops.Elementwise("relu")]


def _written_through_an_alias(self: Any, x: torch.Tensor) -> torch.Tensor:
    y = self.a(x)
    before = y.sigmoid()
    z = self.identity(y)
    z += x
    return before + y + z


def _written_with_an_operator(self: Any, x: torch.Tensor) -> torch.Tensor:
    y = z = self.a(x)
    before = y.neg()
    z *= x
    y -= 1
    return before * z + y


@pytest.mark.parametrize("forward", [_written_through_an_alias, _written_with_an_operator])
def test_the_graph_without_shared_writes_computes_the_same(forward: Callable[..., torch.Tensor]) -> None:
    module = net(forward, a=conv(), identity=nn.Identity())
    x = torch.randn(IMAGE)
    traced = trace_layers(module, (x,))
    assert torch.equal(fx.GraphModule(module, traced.graph)(x.clone()), module(x.clone()))
    written = {n.args[0] for n in traced.graph.nodes if n.target in {operator.iadd, operator.imul, operator.isub}}
    order = {n: i for i, n in enumerate(traced.graph.nodes)}
    for node in written:  # the write is the last reader, so that it may be made out of place
        users = sorted(node.users, key=order.__getitem__)
        assert users[-1].target in {operator.iadd, operator.imul, operator.isub}


def test_a_write_into_a_tensor_of_which_a_view_is_read_later_is_refused() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        view = y.flatten(1)
        y.relu_()
        return view

    with pytest.raises(TraceError, match=r"test_trace\.py:\d+: 'relu_' writes in place .* 'flatten' is a view"):
        layers(net(forward, a=conv()))


# ---- refused


def _branches(_: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return x if x.sum() > 0 else x.neg()


@pytest.mark.parametrize(
    "forward",
    [
        _branches,
        lambda _, x: x * x.mean().item(),
        lambda _, x: x * float(x.mean()),
        lambda _, x: x * int(x.max()),
        lambda _, x: x * x.flatten().tolist()[0],
        lambda _, x: x[: x.argmax()],
        lambda _, x: [x for _ in range(x.argmax())],
    ],
)
def test_what_depends_on_values_is_refused_with_its_place(forward: Callable[..., object]) -> None:
    line = forward.__code__.co_firstlineno + (forward is _branches)
    with pytest.raises(TraceError) as caught:
        layers(net(forward))
    assert str(caught.value).startswith(f"{__file__}:{line}")


def test_a_wrong_shape_names_the_line_and_the_shapes() -> None:
    with pytest.raises(TraceError, match=r"test_trace\.py:\d+: .* fails on inputs of shape \(4, 3, 6, 6\)"):
        layers(net(lambda self, x: self.a(x), a=conv()), (4, 3, 6, 6))


def test_a_wrong_number_of_inputs_names_the_inputs() -> None:
    two = TwoInputs(lambda _, x, y: x + y)
    with pytest.raises(TraceError, match="takes the inputs x, y, but 1 were given"):
        layers(two)
    with pytest.raises(TraceError, match="takes the inputs x, y, but 3 were given"):
        layers(two, IMAGE, IMAGE, IMAGE)
    with pytest.raises(TraceError, match="at least one input"):
        trace_layers(net(lambda _, x: x), (torch.empty(()),))


def test_results_that_are_no_tensors_are_refused() -> None:
    with pytest.raises(TraceError, match="the model returns 3, which is not a tensor"):
        layers(net(lambda _, x: (x.relu(), 3)))


# ---- weights


class Small(nn.Module):
    """Batch norm, in-place writes, a residual, concat, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.norm, self.relu = nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.relu(self.norm(self.a(x)))
        y = self.norm(self.b(x))
        y += x
        pooled = torch.cat([functional.adaptive_avg_pool2d(t, 1) for t in (x, y)], 1).flatten(1)
        return {"classes": self.head(pooled), "pooled": pooled}


@pytest.mark.parametrize("build", [Small, entry("digits-cnn").build, lambda: entry("resnet20").build(width=0.25)])
def test_the_graph_on_real_weights_is_eager_bit_for_bit(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    eager = build()
    x = torch.randn(4, 1 if hasattr(eager, "features") else 3, 8, 8)
    other = copy.deepcopy(eager)
    bound = fx.GraphModule(other, trace_layers(other, (x,)).graph)
    found, wanted = (_trained(module, x) for module in (bound, eager))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def _trained(module: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return outputs, gradients and buffers of a forward and backward pass."""
    result = module(x)
    outputs = result if isinstance(result, dict) else {"output": result}
    sum(out.square().sum() for out in outputs.values()).backward()
    gradients = {f"gradient of {n}": p.grad for n, p in module.named_parameters() if p.grad is not None}
    return {**outputs, **gradients, **dict(module.named_buffers())}


def test_weights_are_never_materialised() -> None:
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(50_000, 50_000), nn.ReLU(), nn.Linear(50_000, 10))
    assert layers(module, (8, 50_000)).num_params > 2.5e9  # 10 GB


def test_a_real_module_is_neither_copied_nor_changed() -> None:
    module = nn.Sequential(conv(), nn.BatchNorm2d(8), nn.Sequential(conv()))
    module.eval()
    state = {name: value.clone() for name, value in module.state_dict().items()}
    copied = on_meta(module)
    assert all(t.is_meta for t in copied.state_dict().values())
    layers(module)
    assert not module.training
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


def test_copies_on_meta_keep_shared_weights_shared() -> None:
    first, second = conv(), conv()
    second.weight = first.weight
    copied = on_meta(nn.Sequential(first, second))
    assert copied[0].weight is copied[1].weight  # type: ignore[index]  # a sequence
    assert isinstance(copied[0].weight, nn.Parameter)  # type: ignore[index]  # see above


def test_a_subclass_that_keeps_the_forward_of_torch_is_that_operator() -> None:
    class MyConv(nn.Conv2d):
        """A convolution with another initialisation."""

    class MyBlock(nn.Sequential):
        """A container, which is no operator."""

    model = MyBlock(MyConv(3, 4, 3), nn.ReLU(), MyConv(4, 4, 1))
    layers = trace_layers(model, (torch.empty(2, 3, 8, 8),)).layers.layers
    assert [(layer.id, layer.op.kind) for layer in layers] == [
        ("input", "input"), ("0", "conv"), ("2", "conv"), ("output", "output"),
    ]  # fmt: skip


def test_threads_trace_and_run_at_the_same_time() -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(*(nn.Linear(8, 8) for _ in range(20)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.layers(x)
            return functional.scaled_dot_product_attention(y, y, y)

    plain, x = Attending(), torch.randn(2, 3, 8)
    expected, lengths, errors = plain(x), list[int](), list[BaseException]()
    begin, is_over = threading.Barrier(4), threading.Event()

    def trace_some() -> None:
        begin.wait()
        lengths.extend(len(trace(Attending(), (x,)).nodes) for _ in range(3))

    def run() -> None:
        begin.wait()
        while not is_over.is_set():
            assert torch.equal(plain(x), expected)

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in (trace_some, trace_some, trace_some, run)]
    for thread in threads:
        thread.start()
    for thread in threads[:-1]:
        thread.join()
    is_over.set()
    threads[-1].join()
    assert not errors
    assert len(lengths) == 9
    assert len(set(lengths)) == 1
    assert torch.equal(plain(x), expected)
