"""Devices of unequal speed: what pieces in shares cost, and which shares are tried."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from planner.api import Options, Origin, Planner, machine_of, plan_model, prepare
from planner.api.comparing import price_plan
from planner.cost.shares import MAX_WEIGHT, TOLERANCE, whole_numbers
from planner.devices.graph import Cluster
from planner.devices.library import cluster, equal_devices
from planner.devices.schema import read_cluster, write_cluster
from planner.frontend.source import load_model
from planner.ir.dimension import Dimension
from planner.ir.split import LayerId, Split
from planner.measure.host import HostRates, relative_speeds

SHAPE = (3, 16, 16)


def net() -> nn.Module:
    """Compute in convolutions, few parameters."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


def with_speeds(graph: Cluster, *speeds: float) -> Cluster:
    return replace(graph, devices=tuple(replace(d, speed=s) for d, s in zip(graph.devices, speeds, strict=True)))


def planner_of(graph: Cluster, batch: int, **options: object) -> Planner:
    x = torch.empty(batch, *SHAPE, device="meta")
    return prepare(net(), (x,), machine_of(graph), Options(all_devices=True, **options), Origin("net"))  # type: ignore[arg-type]


@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=5))
def test_small_whole_numbers_are_in_the_proportion_of_rates(rates: list[float]) -> None:
    weights = whole_numbers(rates)
    assert min(weights) <= MAX_WEIGHT
    errors = [abs(w / weights[0] * rates[0] / rate - 1) for w, rate in zip(weights, rates, strict=True)]
    assert max(errors) < 2 * max(TOLERANCE, 0.5 / MAX_WEIGHT) / (1 - 0.5 / MAX_WEIGHT)


@pytest.mark.parametrize(
    ("rates", "weights"), [((1, 0.5), (2, 1)), ((3, 1, 2), (3, 1, 2)), ((1, 1.01), (1, 1)), ((0.6, 1), (3, 5))]
)
def test_simple_proportions(rates: tuple[float, ...], weights: tuple[int, ...]) -> None:
    assert whole_numbers(rates) == weights


