"""``layerwise export``, and layer graphs of ``inspect``, for other tools."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pydot
import pytest

from planner.api import layer_graph
from planner.ir.graph import Layer, LayerGraph
from planner.ir.ops import Elementwise, Input
from planner.ir.split import LayerId
from planner.ir.tensor import TensorSpec
from planner.plan import Plan
from planner.plan.placements import Placements
from planner.report.dot import COLOURS, dot
from support.command_line import layerwise

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of pydot's parser


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    folder = tmp_path_factory.mktemp("plans")

    def plan(*options: str) -> Path:
        path = folder / f"{len(list(folder.iterdir()))}.json"
        ran = layerwise("plan", "lenet5", "--devices", "2", "--batch", "8", *options, "-o", path)
        assert ran.code == 0, ran.err
        return path

    return plan


def read(text: str) -> Any:
    """Return the graph of a DOT file; pydot makes its accessors of attributes while it runs."""
    found = pydot.graph_from_dot_data(text)
    assert found is not None
    return found[0]


def edges(found: Any) -> list[tuple[str, str]]:
    return sorted((e.get_source().strip('"'), e.get_destination().strip('"')) for e in found.get_edges())


def test_the_dot_file_has_every_layer_with_its_split_and_every_edge(planned: Callable[..., Path]) -> None:
    path = planned("--solver", "model")
    ran = layerwise("export", path, "--format", "dot")
    assert (ran.code, ran.err) == (0, "")
    plan, found = Plan.load(path), read(ran.out)
    graph = layer_graph(plan)
    assert edges(found) == sorted((i, layer.id) for layer in graph.layers for i in layer.inputs)
    nodes = {node.get_name().strip('"'): node for node in found.get_nodes()}
    for layer, split in plan.strategy.items():
        assert str(split) in nodes[layer].get_label()
        assert COLOURS[split.dimensions[0]] in nodes[layer].get("fillcolor")


def test_stages_of_a_pipeline_are_boxes(planned: Callable[..., Path], tmp_path: Path) -> None:
    path = planned("--stages", "2")
    ran = layerwise("export", path, "--format", "dot", "-o", tmp_path / "graph.dot")
    assert ran.code == 0, ran.err
    assert f"wrote {tmp_path / 'graph.dot'}" in ran.err
    plan, found = Plan.load(path), read((tmp_path / "graph.dot").read_text())
    boxes = [{n.get_name().strip('"') for n in box.get_nodes()} for box in found.get_subgraphs()]
    layers = {layer.id for layer in layer_graph(plan).layers}
    own = [{part.id for part in stage.layers if part.op != "receive"} & layers for stage in plan.stages]
    assert boxes == own
    assert set.union(*own) == layers


def test_inspect_writes_the_graph_of_a_model_without_a_plan() -> None:
    found = read(layerwise("inspect", "lenet5", "--format", "dot").out)
    rows = json.loads(layerwise("inspect", "lenet5", "--format", "json").out)["layers"]
    nodes = {node.get_name().strip('"') for node in found.get_nodes()}
    assert {row["name"] for row in rows} <= nodes
    assert {end for edge in edges(found) for end in edge} <= nodes


@pytest.mark.parametrize("name", ['a "b"', "back\\slash", "\\N", "<b>&", "ä"])
def test_any_name_is_a_name(name: str) -> None:
    spec = TensorSpec((2, 3))
    first = Layer(LayerId("x"), Input(), (), spec)
    layer = Layer(LayerId(name), Elementwise("relu"), (LayerId("x"),), spec)
    text = dot(LayerGraph(name, (first, layer), 2))
    (edge,) = read(text).get_edges()
    quoted = edge.get_destination()
    assert json.loads(quoted) == name
    assert re.search(rf"label={re.escape(quoted[:-1])}\\n", text)


def test_the_dtensor_file_names_mesh_and_placements(planned: Callable[..., Path], tmp_path: Path) -> None:
    path = planned("--solver", "model")
    ran = layerwise("export", path, "--format", "dtensor", "-o", tmp_path / "placements.json")
    assert ran.code == 0, ran.err
    found, plan = Placements.load(tmp_path / "placements.json"), Plan.load(path)
    (stage,) = found.stages
    assert found.plan_sha256 == plan.digest
    assert (stage.mesh_dim_names, stage.mesh_shape, stage.mesh_ranks) == (["gpu"], [2], [0, 1])
    assert ["Shard(0)"] in [tensor.placements for tensor in stage.tensors.values()]
    assert layerwise("export", path, "--format", "dtensor").out == (tmp_path / "placements.json").read_text()


def test_sharded_parameters_are_noted(planned: Callable[..., Path]) -> None:
    ran = layerwise("export", planned("--solver", "fsdp"), "--format", "dtensor")
    assert "note: parameter sharding is not in the placements" in ran.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("no.json", "--format", "dot"), "no.json"),
        (("PLAN", "--format", "svg"), "--format"),
        (("PLAN",), "--format"),
        (("PLAN", "--format", "dot", "-o", "no/such/graph.dot"), "there is no folder 'no/such'"),
    ],
)
def test_what_cannot_be_exported_is_refused(
    planned: Callable[..., Path], arguments: tuple[str, ...], words: str
) -> None:
    path = str(planned())
    ran = layerwise("export", *(path if each == "PLAN" else each for each in arguments))
    assert (ran.code, ran.out) == (2, "")
    assert words in ran.error
