"""Batch norms that would see one value of each channel, of which there are no statistics."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

from planner.api import Options, Origin, Planner, example_inputs, machine_of, prepare
from planner.errors import MismatchError, UsageError
from planner.ir.mesh import Mesh
from planner.ir.ops import BatchNorm
from planner.ir.rules import layouts
from planner.plan import Plan
from planner.plan.check import refuse_other_layers


class Pooled(nn.Module):
    """Batch norm behind the mean over space: by itself, behind a convolution, or as a function."""

    def __init__(self, where: str, *, frozen: bool = False) -> None:
        super().__init__()
        self.where = where
        self.stem, self.inner = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)
        self.norm, self.head = nn.BatchNorm2d(4), nn.Linear(4, 2)
        self.norm.train(not frozen)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.adaptive_avg_pool2d(self.stem(x), 1)
        if self.where == "behind a convolution":
            x = self.inner(x)
        by_function = self.where == "as a function"
        x = functional.batch_norm(x, None, None, training=True) if by_function else self.norm(x)
        return self.head(torch.flatten(x, 1))


PLACES = ("by itself", "behind a convolution", "as a function")


def planner(where: str, batch: int, devices: int = 2, *, frozen: bool = False, **options: object) -> Planner:
    inputs = example_inputs([(3, 8, 8)], batch)
    machine = machine_of(devices=devices)
    return prepare(Pooled(where, frozen=frozen), inputs, machine, Options(**options), Origin("pooled", ""))  # type: ignore[arg-type]


@pytest.mark.parametrize("where", PLACES)
def test_what_torch_refuses_to_train_is_refused_before_it_is_planned(where: str) -> None:
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        Pooled(where)(torch.zeros(1, 3, 8, 8))
    with pytest.raises(UsageError, match=r"one value of each channel from a batch of 1, .* use a larger batch"):
        planner(where, 1)
    planner(where, 2)


@pytest.mark.parametrize("sync", [True, False])
@pytest.mark.parametrize("where", PLACES[:2])
def test_a_frozen_batch_norm_needs_no_statistics(where: str, sync: bool) -> None:
    Pooled(where, frozen=True)(torch.zeros(1, 3, 8, 8))
    asked = planner(where, 1, frozen=True, all_devices=True, sync_batch_norm=sync)
    refuse_other_layers(asked.plan(), asked.traced.layers)


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize(("batch", "devices"), [(2, 2), (3, 2), (4, 4), (8, 4)])
def test_own_statistics_are_of_several_values_on_every_rank(where: str, batch: int, devices: int) -> None:
    asked = planner(where, batch, devices, all_devices=True, sync_batch_norm=False)
    plans = [asked.plan(), *(asked.plan_of(x.search, x.planned) for x in asked.baselines() if not x.note)]
    assert len(plans) > 2
    for plan in plans:
        refuse_other_layers(plan, asked.traced.layers)
        assert min(values_of_norm(asked, plan)) > 1


def values_of_norm(asked: Planner, plan: Plan) -> list[int]:
    """Return for every rank how many values its batch norm sees of a channel."""
    graph, mesh = asked.traced.layers, plan.mesh
    (layer,) = (x for x in graph.layers if any(isinstance(op, BatchNorm) for op in (x.op, *(a.op for a in x.absorbed))))
    output = layouts(layer, graph.inputs_of(layer), mesh, plan.strategy[layer.id]).output
    shapes = [output.region(rank).shape for rank in range(mesh.size)]
    return [shape[0] * shape[2] * shape[3] for shape in shapes]


def test_a_plan_that_leaves_a_rank_one_value_is_refused() -> None:
    asked = planner("behind a convolution", 2, all_devices=True)
    asked = replace(asked, options=replace(asked.options, solver="data"))
    plan = asked.plan()
    assert min(values_of_norm(asked, plan)) == 1  # of both ranks' samples there are statistics
    refuse_other_layers(plan, asked.traced.layers)
    own = Plan.from_json(plan.to_json()).model_copy(update={"sync_batch_norm": False})
    with pytest.raises(MismatchError, match="leaves a rank's batch norm one value of each channel"):
        refuse_other_layers(own, asked.traced.layers)


def test_where_all_ranks_have_everything_nothing_is_left_out() -> None:
    both = [planner("by itself", 64, sync_batch_norm=wish) for wish in (True, False)]
    spaces = [each.space(Mesh.of(gpu=2)) for each in both]
    assert spaces[0].splits == spaces[1].splits
    assert replace(both[0].options, sync_batch_norm=False) == both[1].options
