"""Layer graphs: shared transfers, digests, FLOPs against torch's counter, gradient buckets."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from planner.frontend.lower import trace_layers
from planner.frontend.source import load_model
from planner.ir import ops
from planner.ir.bucket import Bucket, fill_buckets
from planner.ir.count import gradient_flow, total_flop, work
from planner.ir.graph import Layer, LayerGraph
from planner.ir.split import LayerId
from planner.ir.tensor import TensorSpec
from planner.models import entry


def meta(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")


def counted(module: nn.Module, x: torch.Tensor) -> tuple[int, int]:
    """Return torch's count of forward and backward FLOP."""
    with FlopCounterMode(display=False) as forward:
        output = module(x)
    with FlopCounterMode(display=False) as backward:
        output.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("name", ["alexnet", "digits-cnn", "lenet5", "resnet18", "vgg11_bn"])
def test_flop_of_the_papers_networks_are_torchs(name: str) -> None:
    with torch.device("meta"):
        module = entry(name).build()
    x = meta(4, *entry(name).input_shape)
    assert total_flop(trace_layers(module, (x,)).layers) == counted(module, x)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Sequential(nn.Conv1d(3, 4, 3), nn.ReLU(), nn.Conv1d(4, 5, 2, stride=2)), (2, 3, 12)),
        (nn.Sequential(nn.Conv3d(2, 4, 3, dilation=2), nn.Conv3d(4, 2, 1)), (2, 2, 7, 8, 9)),
        (nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3)), (2, 5, 6)),
    ],
)
def test_flop_of_other_ranks_are_torchs(module: nn.Module, shape: tuple[int, ...]) -> None:
    module, x = module.to("meta"), meta(*shape)
    assert total_flop(trace_layers(module, (x,)).layers) == counted(module, x)


def test_frozen_parameters_need_no_weight_gradient() -> None:
    with torch.device("meta"):
        module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3))
    x = meta(2, 3, 8, 8)
    for frozen in (module[3].weight, module[0].weight):
        frozen.requires_grad_(False)
        assert total_flop(trace_layers(module, (x,)).layers) == counted(module, x)


