import copy
import pickle
from collections.abc import Sequence
from dataclasses import replace

import networkx
import pytest

from planner.devices import Cluster, Device, Level, Link, cluster
from planner.errors import FormatError, UnknownNameError, UsageError


def device(index: int) -> Device:
    return Device(f"gpu{index}", "x", 2**30, {"fp32": 1e12}, 1e11)


def graph(levels: Sequence[Level] = (Level("gpu", 2),), links: Sequence[Link] = ()) -> Cluster:
    pair = Link("gpu0", "gpu1", "wire", 1e-6, 1e9)
    return Cluster("pair", (device(0), device(1)), (), (*links, pair), tuple(levels))


def problems(**changes: object) -> dict[str, str]:
    with pytest.raises(FormatError, match="cluster 'pair'") as caught:
        replace(graph(), **changes)  # type: ignore[arg-type]  # one field at a time
    return dict(caught.value.problems)


def test_the_graph_view_has_the_links_and_cannot_be_changed() -> None:
    view = graph().nx()
    assert list(view.edges) == [("gpu0", "gpu1")]
    assert view.edges["gpu0", "gpu1"]["link"].kind == "wire"
    with pytest.raises(networkx.NetworkXError, match="Frozen"):
        view.add_edge("gpu0", "gpu2")


def test_the_digest_covers_everything_but_the_name() -> None:
    assert graph().digest == replace(graph(), name="other").digest
    assert graph().digest != replace(graph(), levels=(Level("cpu", 2),)).digest
    slower = replace(graph().links[0], bandwidth_bytes_per_s=1e8)
    assert graph().digest != replace(graph(), links=(slower,)).digest
    assert graph().digest == replace(graph(), devices=(device(0), device(1))).digest


def test_graphs_are_values() -> None:
    one = graph()
    assert one == graph()
    assert hash(one) == hash(graph())
    assert pickle.loads(pickle.dumps(one)) == one
    assert copy.deepcopy(one).digest == one.digest


def test_all_numbers_are_checked_together() -> None:
    bad = replace(device(1), memory_bytes=0, peak_flop_per_s={"fp32": -1.0, "fp8": 1.0})
    link = Link("gpu0", "gpu1", "wire", float("nan"), 0.0)
    assert list(problems(devices=(device(0), bad), links=(link,), levels=(Level("gpu", 0),))) == [
        "$.devices[1].peak_flop_per_s",
        "$.links[0].latency_s",
        "$.devices[1].memory_bytes",
        "$.devices[1].peak_flop_per_s.fp32",
        "$.links[0].bandwidth_bytes_per_s",
        "$.levels[0].size",
        "$.levels",
    ]


def test_ids_links_and_levels_are_checked_together() -> None:
    loop, stray = Link("gpu0", "gpu0", "w", 0, 1), Link("gpu0", "gpu7", "w", 0, 1)
    found = problems(switches=("gpu0",), links=(loop, stray), levels=(Level("gpu", 2), Level("gpu", 2)))
    assert found == {
        "$.switches[0]": "'gpu0' appears twice",
        "$.levels[1].name": "'gpu' appears twice",
        "$.links[0]": "'gpu0' and 'gpu0' are the same or already linked",
        "$.links[1].b": "there is no device or switch 'gpu7'",
        "$.levels": "2 x 2 do not give 2 devices",
    }
    assert "do not give 0 devices" in problems(devices=(), links=(), levels=())["$.levels"]
    assert list(problems(levels=(Level("gpu0", 2),))) == ["$.levels[0].name"]


def test_two_links_between_the_same_ends_are_refused() -> None:
    assert list(problems(links=(*graph().links, Link("gpu1", "gpu0", "w", 0, 1)))) == ["$.links[1]"]


def test_a_machine_in_two_parts_is_refused() -> None:
    assert "not connected" in problems(links=())["$.links"]


def test_the_mesh_has_whole_levels_as_axes_and_no_axis_of_size_1() -> None:
    assert cluster("4x8-h100-ib400").mesh().shape == (4, 8)
    assert [axis.name for axis in cluster("4x8-h100-ib400").mesh().axes] == ["node", "gpu"]
    assert [axis.name for axis in cluster("16x1-t4-eth10").mesh().axes] == ["node"]
    assert [axis.name for axis in cluster("2x2-cpu-eth1").mesh().axes] == ["node", "cpu"]
    assert cluster("1xa100-nvlink").mesh().axes == ()


def test_meshes_factor_each_level_into_at_most_three_ordered_factors() -> None:
    def written(name: str) -> list[str]:
        meshes = cluster(name).meshes()
        return [",".join(f"{axis.name}={axis.size}" for axis in mesh.axes) for mesh in meshes]

    assert written("8xa100-nvlink") == [
        "gpu=8",
        "gpu0=2,gpu1=4",
        "gpu0=4,gpu1=2",
        "gpu0=2,gpu1=2,gpu2=2",
    ]
    assert written("2x4-a100-ib100") == ["node=2,gpu=4", "node=2,gpu0=2,gpu1=2"]
    assert written("7xa100-nvlink") == ["gpu=7"]
    assert written("1xa100-nvlink") == [""]
    assert len(written("16xa100-nvlink")) == 1 + 3 + 3  # 16 | 2x8 4x4 8x2 | 2x2x4 and its orders


@pytest.mark.parametrize(
    ("text", "names", "shape"),
    [
        ("node=8,gpu=4x2", ["node", "gpu0", "gpu1"], (8, 4, 2)),
        ("gpu=8, node=2x2x2", ["node0", "node1", "node2", "gpu"], (2, 2, 2, 8)),
    ],
)
def test_a_mesh_is_parsed_outermost_level_first(text: str, names: list[str], shape: tuple[int, ...]) -> None:
    mesh = cluster("8x8-h100-ib400").parse_mesh(text)
    assert [axis.name for axis in mesh.axes] == names
    assert mesh.shape == shape


def test_every_candidate_can_be_written_as_a_mesh() -> None:
    machine = cluster("16x1-t4-eth10")
    assert machine.parse_mesh("node=16") == machine.parse_mesh("node=16,gpu=1") == machine.mesh()
    assert machine.parse_mesh("node=2x8") in machine.meshes()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is not a level and its factors, as in node=4,gpu=8"),
        ("node=4,gpu=", "'gpu=' is not a level"),
        ("node=4,gpu=8x", "'gpu=8x' is not a level"),
        ("node=4,gpu=4x4", "has gpu=8, not 4x4 = 16; write node=4,gpu=8"),
        ("node=4", "does not name the level gpu"),
        ("node=4,gpu=8,gpu=8", "names a level twice"),
        ("node=4,gpu=8x1", "at most 3 factors, each at least 2"),
        ("node=4,gpu=0", "has gpu=8, not 0; write"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        cluster("4x8-h100-ib400").parse_mesh(text)


def test_an_unknown_level_is_named_with_the_known_ones() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'node'"):
        cluster("4x8-h100-ib400").parse_mesh("nodes=4,gpu=8")
