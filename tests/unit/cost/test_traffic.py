"""Bytes between devices: against the list of copies, the priced bytes, and arithmetic written out."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.cost.traffic import Cause, copied, moved, traffic
from planner.ir.layout import BALANCED, Layout, Whole
from planner.ir.mesh import Mesh
from planner.ir.transfer import transfers
from support import layouts as some
from support.equality import planner_for


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Layout, Layout]:
    mesh, shape = draw(some.meshes()), draw(some.shapes())
    wholes = (Whole.EQUAL, Whole.SHARED)
    return draw(some.layouts(shape, mesh, wholes=wholes)), draw(some.layouts(shape, mesh, wholes=wholes))


@given(pairs())
def test_an_exchange_sends_the_copies_that_are_listed(pair: tuple[Layout, Layout]) -> None:
    size = pair[0].mesh.size
    listed = np.zeros((size, size))
    for each in transfers(*pair):
        if each.source != each.target:
            listed[each.source, each.target] += each.region.volume
    np.testing.assert_array_equal(copied(*pair), listed)


def test_collectives_go_around_rings() -> None:
    mesh = Mesh.of(node=2, gpu=3)
    shape, cuts = (12, 6), (BALANCED, BALANCED)
    whole = Layout(shape, mesh, (Whole.EQUAL, Whole.EQUAL), cuts)
    partial = Layout(shape, mesh, (Whole.EQUAL, Whole.PARTIAL), cuts)
    pieces = Layout(shape, mesh, (Whole.EQUAL, 0), cuts)
    ring = np.zeros((6, 6))
    for a, b in ((0, 1), (1, 2), (2, 0), (3, 4), (4, 5), (5, 3)):
        ring[a, b] = 1
    elements = 12 * 6
    np.testing.assert_allclose(moved(partial, whole), ring * 2 * elements * 2 / 3)  # all-reduce: 2 (n - 1) / n
    np.testing.assert_allclose(moved(pieces, whole), ring * elements * 2 / 3)  # all-gather
    np.testing.assert_allclose(moved(partial, pieces), ring * elements * 2 / 3)  # reduce-scatter
    np.testing.assert_array_equal(moved(whole, pieces), 0)


@pytest.mark.parametrize(
    ("name", "solver"),
    [("vgg", "data"), ("vgg", "conv-data-fc-model"), ("resnet20", "model"), ("resnet20", "fsdp")],
)
def test_the_busiest_device_sends_what_is_priced(name: str, solver: str) -> None:
    planner = planner_for(name, 4, solver=solver)
    search, planned = planner.best()
    sent = traffic(search.table, planned.choice)
    total = sum(sent.values())
    assert isinstance(total, np.ndarray)
    assert not total.diagonal().any()
    # of pieces of unequal size, such as 10 classes on 4 ranks, the largest is priced
    rel = 1e-9 if solver in {"data", "fsdp"} else 1e-3
    assert total.sum(axis=1).max() == pytest.approx(planned.timeline.communication_bytes, rel=rel)
    assert total.sum(axis=1).max() <= planned.timeline.communication_bytes * (1 + 1e-9)
    if solver == "data":
        params = sum(p.spec.nbytes for p in _trainable(planner))
        np.testing.assert_allclose(sent[Cause.PARAMETERS].sum(axis=1), 2 * 3 / 4 * params)
        assert not sent[Cause.LAYOUTS].any()


def _trainable(planner):
    return {p.name: p for layer in planner.traced.layers.layers for p in layer.params if p.trainable}.values()
