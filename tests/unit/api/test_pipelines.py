"""Plans of several stages: their search against brute force, their files, what is refused."""

import json
from typing import Any

import pytest
import torch
from torch import nn

from planner.api import Options, Origin, Planner, machine_of, plan_model, prepare
from planner.api.pipelines import best_pipeline
from planner.api.pipelines.chain import Chain
from planner.api.pipelines.pieces import Pieces
from planner.api.pipelines.search import _Search
from planner.errors import FormatError, InfeasibleError, UsageError
from planner.ir.graph import is_boundary
from planner.ir.ops import Redistribute
from planner.ir.schedule import ScheduleKind
from planner.models.lenet import lenet5
from planner.plan import Plan
from planner.plan.stages import graphs_of
from planner.search.stages import Cuts, Part

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
