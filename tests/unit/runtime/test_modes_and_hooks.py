"""A model whose code asks for its mode, and hooks under the user's names."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from planner.api import plan_model
from planner.errors import UsageError
from planner.frontend.lower import TracedModel
from planner.frontend.modes import asks_for_mode
from planner.ir.layout import Whole
from planner.ir.rules import LayerLayouts, layouts
from runtime.module import ParallelModule
from runtime.parallel import trace_for
from support.equality import run_ranks
from support.loops import assert_pieces, build, gradients, images, own, planned

SOLVERS = ["data", "model", "model-in"]


class Auxiliary(nn.Module):
    """A second head in training; a layer of its own in evaluation; other functions in each."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 7, 3, padding=1), nn.BatchNorm2d(7)
        self.deep = nn.Conv2d(7, 6, 3, padding=1)
        self.aux, self.head, self.calibrate = nn.Linear(7, 5), nn.Linear(6, 5), nn.Linear(5, 5)

    def forward(self, x: torch.Tensor) -> Any:
        x = functional.relu(self.norm(self.conv(x)))
        deep = self.head(self.deep(x).mean((2, 3)))
        if not self.training:
            return self.calibrate(deep).softmax(1)
        return deep, self.aux(x.mean((2, 3)))


class Resized(nn.Module):
    """The same convolution sees another size in evaluation, with dropout by function in training."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x if self.training else functional.max_pool2d(x, 2, stride=1)
        x = self.norm(self.conv(x)).mean((2, 3))
        return self.fc(functional.dropout(x, 0.0, training=self.training))


def builder(kind: type[nn.Module]) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        torch.manual_seed(0)
        return kind().double()

    return made


def loss(found: Any) -> torch.Tensor:
    parts = found if isinstance(found, tuple) else (found,)
    return sum((p.square().mean() for p in parts), torch.zeros((), dtype=torch.float64))


@pytest.mark.parametrize("kind", [Auxiliary, Resized])
@pytest.mark.parametrize("solver", SOLVERS)
def test_evaluation_runs_the_code_of_evaluation(solver: str, kind: type[nn.Module]) -> None:
    made, (x, _) = builder(kind), images()
    model = made()
    plan = plan_model(made(), (x,), devices=2, solver=solver, all_devices=True)
    loss(model(x)).backward()
    trained, buffers = gradients(model), copy.deepcopy(dict(model.named_buffers()))
    model.zero_grad()
    scores = model.eval()(x)
    loss(scores).backward()
    tuned = gradients(model)

    def work(net: ParallelModule, _: TracedModel, position: int) -> None:
        (part,) = own(net, position, x)
        loss(net(part)).backward()
        assert_pieces(net, gradients(net), trained)
        assert_pieces(net, dict(net.named_buffers()), buffers)
        net.zero_grad()
        for twin in (net, copy.deepcopy(net)):
            found = twin.eval()(part)
            torch.testing.assert_close(found, *own(net, position, scores.detach()), rtol=1e-9, atol=1e-12)
            loss(found).backward()  # fine-tuning with frozen statistics
            assert_pieces(net, gradients(twin), tuned)
        assert set(net.state_dict()) == set(model.state_dict())
        net.zero_grad()
        net.train()
        net(part)
        single = net.float().eval()(part.float())  # what evaluation reads follows conversions
        assert single.dtype is torch.float32
        assert isinstance(net.train()(part.float()), tuple if kind is Auxiliary else torch.Tensor)

    run_ranks(made, plan, work)


def test_only_models_that_ask_are_traced_twice() -> None:
    assert asks_for_mode(Auxiliary())
    assert not asks_for_mode(nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), nn.Dropout()))
    assert trace_for(build(), planned()).evaluation is None


def test_what_cannot_be_evaluated_says_so_then() -> None:
    class Choosing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x).mean((2, 3))
            return y if self.training else y[y[:, 0] > 0]

    made, (x, _) = builder(Choosing), images()
    plan = plan_model(made(), (x,), devices=2, solver="data", all_devices=True)

    def work(net: ParallelModule, _: TracedModel, position: int) -> None:
        (part,) = own(net, position, x)
        assert net(part).shape == (4, 4)
        with pytest.raises(UsageError, match="in evaluation it cannot be traced"):
            net.eval()(part)

    run_ranks(made, plan, work)


def layouts_of(net: ParallelModule, traced: TracedModel) -> dict[str, LayerLayouts]:
    graph, plan = traced.layers, net.plan
    return {x.id: layouts(x, graph.inputs_of(x), plan.mesh, plan.strategy[x.id]) for x in graph.layers}


@pytest.mark.parametrize("solver", SOLVERS)
def test_hooks_fire_under_the_users_names_with_this_ranks_piece(solver: str) -> None:
    """On layers that are kept, replaced and absorbed; forward, in front of it and backward."""
    x, _ = images()
    names = ["conv1", "bn", "relu", "conv2", "conv3", "conv4", "drop", "fc1", "fc2"]
    whole: dict[str, torch.Tensor] = {}
    model = build()
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda _m, _i, y, n=name: whole.update({n: y.detach().clone()}))
    model(x)

    def work(net: ParallelModule, traced: TracedModel, position: int) -> None:
        seen: dict[str, torch.Tensor] = {}
        calls: list[str] = []

        def note(what: str, *_: Any) -> None:
            calls.append(what)

        for name in names:
            part = net.get_submodule(name)
            part.register_forward_hook(lambda _m, _i, y, n=name: seen.update({n: y.detach().clone()}))
            part.register_forward_pre_hook(partial(note, f"before {name}"))
        for name in ("conv3", "fc1"):
            net.get_submodule(name).register_full_backward_hook(partial(note, f"behind {name}"))
        (own_x,) = own(net, position, x)
        net(own_x).square().mean().backward()
        assert set(seen) == set(names)
        assert calls == [f"before {n}" for n in names] + ["behind fc1", "behind conv3"]
        for name in set(names) & set(traced.layers.index):
            layers = layouts_of(net, traced)
            region = layers[name].computed.region(position)
            expected = whole[name][tuple(slice(a, b) for a, b in zip(region.start, region.stop, strict=True))]
            assert seen[name].shape == expected.shape
            if not layers[name].computed.axes_with(Whole.PARTIAL):
                torch.testing.assert_close(seen[name], expected)
        with pytest.raises(UsageError, match="never be called"):
            net.get_submodule("transfers").register_forward_hook(lambda *_: None)

    run_ranks(build, planned(solver), work)


def test_hooks_on_the_given_model_and_on_blocks() -> None:
    x, _ = images()
    fired: list[str] = []

    def blocks() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Sequential(nn.Conv2d(3, 7, 3), nn.ReLU()), nn.Flatten(), nn.Linear(112, 5)).double()

    def hooked() -> nn.Module:
        net = blocks()
        net[2].register_forward_hook(lambda *_: fired.append("linear"))
        net.register_forward_hook(lambda *_: fired.append("model"))
        return net

    plan = plan_model(blocks(), (x,), devices=2, solver="model", all_devices=True)

    def work(net: ParallelModule, _: TracedModel, position: int) -> None:
        net(*own(net, position, x))
        with pytest.raises(UsageError, match=r"its parts \(0, 1\)"):
            net.get_submodule("0").register_forward_hook(lambda *_: None)

    run_ranks(hooked, plan, work)
    assert sorted(fired) == ["linear", "linear", "model", "model"]
