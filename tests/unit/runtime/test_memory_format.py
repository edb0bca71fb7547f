"""Tensors in channels_last stay so through moves, and give the numbers of one device."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn import functional

from planner.api import plan_model
from planner.errors import MismatchError
from planner.frontend.lower import TracedModel
from runtime.comm.communicator import ThreadCommunicator, ThreadWorld
from runtime.comm.packing import format_of
from runtime.lowering.ops import Redistribution
from runtime.module import ParallelModule
from runtime.parameters.local import refuse_differing_models
from support.equality import run_ranks
from support.loops import assert_equal, assert_pieces, build, gradients, images, loss_of, own, planned

LAST = torch.channels_last


def last() -> nn.Module:
    return build().to(memory_format=LAST)  # type: ignore[call-overload]  # torch's stub lacks it


@pytest.mark.parametrize("devices", [2, 4])
@pytest.mark.parametrize("solver", ["data", "model", "model-in"])
def test_channels_last_stays_and_trains_as_one_device(solver: str, devices: int) -> None:
    model, (x, target) = build(), images()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(model, x, target).backward()
        optimizer.step()

    def work(net: ParallelModule, _: TracedModel, position: int) -> None:
        lost: list[str] = []
        for name, module in net.named_modules():
            if isinstance(module, Redistribution):

                def check(_module: nn.Module, inputs: tuple[torch.Tensor], y: torch.Tensor, name: str = name) -> None:
                    if y.dim() == 4 and format_of(inputs[0]) is not format_of(y):
                        lost.append(name)

                module.register_forward_hook(check)
        own_x, own_target = own(net, position, x, target)
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01, foreach=True)
        for _step in range(2):
            optimizer.zero_grad()
            loss_of(net, own_x.to(memory_format=LAST), own_target).backward()
            for name, parameter in net.named_parameters():
                assert parameter.grad is not None
                assert parameter.grad.stride() == parameter.stride(), name
            optimizer.step()
        assert lost == []
        assert net.get_parameter("conv3.weight").is_contiguous(memory_format=LAST)
        mine = {n: g for n, g in gradients(net).items() if n != "conv1.bias"}  # zero, but for rounding
        assert_pieces(net, mine, {n: g for n, g in gradients(model).items() if n in mine}, 1e-7)

    run_ranks(last, planned(solver, devices), work)


def frozen() -> nn.Module:
    model = build()
    norm = next(each for each in model.modules() if isinstance(each, nn.BatchNorm2d))
    norm.eval()
    return model


@pytest.mark.parametrize("other", [last, frozen])
def test_ranks_with_weights_in_other_formats_or_other_modes_are_refused_on_all(other: Callable[[], nn.Module]) -> None:
    """Gradients are reduced in the order of memory; a batch norm in evaluation waits for nobody."""
    plan = planned()
    world = ThreadWorld(plan.mesh)

    def check(position: int) -> None:
        model = other() if position else build()
        with pytest.raises(MismatchError, match=r"channels_last.*which of its modules train"):
            refuse_differing_models(model, ThreadCommunicator(world, position))

    threads = ThreadPoolExecutor(2)
    for result in [threads.submit(check, position) for position in range(2)]:
        result.result()


def test_volumes_in_channels_last() -> None:
    def volumes() -> nn.Module:
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv3d(2, 5, 3, padding=1), nn.ReLU(), nn.Conv3d(5, 4, 3), nn.Flatten(), nn.Linear(32, 3)
        )
        return net.double().to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]  # torch's stub lacks it

    x = torch.randn(4, 2, 4, 4, 4, dtype=torch.float64)
    model = volumes()
    functional.mse_loss(model(x), torch.ones(4, 3, dtype=torch.float64)).backward()

    def work(net: ParallelModule, _: TracedModel, position: int) -> None:
        (part,) = own(net, position, x)
        out = net(part.contiguous(memory_format=torch.channels_last_3d))
        functional.mse_loss(out, torch.ones_like(out)).backward()
        assert_equal(net, model)

    for solver in ("model", "model-in"):
        run_ranks(volumes, plan_model(volumes(), (x,), devices=2, solver=solver, all_devices=True), work)
