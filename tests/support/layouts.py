"""Random meshes, shapes and layouts."""

import math

from hypothesis import assume
from hypothesis import strategies as st

from planner.ir.halo import Window
from planner.ir.layout import BALANCED, CHUNK, Cut, CutRule, Layout, Placement, Whole, family
from planner.ir.mesh import Mesh
from planner.ir.split import Shares, plain_shares

MAX_RANKS = 12


@st.composite
def meshes(draw: st.DrawFn) -> Mesh:
    sizes: list[int] = []
    for _ in range(draw(st.integers(1, 3))):
        room = MAX_RANKS // math.prod(sizes)
        if room >= 2:
            sizes.append(draw(st.integers(2, min(4, room))))
    return Mesh.of(**{f"axis{i}": size for i, size in enumerate(sizes)})


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, ...]:
    """Samples, channels (often times a unit), and perhaps a row of space."""
    samples = draw(st.integers(1, 13))
    rest = draw(st.sampled_from([(), (12,), (15,), (24,), (7,), (8, 5), (6, 4)]))
    return (samples, *rest)


@st.composite
def shares(draw: st.DrawFn, mesh: Mesh, placements: tuple[Placement, ...]) -> tuple[Shares, ...]:
    """Of some axes that cut, weights of which some may be 0; of some with equal copies, the one that holds them."""
    found: list[Shares] = []
    for axis, placement in zip(mesh.axes, placements, strict=True):
        weights: tuple[int, ...] = (1,) * axis.size
        if isinstance(placement, int) and draw(st.booleans()):
            weights = tuple(draw(st.lists(st.integers(0, 3), min_size=axis.size, max_size=axis.size)))
        elif placement is Whole.EQUAL and draw(st.booleans()):
            holder = draw(st.integers(0, axis.size - 1))
            weights = tuple(int(i == holder) for i in range(axis.size))
        found.append(plain_shares(weights) if any(weights) else None)
    return tuple(found)


@st.composite
def layouts(draw: st.DrawFn, shape: tuple[int, ...], mesh: Mesh, *, wholes: tuple[Whole, ...] = tuple(Whole)) -> Layout:
    """A layout without empty pieces but of idle ranks, cut as activations are; at times in units, as by flatten."""
    options: list[Placement] = [*range(len(shape)), *wholes]
    placements = tuple(draw(st.sampled_from(options)) for _ in mesh.axes)
    units = [u for u in (1, 3, 4) if len(shape) == 2 and shape[1] % u == 0] or [1]
    unit = draw(st.sampled_from(units))
    chunk = CHUNK if unit == 1 else Cut(CutRule.CHUNK, unit)
    own = draw(shares(mesh, placements)) if draw(st.booleans()) else ()
    layout = family(shape, mesh, (BALANCED, chunk, BALANCED)[: len(shape)], own).at(placements)
    assume(not layout.has_empty_piece())
    return layout


@st.composite
def windows(draw: st.DrawFn, in_size: int) -> Window:
    """A window operator that fits an input of this size."""
    kernel, dilation, stride = (draw(st.integers(1, top)) for top in (4, 2, 3))
    extent = dilation * (kernel - 1) + 1
    padding = draw(st.integers(0, kernel // 2))
    out_size = (in_size + 2 * padding - extent) // stride + 1
    assume(out_size >= 1)
    return Window(out_size, kernel, stride, padding, dilation)
