"""Forward and backward passes in other orders than one after the other, and what does not fit a pass."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from planner.api import Options, Origin, machine_of, plan_model, prepare
from planner.errors import MismatchError
from planner.frontend.lower import TracedModel
from planner.ir.dimension import Dimension
from planner.ir.split import LayerId, Split
from planner.plan import Plan
from runtime.data import own_part
from runtime.module import ParallelModule
from runtime.parallel import lower, trace_for
from support.equality import run_ranks
from support.loops import assert_equal, assert_pieces, gradients, own

BATCH = 6


class Classifier(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv, self.drop, self.fc = nn.Conv2d(2, 4, 3, padding=1), nn.Dropout(dropout), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.drop(torch.tanh(self.conv(x)).mean((2, 3))))


def build(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return Classifier(dropout).double()


def images(count: int = BATCH, size: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 2, size, size, generator=generator, dtype=torch.float64), torch.arange(count) % 3


def planned(solver: str = "data", dropout: float = 0.0, **options: Any) -> Plan:
    return plan_model(build(dropout), (images()[0],), devices=2, solver=solver, all_devices=True, **options)


def with_splits(plan: Plan, splits: dict[str, Dimension]) -> Plan:
    """Return a plan whose layers are split otherwise over its only axis."""
    (stage,) = plan.stages
    layers = [
        layer.model_copy(update={"split": dict(Split.of(plan.mesh, (splits[layer.id],)).axes)})
        if layer.id in splits
        else layer
        for layer in stage.layers
    ]
    return plan.model_copy(update={"stages": [stage.model_copy(update={"layers": layers})]})


@pytest.mark.parametrize("solver", ["data", "model"])
def test_each_backward_pass_counts_the_samples_of_its_own_forward_pass(solver: str) -> None:
    """Two uneven batches in one backward pass; then an evaluation of another size in between."""
    x, target = images(9)
    batches = [(slice(0, 5), (3, 2)), (slice(5, 8), (1, 2))]
    model = build()
    sum(functional.cross_entropy(model(x[b]), target[b]) for b, _ in batches).backward()  # type: ignore[union-attr]
    between = build()
    functional.cross_entropy(between(x[:5]), target[:5]).backward()

    def loss(net: ParallelModule, position: int, which: int) -> torch.Tensor:
        part, sizes = batches[which]
        mine = slice(sum(sizes[:position]), sum(sizes[: position + 1]))
        return functional.cross_entropy(net(x[part][mine]), target[part][mine])

    def work(net: ParallelModule, _: TracedModel, position: int) -> None:
        (loss(net, position, 0) + loss(net, position, 1)).backward()
        assert_equal(net, model)
        net.zero_grad()
        kept = loss(net, position, 0)
        with torch.no_grad():
            net.eval()(x[5:][: 3 - position])
        kept.backward()
        assert_equal(net, between)

    run_ranks(build, planned(solver), work)


@pytest.mark.parametrize("sharding", ["none", "full"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_pass_that_is_computed_again_draws_what_it_drew(reentrant: bool, sharding: str) -> None:
    """``torch.utils.checkpoint`` around the parallel module: gradients are those of the masks of the outputs."""
    x, target = images()

    def passes(net: ParallelModule, batch: list[torch.Tensor], repeated: bool) -> dict[str, torch.Tensor]:
        net.zero_grad()
        net._state.step = 10
        total = torch.zeros((), dtype=torch.float64)
        for inputs in (batch[0].clone().requires_grad_(), batch[0].clone().requires_grad_()):
            for _ in range(2):  # twice on the same memory
                scores = checkpoint(net, inputs, use_reentrant=reentrant) if repeated else net(inputs)
                total = total + functional.cross_entropy(scores, batch[1]) * (1 + total.detach())
        total.backward()
        assert net._state.step == 14
        return gradients(net)

    def work(net: ParallelModule, _: TracedModel, position: int) -> None:
        batch = own(net, position, x, target)
        expected, found = passes(net, batch, False), passes(net, batch, True)
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-12)

    run_ranks(lambda: build(0.5), planned(dropout=0.5, parameter_sharding=sharding), work)


def test_dropout_that_is_switched_on_in_evaluation_draws_new_numbers_in_each_pass() -> None:
    x, _ = images()

    def work(net: ParallelModule, _: TracedModel, position: int) -> None:
        net.eval().get_submodule("drop").train()
        (mine,) = own(net, position, x)
        first, second = net(mine), net(mine)
        assert not torch.equal(first, second)
        assert torch.equal(net.eval()(mine), net(mine))

    run_ranks(lambda: build(0.5), planned(dropout=0.5), work)


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.heads = nn.ModuleList(nn.Linear(4, 3) for _ in range(3))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [head(torch.tanh(self.stem(x))) for head in self.heads]


@pytest.mark.parametrize("sharding", ["none", "optimizer"])
def test_what_only_other_ranks_use_gets_their_gradient_and_what_none_uses_gets_none(sharding: str) -> None:
    """As DistributedDataParallel with ``find_unused_parameters``: else replicas would go apart."""

    def made() -> nn.Module:
        torch.manual_seed(0)
        return Heads().double()

    x = torch.randn(4, 4, dtype=torch.float64)
    model = made()
    scores = model(x)
    ((scores[0][:2].square().mean() + scores[1][2:].square().mean()) / 2).backward()
    options: dict[str, Any] = {"parameter_sharding": sharding}
    plan = plan_model(made(), (x,), devices=2, solver="data", all_devices=True, **options)

    def work(net: ParallelModule, _: TracedModel, position: int) -> None:
        (mine,) = own(net, position, x)
        for _step in range(2):
            net.zero_grad()
            net(mine)[position].square().mean().backward()
            assert_pieces(net, gradients(net), gradients(model))
        for _step in range(2):  # a gradient that came from others is added to as any other
            net(mine)[position].square().mean().backward()
        assert_pieces(net, gradients(net), {n: 3 * g for n, g in gradients(model).items()})

    run_ranks(made, plan, work)


# ---- what does not fit


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.tanh(self.a(x)))


def dense() -> nn.Module:
    torch.manual_seed(0)
    return Dense().double()


@pytest.mark.parametrize(("io", "splits"), [("global", {}), ("per-rank", {"a": Dimension.OUT_CHANNEL})])
def test_images_of_another_size_run_where_samples_alone_are_split_and_are_refused_elsewhere(
    io: str, splits: dict[str, Dimension]
) -> None:
    """A rank's region of the planned size would be a part of the image."""
    x, _ = images(4)
    larger, _ = images(4, 9)
    options: dict[str, Any] = {"devices": 2, "solver": "data", "all_devices": True}
    by_samples = plan_model(dense(), (x,), io="per-rank", **options)
    expected = dense()(larger)

    def fits(net: ParallelModule, _: TracedModel, position: int) -> None:
        torch.testing.assert_close(net(*own(net, position, larger)), *own(net, position, expected))

    run_ranks(dense, by_samples, fits)

    def fails(net: ParallelModule, _: TracedModel, position: int) -> None:
        with pytest.raises(MismatchError, match="samples of another size need a plan of their own"):
            net(larger if io == "global" else own(net, position, larger)[0])

    run_ranks(dense, with_splits(plan_model(dense(), (x,), io=io, **options), splits), fails)


