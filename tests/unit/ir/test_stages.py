"""Stages of a layer graph: where cuts may lie, what is sent, and which copies that takes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.ir.graph import Layer, LayerGraph, Parameter, share_transfers
from planner.ir.layout import BALANCED, Layout, Placement, Whole
from planner.ir.mesh import Mesh, MeshAxis
from planner.ir.ops import Elementwise, Input, Linear, Output, Receive, Send
from planner.ir.split import LayerId
from planner.ir.stages import crossings, homes, legal_cuts, stage_graphs, without_redistribution
from planner.ir.tensor import DType, TensorSpec

SPEC = TensorSpec((8, 4))


def layer(name: str, *inputs: str, weight: str = "", op: object = None, spec: TensorSpec = SPEC) -> Layer:
    params = (Parameter(weight, TensorSpec((4, 4))),) if weight else ()
    kind = op if op is not None else Linear(4, 4) if weight else Elementwise("relu")
    return Layer(LayerId(name), kind, tuple(map(LayerId, inputs)), spec, params)  # type: ignore[arg-type]


def graph(*layers: Layer) -> LayerGraph:
    return share_transfers(LayerGraph("net", layers, 8))


RESIDUAL = graph(
    layer("x", op=Input()), layer("a", "x", weight="a.w"), layer("b", "a", weight="b.w"), layer("c", "b", weight="c.w"),
    layer("add", "a", "c", op=Elementwise("add")), layer("head", "add", weight="head.w"),
    layer("output", "head", op=Output()),
)  # fmt: skip


def ids(found: LayerGraph, kind: type) -> list[str]:
    return [x.id for x in found.layers if isinstance(x.op, kind)]


def test_every_layer_but_inputs_the_first_and_outputs_may_begin_a_stage() -> None:
    assert legal_cuts(RESIDUAL) == ("b", "c", "add", "head")


def test_layers_that_share_a_parameter_stay_in_one_stage() -> None:
    tied = graph(
        layer("x", op=Input()), layer("a", "x", weight="w"), layer("b", "a", weight="b.w"), layer("c", "b", weight="w"),
        layer("d", "c", weight="d.w"), layer("output", "d", op=Output()),
    )  # fmt: skip
    assert legal_cuts(tied) == ("d",)
    with pytest.raises(ValueError, match="no stage can begin with"):
        stage_graphs(tied, [LayerId("c")])


def test_a_tensor_that_is_read_two_stages_on_is_relayed() -> None:
    first, second, third = stage_graphs(RESIDUAL, [LayerId("b"), LayerId("add")])
    assert ids(first, Send) == ["a:sent"]
    assert ids(second, Receive) == ["a"]
    assert ids(second, Send) == ["a:sent", "c:sent"]
    assert ids(third, Receive) == ["a", "c"]
    assert third[LayerId("add")].inputs == ("a", "c")
    assert second[LayerId("a:sent")].inputs == ("a",)


def test_readers_in_one_stage_share_a_redistribution() -> None:
    first, second = stage_graphs(RESIDUAL, [LayerId("add")])
    assert "a:shared" not in first.index
    whole = graph(
        layer("x", op=Input()), layer("a", "x", weight="a.w"), layer("b", "a", weight="b.w"),
        layer("c", "a", weight="c.w"),
        layer("add", "b", "c", op=Elementwise("add")), layer("output", "add", op=Output()),
    )  # fmt: skip
    first, second = stage_graphs(whole, [LayerId("b")])
    assert ids(first, Send) == ["a:sent"]
    assert second[LayerId("b")].inputs == second[LayerId("c")].inputs == ("a:shared",)


def test_one_stage_is_the_graph_and_cuts_come_in_order() -> None:
    assert stage_graphs(RESIDUAL, []) == (RESIDUAL,)
    with pytest.raises(ValueError, match="order of the layers"):
        stage_graphs(RESIDUAL, [LayerId("add"), LayerId("b")])


def test_gradients_come_back_only_for_what_has_some() -> None:
    whole = graph(
        layer("x", op=Input()), layer("y", op=Input(), spec=TensorSpec((8,), DType.INT64)),
        layer("a", "x", weight="a.w"),
        layer("b", "a", "y", op=Elementwise("gather")), layer("output", "b", op=Output()),
    )  # fmt: skip
    _, second = stage_graphs(whole, [LayerId("b")])
    assert {x.id: x.op.has_gradient for x in second.layers if isinstance(x.op, Receive)} == {"a": True, "y": False}


def test_every_parameter_has_one_home() -> None:
    assert homes(stage_graphs(RESIDUAL, [LayerId("c")])) == {"a.w": 0, "b.w": 0, "c.w": 1, "head.w": 1}


def test_redistribute_layers_go_and_come() -> None:
    plain = without_redistribution(RESIDUAL)
    assert share_transfers(plain) == RESIDUAL
    assert not [x for x in plain.layers if x.op.kind == "redistribute"]


def mesh(first: int, *sizes: int) -> Mesh:
    count = 1
    for size in sizes:
        count *= size
    axes = tuple(MeshAxis(f"a{i}", size) for i, size in enumerate(sizes))
    return Mesh(axes, tuple(range(first, first + count)))


@st.composite
def layouts(draw: st.DrawFn, first: int, shape: tuple[int, ...]) -> Layout:
    found = mesh(first, *draw(st.lists(st.integers(2, 3), max_size=2)))
    options: list[Placement] = [0, 1, Whole.EQUAL]
    placements = tuple(draw(st.sampled_from(options)) for _ in found.axes)
    return Layout(shape, found, placements, (BALANCED,) * len(shape))


@given(st.data())
def test_every_receiver_gets_each_element_of_its_region_once_from_a_rank_that_has_it(data: st.DataObject) -> None:
    shape = (data.draw(st.integers(9, 12)), data.draw(st.integers(9, 11)))
    source, target = data.draw(layouts(0, shape)), data.draw(layouts(20, shape))
    moves = crossings(source, target)
    for position in range(target.mesh.size):
        own = [move for move in moves if move.target == position]
        region = target.region(position)
        assert all(source.region(move.source).contains(move.region) for move in own)
        assert all(region.contains(move.region) for move in own)
        assert sum(move.region.volume for move in own) == region.volume
        assert not [1 for i, a in enumerate(own) for b in own[:i] if a.region.intersect(b.region) is not None]


def test_equal_copies_take_turns_and_a_rank_serves_itself() -> None:
    whole = Layout((4,), mesh(0, 2), (Whole.EQUAL,), (BALANCED,))
    other = Layout((4,), mesh(2, 2), (Whole.EQUAL,), (BALANCED,))
    assert [(m.source, m.target) for m in crossings(whole, other)] == [(0, 0), (1, 1)]
    same = Layout((4,), Mesh((), (1,)), (), (BALANCED,))
    assert [(m.source, m.target) for m in crossings(whole, same)] == [(1, 0)]


def test_addends_are_never_sent() -> None:
    partial = Layout((4,), mesh(0, 2), (Whole.PARTIAL,), (BALANCED,))
    with pytest.raises(ValueError, match="whole values"):
        crossings(partial, Layout((4,), mesh(2, 2), (0,), (BALANCED,)))
