"""Modules of the user's own with a rule of their own."""

import pytest
import torch
from torch import nn

from planner.api import Options, Origin, machine_of, prepare
from planner.errors import TraceError, UsageError
from planner.frontend.custom import register_module
from planner.frontend.lower import TracedModel, trace_layers
from planner.ir.dimension import Dimension
from planner.ir.ops import Custom
from planner.ir.rules import effects
from runtime.parallel import ParallelModule
from support.equality import own_parts, run_ranks

BATCH = 4


class Gate(nn.Module):
    """Decides by values, channel by channel, what fx cannot trace."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.rand(channels, 1, 1)), nn.Parameter(torch.rand(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale + self.shift if x.abs().max().item() > 0 else x


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gate, self.fc = nn.Conv2d(3, 6, 3, padding=1), Gate(6), nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.gate(self.conv(x)).mean((2, 3)))


@pytest.fixture
def gates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("planner.frontend.custom._RULES", {})
    register_module(Gate, dimensions=("out_channel",), channel_params={"scale": 0}, output_shape=lambda x: x)


def build() -> nn.Module:
    torch.manual_seed(0)
    return Net().double()


def example() -> torch.Tensor:
    return torch.randn(BATCH, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_without_a_rule_it_is_refused_with_the_way_out() -> None:
    with pytest.raises(TraceError, match="register_module"):
        trace_layers(build(), (example(),))


@pytest.mark.usefixtures("gates")
def test_a_registered_module_is_one_layer_with_its_dimensions() -> None:
    graph = trace_layers(build(), (example(),)).layers
    (layer,) = (x for x in graph.layers if isinstance(x.op, Custom))
    assert layer.id == "gate"
    assert layer.op == Custom("Gate", (Dimension.OUT_CHANNEL,))
    assert set(effects(layer.op, graph.inputs_of(layer), layer.output)) == {
        Dimension.REPLICATE, Dimension.SAMPLE, Dimension.OUT_CHANNEL,
    }  # fmt: skip
    assert {p.role: (p.out_dim, p.whole) for p in layer.params} == {"scale": (0, False), "shift": (None, True)}


@pytest.mark.usefixtures("gates")
@pytest.mark.parametrize("solver", ["data", "model", "conv-data-fc-model", "model-in"])
def test_a_registered_module_equals_one_device_under_every_split(solver: str) -> None:
    model, x = build(), example()
    model(x).square().mean().backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    plan = prepare(build(), (x,), machine_of(devices=2), Options(solver=solver), Origin()).plan()

    def work(net: ParallelModule, traced: TracedModel, position: int) -> None:
        net(x[position * 2 : position * 2 + 2]).square().mean().backward()
        parts = own_parts(plan, traced, position)
        for name, parameter in net.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[name][parts[name]], rtol=1e-9, atol=1e-12)

    run_ranks(build, plan, work)


def test_a_rule_with_an_unknown_dimension_is_refused() -> None:
    with pytest.raises(UsageError, match=r"\['height'\]"):
        register_module(Gate, dimensions=("height",))
