"""Pipelines in cycles with all stages in this process, against plain loops over weights as values."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from planner.errors import UsageError
from runtime.pipeline.links import MemoryLink
from runtime.pipeline.stale import CycleStage, StalePipeline
from support.stale_oracle import simulate
from support.stale_pipelines import Log, batches, furthest, live_bytes, loss_fn, net, running, sgd

CLOSE = 1e-12


def pipeline(
    stages: list[nn.Sequential], mode: Any = "stale", pipelined: int | None = None
) -> tuple[StalePipeline, list[Log]]:
    optimizers = [sgd(stage) for stage in stages]
    found = StalePipeline.in_process(stages, optimizers, loss_fn, mode, pipelined)
    return found, [Log(stage, optimizer) for stage, optimizer in zip(stages, optimizers, strict=True)]


@pytest.mark.parametrize("pipelined", [None, 0, 4])
@pytest.mark.parametrize("mode", ["stale", "pipedream"])
@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
def test_every_update_is_that_of_the_definition(num_stages: int, mode: str, pipelined: int | None) -> None:
    data = batches(9)
    expected = simulate(net(num_stages), data, mode, pipelined)
    stages = net(num_stages)
    trained, logs = pipeline(stages, mode, pipelined)
    losses = trained.run(data)
    assert torch.stack(losses).tolist() == pytest.approx(expected.losses, abs=CLOSE)
    for i, (stage, log) in enumerate(zip(stages, logs, strict=True)):
        if next(stage.parameters(), None) is not None:  # of four stages, one has no weights
            assert len(log.weights) == len(data)
            assert furthest(log.weights, expected.weights[i]) < CLOSE
        assert furthest([running(stage)], [expected.running[i]]) < CLOSE


def test_the_definitions_differ_from_each_other_and_from_one_device() -> None:
    """Else the test above could not tell them apart."""
    data = batches(6)
    ends = [
        simulate(net(3), data, mode, pipelined).weights[0][-1][0]
        for mode, pipelined in [("stale", None), ("pipedream", None), ("stale", 2), ("stale", 0)]
    ]
    for i, one in enumerate(ends):
        assert all(float((one - other).abs().max()) > 1e-4 for other in ends[:i])


def test_without_pipelining_training_is_that_of_one_device() -> None:
    data, stages, whole = batches(5), net(3), nn.Sequential(*net(3))
    optimizer = sgd(whole)
    assert optimizer is not None
    trained, _ = pipeline(stages, "stale", pipelined=0)
    for x, target in data:
        (loss,) = trained.step(x, target)
        optimizer.zero_grad()
        expected = loss_fn(whole(x), target)
        expected.backward()
        optimizer.step()
        torch.testing.assert_close(loss, expected.detach())
    for mine, theirs in zip((p for s in stages for p in s.parameters()), whole.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=CLOSE)


def test_losses_come_as_many_cycles_later_as_there_are_stages_behind_the_first() -> None:
    trained, _ = pipeline(net(3))
    assert [len(trained.step(x, y)) for x, y in batches(4)] == [0, 0, 1, 1]
    assert trained.in_flight == 4
    assert len(trained.drain()) == 2
    assert trained.in_flight == 0
    assert trained.drain() == []


@pytest.mark.parametrize("mode", ["stale", "pipedream"])
def test_a_run_from_a_checkpoint_equals_one_that_drained_there(mode: str) -> None:
    """Saved in the pipelined phase and in the one behind it."""
    data = batches(12)
    stages = net(3)
    trained, logs = pipeline(stages, mode, pipelined=8)
    saved = []
    for k, (x, y) in enumerate(data):
        trained.step(x, y)
        if k in {4, 9}:
            trained.drain()
            modules = [stage.module.state_dict() for stage in trained.stages]
            optimizers = [stage.optimizer.state_dict() for stage in trained.stages if stage.optimizer]
            saved.append(copy.deepcopy((k, trained.state_dict(), modules, optimizers)))
    trained.drain()
    for k, state, modules, optimizers in saved:
        again, more = pipeline(net(3), mode, pipelined=8)
        again.load_state_dict(state)
        for stage, module, optimizer in zip(again.stages, modules, optimizers, strict=True):
            stage.module.load_state_dict(module)
            assert stage.optimizer is not None
            stage.optimizer.load_state_dict(optimizer)
        again.run(data[k + 1 :])
        for log, full in zip(more, logs, strict=True):
            assert furthest(log.weights, full.weights[k + 1 :]) == 0.0


def test_state_is_not_saved_loaded_or_evaluated_while_batches_are_in_flight() -> None:
    trained, _ = pipeline(net(2))
    state = trained.state_dict()
    trained.step(*batches(1)[0])
    for call in (
        trained.state_dict,
        lambda: trained.load_state_dict(state),
        lambda: trained.evaluate(batches(1)[0][0]),
    ):
        with pytest.raises(UsageError, match=r"1 batches are in flight; call drain\(\)"):
            call()


def test_evaluation_is_that_of_the_whole_model() -> None:
    stages, (x, y) = net(3), batches(1)[0]
    trained, _ = pipeline(stages)
    trained.step(x, y)
    trained.drain()
    whole = nn.Sequential(*stages).eval()
    found = trained.evaluate(x)
    assert not found.requires_grad
    torch.testing.assert_close(found, whole(x))


# ---- memory


@pytest.mark.parametrize("mode", ["stale", "pipedream"])
def test_memory_stays_constant_in_a_long_run(mode: Any) -> None:
    stages = net(3)
    trained = StalePipeline.in_process(stages, [sgd(s) for s in stages], loss_fn, mode)

    sizes = {}
    for k, (x, y) in enumerate(batches(40)):
        trained.step(x, y)
        if k in {7, 20, 39}:
            sizes[k] = live_bytes()
    assert len(set(sizes.values())) == 1
    assert [stage.in_flight for stage in trained.stages] == [4, 2, 0]  # 2 (K - i) between cycles


def test_stashed_are_the_weights_that_backward_reads_once_for_each_batch_in_flight() -> None:
    """Not biases, nothing at the last stage, and nothing with current weights."""
    stages, data, sizes = net(3), batches(8), dict[str, int]()
    for mode in ("stale", "pipedream"):
        trained = StalePipeline.in_process(net(3), [None] * 3, loss_fn, mode)
        for stage in trained.stages:
            stage.optimizer = sgd(stage.module)
        for x, y in data:
            trained.step(x, y)
        before = live_bytes()
        del trained, stage
        sizes[mode] = before - live_bytes()
    weights = [sum(p.nbytes for n, p in stage.named_parameters() if n.endswith("weight")) for stage in stages]
    assert sizes["pipedream"] - sizes["stale"] == 4 * weights[0] + 2 * weights[1]


# ---- usage


def test_stages_that_do_not_fit_are_refused() -> None:
    (module,), (one, other) = net(1), MemoryLink.pair()
    bad: list[tuple[dict[str, Any], str]] = [
        ({"stage": 2, "num_stages": 2}, "no stage 2 of 2"),
        ({"stage": 0, "num_stages": 1, "loss_fn": loss_fn, "mode": "fresh"}, "'fresh'"),
        ({"stage": 0, "num_stages": 2}, "a link to each stage beside it"),
        ({"stage": 1, "num_stages": 2, "loss_fn": loss_fn, "links": (one, other)}, "a link to each stage beside it"),
        ({"stage": 0, "num_stages": 2, "loss_fn": loss_fn, "links": (None, one)}, "has the loss function"),
        ({"stage": 1, "num_stages": 2, "links": (one, None)}, "has the loss function"),
    ]
    for options, message in bad:
        with pytest.raises(UsageError, match=message):
            CycleStage(module, None, **options)
    with pytest.raises(UsageError, match="pipelined_steps is -1"):
        StalePipeline.in_process([module], [None], loss_fn, pipelined_steps=-1)
    with pytest.raises(UsageError, match="stages of one number"):
        StalePipeline([])
