"""A traced graph bound to a real module: what it shares with it, sizes from the batch, published networks."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import pytest
import torch
from torch import fx, nn
from torch.nn import functional

from planner.errors import TraceError
from planner.frontend import zoo
from planner.frontend.lower import trace_layers
from support.binding import differences, observe, observe_graph
from support.networks import NETWORKS


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors gain nothing from more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- what is bound


def test_the_bound_graph_has_the_parameters_and_buffers_of_the_module_itself() -> None:
    network = NETWORKS["functions and parameters only"]
    module = network.module()
    inputs, _ = network.example(4)
    bound = fx.GraphModule(module, trace_layers(module, inputs).graph)
    for mine, theirs in (
        (bound.named_parameters, module.named_parameters),
        (bound.named_buffers, module.named_buffers),
    ):
        assert {name: id(tensor) for name, tensor in mine()} == {name: id(tensor) for name, tensor in theirs()}


def test_a_graph_traced_without_weights_or_data_binds_to_real_ones() -> None:
    network = NETWORKS["weight standardization"]
    with torch.device("meta"):
        shell = network.build()
        traced = trace_layers(shell, (torch.empty(4, 3, 16, 16),))
    inputs, _ = network.example(4)
    found = observe_graph(traced, network.module(), inputs, {})
    assert differences(found, observe(network.module(), inputs, {})) == []


def test_training_through_the_graph_stays_bit_for_bit() -> None:
    network = NETWORKS["shufflenet"]
    eager, other = network.module(), network.module()
    bound = fx.GraphModule(other, trace_layers(other, network.example(4)[0]).graph)
    for module in (eager, bound):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
        for step in range(3):
            optimizer.zero_grad()
            module(*network.example(5, seed=step)[0]).square().sum().backward()
            optimizer.step()
    assert differences(dict(other.state_dict()), dict(eager.state_dict())) == []


@pytest.mark.parametrize(
    "name", ["coordinates", "functions and parameters only", "stochastic depth", "shifted windows"]
)
def test_double_precision_is_kept(name: str) -> None:
    network = NETWORKS[name]
    eager, other = network.module().double(), network.module().double()
    inputs = tuple(x.double() for x in network.example(3)[0])
    found = observe_graph(trace_layers(other, inputs), other, inputs, {})
    assert found["output"].dtype == torch.float64
    assert differences(found, observe(eager, inputs, {})) == []


# ---- sizes that come from the batch


@pytest.mark.parametrize(
    "name", ["shifted windows", "style", "kernels per sample", "two views as one batch", "cbam", "eca"]
)
def test_a_graph_traced_on_one_sample_is_right_for_many(name: str) -> None:
    network = NETWORKS[name]
    traced = trace_layers(network.module(), network.example(1)[0])
    inputs, _ = network.example(5)
    found = observe_graph(traced, network.module(), inputs, {})
    assert differences(found, observe(network.module(), inputs, {})) == []


class FourEverywhere(nn.Module):
    """Channels, rows, columns and groups that are equal to the batch by chance."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv(x))
        n, c, h, w = x.shape
        x = x.reshape(n, c, h * w).transpose(1, 2).reshape(n, h, w, c) + x.new_ones(h, w, c)
        return self.head(x.reshape(-1, 4, c)).view(n, 4, 4, c).flatten(2).mean(1)


def test_sizes_that_are_equal_to_the_batch_by_chance_are_kept() -> None:
    torch.manual_seed(0)
    module = FourEverywhere()
    traced = trace_layers(module, (torch.randn(4, 4, 4, 4),))
    x = torch.randn(7, 4, 4, 4)
    assert differences(observe_graph(traced, module, (x,), {}), observe(module, (x,), {})) == []


class WithTable(nn.Module):
    """A second input that is the same for all samples."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, prototypes: torch.Tensor) -> torch.Tensor:
        features = self.head(functional.relu(self.conv(x)).mean((2, 3)))
        return functional.normalize(features) @ functional.normalize(prototypes).t()


def test_an_input_without_samples_keeps_its_size() -> None:
    torch.manual_seed(0)
    module, table = WithTable(), torch.randn(6, 8)
    traced = trace_layers(module, (torch.randn(4, 3, 8, 8), table))
    inputs = torch.randn(3, 3, 8, 8), table
    assert differences(observe_graph(traced, module, inputs, {}), observe(module, inputs, {})) == []


class OfBatch(nn.Module):
    """A function of features (N, 8) that computes with the number of samples."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.conv, self.function = nn.Conv2d(3, 8, 3), function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self.conv(x).mean((2, 3)))


def _minibatch_deviation(x: torch.Tensor) -> torch.Tensor:
    groups = x.reshape(2, -1, *x.shape[1:])
    deviation = groups.var(0, unbiased=False).add(1e-8).sqrt().mean(1, keepdim=True)
    return torch.cat([x, deviation.repeat(2, 1)], 1)


