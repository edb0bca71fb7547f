"""Training as people do it: optimizers, groups, accumulation, clipping, frozen and shared layers, averages."""

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from planner.errors import UsageError
from planner.frontend.lower import TracedModel
from runtime.module import ParallelModule
from support.equality import run_ranks
from support.loops import assert_equal, assert_pieces, build, gradient, gradients, images, loss_of, own, planned

SOLVERS = ["data", "model", "model-in"]
Make = Callable[[nn.Module], torch.optim.Optimizer]


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Return groups by name, as people make them: no weight decay for biases and norms."""
    plain = [p for n, p in model.named_parameters() if n.endswith("bias") or n.startswith("bn")]
    decayed = [p for n, p in model.named_parameters() if not (n.endswith("bias") or n.startswith("bn"))]
    return [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "lr": 0.02}]


OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda m: torch.optim.SGD(groups(m), lr=0.1, momentum=0.9, nesterov=True),
    "sgd fused": lambda m: torch.optim.SGD(groups(m), lr=0.1, momentum=0.9, fused=True),
    "adam foreach": lambda m: torch.optim.Adam(groups(m), lr=0.01, foreach=True),
    "adamw": lambda m: torch.optim.AdamW(groups(m), lr=0.01, amsgrad=True),
    "adamw fused": lambda m: torch.optim.AdamW(groups(m), lr=0.01, fused=True),
    "rmsprop": lambda m: torch.optim.RMSprop(groups(m), lr=0.01, momentum=0.5, centered=True, foreach=True),
    "adagrad": lambda m: torch.optim.Adagrad(groups(m), lr=0.05),
}


@pytest.mark.parametrize(("name", "solver"), [(n, s) for n in OPTIMIZERS for s in SOLVERS[: 3 if n == "adamw" else 2]])
def test_any_optimizer_with_groups_and_clipping_gives_the_weights_of_one_device(name: str, solver: str) -> None:
    model, (x, target) = build(), images()

    def train(net: nn.Module, clip: Callable[[float], object], *batch: torch.Tensor) -> None:
        optimizer = OPTIMIZERS[name](net)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(net, *batch).backward()
            clip(0.5)
            optimizer.step()
            schedule.step()

    train(model, lambda limit: nn.utils.clip_grad_norm_(model.parameters(), limit), x, target)

    def work(net: ParallelModule, _: TracedModel, position: int) -> None:
        train(net, net.clip_grad_norm_, *own(net, position, x, target))
        # the bias in front of a batch norm has a gradient of rounding noise, which adaptive steps blow up
        mine = {n: p for n, p in net.state_dict().items() if n != "conv1.bias" and "running_mean" not in n}
        assert_pieces(net, mine, {n: model.state_dict()[n] for n in mine}, 1e-7)

    run_ranks(build, planned(solver), work)


@pytest.mark.parametrize("devices", [2, 4])
@pytest.mark.parametrize("solver", SOLVERS)
def test_the_norm_of_all_gradients_is_that_of_one_device(solver: str, devices: int) -> None:
    model, (x, target) = build(), images()
    for parameter in model.fc2.parameters():
        parameter.requires_grad_(False)
    loss_of(model, x, target).backward()
    whole, norms = gradients(model), [2.0, 1.0, 3.5, math.inf, -math.inf, -1.5]

    def clipped(
        net: nn.Module, clip: Callable[..., torch.Tensor]
    ) -> list[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
        found = []
        before = gradients(net)
        for norm in norms:
            for name, parameter in net.named_parameters():
                if name in before:
                    assert parameter.grad is not None
                    parameter.grad.copy_(before[name])
            limit = 0.4 if norm > 0 else 1e-7
            found.append((clip(limit, norm), gradients(net)))
        return found

    expected = clipped(model, lambda *a: nn.utils.clip_grad_norm_(model.parameters(), *a))

    def work(net: ParallelModule, _: TracedModel, position: int) -> list[float]:
        for parameter in net.get_submodule("fc2").parameters():
            parameter.requires_grad_(False)
        loss_of(net, *own(net, position, x, target)).backward()
        assert_pieces(net, gradients(net), whole)
        totals = []
        for (total, after), (want, want_after) in zip(clipped(net, net.clip_grad_norm_), expected, strict=True):
            torch.testing.assert_close(total, want, rtol=1e-10, atol=0)
            assert_pieces(net, after, want_after)
            totals.append(float(total))
        return totals

    found = run_ranks(build, planned(solver, devices), work)
    assert all(f == found[0] for f in found)  # bit for bit, or ranks would drift apart


def test_clipping_by_value_nonfinite_norms_and_what_is_refused() -> None:
    model, (x, target) = build(), images()
    loss_of(model, x, target).backward()
    nn.utils.clip_grad_value_(model.parameters(), 0.01)

    def work(net: ParallelModule, _: TracedModel, position: int) -> None:
        loss_of(net, *own(net, position, x, target)).backward()
        net.clip_grad_value_(0.01)
        assert_pieces(net, gradients(net), gradients(model))
        with pytest.raises(UsageError, match="counts tensors"):
            net.clip_grad_norm_(1.0, 0)
        if position == 1:
            gradient(net, "fc1.weight")[0, 0] = torch.nan
        with pytest.raises(RuntimeError, match="non-finite"):  # on both ranks
            net.clip_grad_norm_(1.0, error_if_nonfinite=True)
        for parameter in net.parameters():
            parameter.grad = None
        assert net.clip_grad_norm_(1.0) == 0

    run_ranks(build, planned("model"), work)


@pytest.mark.parametrize("solver", SOLVERS)
def test_accumulation_over_parts_of_a_batch_is_the_step_of_the_whole(solver: str) -> None:
    model, (x, target) = build().eval(), images(16)
    loss_of(model, x, target).backward()

    def work(net: ParallelModule, _: TracedModel, position: int) -> None:
        net.eval()
        for sync_early in (False, True):
            net.zero_grad(set_to_none=sync_early)
            parts = [own(net, position, x[k : k + 4], target[k : k + 4]) for k in range(0, 16, 4)]
            if sync_early:
                for part in parts:
                    (loss_of(net, *part) / 4).backward()
            else:
                with net.no_sync():
                    for part in parts[:-1]:
                        (loss_of(net, *part) / 4).backward()
                (loss_of(net, *parts[-1]) / 4).backward()
            assert_pieces(net, gradients(net), gradients(model))

    run_ranks(build, planned(solver), work)


@pytest.mark.parametrize("solver", SOLVERS)
def test_layers_may_be_frozen_before_and_be_frozen_and_thawed_later(solver: str) -> None:
    x, target = images()

    def frozen() -> nn.Module:
        model = build()
        for name in ("conv1", "fc1"):
            model.get_submodule(name).requires_grad_(False)
        return model

    def train(net: nn.Module, *batch: torch.Tensor) -> list[dict[str, torch.Tensor]]:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        found = []
        for names, on in [((), False), (("conv1",), True), (("conv3", "bn"), False), (("fc1", "conv3"), True)]:
            for name in names:
                net.get_submodule(name).requires_grad_(on)
            optimizer.zero_grad()
            loss_of(net, *batch).backward()
            found.append(gradients(net))
            optimizer.step()
        return found

    model = frozen()
    expected = train(model, x, target)
    assert [len(g) for g in expected] == [9, 11, 7, 11]

    def work(net: ParallelModule, _: TracedModel, position: int) -> None:
        for mine, want in zip(train(net, *own(net, position, x, target)), expected, strict=True):
            assert_pieces(net, mine, want)
        assert_equal(net, model)

    run_ranks(frozen, planned(solver, build_net=frozen), work)


class Shared(nn.Module):
    """The same convolution twice, and a weight that two linear layers share."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.first = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(108, 108)
        self.second = nn.Linear(108, 108, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(self.conv(x).tanh())
        return self.second(self.first(x.flatten(1)).tanh())[:, :5]


@pytest.mark.parametrize("solver", SOLVERS)
def test_shared_weights_count_once_in_norm_and_step(solver: str) -> None:
    x, target = images()

    def shared() -> nn.Module:
        torch.manual_seed(0)
        return Shared().double()

    def train(net: nn.Module, clip: Callable[[float], object], *batch: torch.Tensor) -> None:
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(net, *batch).backward()
            clip(0.1)
            optimizer.step()

    model = shared()
    train(model, lambda limit: nn.utils.clip_grad_norm_(model.parameters(), limit), x, target)

    def work(net: ParallelModule, _: TracedModel, position: int) -> None:
        train(net, net.clip_grad_norm_, *own(net, position, x, target))
        assert_equal(net, model, 1e-8)

    run_ranks(shared, planned(solver, build_net=shared), work)


@pytest.mark.parametrize("solver", SOLVERS)
def test_an_average_of_the_weights_follows_and_evaluates_as_on_one_device(solver: str) -> None:
    x, target = images()

    def train(net: nn.Module, *batch: torch.Tensor) -> tuple[AveragedModel, torch.Tensor]:
        average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.7), use_buffers=True)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(net, *batch).backward()
            optimizer.step()
            average.update_parameters(net)
        return average, average.eval()(batch[0])

    model = build()
    whole, scores = train(model, x, target)
    expected = {n: t.detach() for n, t in whole.module.state_dict().items()}

    def work(net: ParallelModule, _: TracedModel, position: int) -> None:
        batch = own(net, position, x, target)
        average, found = train(net, *batch)
        torch.testing.assert_close(found, *own(net, position, scores), rtol=1e-9, atol=1e-12)
        assert isinstance(average.module, ParallelModule)
        assert_pieces(net, {n: t.detach() for n, t in average.module.state_dict().items()}, expected)
        assert net.training
        assert_equal(net, model)
        loss_of(average.module.train(), *batch).backward()  # a copy trains, and leaves the original alone
        twin = copy.deepcopy(whole.module).train()
        loss_of(twin, x, target).backward()
        assert_pieces(net, gradients(average.module), gradients(twin))
        assert_equal(net, model)

    run_ranks(build, planned(solver), work)


