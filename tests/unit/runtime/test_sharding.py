"""Sharded parameters (ZeRO, FSDP) against one device, and against what the cost model prices."""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from planner.api import Options, Origin, Planner, machine_of, prepare
from planner.cost.simulate import simulate
from planner.errors import UsageError
from planner.frontend.lower import TracedModel
from planner.plan import Plan
from runtime.checkpoint.whole import full_state_dict
from runtime.comm.communicator import Axes, Pending, ThreadCommunicator
from runtime.module import ParallelModule
from support.equality import TOLERANCE, on_threads, own_parts, planner_for, random_plan, run_ranks

SHARDINGS = ("optimizer", "full")
BATCH = 12


class Odd(nn.Module):
    """Rows that do not divide or do not suffice, weights used twice, computed, frozen, not at all, channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1, bias=False)  # behind it, a bias would have noise as gradient
        self.norm = nn.BatchNorm2d(6)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.frozen = nn.Conv2d(6, 6, 1)
        self.frozen.requires_grad_(False)
        self.kernel = nn.Parameter(torch.randn(7, 6, 3, 3) / 7)
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.tall = nn.Linear(7 * 16, 13)
        self.twice = nn.Linear(13, 13)
        self.unused = nn.Linear(5, 8)
        self.last = nn.Linear(13, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.norm(self.first(x)))
        x = self.frozen(x + self.depthwise(x))
        x = functional.conv2d(x, self.kernel - self.kernel.mean((1, 2, 3), keepdim=True), padding=1)
        x = functional.max_pool2d(x, 2) * self.scale
        x = functional.relu(self.tall(x.flatten(1)))
        return self.last(self.twice(functional.relu(self.twice(x))))


def build() -> nn.Module:
    torch.manual_seed(0)
    return Odd().double().to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(BATCH, 3, 8, 8, generator=generator, dtype=torch.float64), torch.arange(BATCH) % 3


def planner(num_ranks: int, **options: Any) -> Planner:
    asked = Options(all_devices=True, **options)
    return prepare(build(), (data()[0],), machine_of(devices=num_ranks), asked, Origin())


def planned(sharding: str, num_ranks: int = 2, solver: str = "data", **options: Any) -> Plan:
    return planner(num_ranks, parameter_sharding=sharding, solver=solver, **options).plan()


def own(plan: Plan, position: int) -> slice:
    return slice(position * BATCH // plan.mesh.size, (position + 1) * BATCH // plan.mesh.size)


def adam(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(net.parameters(), lr=0.01)


def backward(net: nn.Module, part: slice) -> None:
    x, target = data()
    functional.cross_entropy(net(x[part]), target[part]).backward()


def assert_as(net: ParallelModule, traced: TracedModel, position: int, model: nn.Module) -> None:
    """Check parameters, buffers and gradients against those of one device."""
    parts = own_parts(net.plan, traced, position)
    expected = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    found = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    assert set(found) == set(expected)
    for name, tensor in found.items():
        part = parts.get(name, ())
        torch.testing.assert_close(tensor.detach(), expected[name].detach()[part], rtol=1e-9, atol=1e-12)
        gradient = expected[name].grad
        assert (tensor.grad is None) == (gradient is None), name
        if gradient is not None:
            torch.testing.assert_close(tensor.grad, gradient[part], rtol=1e-9, atol=1e-12)
        if name in parts:
            held = net.held[name].region
            assert tuple(slice(a, b) for a, b in zip(held.start, held.stop, strict=True)) == part


def everyone(sharding: str, work: Callable[[nn.Module, slice], object], num_ranks: int = 2, **options: Any) -> None:
    """Do the same with the model on one device and with every rank's part; compare."""
    model = build()
    work(model, slice(None))
    plan = planned(sharding, num_ranks, **options)

    def rank(net: ParallelModule, traced: TracedModel, position: int) -> None:
        work(net, own(plan, position))
        assert_as(net, traced, position, model)

    run_ranks(build, plan, rank)


@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize(
    ("name", "num_ranks", "solver"),
    [("lenet5", 4, "data"), ("alexnet", 4, "conv-data-fc-model"), ("vgg", 2, "data"), ("resnet20", 2, "data")],
)
def test_strategies_equal_one_device(name: str, num_ranks: int, solver: str, sharding: str) -> None:
    plan = planner_for(name, num_ranks, solver=solver, parameter_sharding=sharding).plan()
    assert on_threads(name, plan) < TOLERANCE


@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize(("name", "num_ranks", "seed"), [("lenet5", 3, 0), ("alexnet", 4, 1), ("vgg", 4, 2)])
def test_random_mixed_strategies_equal_one_device(name: str, num_ranks: int, seed: int, sharding: str) -> None:
    planner = planner_for(name, num_ranks, parameter_sharding=sharding)
    assert on_threads(name, random_plan(planner, seed)) < TOLERANCE