def _contrastive(x: torch.Tensor) -> torch.Tensor:
    x = functional.normalize(x)
    logits = (x @ x.t()).masked_fill(torch.eye(x.shape[0], dtype=torch.bool), float("-inf"))
    return functional.cross_entropy(logits, torch.arange(x.shape[0], device=x.device).roll(x.shape[0] // 2))


OF_BATCH: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "mean": lambda x: x.sum(0) / x.shape[0],
    "mean by the inverse": lambda x: x.sum(0) * (1 / x.shape[0]),
    "mean by the inverse length": lambda x: x.sum(0) * (1.0 / len(x)),
    "root": lambda x: x.sum(0) / math.sqrt(x.size(0)),
    "number of elements": lambda x: x.sum() / float(x.numel()),
    "one less": lambda x: x * (x.shape[0] - 1),
    "negative": lambda x: x * -x.shape[0],
    "square": lambda x: x * (x.shape[0] ** 2),
    "minimum": lambda x: x * min(x.shape[0], 5),
    "comparison": lambda x: x if x.shape[0] > 5 else -x,
    "halves": lambda x: x[: x.shape[0] // 2] - x[x.shape[0] // 2 :],
    "chunks": lambda x: torch.stack(x.chunk(2)).sum(0),
    "pairs": lambda x: x.view(x.shape[0] // 2, 2, -1).sum(1),
    "copies": lambda x: x.repeat_interleave(2, 0).view(x.shape[0], 2, 8),
    "every second sample": lambda x: x[::2] * x[1::2],
    "last sample": lambda x: x[x.shape[0] - 1],
    "first and last sample": lambda x: x[-1] + x[0],
    "numbered samples": lambda x: x * torch.arange(x.shape[0]).flip(0)[:, None],
    "ramp": lambda x: x * torch.linspace(0, 1, x.shape[0])[:, None],
    "random order": lambda x: x[torch.randperm(x.shape[0])],
    "best of each sample": lambda x: x[torch.arange(x.size(0)), x.argmax(1)],
    "padded to a fixed batch": lambda x: functional.pad(x, (0, 0, 0, 8 - x.shape[0])),
    "statistics": lambda x: x.cumsum(0) - x.mean(0) + x.std(0),
    "gram": lambda x: x.t() @ x,
    "deviation in the batch": _minibatch_deviation,
    "contrastive loss": _contrastive,
}


@pytest.mark.parametrize("name", OF_BATCH)
def test_what_is_computed_with_the_number_of_samples_is_right_at_any_batch_or_refused(name: str) -> None:
    torch.manual_seed(0)
    module = OfBatch(OF_BATCH[name])
    try:
        traced = trace_layers(module, (torch.randn(4, 3, 6, 6),))
    except TraceError as error:
        assert f"{__file__}:" in str(error)  # noqa: PT017  # either way is right
        return
    for batch in (4, 6):
        inputs = (torch.randn(batch, 3, 6, 6),)
        found = observe_graph(traced, module, inputs, {})
        assert differences(found, observe(module, inputs, {})) == [], f"at a batch of {batch}"


# ---- published networks


@dataclass(frozen=True)
class Published:
    """A model of torchvision or timm with a small input."""

    reference: str
    side: int = 32
    arguments: Mapping[str, object] = field(default_factory=dict)
    batch: int = 2


PUBLISHED = [
    Published("torchvision:resnet18"),
    Published("torchvision:googlenet", 64, {"num_classes": 10}),
    Published("torchvision:inception_v3", 299, {"num_classes": 10}),  # its auxiliary head takes nothing smaller
    Published("torchvision:densenet121"),
    Published("torchvision:mobilenet_v3_small"),
    Published("torchvision:shufflenet_v2_x0_5"),
    Published("torchvision:efficientnet_b0"),
    Published("torchvision:convnext_tiny"),
    Published("torchvision:swin_t", 64),
    Published("timm:hrnet_w18_small", 64),
    Published("timm:resnetv2_50x1_bit", 64),
    Published("timm:coatnet_rmlp_nano_rw_224", 64, {"img_size": 64}),
    Published("timm:mobilevit_xxs", 64),
]


@pytest.mark.zoo
@pytest.mark.parametrize("published", PUBLISHED, ids=lambda p: p.reference)
def test_a_published_network_trains_bit_for_bit(published: Published) -> None:
    model = zoo.find(published.reference, published.arguments)

    def build() -> nn.Module:
        torch.manual_seed(0)
        module = model.build(**model.arguments)
        assert isinstance(module, nn.Module)
        return module.train()

    inputs = (torch.randn(published.batch, 3, published.side, published.side),)
    bound = build()
    found = observe_graph(trace_layers(bound, (torch.empty(8, 3, published.side, published.side),)), bound, inputs, {})
    assert differences(found, observe(build(), inputs, {})) == []