def test_a_parallel_module_is_not_pickled() -> None:
    def work(net: ParallelModule, _: TracedModel, position: int) -> None:
        del position
        with pytest.raises(UsageError, match="state_dict"):
            pickle.dumps(net)

    run_ranks(build, planned(), work)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_second_derivative_is_refused(solver: str) -> None:
    x, target = images()

    def work(net: ParallelModule, _: TracedModel, position: int) -> None:
        own_x, own_target = own(net, position, x, target)
        loss = loss_of(net, own_x.requires_grad_(), own_target)
        with pytest.raises(UsageError, match="create_graph"):
            torch.autograd.grad(loss, own_x, create_graph=True)

    run_ranks(build, planned(solver), work)


@pytest.mark.parametrize("solver", SOLVERS)
def test_evaluation_without_history_and_training_go_on_side_by_side(solver: str) -> None:
    model, (x, target) = build(), images()
    model(x)
    scores = model.eval()(x)
    loss_of(model.train(), x, target).backward()

    def work(net: ParallelModule, _: TracedModel, position: int) -> None:
        batch = own(net, position, x, target)
        net(batch[0])
        for mode in (torch.inference_mode, torch.no_grad):
            with mode():
                found = net.eval()(batch[0])
            assert not found.requires_grad
            torch.testing.assert_close(found, *own(net, position, scores.detach()), rtol=1e-9, atol=1e-12)
        loss_of(net.train(), *batch).backward()
        assert_equal(net, model)

    run_ranks(build, planned(solver), work)


def test_a_module_converted_after_it_was_parallelized_trains_on() -> None:
    model, (x, target) = build().float(), images()
    loss_of(model, x.float(), target).backward()
    whole = gradients(model)

    def work(net: ParallelModule, _: TracedModel, position: int) -> None:
        own_x, own_target = own(net, position, x, target)
        loss_of(net, own_x, own_target).backward()
        net.zero_grad()
        net.float().to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
        for name, buffer in net.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.fill_(float(name.endswith("var")))
        loss_of(net, own_x.float(), own_target).backward()
        assert_pieces(net, gradients(net), whole, 1e-4)

    run_ranks(build, planned("model"), work)
