"""What one device does in training and evaluation beside arithmetic: history, modes, names, random numbers."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional

from planner.api import Options, Origin, machine_of, prepare
from planner.frontend.lower import TracedModel, trace_layers
from planner.ir.rules import effects
from planner.plan import Plan
from runtime.parallel import ParallelModule
from support.equality import own_parts, run_ranks

BATCH = 4
SOLVERS = ["data", "model", "conv-data-fc-model"]


class Net(nn.Module):
    """A convolution, what is tried, and a linear layer; one more that nobody reads."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.conv, self.inner, self.fc, self.unused = nn.Conv2d(3, 8, 3), inner, nn.Linear(8, 5), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.inner(self.conv(x)).mean((2, 3)))


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return self.norm(self.conv(x))


class Encoder(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=batch_first)
        self.inner = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x.flatten(2).transpose(1, 2)).transpose(1, 2)[..., None]


class MovingMean(nn.Module):
    mean: torch.Tensor

    def __init__(self, always: bool) -> None:
        super().__init__()
        self.always = always
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training or self.always:
            self.mean.mul_(0.9).add_(x.detach().mean((0, 2, 3)), alpha=0.1)
        return x - self.mean[:, None, None]


class Shaken(nn.Module):
    """Two shares of one random number for each sample, which add up to the whole."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        share = torch.rand(x.shape[0], 1, 1, 1, dtype=x.dtype, device=x.device)
        return share * x + (1 - share) * x


INNER: dict[str, Callable[[], nn.Module]] = {
    "without history": Frozen,
    "attention over the batch": lambda: Encoder(batch_first=False),
    "attention over rows": lambda: Encoder(batch_first=True),
    "statistics of instances": lambda: nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
    "a mean in training": lambda: MovingMean(always=False),
    "a mean": lambda: MovingMean(always=True),
    "random shares": Shaken,
}


def builder(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return Net(INNER[name]()).double()

    return build


def images() -> torch.Tensor:
    return torch.randn(BATCH, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def planned(name: str, solver: str) -> Plan:
    return prepare(builder(name)(), (images(),), machine_of(devices=2), Options(solver=solver), Origin()).plan()


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", INNER)
def test_gradients_buffers_names_and_evaluation_are_those_of_one_device(name: str, solver: str) -> None:
    model, x, plan = builder(name)(), images(), planned(name, solver)
    model(x).square().mean().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    evaluated = model.eval()(x)

    def work(net: ParallelModule, traced: TracedModel, position: int) -> None:
        part = slice(position * 2, position * 2 + 2)
        found = net(x[part])
        whole = found.shape[0] == BATCH  # behind what mixes samples
        found.square().mean().backward()
        parts = own_parts(plan, traced, position)
        assert set(net.state_dict()) == set(model.state_dict())
        assert {n for n, p in net.named_parameters() if p.grad is not None} == set(gradients)
        for key, parameter in net.named_parameters():
            if key in gradients:
                torch.testing.assert_close(parameter.grad, gradients[key][parts[key]], rtol=1e-9, atol=1e-12)
        for key, buffer in net.named_buffers():
            torch.testing.assert_close(buffer, buffers[key][parts[key]] if key in parts else buffers[key])
        net.eval()
        torch.testing.assert_close(net(x[part]), evaluated if whole else evaluated[part])

    run_ranks(builder(name), plan, work)


def test_a_random_number_for_each_sample_is_drawn_once() -> None:
    graph = trace_layers(builder("random shares")(), (images(),)).layers
    assert sum(layer.id.endswith("rand") for layer in graph.layers) == 1


def test_a_function_that_draws_follows_the_mode() -> None:
    class Dropped(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return functional.alpha_dropout(x, p=0.5, training=self.training)

    def build() -> nn.Module:
        torch.manual_seed(0)
        return Net(Dropped()).double()

    x = images()
    plan = prepare(build(), (x,), machine_of(devices=2), Options(solver="data"), Origin()).plan()
    expected = build().eval()(x)

    def work(net: ParallelModule, _: TracedModel, position: int) -> None:
        part = slice(position * 2, position * 2 + 2)
        assert not torch.equal(net(x[part]), net(x[part]))
        torch.testing.assert_close(net.eval()(x[part]), expected[part])

    run_ranks(build, plan, work)


def test_attention_over_the_batch_is_not_split_by_samples() -> None:
    graph = trace_layers(builder("attention over the batch")(), (images(),)).layers
    (layer,) = (x for x in graph.layers if x.id == "inner.inner")
    assert "sample" not in effects(layer.op, graph.inputs_of(layer), layer.output)
