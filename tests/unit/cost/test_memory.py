"""Bytes per device: against what autograd really holds, and against arithmetic."""

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from planner.api import Options, Origin, Planner, machine_of, prepare
from planner.cost.memory import LayerBytes
from planner.cost.peak import Phase, StepMemory, step_memory
from planner.cost.simulate import simulate
from planner.frontend.source import load_model
from planner.ir.dimension import Dimension
from planner.measure.allocated import allocated_peak
from planner.measure.saved import SavedBytes, saved_peak
from runtime.data import own_samples
from runtime.module import ParallelModule
from support.equality import run_ranks

TOLERANCE = 0.1
REQUIRED = [
    ("alexnet", 4),
    pytest.param("vgg16", 2, marks=pytest.mark.slow),
    ("resnet50", 2),
    ("unet", 1),
    pytest.param("torchvision:densenet121", 2, marks=pytest.mark.zoo),
]
SMALLER = {"unet": (1, 192, 192)}  # a seventh of its usual 512 x 512 pixels
ON_A_GPU = [
    ("alexnet", 128),
    ("vgg16", 16),
    ("resnet50", 16),
    ("unet", 2),
    pytest.param("torchvision:densenet121", 16, marks=pytest.mark.zoo),
]


def planner_of(module: nn.Module, shape: tuple[int, ...], devices: int, **options: Any) -> Planner:
    x = torch.empty(shape, device="meta")
    return prepare(module, (x,), machine_of(devices=devices), Options(**options), Origin("net", "net"))


def planned_memory(planner: Planner, strategy: str) -> StepMemory:
    return planner.search(planner.meshes()[0]).fixed(strategy).timeline.memory


def bytes_of(tensors: list[torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def state_of(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


# --- against autograd


@pytest.mark.parametrize(("name", "batch"), REQUIRED)
def test_saved_activations_and_parameters_on_one_device_are_as_measured(name: str, batch: int) -> None:
    shape = (batch, *SMALLER.get(name, load_model(name).input_shapes[0]))
    predicted = planned_memory(planner_of(load_model(name).module, shape, 1), "data").saved_bytes
    module = load_model(name, device="cpu").module
    measured = saved_peak(module, (torch.randn(shape),)) + bytes_of(state_of(module))
    assert predicted == pytest.approx(measured, rel=TOLERANCE)


@pytest.mark.parametrize(("name", "batch"), [("resnet50", 2), ("unet", 1)])
def test_the_peak_of_a_step_is_what_the_allocator_gave_out(name: str, batch: int) -> None:
    shape = (batch, *SMALLER.get(name, load_model(name).input_shapes[0]))
    predicted = planned_memory(planner_of(load_model(name).module, shape, 1, optimizer="momentum"), "data").peak

    def make() -> Callable[[], None]:
        module = load_model(name, device="cpu").module
        optimizer = torch.optim.SGD(module.parameters(), lr=1e-6, momentum=0.9)

        def step() -> None:
            optimizer.zero_grad()
            module(torch.ones(shape)).square().mean().backward()
            optimizer.step()

        return step

    measured = allocated_peak(make, 2)  # the state is made by the first
    assert predicted.total == pytest.approx(measured.num_bytes, rel=TOLERANCE)


def test_the_allocators_peak_has_what_is_there_for_a_while_and_not_what_was_before() -> None:
    before = torch.ones(2000)

    def make() -> Callable[[], None]:
        kept = torch.ones(1000)

        def work() -> None:
            (before[:500] + kept[:500]).exp_()
            kept.sort()  # values and indices of 8 bytes

        return work

    found = allocated_peak(make, 3)
    assert 4000 + 4000 + 8000 <= found.num_bytes < 4000 + 2 * (4000 + 8000)
    assert len(found.place) == 3


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "batch"), ON_A_GPU)
def test_the_peak_on_a_gpu_is_as_measured(name: str, batch: int) -> None:
    shape = (batch, *load_model(name).input_shapes[0])
    predicted = planned_memory(planner_of(load_model(name).module, shape, 1, optimizer="momentum"), "data")
    module = load_model(name, device="cuda").module
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-6, momentum=0.9)
    before = torch.cuda.memory_allocated() - bytes_of(state_of(module))
    x = torch.randn(shape, device="cuda")  # the first layer keeps it
    for step in range(3):
        if step == 2:
            torch.cuda.reset_peak_memory_stats()
        optimizer.zero_grad()
        module(x).square().mean().backward()
        optimizer.step()
    measured = torch.cuda.max_memory_allocated() - before
    assert predicted.peak.total == pytest.approx(measured, rel=TOLERANCE)


