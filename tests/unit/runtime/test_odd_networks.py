"""Networks as people write them, split at random over ranks of this process, against one device in float64."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from planner.api import Options, Origin, Planner, machine_of, prepare
from planner.frontend.lower import TracedModel
from planner.ir import ops
from planner.plan import Plan
from runtime.parallel import ParallelModule
from support.equality import own_parts, run_ranks
from support.networks import NETWORKS

BATCH = 4
SEEDS = range(1, 13 if os.environ.get("LAYERWISE_FULL") else 2)
RANDOM = {"stochastic depth", "drop block", "style"}
"""Networks that draw numbers in training: on ranks other ones than on one device."""


SINGLE = {"same padding", "super resolution", "complex weights", "recurrent", "linear algebra"}
"""Networks that make tensors of single precision, whatever their input."""


def tensors(output: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors of a nested result, in order."""
    if torch.is_tensor(output):
        yield output.detach()
    elif isinstance(output, dict | list | tuple):
        for each in output.values() if isinstance(output, dict) else output:
            yield from tensors(each)


def scalar(output: Any) -> torch.Tensor:
    """Return a mean over samples, so that ranks with equal shares average to the whole."""
    if isinstance(output, dict):
        output = list(output.values())
    if isinstance(output, list | tuple):
        return sum((scalar(o) for o in output if o is not None), torch.zeros(()))
    if not output.is_floating_point():
        return torch.zeros(())
    weights = torch.linspace(-1, 1, max(output[0].numel(), 1), dtype=output.dtype).view(output.shape[1:])
    return (output * weights).mean()


def random_plan(planner: Planner, seed: int) -> Plan:
    """Return a plan with random options of the problem's variables."""
    search = planner.search(planner.meshes()[seed % len(planner.meshes())])
    generator = torch.Generator().manual_seed(seed)
    options = [int(torch.randint(len(c), (), generator=generator)) for c in search.formulation.problem.node_s]
    return planner.plan_of(search, search.forced(search.formulation.layer_choice(tuple(options))))