def test_what_one_rank_refuses_is_an_error_on_all() -> None:
    x, _ = images()

    def work(net: ParallelModule, _: TracedModel, position: int) -> str:
        with pytest.raises(MismatchError) as error:
            net(x[:3] if position else x[:3, :1])
        return str(error.value)

    first, second = run_ranks(build, planned("model"), work)
    assert "its part of a sample" in first
    assert "see its own message" in second


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(2, 4, 3, padding=1)

    def forward(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return self.a(x) * self.b(z)


def test_inputs_may_be_split_in_different_ways() -> None:
    """``io: local``: a rank passes some samples of one input and a region of all samples of the other."""

    def made() -> nn.Module:
        torch.manual_seed(0)
        return TwoInputs().double()

    (x, _), (z, _) = images(4), images(4)
    options = Options(all_devices=True, io="local", dimensions=(Dimension.SAMPLE, Dimension.HEIGHT))
    plan = prepare(made(), (x, z), machine_of(devices=2), options, Origin("net")).plan()
    splits = {"x": Dimension.SAMPLE, "z": Dimension.HEIGHT}
    assert set(splits) <= {str(layer) for layer in plan.strategy}
    plan = with_splits(plan, splits)
    assert plan.strategy[LayerId("z")].dimensions == (Dimension.HEIGHT,)
    model = made()
    model(x, z).square().mean().backward()

    def work(net: ParallelModule, _: TracedModel, position: int) -> None:
        rank = plan.mesh.ranks[position]
        mine = [whole[own_part(plan, rank, name)] for name, whole in (("x", x), ("z", z))]
        net(*mine).square().mean().backward()
        assert_equal(net, model)
        with pytest.raises(MismatchError, match="its part of a batch of 4"):
            net(mine[0], mine[1][:3])

    run_ranks(made, plan, work)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.conv(x))


@pytest.mark.parametrize("solver", ["data", "model", "spatial"])
def test_chained_modules_have_the_gradients_of_one_network(solver: str) -> None:
    """The gradient that the second module gives its input goes on into the first one."""

    def encoder() -> nn.Module:
        torch.manual_seed(1)
        return Encoder().double()

    x, target = images(5)
    first, second = encoder(), build()
    functional.cross_entropy(second(first(x)), target).backward()
    plan = plan_model(encoder(), (images()[0],), devices=2, solver=solver, all_devices=True)
    models = [encoder(), encoder()]
    traces = [trace_for(model, plan) for model in models]  # not in a thread: fx patches modules globally

    def work(net: ParallelModule, _: TracedModel, position: int) -> None:
        front = lower(models[position], traces[position], plan, net._state.communicator)
        images_, target_ = own(net, position, x, target)
        functional.cross_entropy(net(front(images_)), target_).backward()
        assert_equal(net, second)
        assert_equal(front, first)

    run_ranks(build, planned(solver), work)
