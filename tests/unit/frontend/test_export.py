"""`torch.export` as the fallback of the tracer, and as its cross-check."""

import pytest
import torch
from torch import fx, nn
from torch.nn import functional

from planner.frontend.lower import TracedModel, trace_layers
from planner.ir import ops
from planner.ir.count import total_flop
from planner.models import entry
from support.binding import differences, observe, observe_graph
from support.networks import NETWORKS

IMAGE = (torch.zeros(4, 3, 16, 16),)


class Checked(nn.Module):
    """Asks whether its input is a tensor, which a proxy is not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"wanted a tensor, got a {type(x).__name__}")
        y = functional.relu(self.norm(self.conv(x)))
        return {"map": y, "scores": self.fc(y.mean((2, 3)).view(x.shape[0], -1))}


def products(traced: TracedModel) -> list[ops.Op]:
    return [layer.op for layer in traced.layers.layers if isinstance(layer.op, ops.Conv | ops.Linear | ops.BatchNorm)]


@pytest.mark.parametrize("batch", [4, 6])
def test_what_the_tracer_cannot_follow_is_traced_by_export(batch: int) -> None:
    torch.manual_seed(0)
    module = Checked()
    traced = trace_layers(module, IMAGE)
    assert traced.traced_by == "export"
    assert [type(op) for op in products(traced)] == [ops.Conv, ops.Linear]
    inputs = (torch.randn(batch, 3, 16, 16),)
    twin = Checked()
    twin.load_state_dict(module.state_dict())
    assert differences(observe_graph(traced, module, inputs, {}), observe(twin, inputs, {})) == []


def test_the_usual_way_is_the_tracer() -> None:
    assert trace_layers(nn.Sequential(nn.Conv2d(3, 4, 3)), IMAGE).traced_by == "fx"


@pytest.mark.parametrize("name", ["alexnet", "vgg11_bn", "resnet18", "lenet5"])
def test_both_ways_find_the_same_layers(name: str) -> None:
    known = entry(name)
    with torch.device("meta"):
        module = known.build()
    example = (torch.empty(8, *known.input_shape, device="meta"),)
    mine, exported = (trace_layers(module, example, tracer=way) for way in ("fx", "export"))
    assert products(mine) == products(exported)
    assert total_flop(mine.layers) == total_flop(exported.layers)
    assert len(mine.layers.layers) == len(exported.layers.layers)
    assert mine.layers.num_params == exported.layers.num_params
    kept = [sum(layer.saved_bytes for layer in x.layers.layers) for x in (mine, exported)]
    assert kept[0] == pytest.approx(kept[1], rel=0.01)


@pytest.mark.parametrize("name", ["squeeze and excite", "u-net of odd sizes", "siamese"])
def test_both_ways_compute_the_same(name: str) -> None:
    if name not in NETWORKS:
        pytest.fail(f"no network is called {name!r}, only {sorted(NETWORKS)}")
    network = NETWORKS[name]
    inputs, keywords = network.example(4)
    traced = trace_layers(network.module(), inputs, keywords=keywords, tracer="export")
    assert isinstance(traced.graph, fx.Graph)
    inputs, keywords = network.example(6)
    found = observe_graph(traced, network.module(), inputs, keywords)
    assert differences(found, observe(network.module(), inputs, keywords)) == []