@pytest.mark.parametrize("strategy", ["data", "conv-data-fc-model"])
def test_a_rank_of_a_split_alexnet_holds_what_was_predicted(strategy: str) -> None:
    x = torch.randn(8, 3, 224, 224)
    planner = planner_of(load_model("alexnet").module, tuple(x.shape), 2, solver=strategy)
    search, planned = planner.best()

    def rank(net: ParallelModule, _: object, position: int) -> int:
        samples = x[own_samples(net.plan, net.plan.mesh.ranks[position])].clone()  # a storage of their own
        counter = SavedBytes(state_of(net))
        with counter.counting():
            y = net(samples)
        y.sum().backward()
        return counter.peak + bytes_of(state_of(net))

    predicted = planned.timeline.memory.saved_bytes
    measured = run_ranks(lambda: load_model("alexnet", device="cpu").module, planner.plan_of(search, planned), rank)
    assert measured == pytest.approx([predicted] * 2, rel=TOLERANCE)


# --- the counter


def test_the_counter_counts_a_storage_once_and_until_it_is_freed() -> None:
    weight = torch.ones(1000, requires_grad=True)
    counter = SavedBytes([weight])
    with counter.counting():
        y = weight.exp()  # keeps y
        z = (y * y).sum() + (y.view(10, 100) * 3).sum()  # keeps y again; a number keeps nothing
    assert (counter.now, counter.peak) == (4000, 4000)
    z.backward()
    del y, z
    gc.collect()
    assert (counter.now, counter.peak) == (0, 4000)
    assert weight.grad is not None


# --- the walk


def test_the_walk_through_three_layers() -> None:
    first = LayerBytes(parameters=10, gradients=8, reduced=8, state=16, activations=100, computed=120, inputs=30)
    second = LayerBytes(parameters=20, gradients=20, reduced=0, state=40, activations=50, computed=50, inputs=120)
    third = LayerBytes(parameters=0, gradients=0, reduced=0, state=0, activations=5, computed=1, inputs=50)
    found = step_memory(["a", "b", "c"], [first, second, third])
    assert [(m.name, m.phase, m.gradients, m.activations, m.working) for m in found.moments] == [
        ("a", Phase.FORWARD, 8, 100, 120 + 30 - 100),
        ("b", Phase.FORWARD, 8, 150, 50 + 120 - 50),
        ("c", Phase.FORWARD, 8, 155, 1 + 50 - 5),
        ("c", Phase.BACKWARD, 8, 155, 1 + 50),
        ("b", Phase.BACKWARD, 28, 150, 50 + 120),
        ("a", Phase.BACKWARD, 28, 100, 120 + 120 + 8),
        ("optimizer", Phase.UPDATE, 28, 0, 0),
    ]
    assert all((m.parameters, m.state) == (30, 56) for m in found.moments)
    assert (found.peak.name, found.peak.phase) == ("a", Phase.BACKWARD)
    assert found.peak.total == 30 + 56 + 28 + 100 + 248
    assert found.saved_bytes == 30 + 155


SIZES = st.integers(min_value=0, max_value=1000)


@st.composite
def layers(draw: st.DrawFn) -> LayerBytes:
    gradients, inputs = draw(SIZES), draw(SIZES)
    return LayerBytes(
        parameters=gradients + draw(SIZES), gradients=gradients, reduced=draw(st.sampled_from([0, gradients])),
        state=2 * gradients, activations=draw(SIZES), computed=draw(SIZES), inputs=inputs,
        framed=draw(st.sampled_from([0, inputs])), reordered=draw(SIZES),
    )  # fmt: skip


@given(st.lists(layers(), min_size=1, max_size=6))
def test_the_peak_lies_between_what_always_stays_and_the_bound_of_the_solvers(found: list[LayerBytes]) -> None:
    peak = step_memory([str(i) for i in range(len(found))], found).peak.total
    assert sum(m.parameters + m.state for m in found) <= peak
    assert peak <= sum(m.resident for m in found) + max(m.transient for m in found)


@pytest.mark.parametrize("strategy", ["data", "model", "conv-data-fc-model"])
def test_the_peak_of_a_plan_is_below_the_bound_that_its_memory_limit_is_held_against(strategy: str) -> None:
    planner = planner_of(load_model("vgg16").module, (32, 3, 224, 224), 4)
    search = planner.search(planner.meshes()[0])
    timeline = search.fixed(strategy).timeline
    assert 0.5 * timeline.memory_bytes < timeline.memory.peak.total <= timeline.memory_bytes