@pytest.mark.parametrize(
    ("speeds", "shares", "pieces"), [((1, 0.5), (2, 1), (8, 4)), ((0.5, 1, 1), (1, 2, 2), (2, 5, 5))]
)
def test_a_layer_takes_what_its_slowest_rank_takes(
    speeds: tuple[float, ...], shares: tuple[int, ...], pieces: tuple[int, ...]
) -> None:
    planner = planner_of(with_speeds(equal_devices(len(speeds)), *speeds), 12)
    model = planner.cost_model(planner.meshes()[0])
    layer = planner.traced.layers[LayerId("2")]
    equal = Split.of(model.mesh, (Dimension.SAMPLE,))
    both = model.times(layer, (equal, equal.with_shares({"gpu": shares})))
    local = model.local(layer, equal)

    def alone_s(samples: int) -> float:
        piece = replace(local, inputs=((samples, *local.inputs[0][1:]),), output=(samples, *local.output[1:]))
        return model.profile.time(piece).forward_s

    assert both[0].forward_s == pytest.approx(alone_s(12 // len(speeds)) / min(speeds))
    assert both[1].forward_s == pytest.approx(max(alone_s(n) / s for n, s in zip(pieces, speeds, strict=True)))


def test_a_layer_that_one_rank_runs_takes_what_that_rank_takes() -> None:
    planner = planner_of(with_speeds(equal_devices(2), 1, 0.5), 12)
    model = planner.cost_model(planner.meshes()[0])
    layer = planner.traced.layers[LayerId("2")]
    whole = Split.of(model.mesh, (Dimension.REPLICATE,))
    fast, slow = model.times(layer, (whole.with_shares({"gpu": (1, 0)}), whole.with_shares({"gpu": (0, 1)})))
    assert slow.forward_s == 2 * fast.forward_s == 2 * model.profile.time(model.local(layer, whole)).forward_s
    assert model.layers(layer, (whole.with_shares({"gpu": (1, 0)}),))[0].sync == {}


@pytest.mark.parametrize(("speeds", "shares"), [((1, 0.5), [2, 1]), ((0.25, 1), [1, 4])])
def test_plans_give_devices_pieces_in_proportion_to_their_speed(speeds: tuple[float, ...], shares: list[int]) -> None:
    machine = with_speeds(equal_devices(2), *speeds)
    found = planner_of(machine, 4096).plan()
    equal = planner_of(machine, 4096, shares="equal").plan()
    ends = [layer for layer in found.stages[0].layers if layer.op in {"input", "output"}]
    assert [layer.shares for layer in ends] == [{"gpu": shares}] * 2
    assert not any(layer.shares for layer in equal.stages[0].layers)
    ideal = sum(speeds) / (2 * min(speeds))
    assert equal.totals.compute_s / found.totals.compute_s == pytest.approx(ideal, rel=0.1)
    assert found.totals.step_s < equal.totals.step_s
    assert found.search.lower_bound_s <= found.totals.step_s


def test_a_plan_with_shares_is_priced_as_it_was_planned() -> None:
    machine = machine_of(with_speeds(equal_devices(2), 1, 0.5))
    source = "planner.models.lenet:lenet5"
    given = load_model(source, {})
    x = torch.empty(512, 1, 32, 32, device="meta")
    plan = plan_model(given.module, (x,), machine=machine, all_devices=True, origin=Origin(source, source))
    assert any(layer.shares for layer in plan.stages[0].layers)
    assert price_plan(plan, machine).timeline.step_s == pytest.approx(plan.totals.step_s, rel=1e-12)


def test_kinds_of_devices_have_prices_of_their_own() -> None:
    graph = cluster("2x1-v100-eth10")
    slow = cluster("2x1-t4-eth10").devices[1]
    mixed = replace(graph, devices=(graph.devices[0], replace(slow, id=graph.devices[1].id)))
    machine = machine_of(mixed)
    assert (machine.profile.device, set(machine.others)) == ("t4", {"v100"})
    planner = planner_of(mixed, 4096)
    model = planner.cost_model(planner.meshes()[0])
    fast, last = model.crew.workers
    local = model.local(planner.traced.layers[LayerId("2")], Split.of(model.mesh, (Dimension.SAMPLE,)))
    assert fast.time(local).forward_s < last.time(local).forward_s == model.crew.time(local).forward_s
    ends = [layer.shares for layer in planner.plan().stages[0].layers if layer.op == "input"]
    (shares,) = ends[0].values()
    ratio = last.time(local).forward_s / fast.time(local).forward_s
    assert shares[0] / shares[1] == pytest.approx(ratio, rel=0.25)


def test_speeds_survive_a_file_and_change_the_digest_only_where_there_are_some(tmp_path: Path) -> None:
    plain = equal_devices(2)
    slowed = with_speeds(plain, 1, 0.5)
    write_cluster(slowed, tmp_path / "slow.json")
    assert read_cluster(tmp_path / "slow.json") == slowed
    assert plain.digest == with_speeds(plain, 1, 1).digest != slowed.digest


def test_speeds_are_those_of_whole_seconds_and_noise_is_none() -> None:
    rates = HostRates(
        conv_flop_per_s=4e10, linear_flop_per_s=5e10, bandwidth_bytes_per_s=1e10, update_bytes_per_s=1e10,
        launch_s=1e-5, memory_bytes=2**30,
    )  # fmt: skip
    disturbed = rates.model_copy(update={"conv_flop_per_s": 1e10})
    reference, speeds = relative_speeds([rates, rates, disturbed], [100.0, 104.0, 51.0])
    assert speeds == [1.0, 1.0, 0.5]
    assert math.isclose(reference.conv_flop_per_s, 4e10)
