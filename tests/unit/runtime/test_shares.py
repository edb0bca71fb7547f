"""Pieces in proportion to the speeds of devices, and layers that one coordinate of an axis runs alone."""

import copy
import functools
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from planner.frontend.lower import TracedModel
from planner.ir.dimension import Dimension
from planner.plan import Plan
from runtime import checkpoint
from runtime.checkpoint import saving, storage
from runtime.checkpoint.whole import Part, full_state_dict
from runtime.data import Batches, own_samples, smallest_batch
from runtime.module import ParallelModule
from support import checkpoints
from support.equality import run_ranks
from support.loops import build, gradients, images, loss_of, own, piece, planned
from support.random_plans import unequal_plan

Splits = Mapping[str, tuple[Dimension, tuple[int, ...]]]
"""By layer: what the only axis does, and its shares."""
REPLICATE = Dimension.REPLICATE


def with_splits(plan: Plan, ends: tuple[int, ...] = (), **splits: tuple[Dimension, tuple[int, ...]]) -> Plan:
    """Return a plan on one axis with other splits of some layers; ``ends``: shares of all that is cut by samples."""
    (stage,) = plan.stages
    (axis,) = stage.mesh.axes
    layers = []
    for layer in stage.layers:
        dimension, shares = splits.get(layer.id, (layer.split[axis.name], ends))
        is_cut = shares and (0 in shares or dimension is not REPLICATE)
        given = {axis.name: list(shares)} if is_cut else {}
        layers.append(layer.model_copy(update={"split": {axis.name: dimension}, "shares": given}))
    return plan.model_copy(update={"stages": [stage.model_copy(update={"layers": layers})]}).validated("plan")


BRANCH: Splits = {"conv2": (REPLICATE, (0, 1)), "bn": (REPLICATE, (0, 1)), "conv1": (REPLICATE, (0, 1))}
ALONE: Splits = {"fc1": (REPLICATE, (1, 0)), "fc2": (REPLICATE, (1, 0)), "conv4": (REPLICATE, (0, 1))}


@pytest.mark.parametrize(
    ("ends", "splits"), [((3, 1), {}), ((1, 2), BRANCH), ((), ALONE), ((2, 1), {**BRANCH, **ALONE})]
)
def test_loops_train_as_one_device_does(ends: tuple[int, ...], splits: Splits) -> None:
    plan = with_splits(planned(), ends, **splits)
    x, target = images()
    model = build()

    def steps(
        net: torch.nn.Module, mine: list[torch.Tensor]
    ) -> tuple[dict[str, torch.Tensor], list[float], torch.Tensor]:
        optimizer, norms, half = torch.optim.AdamW(net.parameters(), lr=0.01), [], len(mine[0]) // 2
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(net, *mine).backward()
            clip = net.clip_grad_norm_ if isinstance(net, ParallelModule) else functools.partial(
                torch.nn.utils.clip_grad_norm_, net.parameters())  # fmt: skip
            norms.append(float(clip(0.5, norm_type=float("inf") if half else 2.0)))
            optimizer.step()
        net.eval()
        with torch.no_grad():
            return gradients(net), norms, net(mine[0])

    expected, their_norms, whole = steps(model, [x, target])

    def work(net: ParallelModule, _: TracedModel, position: int) -> None:
        found, norms, output = steps(net, own(net, position, x, target))
        assert norms == pytest.approx(their_norms, rel=1e-7)
        torch.testing.assert_close(output, whole[own_samples(plan, position)], rtol=1e-7, atol=1e-9)
        idle = {n for n, held in net.held.items() if held.region.volume == 0}
        assert set(found) == set(expected)
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, piece(net, name, expected[name]), rtol=1e-7, atol=1e-9)
        assert {n for n, p in net.named_parameters() if p.numel() == 0} == {
            n for n in idle if n in dict(net.named_parameters())
        }
        assert int(net.get_buffer("bn.num_batches_tracked")) == 3
        torch.testing.assert_close(
            full_state_dict(net)["bn.running_var"], model.bn.running_var
        ) if position == 0 else full_state_dict(net)

    run_ranks(build, plan, work)


