"""The networks of ``planner.models`` beyond plain CNNs: planned on several ranks, a step is that of one device."""

import functools
import os
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from planner.api import Options, Origin, machine_of, prepare
from planner.frontend.lower import TracedModel
from planner.models import entry
from planner.plan import Plan
from runtime.data import own_samples
from runtime.module import ParallelModule
from support.equality import run_ranks
from support.loops import assert_equal

FULL = bool(os.environ.get("LAYERWISE_FULL"))
BATCH, CLASSES = 4, 3


@dataclass(frozen=True)
class Small:
    """A network of the registry at a size that trains in milliseconds."""

    width: float
    inputs: tuple[tuple[int, ...], ...]
    arguments: tuple[tuple[str, Any], ...] = ()
    dense: tuple[int, ...] = ()
    """Positions of the output, where it has a class for each."""
    forced: str = "spatial"
    """The fixed strategy that it always trains under, beside the planned one."""


SMALL = {
    "binary-vgg": Small(0.0625, ((3, 16, 16),), (("pixels", 16),), forced="model"),
    "circulant-cnn": Small(0.125, ((3, 16, 16),), (("block", 4), ("pixels", 16))),
    "cosmoflow": Small(0.125, ((4, 16, 16, 16),), (("size", 16),)),
    "ct-classifier": Small(0.03125, ((1, 46, 46, 46),)),
    "degraded-classifier": Small(0.0625, ((3, 12, 12), (1,)), forced="model"),
    "ecg-cnn": Small(1.0, ((1, 260),)),
    "ecg-resnet": Small(0.0625, ((1, 60),), (("blocks", 6),), dense=(7,)),
    "golf-cnn": Small(0.125, ((8, 32),)),
    "golf-inception": Small(0.125, ((8, 32),), forced="model"),
    "golf-resnet": Small(0.125, ((8, 32),), forced="model-in"),
    "golf-vgg": Small(0.125, ((8, 32),)),
    "pruned-lenet": Small(0.25, ((1, 28, 28),), forced="model-in"),
    "unet3d": Small(0.0625, ((1, 8, 16, 8),), dense=(8, 16, 8)),
    "vessel-unet": Small(0.0625, ((1, 32, 16),), dense=(32, 16)),
}
STRATEGIES = ["data", "model", "model-in", "conv-data-fc-model", "spatial"]
"""Forced where all is run."""
ON_TWO = SMALL if FULL else [name for name in SMALL if name not in {"golf-cnn", "golf-vgg", "unet3d"}]
ON_FOUR = SMALL if FULL else ["circulant-cnn"]


def build(name: str) -> nn.Module:
    """Return a network with fixed weights, in float64 and without dropout."""
    torch.manual_seed(0)
    small = SMALL[name]
    model = entry(name).build(width=small.width, num_classes=CLASSES, **dict(small.arguments)).double()
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    return model


def batch(name: str) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """Return the inputs of a batch and its classes."""
    generator = torch.Generator().manual_seed(1)
    small = SMALL[name]
    inputs = tuple(torch.randn(BATCH, *shape, generator=generator, dtype=torch.float64) for shape in small.inputs)
    return inputs, torch.randint(CLASSES, (BATCH, *small.dense), generator=generator)


@functools.cache
def plans_of(name: str, num_ranks: int) -> dict[str, Plan]:
    """Return the planned strategy and the fixed ones, all of them on all ranks."""
    options = Options(all_devices=True)
    planner = prepare(build(name), batch(name)[0], machine_of(devices=num_ranks), options, Origin(name, name))
    fixed = {b.planned.solver: planner.plan_of(b.search, b.planned) for b in planner.baselines()}
    return {"planned": planner.plan(), **fixed}


@dataclass(frozen=True)
class Trained:
    """What one device has behind a step."""

    model: nn.Module
    output: torch.Tensor


@functools.cache
def alone(name: str) -> Trained:
    model = build(name)
    return Trained(model, step(model, *batch(name)))


def step(model: nn.Module, inputs: tuple[torch.Tensor, ...], target: torch.Tensor) -> torch.Tensor:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    output: torch.Tensor = model(*inputs)
    functional.cross_entropy(output, target).backward()
    optimizer.step()
    return output.detach()


def equals_one_device(name: str, plan: Plan) -> None:
    inputs, target = batch(name)
    expected = alone(name)

    def work(net: ParallelModule, _: TracedModel, position: int) -> None:
        part = own_samples(plan, plan.mesh.ranks[position], BATCH)
        output = step(net, tuple(x[part] for x in inputs), target[part])
        torch.testing.assert_close(output, expected.output[part], rtol=1e-9, atol=1e-11)
        assert_equal(net, expected.model)

    run_ranks(functools.partial(build, name), plan, work)


@pytest.mark.parametrize("name", ON_TWO)
def test_a_step_on_two_ranks_is_that_of_one_device(name: str) -> None:
    plans = plans_of(name, 2)
    for strategy in ["planned", *(STRATEGIES if FULL else [SMALL[name].forced])]:
        assert plans[strategy].mesh.size == 2
        equals_one_device(name, plans[strategy])


@pytest.mark.parametrize("name", ON_FOUR)
def test_a_step_on_four_ranks_is_that_of_one_device(name: str) -> None:
    plans = plans_of(name, 4)
    for strategy in ["planned", *(STRATEGIES if FULL else ())]:
        assert plans[strategy].mesh.size == 4
        equals_one_device(name, plans[strategy])


def splits(plan: Plan, kind: str) -> set[str]:
    """Return the dimensions by which a plan splits layers of a kind."""
    return {d for stage in plan.stages for layer in stage.layers if layer.op == kind for d in layer.split.values()}


@pytest.mark.parametrize("name", ["binary-vgg", "pruned-lenet"])
def test_layers_whose_weights_are_made_element_by_element_are_split_by_channels(name: str) -> None:
    plan = plans_of(name, 2)["model"]
    assert splits(plan, "conv") == splits(plan, "linear") == {"out_channel"}
    assert splits(plans_of(name, 2)["model-in"], "linear") >= {"in_channel"}


def test_transforms_are_units_that_samples_alone_cut() -> None:
    plans = plans_of("circulant-cnn", 2)
    assert splits(plans["data"], "rfft") == splits(plans["data"], "einsum") == {"sample"}
    assert splits(plans["spatial"], "conv") == {"height"}
    assert splits(plans["spatial"], "rfft") == splits(plans["spatial"], "irfft") == {"replicate"}