class Scaled(nn.Module):
    """A frozen convolution whose result is scaled by what is trained, and branches without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)
        self.frozen.requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(4, 1, 1))
        self.teacher = nn.utils.spectral_norm(nn.Conv2d(3, 5, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.head(self.frozen(x) * self.scale)
        return y - self.head(y.detach().repeat(1, 1, 2, 2)[:, :4, :6, :6]).mean() + self.teacher(x)


def test_gradients_are_counted_where_there_are_some() -> None:
    module, x = Scaled().to("meta"), meta(2, 3, 8, 8)
    assert total_flop(trace_layers(module, (x,)).layers) == counted(module, x)


def test_a_layer_behind_which_the_gradient_ends_has_no_backward() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), Detached(), nn.Conv2d(4, 5, 3)).to("meta")
    x = meta(2, 3, 8, 8)
    graph = trace_layers(module, (x,)).layers
    assert [a.op for a in graph[LayerId("0")].absorbed] == [ops.Elementwise("detach")]
    assert total_flop(graph) == counted(module, x)
    assert gradient_flow(graph) == {"input": False, "0": False, "2": True, "output": True}


class Detached(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.detach()


def test_backward_of_grouped_convolutions_is_torchs_with_the_groups_it_forgets() -> None:
    groups = 4
    with torch.device("meta"):
        module = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 16, 3, groups=groups))
    x = meta(2, 3, 8, 8)
    forward, backward = total_flop(trace_layers(module, (x,)).layers)
    first = 2 * 2 * 8 * 64 * 3
    second = 2 * 2 * 16 * 36 * (8 // groups) * 9
    assert (forward, backward) == (first + second, first + 2 * second)
    assert counted(module, x) == (forward, first + (1 + groups) * second)


def test_the_gradient_flows_from_the_first_trainable_parameter_on() -> None:
    module = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(3, 4, 3), nn.MaxPool2d(2))
    graph = trace_layers(module, (meta(2, 3, 12, 12),)).layers
    assert gradient_flow(graph) == {
        "input": False,
        "0": False,
        "1": True,
        "2": True,
        "output": True,
    }


def test_views_and_redistribute_touch_no_memory() -> None:
    spec = TensorSpec((2, 8))
    reshape = ops.Reshape(((0, 1, 0, 1), (1, 3, 1, 2)))
    for op in (reshape, ops.Permute((1, 0)), ops.Redistribute(), ops.Output(), ops.Elementwise("identity")):
        layer = Layer(LayerId("a"), op, (LayerId("x"),), spec)
        found = work(layer, [(2, 4, 2)], (2, 8), [], input_gradient=True)
        assert (found.forward_elements, found.backward_elements, found.kernels) == (0, 0, 0)


class Inception(nn.Module):
    """Four branches of one tensor, joined."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.a = nn.Conv2d(8, 4, 1)
        self.b = nn.Sequential(nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 6, 3, padding=1))
        self.c = nn.Conv2d(8, 2, 5, padding=2)
        self.d = nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.Conv2d(8, 4, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return torch.cat([self.a(x), self.b(x), self.c(x), self.d(x)], 1)


def kinds(graph: LayerGraph) -> list[str]:
    return [layer.op.kind for layer in graph.layers]


def test_the_branches_of_an_inception_block_share_one_redistribute_layer() -> None:
    graph = trace_layers(Inception(), (meta(2, 3, 8, 8),)).layers
    assert kinds(graph).count("redistribute") == 1
    shared = LayerId("stem:shared")
    assert graph[shared].inputs == ("stem",)
    readers = [layer.id for layer in graph.layers if shared in layer.inputs]
    assert readers == ["a", "b.0", "c", "d.0"]
    assert graph[LayerId("cat")].inputs == ("a", "b.2", "c", "d.1")


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.conv(x)
        return torch.relu(x + x), x


def test_outputs_of_the_model_read_the_tensor_itself() -> None:
    graph = trace_layers(Residual(), (meta(2, 4, 8, 8),)).layers
    assert graph[LayerId("output.1")].inputs == ("conv",)
    assert graph[LayerId("add")].inputs == ("conv",)  # once: the output does not count as a second reader
    assert kinds(graph) == ["input", "conv", "elementwise", "output", "output"]


def test_a_tensor_with_one_reader_has_no_redistribute_layer() -> None:
    with torch.device("meta"):
        module = entry("vgg11").build()
    graph = trace_layers(module, (meta(2, 3, 224, 224),)).layers
    assert "redistribute" not in kinds(graph)


def test_the_digest_follows_the_operators_and_not_the_place_of_the_code(tmp_path: Path) -> None:
    def digest(name: str, kernel: int, blank_lines: int) -> str:
        path = tmp_path / name
        net = f"def net():\n    return nn.Sequential(nn.Conv2d(3, 4, {kernel}))\n"
        path.write_text("from torch import nn\n" + "\n" * blank_lines + net)
        return trace_layers(load_model(f"{path}:net").module, (meta(2, 3, 8, 8),)).layers.digest

    assert digest("a.py", 3, 0) == digest("b.py", 3, 7)
    assert digest("a.py", 3, 0) != digest("c.py", 5, 0)


def test_the_digest_follows_everything_else_that_costs_depend_on() -> None:
    graph = trace_layers(Inception(), (meta(2, 3, 8, 8),)).layers
    assert replace(graph, name="another").digest == graph.digest
    assert trace_layers(Inception(), (meta(4, 3, 8, 8),)).layers.digest != graph.digest
    frozen = Inception()
    frozen.a.weight.requires_grad_(False)
    assert trace_layers(frozen, (meta(2, 3, 8, 8),)).layers.digest != graph.digest


def test_layers_come_after_what_they_read_and_have_their_own_ids() -> None:
    a = Layer(LayerId("a"), ops.Input(), (), TensorSpec((2,)))
    b = Layer(LayerId("b"), ops.Output(), (LayerId("a"),), TensorSpec((2,)))
    with pytest.raises(ValueError, match="before they are made"):
        LayerGraph("net", (b, a), 2)
    with pytest.raises(ValueError, match="appears twice"):
        LayerGraph("net", (a, a), 2)


def test_x_plus_x_has_one_edge() -> None:
    graph = trace_layers(Residual(), (meta(2, 4, 8, 8),)).layers
    assert graph.nx().number_of_edges(LayerId("conv"), LayerId("add")) == 1
    assert len(list(graph.edges())) == graph.nx().number_of_edges()


@pytest.mark.parametrize(
    ("gradients", "expected"),
    [
        ([], []),
        ([("a", 4), ("a", 4), ("a", 4)], [("a", (0, 1, 2))]),
        ([("a", 6), ("a", 6), ("a", 6)], [("a", (0, 1)), ("a", (2,))]),
        ([("a", 99), ("a", 1)], [("a", (0,)), ("a", (1,))]),
        ([("a", 5), ("b", 5), ("a", 5), ("b", 1)], [("a", (0, 2)), ("b", (1, 3))]),
        ([("a", 5), ("b", 10), ("a", 1)], [("b", (1,)), ("a", (0, 2))]),
        ([("a", 1), ("b", 1), ("c", 1), ("a", 1)], [("b", (1,)), ("c", (2,)), ("a", (0, 3))]),
    ],
)
def test_a_bucket_is_closed_as_soon_as_it_holds_the_limit(
    gradients: list[tuple[str, int]], expected: list[tuple[str, tuple[int, ...]]]
) -> None:
    assert fill_buckets(gradients, 10) == tuple(Bucket(key, items) for key, items in expected)


@settings(max_examples=200, deadline=None)
@given(
    kernel=st.integers(1, 5), stride=st.integers(1, 2), padding=st.integers(0, 4), dilation=st.integers(1, 3),
    after=st.sampled_from([None, 0, 1]),
)  # fmt: skip
def test_a_convolution_keeps_the_size_where_torch_says_so(
    kernel: int, stride: int, padding: int, dilation: int, after: int | None
) -> None:
    behind = None if after is None else (after,)
    op = ops.Conv(1, 1, (kernel,), (stride,), (padding,), (dilation,), padding_after=behind)
    sizes = range(dilation * (kernel - 1) + 1, 40)
    conv = nn.Conv1d(1, 1, kernel, stride, padding, dilation, device="meta")
    keeps = after is None and all(conv(meta(1, 1, n)).shape[-1] == n for n in sizes)
    assert op.keeps_size == keeps