def test_an_idle_rank_keeps_nothing_of_a_layer_and_takes_part_in_its_gradients() -> None:
    plan = with_splits(planned(devices=3), (2, 1, 1), fc1=(REPLICATE, (0, 1, 0)))

    def work(net: ParallelModule, _: TracedModel, position: int) -> tuple[int, bool]:
        x, target = own(net, position, *images())
        net.get_parameter("conv1.weight").requires_grad_(False)
        loss_of(net, x, target).backward()
        return net.get_parameter("fc1.weight").numel(), net.get_parameter("conv1.weight").grad is None

    assert run_ranks(build, plan, work) == [(0, True), (11 * 72, True), (0, True)]


def test_ranks_pass_the_shares_of_any_batch() -> None:
    plan = with_splits(planned(), (3, 1))
    assert smallest_batch(plan) == 4
    parts = [list(Batches(14, plan, rank)) for rank in range(2)]
    assert [len(batch) for batch in parts[0]] == [6, 4]
    assert [a + b for a, b in zip(*parts, strict=True)] == [list(range(8)), list(range(8, 14))]

    def work(net: ParallelModule, _: TracedModel, position: int) -> list[float]:
        found = []
        for count in (8, 14):
            x, target = images(count)
            mine = own(net, position, x, target)
            found.append(float(loss_of(net, *mine).detach()) * len(mine[0]) / count)
        odd = 5 if position else 3  # other pieces than planned
        x, target = (t[3:] if position else t[:3] for t in images(8))
        found.append(float(loss_of(net, x, target).detach()) * odd / 8)
        return found

    found = run_ranks(lambda: build().eval(), plan, work)
    reference = [float(loss_of(build().eval(), *images(count)).detach()) for count in (8, 14, 8)]
    assert [a + b for a, b in zip(*found, strict=True)] == pytest.approx(reference, rel=1e-9)


@pytest.mark.parametrize("seed", range(2))
def test_checkpoints_go_from_shares_to_any_plan_and_back(seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    ranks = (2, 3) if seed % 2 else (3, 2)
    pick = functools.partial(lambda generator, n: int(generator.integers(n)), rng)
    first, second = (unequal_plan(checkpoints.planner_for(count), pick) for count in ranks)
    make = checkpoints.OPTIMIZERS["amsgrad"]

    def save(net: ParallelModule, _: TracedModel, position: int) -> storage.Job:
        optimizer = make(checkpoints.groups(net))
        checkpoints.train(net, optimizer, own_samples(first, first.mesh.ranks[position]))
        return saving._job(Part.of(net), optimizer, tmp_path / "saved", 3, {})

    storage.write_together(run_ranks(checkpoints.build, first, save))
    reference = checkpoints.build()
    theirs = make(checkpoints.groups(reference))
    checkpoints.train(reference, theirs, steps=2 * checkpoints.STEPS)

    def load(net: ParallelModule, _: TracedModel, position: int) -> None:
        optimizer = make(checkpoints.groups(net))
        assert checkpoint.load(net, optimizer, tmp_path / "saved").step == 3
        checkpoints.train(net, optimizer, own_samples(second, second.mesh.ranks[position]))
        whole = reference.state_dict(keep_vars=True)
        for name, tensor in Part.of(net).tensors.items():
            assert checkpoints.difference(tensor, piece(net, name, whole[name])) < checkpoints.TOLERANCE, name

    run_ranks(lambda: checkpoints.build(seed=8), second, load)


def test_half_precision_goes_through_idle_ranks() -> None:
    plan = with_splits(planned(build_net=lambda: build().float()), (1, 2), **BRANCH, **ALONE)
    plan = plan.model_copy(update={"precision": "bf16"})
    x, target = images()
    x = x.float()
    model = build().float()
    with torch.autocast("cpu", torch.bfloat16):
        expected = loss_of(model, x, target)

    def work(net: ParallelModule, _: TracedModel, position: int) -> float:
        mine = own(net, position, x, target)
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(net, *mine)
        loss.backward()
        copy.deepcopy(net)
        return float(loss.detach()) * len(mine[0]) / len(x)

    found = run_ranks(lambda: build().float(), plan, work)
    assert sum(found) == pytest.approx(float(expected.detach()), rel=2e-2)
