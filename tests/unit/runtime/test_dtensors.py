"""Placements of a plan, applied by torch's own ``distribute_tensor``, give every rank what the plan gives it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from planner.api import Plan, export_placements, layer_graph, plan_model
from planner.errors import FormatError, MismatchError, UsageError
from planner.plan.placements import Placements, parameter_layouts
from runtime.dtensors import distribute_parameters
from support.threads import on_threads


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 10, 3, padding=1), nn.BatchNorm2d(10), nn.ReLU(), nn.Conv2d(10, 12, 3, groups=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 14), nn.ReLU(), nn.Linear(14, 6),
    )  # fmt: skip


def planned(build: Callable[[], nn.Module], image: int, **options: object) -> Plan:
    inputs = (torch.empty(16, 3, image, image, device="meta"),)
    return plan_model(build(), inputs, **options)  # type: ignore[arg-type]


def held(plan: Plan, build: Callable[[], nn.Module]) -> list[dict[str, torch.Tensor]]:
    """Return what every rank of a plan of one stage holds of every parameter and buffer, cut out by hand."""
    cut = parameter_layouts(plan.only_stage, layer_graph(plan, build()))
    whole = {name: tensor.detach() for name, tensor in build().state_dict().items()}

    def piece(name: str, position: int) -> torch.Tensor:
        region = cut[name].region(position)
        return whole[name][tuple(slice(a, b) for a, b in zip(region.start, region.stop, strict=True))]

    return [{name: piece(name, position) for name in cut} for position in range(plan.mesh.size)]


OPTIONS = (
    {"devices": 4, "solver": "data"},
    {"devices": 4, "mesh": "gpu=2x2", "pin": ["*=out_channel"]},  # 10 channels: 3, 2, 3, 2
    {"devices": 4, "mesh": "gpu=2x2", "pin": ["0=gpu0:sample,gpu1:out_channel", "7=gpu0:in_channel,gpu1:out_channel"]},
    {"cluster": "2x2-a100-eth10", "solver": "conv-data-fc-model"},
)


def test_torch_gives_every_rank_the_pieces_of_the_plan() -> None:
    plans = [planned(net, 8, **options) for options in OPTIONS]
    found = [export_placements(plan, net()) for plan in plans]
    shards = {word for one in found for t in one.stages[0].tensors.values() for word in t.placements or ()}
    assert shards == {"Replicate()", "Shard(0)", "Shard(1)"}
    models = [[net() for _ in plans] for _ in range(4)]  # here: all threads have one generator
    for parameter in (p for own in models[1:] for model in own for p in model.parameters()):
        nn.init.zeros_(parameter)  # values are those of rank 0

    def work(rank: int) -> list[dict[str, torch.Tensor]]:
        results = []
        for plan, one, model in zip(plans, found, models[rank], strict=True):
            mesh = distribute_parameters(model, one)
            assert mesh.mesh_dim_names == tuple(axis.name for axis in plan.mesh.axes)
            tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
            results.append({n: t.to_local().detach() for n, t in tensors.items() if isinstance(t, DTensor)})
        return results

    for position, results in enumerate(on_threads(4, work)):
        for plan, one, local in zip(plans, found, results, strict=True):
            expected = held(plan, net)[position]
            assert local.keys() == expected.keys() == one.stages[0].tensors.keys()
            for name, tensor in expected.items():
                assert torch.equal(local[name], tensor), name
                assert len(one.stages[0].tensors[name].placements or ()) == len(plan.mesh.axes)


def test_the_file_says_the_largest_piece_and_comes_back_as_it_was(tmp_path: Path) -> None:
    plan = planned(net, 8, **OPTIONS[1])
    found = export_placements(plan, net())
    for name, layout in parameter_layouts(plan.only_stage, layer_graph(plan, net())).items():
        tensor = found.stages[0].tensors[name]
        assert tuple(tensor.local_shape) == layout.largest_shape()
        assert tensor.trainable is (name in dict(net().named_parameters()))
    found.save(tmp_path / "placements.json")
    assert Placements.load(tmp_path / "placements.json") == found
    (tmp_path / "bad.json").write_text(found.to_json().replace("Shard(0)", "Partial()"))
    with pytest.raises(FormatError, match=r"tensors\S+\.placements\[0\]: String should match"):
        Placements.load(tmp_path / "bad.json")


def wide() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(20, 8))


def test_pieces_that_shard_does_not_know_have_no_placements_and_are_refused_with_the_reason() -> None:
    plan = planned(wide, 4, devices=2, mesh="gpu=2", pin=["3=out_channel"])
    assert export_placements(plan, wide()).missing == {}
    document = json.loads(plan.to_json())
    next(layer for layer in document["stages"][0]["layers"] if layer["id"] == "3")["shares"] = {"gpu": [3, 1]}
    found = export_placements(Plan.from_json(json.dumps(document)), wide())
    reason = "its pieces are in proportion to the speeds of the devices, and Shard cuts equal ones"
    assert found.missing == {"3.weight": reason, "3.bias": reason}
    assert found.stages[0].tensors["3.weight"].local_shape == [6, 20]
    with pytest.raises(MismatchError, match=r"cannot place these as the plan does: 3\.weight"):
        distribute_parameters(wide(), found)


def test_another_model_or_stage_is_refused() -> None:
    found = export_placements(planned(net, 8, **OPTIONS[0]), net())
    with pytest.raises(MismatchError, match=r"with '0\.weight' of shape \(10, 3, 3, 3\); this one has it with shape"):
        distribute_parameters(wide(), found)
    with pytest.raises(UsageError, match="there are stages 0 to 0, not 1"):
        distribute_parameters(net(), found, stage=1)
    with pytest.raises(MismatchError):
        export_placements(planned(net, 8, **OPTIONS[0]), wide())


def test_every_stage_of_a_pipeline_has_a_mesh_and_its_own_tensors() -> None:
    plan = planned(net, 8, devices=4, stages=2)
    found = export_placements(plan, net())
    assert [stage.mesh_ranks for stage in found.stages] == [stage.mesh.ranks for stage in plan.stages]
    names = [set(stage.tensors) for stage in found.stages]
    assert names[0].isdisjoint(names[1])
    assert names[0] | names[1] == set(net().state_dict())

    models = [net() for _ in range(4)]

    def work(rank: int) -> set[str]:
        model = models[rank]
        for stage in range(2):
            mesh = distribute_parameters(model, found, stage=stage)
            assert (mesh.get_coordinate() is not None) is (rank in found.stages[stage].mesh_ranks)
        return {name for name, tensor in model.state_dict().items() if isinstance(tensor, DTensor)}

    for rank, own in enumerate(on_threads(4, work)):
        assert own == {n for s, stage in enumerate(found.stages) if rank in stage.mesh_ranks for n in names[s]}