# --- what counts how often


class Tied(nn.Module):
    """Applies one linear layer twice, with another one in between."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.other = nn.Linear(20, 20), nn.Linear(20, 20)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.shared(self.other(self.shared(x).relu()).relu())
        return y


def test_a_parameter_of_two_layers_is_held_reduced_and_updated_once() -> None:
    planner = planner_of(Tied(), (8, 20), 2, optimizer="adam")
    search = planner.search(planner.meshes()[0])
    table = search.table
    costs = {
        str(layer.id): costs[c]
        for layer, costs, c in zip(table.space.graph.layers, table.layers, search.fixed("data").choice, strict=True)
    }
    linear = (20 * 20 + 20) * 4
    first, other, again = costs["shared"], costs["other"], costs["shared@2"]
    assert again.memory.inputs == first.memory.inputs > 0
    for cost in (first, other):
        assert (cost.memory.parameters, cost.memory.gradients, cost.memory.state) == (linear, linear, 2 * linear)
        assert cost.sync == {(0,): linear}
    assert (again.memory.parameters, again.memory.gradients, again.memory.state) == (0, 0, 0)
    assert again.sync == {}
    assert again.update_s == 0 < first.update_s
    assert first.update_s == other.update_s
    timeline = simulate(table, search.fixed("data").choice, 2**20)
    assert timeline.communication_bytes == 2 * linear  # 2 (p - 1) / p of each of two, p = 2


def test_tied_layers_cost_the_solvers_what_the_simulator_counts() -> None:
    planner = planner_of(Tied(), (8, 20), 2)
    search = planner.search(planner.meshes()[0])
    for strategy in ("data", "model"):
        choice = search.fixed(strategy).choice
        options = [
            next(o for o, own in enumerate(search.formulation.options[i]) if own == choice[i])
            for i in range(len(choice))
        ]
        by_variable = dict(zip(search.formulation.variable_of, options, strict=True))
        problem = search.formulation.problem
        found = problem.memory_bytes([by_variable[v] for v in range(len(problem.node_s))])
        assert found == simulate(search.table, choice, 2**20).memory_bytes


class Standardised(nn.Conv2d):
    """A convolution whose weight is standardised, as in networks without normalisation."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return functional.conv2d(x, weight * 3.0, self.bias, padding=1)


def test_weights_that_are_computed_from_weights_are_kept_whole_by_every_rank() -> None:
    shape, weight = (8, 6, 5, 5), 7 * 6 * 3 * 3 * 4
    planner = planner_of(nn.Sequential(Standardised(6, 7, 3), nn.ReLU()), shape, 4)
    layer = next(layer for layer in planner.traced.layers.layers if layer.op.kind == "conv")
    result = 8 * 7 * 5 * 5 * 4
    assert layer.saved_constant_bytes == weight
    assert layer.saved_bytes == weight + result
    search = planner.search(planner.meshes()[0])
    index = planner.traced.layers.index[layer.id]
    splits = search.table.space.splits[layer.id]
    by_sample = next(c for c, s in enumerate(splits) if s.dimensions == (Dimension.SAMPLE,))
    assert search.table.layers[index][by_sample].memory.activations == weight + result // 4


def test_measured_bytes_of_computed_weights_are_predicted() -> None:
    net = nn.Sequential(Standardised(6, 7, 3), nn.ReLU(), Standardised(7, 5, 3), nn.ReLU())
    predicted = planned_memory(planner_of(net, (8, 6, 5, 5), 1), "data").saved_bytes
    measured = saved_peak(net, (torch.randn(8, 6, 5, 5),)) + bytes_of(state_of(net))
    assert predicted == measured


def test_layers_that_differ_only_in_what_autograd_keeps_are_priced_apart() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(x) + self.c(self.b(x))  # only b's result is needed again: by c's weight

    planner = planner_of(Two(), (8, 6), 1)
    found = {str(layer.id): layer.saved_bytes for layer in planner.traced.layers.layers}
    assert (found["a"], found["b"]) == (0, 8 * 6 * 4)
    table = planner.search(planner.meshes()[0]).table
    index = {str(name): i for name, i in planner.traced.layers.index.items()}
    assert [table.layers[index[i]][0].memory.activations for i in ("a", "b")] == [0, 8 * 6 * 4]
    assert replace(table.layers[index["a"]][0].memory, activations=192) == table.layers[index["b"]][0].memory
