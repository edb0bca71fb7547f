"""Networks and calls that once went wrong, each against one device."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from planner.api import Constraints, Options, Origin, Planner, machine_of, plan_model, prepare
from planner.errors import FormatError, MismatchError
from planner.frontend.lower import TracedModel
from planner.ir.dimension import Dimension
from planner.plan import Plan
from runtime.parallel import ParallelModule, trace_for
from support.equality import own_parts, run_ranks
from support.loops import own

BATCH = 4


def images(channels: int = 4, size: int = 8) -> torch.Tensor:
    return torch.randn(BATCH, channels, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(256, 3), nn.Linear(256, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.trunk(x).flatten(1)
        return self.a(y), self.b(y)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(256, 256), nn.Linear(256, 256)
        self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.tanh(self.a(x.flatten(1))))


class TwoSizes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.h = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.h(x).mean((2, 3)) + self.h(functional.max_pool2d(x, 2)).mean((2, 3))


class Names(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.conv_2 = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv_2(self.conv(self.conv(x)))


class Alias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.same, self.relu = nn.Identity(), nn.ReLU(inplace=True)
        self.a, self.b, self.c = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x)
        y = self.relu(self.same(x))
        return self.b(y) + self.c(x)


class Reshaped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(256, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.fc(x.flatten(1))
        return torch.reshape(y, (y.shape[0], -1)) * 2


class Rows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.bn = nn.Linear(8, 6), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.fc(x))


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(4, 8, 3, padding=1, groups=4)
        self.b = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8, bias=False)
        self.bn = nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        y = functional.silu(self.a(x))
        y = y + 1.5
        return {"deep": (self.bn(self.b(y)),), "early": y}


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.bn = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor, scale: float = 0.5, mask: torch.Tensor | None = None) -> torch.Tensor:
        x = self.a(x)
        y = z = self.bn(self.b(x))
        y += x
        z *= scale if mask is None else mask
        return functional.relu_(y) + x


NETS: tuple[type[nn.Module], ...] = (TwoHeads, Tied, TwoSizes, Names, Alias, Reshaped, Rows, Grouped, InPlace)


def builder(kind: type[nn.Module]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return kind().double()

    return build


def planner_of(model: nn.Module, num_ranks: int = 2, **options: Any) -> Planner:
    return prepare(model, (images(),), machine_of(devices=num_ranks), Options(**options), Origin())


def scalar(output: Any) -> torch.Tensor:
    """Return a mean over samples, so that ranks with equal shares average to the whole."""
    if isinstance(output, dict):
        output = list(output.values())
    if isinstance(output, list | tuple):
        return sum((scalar(o) for o in output), torch.zeros(()))
    return (output * torch.linspace(-1, 1, output[0].numel(), dtype=output.dtype).view(output.shape[1:])).mean()


def random_choice(planner: Planner, seed: int) -> Plan:
    """Return a plan with random options of the problem's variables, so that tied layers stay tied."""
    search = planner.search(planner.meshes()[seed % len(planner.meshes())])
    generator = torch.Generator().manual_seed(seed)
    options = [int(torch.randint(len(c), (), generator=generator)) for c in search.formulation.problem.node_s]
    return planner.plan_of(search, search.forced(search.formulation.layer_choice(tuple(options))))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", NETS)
def test_hard_networks_equal_one_device_under_random_plans(kind: type[nn.Module], seed: int) -> None:
    build = builder(kind)
    model, x = build(), images()
    scalar(model(x)).backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    plan = random_choice(planner_of(build(), (2, 4)[seed % 2]), seed)
    size = plan.mesh.size

    def work(net: ParallelModule, traced: TracedModel, position: int) -> None:
        part = slice(position * BATCH // size, (position + 1) * BATCH // size)
        scalar(net(x[part])).backward()
        parts = own_parts(plan, traced, position)
        for name, parameter in net.named_parameters():
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, expected[name][parts[name]], rtol=1e-9, atol=1e-12)

    run_ranks(build, plan, work)