@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize(
    ("num_ranks", "solver"),
    [(2, "data"), (3, "data"), (4, "data"), (4, "conv-data-fc-model"), (2, "model-in")],
)
def test_adam_on_odd_parameters(sharding: str, num_ranks: int, solver: str) -> None:
    def train(net: nn.Module, part: slice) -> None:
        optimizer = adam(net)
        for _ in range(3):
            optimizer.zero_grad()
            backward(net, part)
            optimizer.step()

    everyone(sharding, train, num_ranks, solver=solver, optimizer="adam")


@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("forget", [False, True])
def test_gradients_accumulate_without_sync_and_with_it(sharding: str, forget: bool) -> None:
    def work(net: nn.Module, part: slice) -> None:
        backward(net.eval(), part)
        with net.no_sync() if isinstance(net, ParallelModule) else torch.enable_grad():
            backward(net, part)
            backward(net, part)
        if forget:
            net.zero_grad()
        backward(net, part)
        backward(net, part)

    everyone(sharding, work)


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_a_gradient_of_which_only_a_part_is_there_is_not_to_be_changed(sharding: str) -> None:
    plan = planned(sharding)

    def work(net: ParallelModule, _: TracedModel, position: int) -> None:
        with net.no_sync():
            backward(net, own(plan, position))
        net.zero_grad(set_to_none=False)
        with pytest.raises(UsageError, match=r"changed in place .* no_sync"):
            net(data()[0][own(plan, position)])
        net.zero_grad()
        net(data()[0][own(plan, position)])

    run_ranks(build, plan, work)


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_zeroed_gradients_penalties_clipping_and_frozen_parameters(sharding: str) -> None:
    def work(net: nn.Module, part: slice) -> None:
        x, target = data()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for step in range(3):
            net.get_submodule("tall").requires_grad_(step != 1)
            penalty = sum(p.square().sum() for p in net.parameters())
            (functional.cross_entropy(net(x[part]), target[part]) + 0.1 * penalty).backward()
            if isinstance(net, ParallelModule):
                norm = net.clip_grad_norm_(0.5)
            else:
                norm = nn.utils.clip_grad_norm_(net.parameters(), 0.5)
            norms[step].append(float(norm))
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        backward(net, part)

    norms: list[list[float]] = [[], [], []]
    everyone(sharding, work)
    for one, *others in norms:
        assert others == pytest.approx([one] * 2, rel=1e-9)


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_evaluation_between_forward_and_backward_and_what_is_written_past_the_counts(sharding: str) -> None:
    x, target = data()

    def work(net: nn.Module, part: slice) -> None:
        net.train()
        loss = functional.cross_entropy(net(x[part]), target[part])
        loss = loss + functional.cross_entropy(net(2 * x[part]), target[part])
        with torch.no_grad():
            before = net.eval()(x[part])
        loss.backward(retain_graph=True)
        loss.backward()
        for parameter in net.parameters():  # as old optimizers and averages of weights do
            parameter.data.mul_(1.5)
        with torch.no_grad():
            after = net.train().eval()(x[part])
            net.load_state_dict({name: t * 2 for name, t in net.state_dict().items()})
            outputs.append((part, torch.stack([before, after, net(x[part])])))

    outputs: list[tuple[slice, torch.Tensor]] = []
    everyone(sharding, work)
    (_, whole), *pieces = outputs
    for part, found in pieces:
        torch.testing.assert_close(found, whole[:, part], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_copies_conversions_and_replaced_parameters(sharding: str) -> None:
    x, _ = data()
    plan = planned(sharding)
    expected = build().eval()(x)
    initial = build().state_dict()  # not by the ranks: torch's generator is one for all threads

    def work(net: ParallelModule, _: TracedModel, position: int) -> None:
        part = own(plan, position)
        for name, tensor in full_state_dict(net, everywhere=True).items():
            assert tensor.equal(initial[name])
        copied = copy.deepcopy(net)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.zero_()
        torch.testing.assert_close(copied.eval()(x[part]), expected[part])
        backward(copied, part)
        assert all(p.grad is None for p in net.parameters())
        single = copied.float()
        torch.testing.assert_close(single(x[part].float()), expected[part].float(), rtol=1e-4, atol=1e-5)
        backward(single.double(), part)
        net.get_submodule("tall").weight = nn.Parameter(torch.zeros(13, 112))
        with pytest.raises(UsageError, match=r"tall\.weight was replaced"):
            net(x[part])

    run_ranks(build, plan, work)


class Posted(ThreadCommunicator):
    """Notes what is posted behind computation, in order, with the bytes of the message."""

    def _note(self, kind: str, buffer: torch.Tensor) -> None:
        self.__dict__.setdefault("posted", []).append((kind, buffer.nbytes))

    def start_all_reduce(self, buffer: torch.Tensor, axes: Axes) -> Pending:
        self._note("all_reduce", buffer)
        return super().start_all_reduce(buffer, axes)

    def start_reduce_scatter(self, buffer: torch.Tensor, own: torch.Tensor, axes: Axes) -> Pending:
        self._note("sync", buffer)
        return super().start_reduce_scatter(buffer, own, axes)

    def start_all_gather(self, result: torch.Tensor, own: torch.Tensor, axes: Axes) -> Pending:
        self._note("gather", result)
        return super().start_all_gather(result, own, axes)


class Even(nn.Module):
    """Rows that divide by 4."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.ReLU(), nn.Flatten(),
            nn.Linear(12 * 16, 40), nn.ReLU(), nn.Linear(40, 20),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def even(sharding: str) -> tuple[Planner, Plan, list[Any], Any]:
    """Return planner, plan, costs of the layers and the simulated step, on 4 ranks."""
    x = torch.randn(BATCH, 3, 8, 8)
    asked: dict[str, Any] = {"parameter_sharding": sharding}
    options = Options(all_devices=True, solver="data", optimizer="adam", **asked)
    made = prepare(Even(), (x,), machine_of(devices=4), options, Origin())
    plan = made.plan()
    search = made.search(made.meshes()[0])
    choice = search.table.choice(plan.strategy)
    costs = [layer[c] for layer, c in zip(search.table.layers, choice, strict=True)]
    return made, plan, costs, simulate(search.table, choice, plan.bucket_bytes)


def steps(plan: Plan, position: int, net: ParallelModule) -> torch.optim.Optimizer:
    """Train for two steps; only what the second posts is left."""
    x = torch.randn(BATCH, 3, 8, 8, generator=torch.Generator().manual_seed(0))[own(plan, position)]
    optimizer = adam(net)
    for _ in range(2):
        vars(net._state.communicator)["posted"] = []
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
    return optimizer


def test_what_full_sharding_posts_is_what_is_priced_in_the_order_of_the_simulated_step() -> None:
    made, plan, costs, timeline = even("full")
    num_bytes = {
        layer.id: sum(cost.sync.values()) for layer, cost in zip(made.traced.layers.layers, costs, strict=True)
    }
    expected = [
        (kind, num_bytes[layer]) for kind, _, layer in (event.name.partition(" ") for event in timeline.events)
        if kind in {"gather", "sync"}
    ]  # fmt: skip
    assert [kind for kind, _ in expected].count("gather") == 8
    statistics = sum(c.blocking_forward.num_bytes + c.blocking_backward.num_bytes for c in costs)  # of the batch norm

    def work(net: ParallelModule, _: TracedModel, position: int) -> list[tuple[str, int]]:
        steps(plan, position, net)
        return vars(net._state.communicator)["posted"]

    for posted in run_ranks(Even, plan, work, Posted):
        assert posted == expected
        assert sum(b for _, b in posted) * 3 / 4 == plan.totals.communication_bytes - statistics


def test_what_a_sharded_optimizer_posts_is_what_is_priced() -> None:
    _, plan, costs, _ = even("optimizer")
    total = sum(b for cost in costs for b in cost.sync.values())

    def work(net: ParallelModule, _: TracedModel, position: int) -> list[tuple[str, int]]:
        steps(plan, position, net)
        return vars(net._state.communicator)["posted"]

    for posted in run_ranks(Even, plan, work, Posted):
        assert posted == [("gather", total), ("sync", total)]


@pytest.mark.parametrize("sharding", ["none", *SHARDINGS])
def test_stored_bytes_are_the_planned_ones(sharding: str) -> None:
    """Parameters, buffers and the state of Adam between two steps; counters, 8 bytes at most each, apart."""
    _, plan, costs, _ = even(sharding)
    planned_bytes = sum(cost.memory.parameters + cost.memory.state for cost in costs)
    num_weights = len(list(Even().parameters()))

    def work(net: ParallelModule, _: TracedModel, position: int) -> tuple[int, int]:
        optimizer = steps(plan, position, net)
        state = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
        wholes = [shard.whole.data for shard in net._shards._shards]
        tensors = [*net.parameters(), *net.buffers(), *wholes, *(p.data for p in net.parameters())]
        storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
        return sum(storages.values()), sum(t.untyped_storage().nbytes() for t in state)

    for parameters, state in run_ranks(Even, plan, work):
        counters = num_weights * 4 + 8 + (num_weights * 4 if sharding == "full" else 0)
        assert planned_bytes <= parameters + state <= planned_bytes + counters


def test_two_layers_are_whole_at_most() -> None:
    _, plan, costs, _ = even("full")
    sizes = [sum(cost.sync.values()) for cost in costs if cost.sync]
    most = max(a + b for a, b in itertools.pairwise(sizes))

    def work(net: ParallelModule, _: TracedModel, position: int) -> list[int]:
        gathers = net._shards._gathers
        assert gathers is not None
        need, seen = gathers.need, []

        def noted(point: int, step: int) -> None:
            need(point, step)
            live = [t.untyped_storage().nbytes() for wholes in gathers._live.values() for t in wholes]
            seen.append(sum(live) + sum(f.message.nbytes for f in gathers._flights.values()))

        gathers.need = noted  # type: ignore[method-assign]  # to look at it
        steps(plan, position, net)
        assert not gathers._live
        assert not gathers._flights
        return seen

    for seen in run_ranks(Even, plan, work):
        assert len(seen) == 2 * 8
        assert max(seen) == most
