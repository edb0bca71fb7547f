import json
from pathlib import Path
from typing import Any

import pytest

from planner.devices import cluster, clusters, read_cluster, write_cluster
from planner.devices.schema import LinkKindsFile
from planner.errors import FormatError, UsageError
from planner.ir.canonical import decode


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_cluster(cluster("2xa100-nvlink"), tmp_path / "machine.json")
    return tmp_path / "machine.json"


def problems(path: Path, content: Any) -> dict[str, str]:
    path.write_text(json.dumps(content))
    with pytest.raises(FormatError, match=r"cluster file .*machine\.json is not valid") as caught:
        read_cluster(path)
    return dict(caught.value.problems)


@pytest.mark.parametrize("name", clusters())
def test_a_machine_survives_its_file(name: str, tmp_path: Path) -> None:
    graph = cluster(name)
    write_cluster(graph, tmp_path / "machine.json")
    read = read_cluster(tmp_path / "machine.json")
    assert read == graph
    assert read.digest == graph.digest
    first = (tmp_path / "machine.json").read_bytes()
    write_cluster(read, tmp_path / "machine.json")
    assert (tmp_path / "machine.json").read_bytes() == first


def test_problems_of_the_form_have_their_json_path_in_lists_those_of_the_first_bad_item(path: Path) -> None:
    content = json.loads(path.read_text())
    content["schema_version"] = 2
    content["devices"][1]["memory_bytes"] = "80 GB"
    content["devices"][0]["peak_flop_per_s"]["fp8"] = 1.0
    content["links"][0]["duplex"] = "both"
    content["links"][1]["latency_s"] = -1.0
    content["colour"] = "red"
    assert sorted(problems(path, content)) == [
        "$.colour",
        '$.devices[0].peak_flop_per_s.fp8["[key]"]',
        "$.links[0].duplex",
        "$.schema_version",
    ]


def test_problems_of_the_machine_have_the_same_paths(path: Path) -> None:
    content = json.loads(path.read_text())
    content["devices"][1]["id"] = "gpu0"
    content["levels"][0]["size"] = 3
    assert problems(path, content) == {
        "$.devices[1].id": "'gpu0' appears twice",
        "$.links[1].a": "there is no device or switch 'gpu1'",
        "$.levels": "3 do not give 2 devices",
    }


def test_a_duplex_that_is_left_out_is_full(path: Path) -> None:
    content = json.loads(path.read_text())
    for link in content["links"]:
        del link["duplex"]
    path.write_text(json.dumps(content))
    assert read_cluster(path) == cluster("2xa100-nvlink")


def test_too_many_devices_are_refused(path: Path) -> None:
    content = json.loads(path.read_text())
    content["levels"][0]["size"] = 65_537
    assert sorted(problems(path, content)) == ["$.levels[0].size"]


def test_a_missing_file_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read cluster file"):
        read_cluster(tmp_path / "machine.json")


def test_a_link_kind_may_not_appear_twice() -> None:
    kind = {"name": "x", "latency_s": 0, "bandwidth_bytes_per_s": 1, "duplex": "full"}
    content = {"schema_version": 1, "buses": [kind | {"source": "s"}] * 2, "networks": []}
    with pytest.raises(FormatError, match="a link kind appears twice"):
        decode(LinkKindsFile, json.dumps(content), "link kinds")
