"""`soybean`: recursive cuts of every tensor of the training graph [SoyBean18], and of any factors [Tofu19].

One cut divides a group of devices into k parts (2 in [SoyBean18]). Under it a tensor is **cut** along samples or
channels (of a weight: output or input channels), **replicated**, or, only as an operator produces it, **reduced**:
addends of one sum. Converting a tensor of T elements moves, all parts and directions together,

    from / to    cut, same    cut, other       replicated
    cut          0            T (k - 1) / k    T (k - 1)
    replicated   0            0                0
    reduced      T (k - 1)    T (k - 1)        2 T (k - 1)

which for k = 2 is the published 0, T/2, T; 0, 0, 0; T, T, 2T. A linear layer or convolution works in aligned forms:

    form     forward              backward
    sample   x C0, w R,  y C0     dy C0, x C0, dw red, w R,  dx C0
    out      x R,  w C0, y C1     dy C1, x R,  dw C0,  w C0, dx red
    in       x C1, w C1, y red    dy R,  x C1, dw C1,  w C1, dx C1

and costs the conversions from stored tilings to those of its form and back. A weight's gradient gets the weight's
tiling. One cut for the whole graph is the cheapest choice of forms and stored tilings, by elimination; every region
that a form cuts is k times smaller in the next cut, those it reduces are not, and

    cost(cuts 1..n) = cost_1 + k cost(cuts 2..n)   elements.

Data parallelism costs 2 W (k - 1) per layer and cut, a split of the reduction 2 F (k - 1): with the forms ``sample``
and ``in`` alone this is [HyPar19] as its figures count.

**Readings of ours.** An operator's result is counted behind its pools, and unweighted operators on one tensor move
nothing. A tensor that forward and backward need in the same tiling is converted once. The input of the model is there
in any tiling; the loss is computed where the output lies. To gather a tensor costs by the larger of what its maker and
its reader see of it: after a cut that replicates it for the reader, a group makes only a part of what it needs. The
code charges 100 times the tensors for a cut that does not divide; here such a form is not there, and a layer without
any form stays whole. Stored tensors may be cut unevenly.
"""

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Final

import numpy as np

from planner.cost.table import CostTable
from planner.ir.dimension import Dimension
from planner.search.formulate import Formulation
from planner.search.problem import Choice, Costs, Problem
from planner.search.published.networks import Axes, Network, Node, solve_decisions


class Tiling(IntEnum):
    """Of a tensor under one cut; the last is no stored one."""

    CUT0 = 0
    CUT1 = 1
    REPLICATED = 2
    REDUCED = 3


class Form(IntEnum):
    """What a layer with weights divides under one cut."""

    SAMPLE = 0
    OUT = 1
    IN = 2
    WHOLE = 3
    """Nothing: every part computes the whole layer."""


@dataclass(frozen=True, slots=True)
class _Aligned:
    """Tilings of the tensors of a layer in one form."""

    x: Tiling
    w: Tiling
    y: Tiling
    dy: Tiling
    dw: Tiling
    dx: Tiling


_C0, _C1, _REP, _RED = Tiling
ALIGNED: Final = {
    Form.SAMPLE: _Aligned(x=_C0, w=_REP, y=_C0, dy=_C0, dw=_RED, dx=_C0),
    Form.OUT: _Aligned(x=_REP, w=_C0, y=_C1, dy=_C1, dw=_C0, dx=_RED),
    Form.IN: _Aligned(x=_C1, w=_C1, y=_RED, dy=_REP, dw=_C1, dx=_C1),
    Form.WHOLE: _Aligned(x=_REP, w=_REP, y=_REP, dy=_REP, dw=_REP, dx=_REP),
}
STORED: Final = (_C0, _C1, _REP)
DIMENSIONS: Final = {
    Form.SAMPLE: (Dimension.SAMPLE,),
    Form.OUT: (Dimension.OUT_CHANNEL,),
    Form.IN: (Dimension.IN_CHANNEL_SCATTER, Dimension.IN_CHANNEL),
    Form.WHOLE: (Dimension.REPLICATE,),
}
"""Of our splits, by form."""

Forms = tuple[Form, Form]
"""Forward and backward."""
_CUTTING: Final = (Form.SAMPLE, Form.OUT, Form.IN)
ALL_FORMS: Final[tuple[Forms, ...]] = tuple((first, second) for first in _CUTTING for second in _CUTTING)
"""Forward and backward may differ."""
MATCHED: Final[tuple[Forms, ...]] = tuple((form, form) for form in _CUTTING)
_PAIRS: Final[tuple[Forms, ...]] = tuple((first, second) for first in Form for second in Form)
_OPTIONS: Final = tuple(itertools.product(_PAIRS, STORED, STORED))
"""Of every node: its forms, the stored tilings of its output and of the gradient of that. A join has tilings only."""


