"""Variable batch: the accumulated form is synchronous SGD; (m, n) is its definition, step for step, in float64."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from planner.api import Options, Origin, machine_of, prepare
from planner.errors import MismatchError, UsageError
from planner.ir.split import LayerId
from planner.ir.turns import Scheme
from planner.plan import Plan
from runtime.amp import GradScaler
from runtime.variable import VariableBatch, number_of_turns, variable_batch
from support.variable_batches import on_threads, simulate

BATCH, STEPS, CLASSES = 12, 3, 5
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-2)
ADAM = partial(torch.optim.Adam, lr=0.01, amsgrad=True)


class Net(nn.Module):
    """Convolutions with batch norm, then linear layers, of which the last is too small for some splits."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 4, 3, padding=1)
        )
        self.classifier = nn.Sequential(
            nn.Linear(36, 10), nn.Tanh(), nn.Linear(10, 7), nn.ReLU(), nn.Linear(7, CLASSES)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))


def build() -> Net:
    torch.manual_seed(0)
    return Net().double()


def batches(sizes: tuple[int, ...] = (BATCH,) * STEPS) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(n, 2, 6, 6, generator=generator, dtype=torch.float64),
            torch.randint(0, CLASSES, (n,), generator=generator),
        )
        for n in sizes
    ]


_PLANS: dict[tuple[Any, ...], Plan] = {}


def plan_of(ranks: int, solver: str = "conv-data-fc-model", mesh: str | None = None) -> Plan:
    if (ranks, solver, mesh) not in _PLANS:
        x, _ = batches()[0]
        options = Options(mesh=mesh, all_devices=True, solver=solver)
        planner = prepare(build(), (x,), machine_of(devices=ranks), options, Origin("net", "net"))
        search = planner.search(planner.meshes()[0])
        _PLANS[ranks, solver, mesh] = planner.plan_of(search, search.fixed(solver))
    return _PLANS[ranks, solver, mesh]


def own(x: torch.Tensor, shares: tuple[int, ...], rank: int) -> torch.Tensor:
    return x[sum(shares[:rank]) : sum(shares[: rank + 1])]


def parts(net: VariableBatch) -> dict[str, tuple[torch.Tensor, tuple[slice, ...]]]:
    """Return this rank's piece of every parameter and buffer, and where it lies in the whole."""
    held = {name: place for stage in net.held_stages for name, place in stage.held.items()}
    found = {}
    for name, tensor in net.state_dict(keep_vars=True).items():
        region = held[name].regions[held[name].position]
        found[name] = tensor, tuple(slice(a, b) for a, b in zip(region.start, region.stop, strict=True))
    return found


def assert_equal(found: list[tuple[list[float], dict[str, Any]]], losses: list[float], expected: nn.Module) -> None:
    whole = expected.state_dict(keep_vars=True)
    for mine, tensors in found:
        assert mine == pytest.approx(losses, rel=1e-10)
        assert tensors.keys() == whole.keys()
        for name, (value, gradient, part) in tensors.items():
            torch.testing.assert_close(value, whole[name].detach()[part], rtol=1e-9, atol=1e-11)
            if gradient is not None:
                torch.testing.assert_close(gradient, whole[name].grad[part], rtol=1e-9, atol=1e-11)


def after(net: VariableBatch, *, gradients: bool) -> dict[str, Any]:
    return {
        name: (t.detach(), t.grad if gradients else None, part) for name, (t, part) in parts(net).items()
    }  # fmt: skip


CASES = [
    ("a", 2, None, (6, 6), "conv-data-fc-model"),
    ("b", 2, 4, (5, 7), "conv-data-fc-model"),
    ("c", 2, 4, (3, 9), "conv-data-fc-model"),
    ("b", 3, None, (4, 4, 4), "model-in"),
    ("c", 2, 7, (2, 10), "spatial"),
    ("c", 1, 3, (12,), "data"),
]
"""Scheme, ranks, turns, samples of each rank, splits; the middle layers of ``model-in`` are split by what they read."""


@pytest.mark.parametrize(("scheme", "ranks", "count", "shares", "solver"), CASES)
def test_without_updates_in_turns_it_is_synchronous_sgd(
    scheme: Scheme, ranks: int, count: int | None, shares: tuple[int, ...], solver: str
) -> None:
    expected, losses = build(), []
    optimizer = SGD(expected.parameters())
    for x, target in batches():
        optimizer.zero_grad()
        loss = functional.cross_entropy(expected(x), target)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))

    def work(net: VariableBatch, rank: int) -> tuple[list[float], dict[str, Any]]:
        mine, optimizer = [], SGD(net.parameters())
        for x, target in batches():
            optimizer.zero_grad()
            mine.append(float(net.step(own(x, shares, rank), target=own(target, shares, rank))))
            optimizer.step()
        return mine, after(net, gradients=True)

    assert_equal(on_threads(build, plan_of(ranks, solver), work, scheme, count), losses, expected)


