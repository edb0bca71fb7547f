"""What is no longer used is freed: hooks that autograd holds must not hold a model."""

import gc
import weakref

import pytest
import torch
from torch import nn

from planner.frontend.export import trace_by_export
from planner.frontend.lower import TracedModel, trace_layers
from runtime.module import ParallelModule
from support.equality import build, data, planner_for, run_ranks, train_rank

NET = "resnet20"


@pytest.mark.parametrize("sharding", ["none", "optimizer", "full"])
def test_a_parallel_module_and_its_copies_of_weights_are_freed_behind_training(sharding: str) -> None:
    plan = planner_for(NET, 2, solver="data", parameter_sharding=sharding).plan()
    seen: list[weakref.ref[object]] = []

    def work(net: ParallelModule, _traced: TracedModel, position: int) -> None:
        train_rank(net, NET, plan.mesh.ranks[position])
        seen.extend(weakref.ref(each) for each in (net, *net.parameters()))

    run_ranks(lambda: build(NET), plan, work)
    gc.collect()
    assert len(seen) > 2
    assert not any(each() is not None for each in seen)


@pytest.mark.parametrize("exported", [False, True])
def test_a_model_that_was_traced_is_freed(exported: bool) -> None:
    def traced(model: nn.Module) -> object:
        inputs = data(NET)[0]
        if exported:
            meta = model.to("meta")
            return trace_by_export(meta, (torch.empty_like(inputs, device="meta"),), {})
        return trace_layers(model, (inputs,))

    model = build(NET)
    seen = [weakref.ref(each) for each in (model, *model.parameters())]
    found = traced(model)
    assert found
    del model, found
    gc.collect()
    assert not any(each() is not None for each in seen)