def labelled(key: str) -> Callable[[str], str]:
    return lambda text: f"{key}: {text}"


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", [n for n in NETWORKS if n not in RANDOM])
def test_odd_networks_equal_one_device_under_random_plans(
    name: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = NETWORKS[name]
    monkeypatch.setattr(functional, "dropout", lambda x, *_, **__: x)  # masks of ranks are not those of one device
    dtype, rtol = (torch.float32, 1e-4) if name in SINGLE else (torch.float64, 1e-9)
    given, named = network.example(BATCH)
    inputs = tuple(x.to(dtype) if x.is_floating_point() else x for x in given)
    keywords = {k: x.to(dtype) if x.is_floating_point() else x for k, x in named.items()}

    def build() -> nn.Module:
        model = network.module(training=True)
        model = model if name in SINGLE else model.double()
        for part in model.modules():
            if isinstance(part, nn.Dropout | nn.Dropout2d):
                part.p = 0.0
            elif isinstance(part, nn.MultiheadAttention):
                part.dropout = 0.0
        return model

    model = build()
    result = model(*(x.clone() for x in inputs), **keywords)
    scalar(result).backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    buffers = dict(model.named_buffers())
    machine = machine_of(devices=(2, 4)[seed % 2])
    plan = random_plan(prepare(build(), inputs, machine, Options(), Origin(), keywords), seed)
    size = plan.mesh.size

    def work(net: ParallelModule, traced: TracedModel, position: int) -> None:
        part = slice(position * BATCH // size, (position + 1) * BATCH // size)
        found = net(*(x[part].clone() for x in inputs), **{k: x[part] for k, x in keywords.items()})
        scalar(found).backward()
        specs = [layer.output for layer in traced.layers.layers if isinstance(layer.op, ops.Output)]
        for spec, own, whole in zip(specs, tensors(found), tensors(result), strict=True):
            mine = whole if spec.sample_dim is None else whole.narrow(spec.sample_dim, part.start, BATCH // size)
            torch.testing.assert_close(own, mine, rtol=rtol, atol=rtol)
        parts = own_parts(plan, traced, position)
        names = {n for n, p in net.named_parameters() if p.grad is not None}
        assert names == set(expected), names ^ set(expected)
        for key, parameter in net.named_parameters():
            if key in expected:
                least = 1e-6 if name in SINGLE else 1e-14
                atol = rtol * float(expected[key].abs().max()) + least
                torch.testing.assert_close(
                    parameter.grad, expected[key][parts[key]], rtol=rtol, atol=atol,
                    msg=labelled(key),
                )  # fmt: skip
        for key, buffer in net.named_buffers():
            whole = buffers[key]
            torch.testing.assert_close(
                buffer, whole[parts[key]] if key in parts else whole, rtol=rtol, atol=rtol,
                msg=labelled(key),
            )  # fmt: skip

    run_ranks(build, plan, work)


class OfBatch(nn.Module):
    """A function of images and of this module, which has features to give and a layer for constants."""

    def __init__(self, function: Callable[["OfBatch", torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.conv, self.early, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(3, 8), nn.Linear(8, 4)
        self.function = function

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x).mean((2, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.function(self, x))


OF_BATCH: dict[str, Callable[[OfBatch, torch.Tensor], torch.Tensor]] = {
    "number of samples": lambda m, x: m.features(x) / x.shape[0],
    "number of samples as a tensor": lambda m, x: m.features(x) * torch.tensor(x.shape[0]),
    "filled with the number of samples": lambda m, x: m.features(x) + torch.full((x.shape[0], 8), x.shape[0]),
    "sum of ones": lambda m, x: m.features(x) * torch.ones(x.shape[0], 8).sum(0),
    "share of ones": lambda m, x: m.features(x) * torch.ones(x.shape[0], 8).softmax(0),
    "counted samples": lambda m, x: m.features(x) * torch.ones(x.shape[0], 8).cumsum(0),
    "counted channels": lambda m, x: m.features(x) * torch.ones(x.shape[0], 8).cumsum(1),
    "product of constants": lambda m, x: torch.einsum(
        "ni,nj->ni", m.early(torch.ones(x.shape[0], 3, dtype=x.dtype)), m.features(x)
    ),
}
MIXING = {"share of ones", "counted samples"}
"""Those that are another number for each sample, or depend on all: ranks get the result for the whole batch."""


@pytest.mark.parametrize("name", OF_BATCH)
def test_what_is_computed_from_the_number_of_samples_is_that_of_the_whole_batch(name: str) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return OfBatch(OF_BATCH[name]).double()

    x = torch.randn(BATCH, 3, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    plan = prepare(build(), (x,), machine_of(devices=2), Options(solver="data"), Origin()).plan()
    alone = build()
    expected = alone(x)
    scalar(expected).backward()

    def work(net: ParallelModule, _: TracedModel, position: int) -> None:
        part = slice(position * 2, position * 2 + 2)
        found = net(x[part])
        scalar(found).backward()
        torch.testing.assert_close(found, expected if name in MIXING else expected[part])
        for key, parameter in alone.named_parameters():
            torch.testing.assert_close(net.get_parameter(key).grad, parameter.grad)

    run_ranks(build, plan, work)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)
        self.fc = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, _ = self.attention(x, x, x, need_weights=False)
        return self.fc(y)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) * (1 + torch.rand(1, device=x.device))


def seeded(kind: type[nn.Module]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return kind()

    return build


def planned(kind: type[nn.Module], solver: str) -> tuple[torch.Tensor, Plan]:
    x = torch.randn(BATCH, 5, 8, generator=torch.Generator().manual_seed(1))
    machine = machine_of(devices=2)
    return x, prepare(seeded(kind)(), (x,), machine, Options(solver=solver), Origin()).plan()


@pytest.mark.parametrize("solver", ["data", "conv-data-fc-model", "model"])
def test_what_draws_inside_of_a_module_of_torch_follows_the_mode(solver: str) -> None:
    x, plan = planned(Attention, solver)
    expected = seeded(Attention)().eval()(x)

    def work(net: ParallelModule, _: TracedModel, position: int) -> None:
        part = slice(position * 2, position * 2 + 2)
        assert not torch.equal(net(x[part]), net(x[part]))
        net.eval()
        torch.testing.assert_close(net(x[part]), expected[part])

    run_ranks(seeded(Attention), plan, work)


@pytest.mark.parametrize("solver", ["data", "model"])
def test_a_number_that_is_drawn_for_the_whole_batch_is_the_same_on_every_rank(solver: str) -> None:
    x, plan = planned(Scaled, solver)
    plain = seeded(Scaled)().get_submodule("fc")(x)

    def work(net: ParallelModule, _: TracedModel, position: int) -> list[float]:
        part = slice(position * 2, position * 2 + 2)
        return [float((net(x[part]) / plain[part]).detach().mean()) for _ in range(3)]

    first, second = run_ranks(seeded(Scaled), plan, work)
    assert first == pytest.approx(second, rel=1e-5)
    assert len({round(f, 4) for f in first}) == 3