class Squeezed(nn.Module):
    """A product without bias, and one with, in front of functions that write in place."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1), nn.ReLU(inplace=True),
            nn.Flatten(), nn.Linear(256, 8), nn.ReLU(inplace=True), nn.Linear(8, 4, bias=False), nn.ReLU(inplace=True),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.body(x)
        return found


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dimension", ["in_channel", "in_channel_scatter"])
def test_partial_sums_in_front_of_what_writes_in_place_equal_one_device(
    dimension: str, memory_format: torch.memory_format
) -> None:
    build, x = builder(Squeezed), images()
    model = build()
    for each in model.parameters():
        each.data = each.data.abs()  # relu lets all through
    x = x.abs().to(memory_format=memory_format)
    scalar(model(x)).backward()
    constraints = Constraints.of(pin=[f"{name}={dimension}" for name in ("*0", "*2", "*5", "*7")])
    plan = planner_of(build(), constraints=constraints, all_devices=True, solver="dp").plan()
    found = {str(name): str(split).rpartition("=")[2] for name, split in plan.strategy.items()}
    assert [found[f"body.{k}"] for k in (0, 2, 5, 7)] == [*["in_channel_scatter"] * 3, dimension]

    def work(net: ParallelModule, traced: TracedModel, position: int) -> None:
        kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        for hooked in (False, True):
            if hooked:  # what hooks keep stays as it is
                for name in ("body.0", "body.7"):
                    net.get_submodule(name).register_forward_hook(
                        lambda _m, _i, y: kept.append((y, y.detach().clone()))
                    )
            net.zero_grad()
            scalar(net(*own(net, position, x))).backward()
            parts = own_parts(plan, traced, position)
            for name, parameter in net.named_parameters():
                expected = model.get_parameter(name).grad
                assert parameter.grad is not None
                assert expected is not None
                torch.testing.assert_close(parameter.grad, expected[parts[name]], rtol=1e-9, atol=1e-12)
        assert len(kept) == 2
        for y, then in kept:
            torch.testing.assert_close(y, then, rtol=0, atol=0)

    def prepared() -> nn.Module:
        found = build()
        for each in found.parameters():
            each.data = each.data.abs()
        return found

    run_ranks(prepared, plan, work)


def test_a_backward_pass_through_one_head_leaves_the_gradients_of_the_other_alone() -> None:
    build, x = builder(TwoHeads), images()
    model = build()
    a, b = model(x)
    scalar(a).backward(retain_graph=True)
    scalar(b).backward()
    expected = {n: p.grad for n, p in model.named_parameters()}
    plan = planner_of(build(), solver="data").plan()

    def work(net: ParallelModule, _: TracedModel, position: int) -> None:
        a, b = net(x[position * 2 : position * 2 + 2])
        scalar(a).backward(retain_graph=True)
        scalar(b).backward()
        for name, parameter in net.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-9, atol=1e-12)

    run_ranks(build, plan, work)


def test_a_module_in_evaluation_stays_so() -> None:
    def build() -> nn.Module:
        model = builder(Grouped)()
        model.get_submodule("bn").eval()
        return model

    plan = planner_of(build(), solver="data").plan()
    flags = run_ranks(build, plan, lambda net, _, __: (net.training, net.get_submodule("bn").training))
    assert flags == [(True, False)] * 2


def test_inputs_by_name_are_accepted() -> None:
    build, x = builder(Reshaped), images()
    plan = planner_of(build(), solver="data").plan()
    shapes = run_ranks(build, plan, lambda net, _, position: net(x=x[position * 2 : position * 2 + 2]).shape)
    assert shapes == [(2, 6), (2, 6)]


def test_a_global_batch_smaller_than_the_pieces_is_an_error_on_every_rank() -> None:
    build, x = builder(Names), images()
    plan = planner_of(build(), 4, solver="data", io="global").plan()

    def work(net: ParallelModule, _: TracedModel, __: int) -> str:
        with pytest.raises(MismatchError, match="too small") as error:
            net(x[:2])
        return str(error.value)

    assert len(run_ranks(build, plan, work)) == 4


def test_gradients_are_clipped_by_the_norm_over_all_ranks() -> None:
    build, x = builder(TwoHeads), images()
    model = build()
    sum((scalar(o) for o in model(x)), torch.zeros(())).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    for solver in ("data", "model", "conv-data-fc-model"):
        plan = planner_of(build(), solver=solver).plan()

        def work(net: ParallelModule, traced: TracedModel, position: int) -> torch.Tensor:
            sum((scalar(o) for o in net(x[position * 2 : position * 2 + 2])), torch.zeros(())).backward()
            found = net.clip_grad_norm_(1e-3)
            parts = own_parts(net.plan, traced, position)
            for name, parameter in net.named_parameters():
                assert parameter.grad is not None
                torch.testing.assert_close(parameter.grad, expected[name][parts[name]], rtol=1e-9, atol=1e-14)
            return found

        for found in run_ranks(build, plan, work):
            torch.testing.assert_close(found, norm.double())


def test_plans_with_other_ranks_orders_or_split_ties_are_refused() -> None:
    text = planner_of(builder(Names)(), solver="model").plan().to_json()
    with pytest.raises(FormatError, match=r"\$\.stages\[0\]\.mesh\.ranks"):
        Plan.from_json(text.replace('"ranks": [\n          0,\n          1\n        ]', '"ranks": [1, 0]'))
    model = builder(Tied)()
    plan = plan_model(model, (images(),), devices=2, solver="data")
    changed = plan.model_dump(mode="json")
    for layer in changed["stages"][0]["layers"]:
        if layer["id"] == "b":
            layer["split"] = dict.fromkeys(layer["split"], Dimension.OUT_CHANNEL.value)
    with pytest.raises(MismatchError, match="share a parameter"):
        trace_for(model, Plan.from_json(json.dumps(changed)))


def test_a_shared_weight_counts_once() -> None:
    plan = plan_model(builder(Tied)(), (images(),), devices=2)
    assert plan.model.num_params == sum(p.numel() for p in builder(Tied)().parameters())