@pytest.mark.parametrize(
    ("scheme", "ranks", "count", "shares", "solver", "update"),
    [*((*case, SGD) for case in CASES), ("b", 2, None, (6, 6), "conv-data-fc-model", ADAM)],
)
def test_with_updates_in_turns_it_is_a_simulation_of_its_definition(
    scheme: Scheme, ranks: int, count: int | None, shares: tuple[int, ...], solver: str, update: Any
) -> None:
    plan, expected = plan_of(ranks, solver), build()
    front = nn.Sequential(expected.features, nn.Flatten())
    num_turns = number_of_turns(plan, scheme, count)
    losses = simulate(front, expected.classifier, batches(), shares, scheme, num_turns, (update, update))

    def work(net: VariableBatch, rank: int) -> tuple[list[float], dict[str, Any]]:
        optimizer = update(net.parameters())
        mine = [
            float(net.step(own(x, shares, rank), target=own(target, shares, rank), optimizer=optimizer))
            for x, target in batches()
        ]
        return mine, after(net, gradients=False)

    assert_equal(on_threads(build, plan, work, scheme, count), losses, expected)


class SkipsSecond(torch.optim.SGD):
    """Leaves its second step out."""

    def step(self, *arguments: Any) -> None:  # type: ignore[override]  # it is called without a closure
        self.count = getattr(self, "count", 0) + 1
        if self.count != 2:
            super().step(*arguments)


@pytest.mark.parametrize("overflows", [False, True])
def test_with_a_scaled_loss_all_ranks_leave_out_the_turn_that_overflows_on_one(overflows: bool) -> None:
    expected, update, shares = build(), partial(torch.optim.SGD, lr=0.1, momentum=0.9), (5, 7)
    linear = partial(SkipsSecond, lr=0.1, momentum=0.9) if overflows else update
    front = nn.Sequential(expected.features, nn.Flatten())
    losses = simulate(front, expected.classifier, batches(), shares, "c", 3, (update, linear))

    def work(net: VariableBatch, rank: int) -> tuple[list[float], dict[str, Any]]:
        optimizer, scaler = update(net.parameters()), GradScaler(net, init_scale=2.0**10, growth_interval=100)
        (weight,) = (p for name, p in net.linear.named_parameters() if name.endswith("classifier.0.weight"))
        turn = iter(range(100))
        if overflows and rank == 1:
            weight.register_hook(lambda g: g * torch.inf if next(turn) == 1 else g)
        mine = [
            float(net.step(own(x, shares, rank), target=own(target, shares, rank), optimizer=optimizer, scaler=scaler))
            for x, target in batches()
        ]
        assert scaler.get_scale() == (2.0**9 if overflows else 2.0**10)
        return mine, after(net, gradients=False)

    plan = plan_of(2)
    assert "out_channel" in plan.strategy[LayerId("classifier.0")].dimensions  # a piece each: one rank sees it
    assert_equal(on_threads(build, plan, work, "c", 3), losses, expected)


def test_a_scaled_loss_without_updates_in_turns_is_that_of_the_caller() -> None:
    (x, target), *_ = batches()
    expected = build()
    functional.cross_entropy(expected(x), target).backward()

    def work(net: VariableBatch, rank: int) -> tuple[list[float], dict[str, Any]]:
        optimizer, scaler = torch.optim.SGD(net.parameters(), lr=0.0), GradScaler(net, init_scale=2.0**10)
        with pytest.raises(UsageError, match=r"must be a runtime\.GradScaler"):
            net.step(x, target=target, scaler=torch.amp.GradScaler("cpu"))  # type: ignore[arg-type]  # what is tested
        net.step(own(x, (6, 6), rank), target=own(target, (6, 6), rank), scaler=scaler)
        scaler.step(optimizer)
        scaler.update()
        return [], after(net, gradients=True)

    assert_equal(on_threads(build, plan_of(2), work, "c", None), [], expected)


