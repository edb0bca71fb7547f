"""The plan file: round trip, schema, every refusal with its place, and what the digest covers."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from planner.errors import FormatError, MismatchError, UsageError
from planner.ir.dimension import Dimension
from planner.ir.split import LayerId
from planner.plan import Plan
from planner.plan.check import refuse_other_machine
from planner.plan.schema import json_schema, require_single_rank_count
from support.plans import Json, document, plan_of

Edit = Callable[[Json], object]


def edited(edit: Edit) -> str:
    found = document()
    edit(found)
    return json.dumps(found)


def stage(found: Json) -> Json:
    first: Json = found["stages"][0]
    return first


def test_a_plan_survives_the_way_through_a_file_unchanged(tmp_path: Path) -> None:
    plan = plan_of(document())
    path = tmp_path / "plan.json"
    plan.save(path)
    assert Plan.load(path) == plan
    assert path.read_text() == plan.to_json()
    assert json.loads(plan.to_json()) == document()
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_a_plan_from_before_these_fields_were_there_is_read_and_has_the_same_digest() -> None:
    old = document()
    for part, name in (
        (stage(old), "devices"), (stage(old), "parameter_sharding"), (old["search"], "constraints"),
        (old["baselines"][0], "note"),
    ):  # fmt: skip
        part.pop(name)
    found = plan_of(old)
    assert found.stages[0].parameter_sharding == "none"
    assert found.stages[0].devices == []
    assert found.search.constraints == []
    assert found.baselines[0].note == ""
    assert found.digest == plan_of(document()).digest


def test_the_digest_tells_sharded_parameters_from_whole_ones_and_not_which_devices_are_used() -> None:
    plain = plan_of(document())
    sharded = Plan.from_json(edited(lambda d: stage(d).update(parameter_sharding="full")))
    elsewhere = Plan.from_json(edited(lambda d: stage(d).update(devices=["gpu4", "gpu5"])))
    assert len({plain.digest, sharded.digest}) == 2
    assert elsewhere.digest == plain.digest


def test_a_plan_gives_mesh_and_strategy_as_domain_values() -> None:
    plan = plan_of(document())
    assert plan.mesh.shape == (2,)
    assert plan.strategy[LayerId("fc1")].dimensions == (Dimension.OUT_CHANNEL,)


@pytest.mark.parametrize(
    ("edit", "path", "words"),
    [
        (lambda d: d.update(schema_version=2), "$.schema_version", "1"),
        (lambda d: d.update(colour="red"), "$.colour", "Extra inputs are not permitted"),
        (lambda d: d.pop("batch"), "$.batch", "required"),
        (lambda d: d.update(batch="8"), "$.batch", 'found "8"'),
        (lambda d: d.update(batch=0), "$.batch", "found 0"),
        (lambda d: d.update(precision="fp8"), "$.precision", 'found "fp8"'),
        (lambda d: d["model"].update(graph_sha256="abc"), "$.model.graph_sha256", 'found "abc"'),
        (lambda d: d["model"]["inputs"][0].update(dtype="int3"), "$.model.inputs[0].dtype", 'found "int3"'),
        (lambda d: d["model"]["inputs"][0]["shape"].__setitem__(0, 9), "$.model.inputs[0].shape[0]", "batch is 8"),
        (lambda d: d["totals"].update(step_s=0.0), "$.totals.step_s", "greater than 0"),
        (lambda d: d["search"].update(gap=1.5), "$.search.gap", "less than or equal to 1"),
        (lambda d: d["cluster"].update(num_devices=1), "$.stages[0].mesh", "has 2 ranks, the cluster 1"),
        (lambda d: stage(d)["mesh"]["axes"][0].update(size=3), "$.stages[0].mesh", "do not multiply to 2 ranks"),
        (lambda d: stage(d)["mesh"].update(ranks=[0, 2]), "$.stages[0].mesh.ranks", "numbers 0 to 1"),
        (lambda d: stage(d)["mesh"].update(ranks=[1, 0]), "$.stages[0].mesh.ranks", "in order"),
        (lambda d: stage(d)["layers"][1].update(id="fc2"), "$.stages[0].layers[2].id", "appears twice"),
        (lambda d: stage(d)["layers"][1]["split"].update(gpu="chanel"), "$.stages[0].layers[1].split.gpu", "chanel"),
        (lambda d: stage(d)["layers"][1].update(split={"cpu": "sample"}), "$.stages[0].layers[1].split", "['gpu']"),
        (lambda d: d.update(stages=[]), "$.stages", "at least 1"),
        (lambda d: stage(d).update(devices=["gpu0"]), "$.stages[0].devices", "1 different ones"),
        (lambda d: stage(d).update(devices=["gpu0", "gpu0"]), "$.stages[0].devices", "1 different ones"),
        (lambda d: stage(d).update(parameter_sharding="some"), "$.stages[0].parameter_sharding", 'found "some"'),
    ],
)  # fmt: skip
def test_a_wrong_value_is_refused_with_its_path(edit: Edit, path: str, words: str) -> None:
    with pytest.raises(FormatError) as raised:
        Plan.from_json(edited(edit))
    assert [p for p, _ in raised.value.problems] == [path]
    assert words in str(raised.value)


@pytest.mark.parametrize(
    ("text", "path", "words"),
    [
        ("{", "$", "is not JSON"),
        ("[]", "$", "object"),
        (json.dumps(document()).replace('"batch": 8', '"batch": 8, "batch": 9'), "$.batch", "twice"),
        (json.dumps(document()).replace("0.004", "NaN"), "$", "NaN"),
        (json.dumps(document()).replace("0.004", "1e999"), "$.totals.step_s", "finite"),
        ("[" * 100_000, "$", "is not JSON"),
    ],
    ids=["cut", "list", "duplicate key", "nan", "infinity", "deep"],
)
def test_text_that_is_no_plan_is_refused(text: str, path: str, words: str) -> None:
    with pytest.raises(FormatError) as raised:
        Plan.from_json(text)
    assert [p for p, _ in raised.value.problems] == [path]
    assert words in str(raised.value)


def test_all_problems_are_reported_at_once() -> None:
    with pytest.raises(FormatError) as raised:
        Plan.from_json(edited(lambda d: d.update(batch=-1, io="both", more=1)))
    assert {path for path, _ in raised.value.problems} == {"$.batch", "$.io", "$.more"}


def test_a_file_is_named_once_in_its_errors(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    for text in ("{", edited(lambda d: d["cluster"].update(num_devices=1))):
        path.write_text(text)
        with pytest.raises(FormatError) as raised:
            Plan.load(path)
        assert str(raised.value).startswith(f"plan {path} is not valid:")
    with pytest.raises(UsageError, match="No such file"):
        Plan.load(tmp_path / "none.json")


def test_the_json_schema_lists_every_field_and_forbids_others() -> None:
    schema = json.loads(json_schema())
    assert list(schema["properties"]) == sorted(Plan.model_fields)
    objects = [schema, *(d for d in schema["$defs"].values() if d["type"] == "object")]
    assert all(part["additionalProperties"] is False for part in objects)


def test_the_json_schema_accepts_a_plan() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.validate(document(), json.loads(json_schema()))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document() | {"colour": "red"}, json.loads(json_schema()))


@pytest.mark.parametrize(
    "edit",
    [
        lambda d: stage(d)["layers"][1]["split"].update(gpu="in_channel"),
        lambda d: d.update(bucket_bytes=4096),
        lambda d: d.update(sync_batch_norm=False),
        lambda d: d["model"].update(graph_sha256="d" * 64),
    ],
    ids=["split", "buckets", "batch norm", "graph"],
)
def test_the_digest_changes_with_what_the_ranks_do(edit: Edit) -> None:
    assert Plan.from_json(edited(edit)).digest != plan_of(document()).digest


@pytest.mark.parametrize(
    "edit",
    [
        lambda d: d["totals"].update(step_s=1.0),
        lambda d: stage(d)["layers"][1]["cost"].update(compute_s=1.0),
        lambda d: d["provenance"].update(utc="2031-01-01T00:00:00Z"),
        lambda d: d["search"].update(gap=0.0),
        lambda d: d.update(baselines=[]),
    ],
    ids=["totals", "layer", "time", "gap", "baselines"],
)
def test_the_digest_does_not_change_with_the_prediction(edit: Edit) -> None:
    assert Plan.from_json(edited(edit)).digest == plan_of(document()).digest


def test_another_machine_is_refused_with_both_names() -> None:
    plan = plan_of(document())
    refuse_other_machine(plan, "b" * 64, "2xa100-nvlink")
    with pytest.raises(MismatchError, match=r"'2xa100-nvlink'.*'4xt4-pcie'.*--cluster 4xt4-pcie"):
        refuse_other_machine(plan, "e" * 64, "4xt4-pcie")


def test_another_number_of_ranks_is_refused_with_both_numbers() -> None:
    require_single_rank_count(plan_of(document()), 2)
    with pytest.raises(UsageError, match="for 2 ranks, but 3 are running"):
        require_single_rank_count(plan_of(document()), 3)


def test_a_plan_cannot_be_changed() -> None:
    plan = plan_of(document())
    with pytest.raises(ValueError, match="frozen"):
        plan.batch = 9


def test_what_is_overlapped_is_a_decision_and_absent_in_older_plans() -> None:
    plan = Plan.from_json(edited(lambda d: [layer.pop("overlap") for layer in stage(d)["layers"]]))
    assert not any(layer.overlap for layer in plan.stages[0].layers)
    changed = Plan.from_json(plan.with_overlap({LayerId("fc1")}).to_json())
    assert [layer.id for layer in changed.stages[0].layers if layer.overlap] == ["fc1"]
    assert changed.digest != plan.digest == changed.with_overlap(set()).digest