@dataclass(frozen=True, slots=True)
class SoyBeanPlan:
    """Cuts with what they move.

    Attributes:
        cuts: outermost first; of every node its forms. Those of a join mean nothing.
        elements: moved per step by all devices.
        by_cut: of one group each, before it is counted for every group.
    """

    cuts: tuple[tuple[Forms, ...], ...]
    elements: float
    by_cut: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class _Regions:
    """Into how many parts the cuts so far have divided what a node's operators see.

    Attributes:
        x, w, y: forward; of a join only y counts, its output.
        dy, dx, x_again, w_again, dw: backward.
        divided: of samples, output and input channels, by the forms of either direction.
    """

    x: int = 1
    w: int = 1
    y: int = 1
    dy: int = 1
    dx: int = 1
    x_again: int = 1
    w_again: int = 1
    dw: int = 1
    divided: tuple[tuple[int, int, int], tuple[int, int, int]] = ((1, 1, 1), (1, 1, 1))

    def behind(self, option: int, is_join: bool, k: int) -> "_Regions":
        (forward, backward), y, dy = _OPTIONS[option]
        if is_join:
            return replace(self, y=_shrunk(self.y, y, k), dy=_shrunk(self.dy, dy, k))
        f, b = ALIGNED[forward], ALIGNED[backward]
        first, second = (
            tuple(parts * (k if form == i else 1) for i, parts in enumerate(divided))
            for form, divided in zip((forward, backward), self.divided, strict=True)
        )
        return _Regions(
            _shrunk(self.x, f.x, k), _shrunk(self.w, f.w, k), _shrunk(self.y, f.y, k),
            _shrunk(self.dy, b.dy, k), _shrunk(self.dx, b.dx, k), _shrunk(self.x_again, b.x, k),
            _shrunk(self.w_again, b.w, k), _shrunk(self.dw, b.dw, k), (_triple(first), _triple(second)),
        )  # fmt: skip


def conversion(source: Tiling, target: Tiling, k: int = 2) -> float:
    """Return the elements that k parts move to convert a tensor, as a multiple of its elements."""
    if source is _REP or source is target:
        return 0.0
    if source is _RED:
        return float((k - 1) * (2 if target is _REP else 1))
    return float(k - 1) if target is _REP else (k - 1) / k


def _made(source: Tiling, stored: Tiling, k: int, made: float, needed: float) -> float:
    """Return what it costs to store a result: elements that the operator makes, and that the largest reader needs."""
    if stored is not _REP or source is _REP:
        return conversion(source, stored, k) * made
    scattered = conversion(_RED, _C0, k) * made if source is _RED else 0.0
    return scattered + conversion(_C0, _REP, k) * max(made, needed)


def soybean(
    network: Network, sizes: Sequence[int], forms: Collection[Forms] = ALL_FORMS, *, divide: bool = True
) -> SoyBeanPlan:
    """Return the cheapest cut after the other.

    Args:
        network: layers with weights, and joins.
        sizes: parts of each cut; 2 each for 2^n devices, else factors, the largest first [Tofu19].
        forms: that a layer may take.
        divide: leave out the forms that do not divide a layer's sizes.
    """
    regions = [_Regions() for _ in network.nodes]
    cuts, costs = [], []
    for k in sizes:
        allowed = [_allowed(node, r, forms, k, divide) for node, r in zip(network.nodes, regions, strict=True)]
        options, cost = _one_cut(network, regions, k, range(len(regions)), allowed)
        cuts.append(tuple(_OPTIONS[o][0] for o in options))
        costs.append(cost)
        regions = _behind(network, regions, options, k)
    return SoyBeanPlan(tuple(cuts), recursive_cost(costs, sizes), tuple(costs))


def recursive_cost(costs: Sequence[float], sizes: Sequence[int]) -> float:
    """Return cost_1 + k_1 (cost_2 + k_2 (...)) for costs of one group each."""
    total = 0.0
    for cost, k in zip(reversed(costs), reversed(sizes), strict=True):
        total = cost + k * total
    return total


def factors(devices: int) -> tuple[int, ...]:
    """Return the cuts for a number of devices: its prime factors, the largest first [Tofu19]."""
    found, factor = [], 2
    while devices > 1:
        while devices % factor == 0:
            found.append(factor)
            devices //= factor
        factor += 1
    return tuple(reversed(found))


def soybean_choice(table: CostTable, formulation: Formulation) -> Choice:
    """Return the plan of [SoyBean18] on a mesh: a cut for every axis, outermost first, with as many parts as it has.

    The forms are splits by samples, output channels and input channels (in whichever form costs less), the same forward
    and backward; a layer where none is legal on an axis replicates. Layers without weights take what costs least.
    """
    axes = Axes(table, formulation)
    network = axes.network
    regions = [_Regions() for _ in network.nodes]
    for axis, k in enumerate(table.space.mesh.shape):
        allowed = []
        for n, node in enumerate(network.nodes):
            legal = [(f, f) for f, _ in MATCHED if axes.allows(n, axis, DIMENSIONS[f])]
            allowed.append(_allowed(node, regions[n], legal, k, divide=False))
        options, _ = _one_cut(network, regions, k, axes.variable_of, allowed)
        for n, option in enumerate(options):
            (form, _), _, _ = _OPTIONS[option]
            axes.decide(n, axis, DIMENSIONS[form])
        regions = _behind(network, regions, options, k)
    return axes.choice()