def test_two_axes_and_batches_of_other_sizes() -> None:
    data = batches((12, 9, 5))
    expected = build()
    front = nn.Sequential(expected.features, nn.Flatten())
    for (x, target), shares in zip(data, [(3, 3, 3, 3), (2, 3, 1, 3), (1, 2, 1, 1)], strict=True):
        simulate(front, expected.classifier, [(x, target)], shares, "c", 4, (ADAM_FREE, ADAM_FREE))

    def work(net: VariableBatch, rank: int) -> tuple[list[float], dict[str, Any]]:
        optimizer = ADAM_FREE(net.parameters())
        for (x, target), shares in zip(data, [(3, 3, 3, 3), (2, 3, 1, 3), (1, 2, 1, 1)], strict=True):
            net.step(own(x, shares, rank), target={"labels": own(target, shares, rank)}["labels"], optimizer=optimizer)
        return [], after(net, gradients=False)

    plan = plan_of(4, mesh="gpu=2x2")
    assert len(plan.mesh.axes) == 2
    assert_equal(on_threads(build, plan, work, "c", 4), [], expected)


ADAM_FREE = partial(torch.optim.SGD, lr=0.1)
"""Without a memory, so that the simulation may be started anew for every batch."""


def test_evaluation_gives_every_rank_the_output_of_its_samples() -> None:
    (x, _), *_ = batches()
    expected = build().eval()(x)

    def work(net: VariableBatch, rank: int) -> torch.Tensor:
        net.eval()
        return net.evaluate(own(x, (5, 7), rank))

    found = torch.cat(on_threads(build, plan_of(2), work, "b", None))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert not found.requires_grad


def test_frozen_convolutions_get_no_gradient() -> None:
    def frozen() -> Net:
        net = build()
        net.features.requires_grad_(requires_grad=False)
        return net

    (x, target), *_ = batches()
    expected = frozen()
    functional.cross_entropy(expected(x), target).backward()

    def work(net: VariableBatch, rank: int) -> tuple[list[float], dict[str, Any]]:
        net.step(own(x, (6, 6), rank), target=own(target, (6, 6), rank))
        assert all(p.grad is None for p in net.front.parameters())
        return [], after(net, gradients=True)

    plan_net, search = prepared(frozen())
    assert_equal(on_threads(frozen, plan_net.plan_of(search, search.fixed("data")), work, "c", None), [], expected)


def prepared(net: nn.Module) -> tuple[Any, Any]:
    planner = prepare(net, (batches()[0][0],), machine_of(devices=2), Options(all_devices=True), Origin("net", "net"))
    return planner, planner.search(planner.meshes()[0])


def test_every_rank_hears_of_samples_that_do_not_fit() -> None:
    (x, target), *_ = batches()

    def work(net: VariableBatch, rank: int) -> str:
        with pytest.raises(MismatchError) as caught:
            net.step(own(x, (6, 6), rank), target=target[: 5 + rank])
        return str(caught.value)

    mine, other = on_threads(build, plan_of(2), work, "c", None)
    assert "[5, 6] samples on this rank" in mine
    assert "passed (-1, 6) samples, where -1 stands for" in other


@pytest.mark.parametrize(
    ("scheme", "count", "first", "message"),
    [
        ("b", 3, None, "a multiple of 2, not 3"),
        ("a", 2, None, "one turn"),
        ("c", 0, None, "at least one"),
        ("c", 2, "features.9", r"cannot begin with .features\.9.; possible are .*classifier\.0"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(
    scheme: Scheme, count: int, first: str | None, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        on_threads(build, plan_of(2), lambda _net, _rank: None, scheme, count, first)


def test_a_network_without_linear_layers_is_refused() -> None:
    def convolutions() -> nn.Module:
        return nn.Sequential(nn.Conv2d(2, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()

    planner, search = prepared(convolutions())
    plan = planner.plan_of(search, search.fixed("data"))
    with pytest.raises(UsageError, match="no linear layer behind its last convolution"):
        on_threads(convolutions, plan, lambda _net, _rank: None, "c", None)


def test_another_first_layer_takes_a_convolution_into_the_turns() -> None:
    (x, target), *_ = batches()
    expected = build()
    functional.cross_entropy(expected(x), target).backward()

    def work(net: VariableBatch, rank: int) -> tuple[list[float], dict[str, Any]]:
        net.step(own(x, (6, 6), rank), target=own(target, (6, 6), rank))
        return [], after(net, gradients=True)

    assert_equal(on_threads(build, plan_of(2), work, "c", 3, "features.4"), [], expected)


def test_no_job_and_no_forward() -> None:
    with pytest.raises(UsageError, match="is not initialised: call"):
        variable_batch(build(), plan_of(2), functional.cross_entropy)

    def work(net: VariableBatch, _rank: int) -> None:
        with pytest.raises(UsageError, match="call step"):
            net(batches()[0][0])

    on_threads(build, plan_of(2), work, "a", None)
