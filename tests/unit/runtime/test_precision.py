"""Mixed precision: what ranks compute against one device under autocast, and scaled losses whose ranks agree."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from planner.frontend.lower import TracedModel
from runtime.amp import GradScaler
from runtime.lowering.ops import Redistribution
from runtime.module import ParallelModule
from support.equality import run_ranks
from support.loops import assert_equal, build, gradient, gradients, images, loss_of, own, piece, planned

SOLVERS = ["data", "model", "model-in"]
TOLERANCES = {torch.bfloat16: 0.06, torch.float16: 0.01}


def small() -> nn.Module:
    return build().float()


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("solver", SOLVERS)
def test_autocast_reaches_all_moves_and_gradients_are_those_of_one_device(solver: str, dtype: torch.dtype) -> None:
    model, (x, target) = small(), images()

    def run(net: nn.Module, *batch: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype):
            scores = net(batch[0].float())
            loss = nn.functional.cross_entropy(scores, batch[1])
        loss.backward()
        return scores

    whole = run(model, x, target)
    exact = small()
    loss_of(exact, x.float(), target).backward()
    expected, rounded, tolerance = gradients(exact), gradients(model), TOLERANCES[dtype]

    def work(net: ParallelModule, _: TracedModel, position: int) -> None:
        seen: list[torch.dtype] = []

        def note(module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
            if module.get_submodule("").__class__ is Redistribution and output.is_floating_point():
                seen.append(output.dtype)
                if output.requires_grad:
                    output.register_hook(lambda g: seen.append(g.dtype))

        moves = {n: m for n, m in net.named_modules() if isinstance(m, Redistribution)}
        inputs = [n for n in moves if "conv1" in n]
        for name, move in moves.items():
            if name not in inputs:  # the images themselves are fp32
                move.register_forward_hook(note)
        scores = run(net, *own(net, position, x, target))
        assert scores.dtype is whole.dtype is dtype
        assert set(seen) == {dtype}
        (mine,) = own(net, position, whole)
        torch.testing.assert_close(scores, mine, rtol=tolerance, atol=tolerance)
        for name, mine in gradients(net).items():
            whole_error = float((rounded[name] - expected[name]).norm())
            want = piece(net, name, expected[name])
            error = float((mine - want).norm())
            assert mine.dtype is torch.float32, name
            assert error < 2 * whole_error + tolerance * float(want.norm()) + 1e-4, name
        assert net.get_buffer("bn.running_var").dtype is torch.float32
        torch.testing.assert_close(
            net.get_buffer("bn.running_var"),
            piece(net, "bn.running_var", model.get_buffer("bn.running_var")),
            rtol=1e-3,
            atol=1e-4,
        )

    run_ranks(small, planned(solver, build_net=small), work)


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9),
    "adamw fused": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, fused=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_scaled_loss_gives_the_steps_of_one_device_and_all_ranks_skip_together(solver: str, name: str) -> None:
    """In step 1 one element of one rank's gradient overflows: everyone skips it and halves the scale."""
    model, (x, target) = build(), images()

    def train(
        net: nn.Module, scaler: torch.amp.GradScaler, hit: Callable[[], Any], *batch: torch.Tensor
    ) -> list[float]:
        optimizer, scales = OPTIMIZERS[name](net), []
        for k in range(4):
            optimizer.zero_grad()
            scaler.scale(loss_of(net, *batch)).backward()
            if k == 1:
                hit()
            if k != 2:
                scaler.unscale_(optimizer)
                if isinstance(net, ParallelModule):
                    net.clip_grad_norm_(0.5)
                else:
                    nn.utils.clip_grad_norm_(net.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        return scales

    options: dict[str, Any] = {"init_scale": 2.0**10, "growth_interval": 2}
    scaler = torch.amp.GradScaler("cpu", **options)
    scales = train(model, scaler, lambda: gradient(model, "fc1.weight")[-1, -1].fill_(torch.inf), x, target)
    assert scales == [2.0**10, 2.0**9, 2.0**9, 2.0**10]

    def work(net: ParallelModule, _: TracedModel, position: int) -> None:
        def hit() -> None:
            held = net.held["fc1.weight"]
            last = held.region.stop == held.shape  # the only rank, or the ranks, that hold the last element
            if last and (position == 1 or len(held.holders) == 2):
                gradient(net, "fc1.weight")[-1, -1] = torch.inf

        mine = train(net, GradScaler(net, **options), hit, *own(net, position, x, target))
        assert mine == scales
        assert_equal(net, model, 1e-7)

    run_ranks(build, planned(solver), work)


def test_a_rank_without_gradients_skips_and_updates_with_the_others() -> None:
    x, target = images()

    def work(net: ParallelModule, _: TracedModel, position: int) -> tuple[float, bool]:
        scaler = GradScaler(net, init_scale=4.0)
        before = net.get_parameter("conv1.weight").detach().clone()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        scaler.scale(loss_of(net, *own(net, position, x, target))).backward()
        if position == 0:
            optimizer.zero_grad()
        else:
            gradient(net, "fc2.bias")[0] = torch.nan
        scaler.step(optimizer)
        scaler.update()
        return scaler.get_scale(), torch.equal(before, net.get_parameter("conv1.weight"))

    assert run_ranks(build, planned(), work) == [(2.0, True)] * 2