def _allowed(node: Node, regions: _Regions, forms: Collection[Forms], k: int, divide: bool) -> list[int]:
    """Return the options of a node: some tilings with the forms that it may take."""
    if node.is_join:
        kept = {(Form.WHOLE, Form.WHOLE)}
    else:
        kept = {f for f in forms if not divide or _divides(node, regions, f, k)} or {(Form.WHOLE, Form.WHOLE)}
    return [o for o, (pair, _, _) in enumerate(_OPTIONS) if pair in kept]


def _divides(node: Node, regions: _Regions, forms: Forms, k: int) -> bool:
    if node.sizes is None:
        return True
    samples, inputs, outputs = node.sizes
    sizes = (samples, outputs, inputs)  # in the order of the forms
    return all(
        sizes[form] % (divided[form] * k) == 0 for form, divided in zip(forms, regions.divided, strict=True)
    )  # fmt: skip


def _one_cut(
    network: Network, regions: Sequence[_Regions], k: int, variable_of: Sequence[int], allowed: Sequence[Sequence[int]]
) -> tuple[tuple[int, ...], float]:
    """Return the option of every node, and the cost of one group."""
    read: dict[int, float] = {}  # by node: the largest part of its output that a reader sees
    edges: dict[tuple[int, int], Costs] = {}
    for i, j, elements in network.edges:
        r = regions[j]
        parts = r.y if network.nodes[j].is_join else min(r.x, r.x_again)
        read[i] = max(read.get(i, 0.0), elements / parts)
        costs = _edge_costs(network.nodes[j], r, elements, elements / regions[i].dy, k)
        edges[i, j] = edges[i, j] + costs if (i, j) in edges else costs
    vectors = tuple(
        _node_costs(node, r, read.get(n, 0.0), k)
        for n, (node, r) in enumerate(zip(network.nodes, regions, strict=True))
    )
    kept = [
        options if n in read else [o for o in options if _OPTIONS[o][1] is _OPTIONS[o][2]]  # the loss moves nothing
        for n, options in enumerate(allowed)
    ]
    return solve_decisions(Problem(vectors, edges), variable_of, kept)


def _node_costs(node: Node, regions: _Regions, read: float, k: int) -> Costs:
    """Return what a layer's weight and output cost under every option."""
    if node.is_join:
        return np.zeros(len(_OPTIONS))
    found = []
    forward_w, backward_w, gradient_w = (node.weights / n for n in (regions.w, regions.w_again, regions.dw))
    for (forward, backward), y, dy in _OPTIONS:
        f, b = ALIGNED[forward], ALIGNED[backward]
        weight = min(
            _both(forward_w, backward_w, w, f.w, b.w, k) + _made(b.dw, w, k, gradient_w, max(forward_w, backward_w))
            for w in STORED
        )
        output = _made(f.y, y, k, node.outputs / regions.y, read)
        found.append(weight + output + conversion(dy, b.dy, k) * node.outputs / regions.dy)
    return np.array(found)


def _edge_costs(reader: Node, regions: _Regions, elements: float, gradient_read: float, k: int) -> Costs:
    """Return what a tensor costs between where it is stored and who reads it: [of its maker, of its reader].

    Args:
        reader: of the tensor.
        regions: that it sees.
        elements: of the whole tensor.
        gradient_read: elements of the gradient that the tensor's maker sees.
        k: parts.
    """
    table = np.empty((len(STORED), len(STORED), len(_OPTIONS)))
    for column, ((forward, backward), y, dy) in enumerate(_OPTIONS):
        f, b = ALIGNED[forward], ALIGNED[backward]
        for stored, gradient in itertools.product(STORED, repeat=2):
            if reader.is_join:  # works in the tilings of its output
                cost = conversion(stored, y, k) * elements / regions.y
                cost += _made(dy, gradient, k, elements / regions.dy, gradient_read)
            else:
                cost = _both(elements / regions.x, elements / regions.x_again, stored, f.x, b.x, k)
                cost += _made(b.dx, gradient, k, elements / regions.dx, gradient_read)
            table[stored, gradient, column] = cost
    rows = [(stored, gradient) for _, stored, gradient in _OPTIONS]
    return table[[r[0] for r in rows], [r[1] for r in rows]]


def _both(forward: float, backward: float, stored: Tiling, first: Tiling, second: Tiling, k: int) -> float:
    """Return the conversions of a stored tensor for forward and backward; one does for both where they agree."""
    if first is second:
        return conversion(stored, first, k) * max(forward, backward)
    return conversion(stored, first, k) * forward + conversion(stored, second, k) * backward


def _behind(network: Network, regions: Sequence[_Regions], options: Sequence[int], k: int) -> list[_Regions]:
    found = zip(network.nodes, regions, options, strict=True)
    return [r.behind(option, node.is_join, k) for node, r, option in found]


def _shrunk(parts: int, tiling: Tiling, k: int) -> int:
    return parts * k if tiling in {_C0, _C1} else parts


def _triple(values: Sequence[int]) -> tuple[int, int, int]:
    first, second, third = values
    return first, second, third
