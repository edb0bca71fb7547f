"""Plans of several stages: their search against brute force, their files, what is refused."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from planner.api import Machine, Options, Origin, Planner, machine_of, plan_model, prepare
from planner.api.pipelines import best_pipeline, price_pipeline
from planner.api.pipelines.chain import Chain, _joined
from planner.api.pipelines.pieces import MAX_UNITS, Pieces
from planner.api.pipelines.search import _Search
from planner.cost.pipeline import InFlight, position_bytes
from planner.cost.stages import stage_times, without_tail
from planner.errors import FormatError, InfeasibleError, TraceError, UsageError
from planner.frontend.lower import TracedModel
from planner.ir.dimension import Dimension
from planner.ir.graph import is_boundary
from planner.ir.ops import Redistribute
from planner.ir.schedule import ScheduleKind
from planner.models.lenet import lenet5
from planner.plan import Plan
from planner.plan.stages import graphs_of
from planner.profile.key import LocalLayer
from planner.profile.table import LayerTime, ProfileTable
from planner.search.stages import Cuts, Part
from support.pipelines import staged_plan

BATCH = 16
SLOW = "2x1-t4-eth1"


def wide() -> nn.Module:
    """Return convolutions with many parameters late, on small images: stages send little, gradients are large."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(64, 512, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(512, 512, 3, padding=1), nn.ReLU(), nn.Conv2d(512, 512, 3, padding=1), nn.ReLU(),
        nn.Conv2d(512, 512, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip


def planner_of(cluster: str, model: nn.Module | None = None, batch: int = BATCH, **options: Any) -> Planner:
    x = (
        torch.empty(batch, 3, 32, 32, device="meta")
        if model is not None
        else torch.empty(batch, 1, 32, 32, device="meta")
    )
    return prepare(model or lenet5(), (x,), machine_of(cluster), Options(**options), Origin("net", "net"))


def test_two_stages_on_two_devices_are_cut_where_brute_force_cuts() -> None:
    planner = planner_of(SLOW, wide(), stages=2, schedule="1f1b", microbatches=4, memory_limit_bytes=2**40)
    pieces = Pieces(planner)
    search, chain = _Search(planner, pieces), Chain.of(pieces, ScheduleKind.ONE_F_ONE_B, 4)
    every = [
        found.timeline.step_s
        for cut in range(1, chain.num_units)
        for found in search._refined(
            ScheduleKind.ONE_F_ONE_B, 4, chain,
            Cuts(0.0, (Part(0, cut, 0, 1), Part(cut, chain.num_units, 1, 2)), 4, 0.0, 0.0),
        )
    ]  # fmt: skip
    assert best_pipeline(planner).timeline.step_s == pytest.approx(min(every), rel=1e-9)


def test_the_plan_file_has_every_layer_once_and_survives_the_way_through_json() -> None:
    planner = planner_of("4x1-t4-eth10", stages=3)
    plan = planner.plan()
    assert Plan.from_json(plan.to_json()) == plan
    graphs = graphs_of(plan, planner.retraced(plan.microbatch).layers)
    named = [
        x.id for graph in graphs for x in graph.layers if not is_boundary(x.op) and not isinstance(x.op, Redistribute)
    ]
    whole = [x.id for x in planner.traced.layers.layers if not is_boundary(x.op) and not isinstance(x.op, Redistribute)]
    assert named == whole
    ranks = [rank for stage in plan.stages for rank in stage.mesh.ranks]
    assert sorted(set(ranks)) == list(range(plan.num_ranks))
    assert plan.batch % plan.schedule.num_microbatches == 0
    assert plan.totals.step_s >= plan.search.lower_bound_s


def test_auto_takes_stages_where_links_are_slow_and_none_where_they_are_fast() -> None:
    slow = planner_of("2x1-t4-eth10", wide(), batch=64, stages="auto").plan()
    assert slow.is_pipelined
    alone = next(row for row in slow.baselines if row.name == "one stage")
    assert slow.totals.step_s < alone.step_s
    fast = planner_of("2xa100-nvlink", wide(), batch=64, stages="auto").plan()
    assert not fast.is_pipelined


def test_what_fits_on_no_device_alone_is_cut_in_stages() -> None:
    model = nn.Sequential(*(nn.Conv2d(3 if i == 0 else 256, 256, 3, padding=1) for i in range(8)))
    whole = planner_of("2xa100-nvlink", model, batch=1, dimensions=frozenset()).plan().totals.memory_bytes
    limit = whole * 3 // 4
    with pytest.raises(InfeasibleError):
        planner_of("2xa100-nvlink", model, batch=1, dimensions=frozenset(), memory_limit_bytes=limit).plan()
    plan = planner_of(
        "2xa100-nvlink", model, batch=1, dimensions=frozenset(), memory_limit_bytes=limit, stages="auto"
    ).plan()  # fmt: skip
    assert plan.is_pipelined
    assert plan.totals.memory_bytes <= limit


def test_memory_that_is_short_is_won_by_computing_activations_again() -> None:
    model = nn.Sequential(*(nn.Conv2d(3 if i == 0 else 16, 16, 3, padding=1) for i in range(10)))
    options: dict[str, Any] = {"stages": 2, "schedule": "gpipe", "microbatches": 8}
    free = planner_of("2xa100-nvlink", model, batch=64, **options).plan()
    assert not any(stage.recompute for stage in free.stages)
    limit = free.totals.memory_bytes * 3 // 5
    tight = planner_of("2xa100-nvlink", model, batch=64, memory_limit_bytes=limit, **options).plan()
    assert any(stage.recompute for stage in tight.stages)
    assert tight.totals.memory_bytes <= limit
    assert tight.totals.step_s > free.totals.step_s


@pytest.mark.parametrize("kind", ["stale", "pipedream"])
def test_stale_schedules_say_how_stale_their_weights_are(kind: str) -> None:
    plan = planner_of("2x1-t4-eth10", stages=2, schedule=kind).plan()
    costs = [stage.cost for stage in plan.stages if stage.cost is not None]
    assert [cost.staleness for cost in costs] == ([2, 0] if kind == "stale" else [cost.staleness for cost in costs])
    assert [cost.weight_versions for cost in costs] == ([1, 1] if kind == "stale" else [3, 1])
    assert plan.schedule.num_microbatches == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"stages": 0}, "at least 1"),
        ({"stages": 99}, "at most"),
        ({"stages": 3}, "2 devices"),
        ({"stages": 2, "microbatches": 5}, "does not divide"),
        ({"stages": 2, "schedule": "stale", "microbatches": 2}, "whole batches"),
        ({"microbatches": 2}, "add --stages"),
        ({"schedule": "gpipe"}, "add --stages"),
        ({"stages": 2, "schedule": "gpipes"}, "gpipe"),
        ({"stages": 2, "mesh": "node=2"}, "--mesh"),
        ({"stages": 2, "solver": "ilp"}, "search of its own"),
        ({"stages": 2, "io": "local"}, "whole batch"),
        ({"stages": 2, "halo_recompute": "always"}, "exchange halos"),
    ],
)
def test_what_makes_no_pipeline_is_refused_with_the_option(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        plan_model(lenet5(), (torch.empty(16, 1, 32, 32),), cluster="2x1-t4-eth10", **options)


def test_files_whose_stages_do_not_fit_each_other_are_refused_with_their_path() -> None:
    plan = json.loads(planner_of("2x1-t4-eth10", stages=2, schedule="1f1b", microbatches=2).plan().to_json())

    def problems(**changes: Any) -> list[str]:
        changed = json.loads(json.dumps(plan))
        for path, value in changes.items():
            place = changed
            *way, last = path.split("__")
            for key in way:
                place = place[int(key)] if key.isdecimal() else place[key]
            place[last] = value
        with pytest.raises(FormatError) as raised:
            Plan.from_json(json.dumps(changed))
        return [path for path, _ in raised.value.problems]

    assert problems(schedule__num_microbatches=3) == ["$.schedule.num_microbatches"]
    assert problems(schedule__kind="single") == ["$.schedule.kind", "$.schedule.num_microbatches"]
    assert problems(stages__1__mesh__ranks=[0]) == ["$.stages[1].mesh.ranks"]
    assert problems(stages__1__mesh__ranks=[2]) == ["$.stages"]
    assert problems(stages__1__cost=None) == ["$.stages[1].cost"]


def test_every_schedule_can_be_asked_for() -> None:
    kinds = [kind for kind in ScheduleKind if kind is not ScheduleKind.SINGLE]
    for kind in kinds:
        stages = 4 if kind is ScheduleKind.INTERLEAVED else 2
        planner = planner_of(SLOW, stages=stages, schedule=kind.value)
        plan = planner.plan_of_pipeline(best_pipeline(planner))
        assert plan.schedule.kind == kind.value
        assert len(plan.stages) == stages
        assert len({tuple(stage.mesh.ranks) for stage in plan.stages}) == 2


@pytest.mark.parametrize("positions", [(0, 1, 1, 0), (0, 0, 1, 1)])
def test_stages_that_do_not_go_round_their_positions_are_refused(positions: tuple[int, ...]) -> None:
    plan = json.loads(planner_of(SLOW, stages=4, schedule="interleaved", microbatches=4).plan().to_json())
    for stage, position in zip(plan["stages"], positions, strict=True):
        stage["mesh"]["ranks"] = [position]
    with pytest.raises(FormatError, match="same order"):
        Plan.from_json(json.dumps(plan))


def test_gpipe_is_taken_where_messages_hold_up_the_turns_of_1f1b() -> None:
    options: dict[str, Any] = {"stages": "auto", "microbatches": 16}
    found = best_pipeline(planner_of("4x1-t4-eth10", wide(), batch=128, **options))
    alone = [
        best_pipeline(planner_of("4x1-t4-eth10", wide(), batch=128, schedule=kind, **options)).timeline.step_s
        for kind in ("gpipe", "1f1b", "zero-bubble")
    ]
    assert alone[0] < min(alone[1:])
    assert found.timeline.step_s <= alone[0]


def test_only_stages_that_memory_is_short_for_compute_again() -> None:
    model = nn.Sequential(*(nn.Conv2d(3 if i == 0 else 16, 16, 3, padding=1) for i in range(10)))
    options: dict[str, Any] = {"stages": 2, "schedule": "1f1b", "microbatches": 8}
    free = best_pipeline(planner_of("2xa100-nvlink", model, batch=64, **options)).timeline.memory_bytes
    found = best_pipeline(
        planner_of("2xa100-nvlink", model, batch=64, memory_limit_bytes=(max(free) + min(free)) // 2, **options)
    )
    assert sum(stage.times.recompute for stage in found.stages) <= 1


def heavy(count: int = 4) -> nn.Module:
    """Return convolutions whose parameters need far more memory than what they compute."""
    return nn.Sequential(*(nn.Conv2d(3 if i == 0 else 256, 256, 3, padding=1) for i in range(count)))


def test_stages_that_memory_is_short_for_are_split_in_another_way() -> None:
    """Activations that are computed again do not help where parameters are what is large."""
    options: dict[str, Any] = {"stages": 2, "schedule": "1f1b", "microbatches": 2}
    samples = {"dimensions": frozenset({Dimension.SAMPLE}), **options}
    free = best_pipeline(planner_of("4xa100-nvlink", heavy(), batch=8, **samples))
    limit = free.memory_bytes * 3 // 4
    with pytest.raises(InfeasibleError):
        best_pipeline(planner_of("4xa100-nvlink", heavy(), batch=8, memory_limit_bytes=limit, **samples))
    tight = best_pipeline(planner_of("4xa100-nvlink", heavy(), batch=8, memory_limit_bytes=limit, **options))
    assert tight.memory_bytes <= limit
    splits = [split for stage in tight.stages for split in stage.table.strategy(stage.choice).values()]
    assert any(Dimension.SAMPLE not in split.dimensions for split in splits)
    plan = planner_of("4xa100-nvlink", heavy(), batch=8, memory_limit_bytes=limit, **options).plan()
    assert plan.totals.memory_bytes <= limit


@pytest.mark.parametrize("kind", [k for k in ScheduleKind if k not in {ScheduleKind.SINGLE, ScheduleKind.INTERLEAVED}])
def test_both_rounds_of_the_search_count_the_same_memory(kind: ScheduleKind) -> None:
    count = 8 if kind.is_synchronous else 1
    planner = planner_of("4xa100-nvlink", heavy(6), batch=16, stages=3, schedule=kind.value, memory_limit_bytes=2**40)
    pieces = Pieces(planner)
    chain = Chain.of(pieces, kind, count)
    parts = (Part(0, 2, 0, 1), Part(2, 4, 1, 2), Part(4, chain.num_units, 2, 3))
    (found,) = _Search(planner, pieces)._refined(kind, count, chain, Cuts(0.0, parts, count, 0.0, 0.0))
    for s, (part, held) in enumerate(zip(parts, found.timeline.memory_bytes, strict=True)):
        *_, fixed, saved, transient, params = chain._runs[1][part.first, part.stop]
        saved = saved + (chain.crossing[part.first] if s else 0)
        by_layers = chain._in_flight(2 - s, 3).held_bytes([fixed + transient], [params], [saved], [saved])
        assert by_layers == pytest.approx(held, rel=0.02)


@pytest.mark.parametrize("count", [2, 8])
def test_interleaved_stages_hold_what_their_orders_say(count: int) -> None:
    planner = planner_of("2xa100-nvlink", heavy(6), stages=4, schedule="interleaved", microbatches=count)
    found = best_pipeline(planner)
    times = [stage.times for stage in found.stages]
    for position, each in enumerate(InFlight.by_position(ScheduleKind.INTERLEAVED, 4, 2, count)):
        assert each.stages == (position, position + 2)
        alone = [position_bytes(times, each.at(s)) for s in each.stages]
        assert max(alone) < position_bytes(times, each) <= sum(alone)
        assert position_bytes(times, each) == found.timeline.memory_bytes[position]


def test_fully_sharded_parameters_are_gathered_for_every_micro_batch() -> None:
    options: dict[str, Any] = {
        "stages": 2, "schedule": "1f1b", "dimensions": frozenset({Dimension.SAMPLE}), "memory_limit_bytes": 2**40,
    }  # fmt: skip
    model = nn.Sequential(*(nn.Conv2d(3 if i == 0 else 64, 64, 3, padding=1, bias=False) for i in range(4)))
    planner = planner_of("4xa100-nvlink", model, batch=16, parameter_sharding="full", **options)
    pieces = Pieces(planner)
    traced = pieces.traced(4)
    mesh = pieces.mesh(0, 2)
    assert mesh is not None
    table = pieces.table(traced.layers, mesh, planner.dimensions)
    by_samples = tuple(
        next((i for i, s in enumerate(table.space.splits[x.id]) if s.dimensions == (Dimension.SAMPLE,)), 0)
        for x in table.space.graph.layers
    )
    whole = sum(p.numel() * 4 for p in model.parameters())
    bare = without_tail(table)
    gathered = sum(table.model.gathers(layer[c]).num_bytes for layer, c in zip(bare.layers, by_samples, strict=True))
    assert gathered == pytest.approx(2 * whole / 2)  # each rank sends its half, forward and backward
    times = stage_times(table, by_samples, 2**20)
    costs = [layer[c] for layer, c in zip(table.layers, by_samples, strict=True)]
    first = next(cost for cost in costs if cost.sync)
    ((axes, num_bytes),) = first.sync.items()
    waited_s = table.model.gathering(axes, num_bytes).seconds  # nothing is computed yet
    assert times.forward_s >= sum(cost.forward_s for cost in costs) + waited_s
    # whole gradients of all micro-batches but the last, beside rows of parameters, gradients and momentum
    held = sum(cost.memory.resident - cost.memory.activations for cost in costs)
    assert held == whole + 3 * whole // 2
    found, copies = (
        best_pipeline(planner_of("4xa100-nvlink", model, batch=16, microbatches=4, **options, parameter_sharding=how))
        for how in ("full", "none")
    )
    assert found.timeline.step_s > copies.timeline.step_s


def test_cuts_of_long_chains_lie_where_little_crosses() -> None:
    count = 200
    small = set(range(2, count, 5))
    entering = [10 if i in small else 1000 for i in range(count)]
    ends = _joined(list(range(count + 1)), np.ones(count), entering)
    assert (ends[0], ends[-1]) == (0, count)
    assert MAX_UNITS - 2 <= len(ends) - 1 <= MAX_UNITS
    assert set(ends[1:-1]) <= small


def test_stages_may_have_three_devices_of_sixteen() -> None:
    pieces = Pieces(planner_of("4x4-p100-ib100", stages="auto"))
    assert [mesh.size for mesh in pieces.first_meshes(8)] == [1, 2, 3, 4, 8, 12]
    assert [mesh.size for mesh in pieces.first_meshes(MAX_UNITS)] == [1, 2, 4, 8, 12]
    flat = Pieces(prepare(lenet5(), (torch.empty(16, 1, 32, 32),), machine_of(devices=16), Options(), Origin("n")))
    assert [mesh.size for mesh in flat.first_meshes(8)] == list(range(1, 16))


def test_pieces_of_micro_batches_can_be_timed_and_a_search_asks_for_no_others() -> None:
    options: dict[str, Any] = {"stages": 2, "schedule": "1f1b", "microbatches": 4}
    planner = planner_of("4xa100-nvlink", heavy(3), batch=16, **options)
    asked: set[str] = set()

    class Listening(ProfileTable):
        def time(self, local: LocalLayer) -> LayerTime:
            if local.has_kernel:
                asked.add(local.piece.text)
            return super().time(local)

    profile = Listening(planner.machine.profile.device, planner.machine.profile.roofline)
    best_pipeline(dataclasses.replace(planner, machine=Machine(planner.machine.graph, profile)))
    known = {piece.text for piece in planner.layer_pieces([], microbatches=[4])}
    assert asked
    assert asked <= known
    assert not asked <= {piece.text for piece in planner.layer_pieces()}
    with pytest.raises(UsageError, match="does not divide"):
        planner.layer_pieces(microbatches=[3])


class _NormOfOne(nn.Module):
    """A batch norm over one position: it needs more than one sample."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1))
        self.norm, self.head = nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.norm(self.features(x))).flatten(1))


def test_micro_batches_that_the_model_cannot_take_are_left_out() -> None:
    options: dict[str, Any] = {"sync_batch_norm": False, "stages": 2}
    found = _Search(planner := planner_of(SLOW, _NormOfOne(), batch=4, **options), Pieces(planner))
    assert found._counts() == (1, 2)
    with pytest.raises(UsageError, match="--microbatches 4"):
        planner_of(SLOW, _NormOfOne(), batch=4, microbatches=4, **options).plan()


def test_micro_batches_that_cannot_be_traced_are_left_out() -> None:
    def planner(**options: Any) -> Planner:
        found = planner_of(SLOW, wide(), batch=4, stages=2, schedule="1f1b", **options)

        def retraced(batch: int) -> TracedModel:
            if batch == 1:
                raise TraceError("one sample is not enough")
            return found.retraced(batch)

        return dataclasses.replace(found, retraced=retraced)

    assert best_pipeline(planner()).num_microbatches in {1, 2}
    with pytest.raises(TraceError, match="one sample"):
        best_pipeline(planner(microbatches=4))


def test_stages_on_a_grid_are_priced_on_a_machine_of_one_level() -> None:
    model = nn.Sequential(*(nn.Conv2d(3 if i == 0 else 8, 8, 3, padding=1) for i in range(4)))
    plan = staged_plan(model, (3, 32, 32), 16, 2, 2, [(2, 2), (2, 2)], seed=None)
    planner = prepare(
        model, (torch.empty(16, 3, 32, 32, device="meta"),), machine_of(devices=8), Options(), Origin("net", "net")
    )
    found = price_pipeline(plan, planner)
    assert [stage.table.space.mesh.shape for stage in found.stages] == [(2, 2), (2, 2)]
    assert found.stages[1].table.space.mesh.ranks == (4, 5, 6, 7)
    assert found.timeline.step_s > 0


@pytest.mark.parametrize("kind", ["zero-bubble", "stale", "pipedream"])
def test_schedules_that_need_whole_parameters_refuse_shards(kind: str) -> None:
    with pytest.raises(UsageError, match="whole parameters"):
        planner_of(SLOW, stages=2, schedule=kind, parameter_sharding="full")
