"""What `parallelize` promises beside equality: batches of other sizes, accumulation, dropout, losses."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from planner.api import plan_model
from planner.errors import MismatchError, UsageError
from planner.frontend.lower import TracedModel
from planner.plan import Plan
from runtime.parallel import ParallelModule, parallelize, trace_for
from support.equality import own_parts, run_ranks

BATCH = 8


class Net(nn.Module):
    """A small CNN with batch norm, a skip connection, dropout and linear layers."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.bn = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1)
        self.drop = nn.Dropout(dropout)
        self.fc1 = nn.Linear(6 * 4 * 4, 10)
        self.fc2 = nn.Linear(10, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.bn(self.conv1(x)))
        x = x + self.conv2(x)
        x = functional.max_pool2d(x, 2)
        x = self.drop(x)
        return self.fc2(functional.relu(self.fc1(x.flatten(1))))


def build(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return Net(dropout).double()


def planned(build_net: Callable[[], nn.Module], solver: str = "data", num_ranks: int = 2, **options: Any) -> Plan:
    x = torch.randn(BATCH, 3, 8, 8, dtype=torch.float64)
    return plan_model(build_net(), (x,), devices=num_ranks, solver=solver, all_devices=True, **options)


def images(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, 3, 8, 8, generator=generator, dtype=torch.float64), torch.arange(count) % 5


def gradients_of(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def expected_gradients(x: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
    model = build()
    return gradients_of(model, functional.cross_entropy(model(x), target))


def assert_gradients(
    net: ParallelModule, traced: TracedModel, position: int, expected: dict[str, torch.Tensor]
) -> None:
    parts = own_parts(net.plan, traced, position)
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, expected[name][parts[name]], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("solver", ["data", "model", "conv-data-fc-model"])
@pytest.mark.parametrize("pieces", [(3, 2), (5, 1), (1, 1), (8, 8)])
def test_any_batch_on_any_rank_gives_the_gradient_of_the_mean_over_all(solver: str, pieces: tuple[int, int]) -> None:
    x, target = images(sum(pieces))
    expected = expected_gradients(x, target)

    def work(net: ParallelModule, traced: TracedModel, position: int) -> None:
        part = slice(0, pieces[0]) if position == 0 else slice(pieces[0], None)
        functional.cross_entropy(net(x[part]), target[part]).backward()
        assert_gradients(net, traced, position, expected)

    run_ranks(build, planned(build, solver), work)


def test_a_rank_without_samples_is_an_error_on_all_ranks() -> None:
    x, _ = images(4)

    def work(net: ParallelModule, _: TracedModel, position: int) -> str:
        try:
            net(x if position == 0 else x[:0])
        except MismatchError as error:
            return str(error)
        return ""

    assert all("needs at least one" in message for message in run_ranks(build, planned(build, "model"), work))


def test_gradients_accumulate_without_sync_and_with_it() -> None:
    x, target = images(BATCH)
    model = build().eval()
    expected = {n: 3 * g for n, g in gradients_of(model, functional.cross_entropy(model(x), target)).items()}

    def work(net: ParallelModule, traced: TracedModel, position: int) -> None:
        part = slice(position * 4, position * 4 + 4)

        def backward() -> None:
            functional.cross_entropy(net.eval()(x[part]), target[part]).backward()

        with net.no_sync():
            backward()
        backward()
        backward()
        assert_gradients(net, traced, position, expected)

    run_ranks(build, planned(build), work)


@pytest.mark.parametrize("solver", ["data", "model", "conv-data-fc-model", "auto"])
def test_a_penalty_on_parameters_in_the_loss_counts_once(solver: str) -> None:
    x, target = images(BATCH)

    def loss(net: nn.Module, part: slice) -> torch.Tensor:
        penalty = sum(p.square().sum() for p in net.parameters())
        return functional.cross_entropy(net(x[part]), target[part]) + 0.1 * penalty

    model = build()
    whole = gradients_of(model, loss(model, slice(None)))

    def work(net: ParallelModule, traced: TracedModel, position: int) -> None:
        loss(net, slice(position * 4, position * 4 + 4)).backward()
        assert_gradients(net, traced, position, whole)

    run_ranks(build, planned(build, solver), work)


def test_in_evaluation_the_running_statistics_are_used_and_outputs_are_the_own_samples() -> None:
    x, _ = images(6)
    expected = build().eval()(x)

    def work(net: ParallelModule, _: TracedModel, position: int) -> torch.Tensor:
        with torch.no_grad():
            return net.eval()(x[position * 3 : position * 3 + 3])

    for position, found in enumerate(run_ranks(build, planned(build, "model"), work)):
        torch.testing.assert_close(found, expected[position * 3 : position * 3 + 3], rtol=1e-10, atol=1e-12)


def test_local_batch_norm_statistics_are_those_of_the_own_samples() -> None:
    x, _ = images(BATCH)

    def work(net: ParallelModule, _: TracedModel, position: int) -> torch.Tensor:
        net(x[position * 4 : position * 4 + 4])
        return dict(net.named_buffers())["bn.running_mean"]

    for position, found in enumerate(run_ranks(build, planned(build, sync_batch_norm=False), work)):
        alone = build()
        alone(x[position * 4 : position * 4 + 4])
        torch.testing.assert_close(found, dict(alone.named_buffers())["bn.running_mean"])


def test_dropout_masks_agree_on_replicas_differ_on_shards_and_change_with_the_step() -> None:
    class Only(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(192, 192)
            self.drop = nn.Dropout(0.5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.drop(self.fc(x.flatten(1)))

    def ones() -> nn.Module:
        model = Only().double()
        with torch.no_grad():
            model.fc.weight.zero_()
            model.fc.bias.fill_(1.0)
        return model

    x, _ = images(BATCH)

    def work(net: ParallelModule, _: TracedModel, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        del position
        return net(x).detach() > 0, net(x).detach() > 0

    replicas = run_ranks(ones, planned(ones, "auto", io="global", dimensions=()), work)
    assert torch.equal(replicas[0][0], replicas[1][0])
    assert not torch.equal(replicas[0][0], replicas[0][1])
    shards = run_ranks(ones, planned(ones, "data", io="global"), work)
    assert torch.equal(shards[0][0], shards[1][0])
    assert not torch.equal(shards[0][0][:4], shards[0][0][4:])
    assert 0.3 < float(shards[0][0].double().mean()) < 0.7


class WithLoss(nn.Module):
    """A model that returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = Net()
        self.loss = nn.CrossEntropyLoss()

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.loss(self.net(x), target)


@pytest.mark.parametrize("solver", ["data", "model", "auto"])
def test_a_loss_inside_the_model_is_the_mean_over_the_batch_on_every_rank(solver: str) -> None:
    x, target = images(BATCH)
    plan = plan_model(WithLoss().double(), (x, target), devices=2, solver=solver, all_devices=True)
    model = WithLoss().double()
    expected = model(x, target)
    gradients = gradients_of(model, expected)

    def work(net: ParallelModule, traced: TracedModel, position: int) -> None:
        part = slice(position * 4, position * 4 + 4)
        loss = net(x[part], target[part])
        loss.backward()
        torch.testing.assert_close(loss.detach(), expected.detach())
        assert_gradients(net, traced, position, gradients)

    run_ranks(lambda: WithLoss().double(), plan, work)


def test_unused_parameters_keep_no_gradient_and_the_others_are_reduced() -> None:
    x, target = images(BATCH)

    def work(net: ParallelModule, _: TracedModel, position: int) -> list[str]:
        part = slice(position * 4, position * 4 + 4)
        for parameter in net.get_submodule("conv1").parameters():
            parameter.requires_grad_(False)
        functional.cross_entropy(net(x[part]), target[part]).backward()
        return sorted(n for n, p in net.named_parameters() if p.grad is None)

    for without in run_ranks(build, planned(build), work):
        assert without == ["conv1.bias", "conv1.weight"]


def test_the_users_names_and_a_readable_forward_are_kept() -> None:
    def work(net: ParallelModule, _: TracedModel, position: int) -> tuple[set[str], str]:
        del position
        return set(net.state_dict()), net.code

    for names, code in run_ranks(build, planned(build, "conv-data-fc-model"), work):
        assert names == set(build().state_dict())
        assert "self.fc1" in code


def test_clear_errors_before_anything_runs() -> None:
    plan = planned(build)
    with pytest.raises(UsageError, match="torchrun"):
        parallelize(build(), plan)
    with pytest.raises(UsageError, match="meta"):
        trace_for(build().to("meta"), plan)

    class Other(Net):
        def __init__(self) -> None:
            super().__init__()
            self.fc2 = nn.Linear(10, 6)

    with pytest.raises(MismatchError, match="graph digest"):
        trace_for(Other().double(), plan)
    with pytest.raises(MismatchError, match="without a split"):
        trace_for(nn.Sequential(nn.Conv2d(3, 4, 3)).double(), plan)
