"""Branches on ranks of their own equal one device, in training and evaluation."""

import copy
import os

import pytest
import torch
from torch import nn

from planner.frontend.lower import TracedModel
from runtime.data import own_samples
from runtime.lowering.idle import Idle
from runtime.module import ParallelModule
from support.branching import NETWORKS, assert_equals_one_device, branched_plan, built, inputs_of, random_plan, scalar
from support.equality import run_ranks

SEEDS = range(30 if os.environ.get("LAYERWISE_FULL") else 3)
ROUNDED = "single"
"""Computes in float32 in between: where ranks add in another order, the results differ by its rounding."""


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", [name for name in NETWORKS if name != ROUNDED])
def test_branches_on_ranks_of_their_own_equal_one_device(name: str, seed: int) -> None:
    plan = random_plan(name, seed)
    assert any(layer.shares for layer in plan.only_stage.layers)
    assert_equals_one_device(name, plan)


def test_idle_ranks_know_the_types_of_what_others_compute_under_autocast() -> None:
    plan = branched_plan("volumes", {"pool": 0, "plain.0": 1})
    (inputs,), types = inputs_of("volumes"), dict[str, list[torch.dtype]]()

    def work(net: ParallelModule, _traced: TracedModel, position: int) -> None:
        for layer, rank in (("pool", 0), ("plain.0", 1)):
            found = types.setdefault(layer, [])
            name = layer if rank == position else f"idle.{layer.replace('.', '_')}"
            net.get_submodule(name).register_forward_hook(lambda _m, _i, out, found=found: found.append(out.dtype))
        net.float()
        with torch.autocast("cpu", torch.bfloat16):
            scalar(net(inputs[own_samples(plan, plan.mesh.ranks[position])].float())).backward()

    run_ranks(lambda: built("volumes"), plan, work)
    assert types == {"pool": [torch.float32] * 2, "plain.0": [torch.bfloat16] * 2}


def test_what_a_branch_computes_in_float32_arrives_so_in_a_model_of_another_type() -> None:
    plan = branched_plan(ROUNDED, {"chunk": 0, "chunk@2": 1})
    (inputs,) = inputs_of(ROUNDED)
    expected = built(ROUNDED).train()(inputs)

    def work(net: ParallelModule, _traced: TracedModel, position: int) -> None:
        own = own_samples(plan, plan.mesh.ranks[position])
        found = net.train()(inputs[own])
        scalar(found).backward()
        torch.testing.assert_close(found, expected[own], rtol=1e-5, atol=1e-6)

    run_ranks(lambda: built(ROUNDED), plan, work)


@pytest.mark.parametrize("is_frozen_first", [True, False])
def test_a_frozen_batch_norm_counts_on_no_rank(is_frozen_first: bool) -> None:
    plan = branched_plan("inception", {"one.0": 0, "pool.0": 1, "pool.1.0": 1})
    (inputs,) = inputs_of("inception")

    def frozen(model: nn.Module) -> nn.Module:
        for name in ("one.1", "pool.1.1"):
            model.get_submodule(name).eval()
        return model

    alone = frozen(built("inception").train())
    alone(inputs)
    expected = {name: buffer for name, buffer in alone.named_buffers() if not buffer.dim()}
    assert [expected[f"{name}.num_batches_tracked"] for name in ("one.1", "pool.1.1", "stem.1")] == [1, 1, 2]

    def work(net: ParallelModule, _traced: TracedModel, position: int) -> None:
        found = copy.deepcopy(net if is_frozen_first else frozen(net.train()))
        found(inputs[own_samples(plan, plan.mesh.ranks[position])])
        assert {name: buffer for name, buffer in found.named_buffers() if not buffer.dim()} == expected
        assert any(isinstance(part, Idle) for part in found.modules())

    run_ranks(lambda: frozen(built("inception")) if is_frozen_first else built("inception"), plan, work)
