"""Min-sum elimination on numpy arrays: the tables of `dp`.

Eliminating variable v replaces it by the table over its neighbours N

    t[N] = min_v ( node_s[v] + sum over tables that contain v ),

which is exact (min-sum bucket elimination [Dechter99]). Node elimination of [OptCNN18, Sec. 5] is
the case of two neighbours, its edge elimination the sum of two tables over the same pair; the
dependent sets of [PaSE21] are the neighbours N.

Two eliminations that read the same arrays in the same way give the same table: it is made once, so
that repeated blocks of a network cost one of them. Which option attains a minimum is not stored, it
is found again for the one entry of each table that is asked for.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from planner.deadline import look
from planner.search.order import elimination_order
from planner.search.problem import Choice, Costs, Problem

BLOCK: Final = 1 << 15
"""Entries that are added and minimised at once; they stay in a core's cache."""
AT_ONCE: Final = 1 << 14
"""Entries up to which a table is built before it is minimised, instead of option after option."""

Axes = tuple[int, ...]
Key = tuple[tuple[int, Axes], ...]


@dataclass(frozen=True, slots=True)
class Step:
    """The elimination of one variable.

    Attributes:
        variable: that is minimised over.
        others: its neighbours, ascending: the axes of the new table.
        inputs: numbers of the tables that contain it.
        axes: for each input, which of (variable, *others) its axes are.
        table: number of the new table.
        work: entries of the table before it is minimised; 0 where an equal one is made by an earlier step.
    """

    variable: int
    others: tuple[int, ...]
    inputs: tuple[int, ...]
    axes: tuple[Axes, ...]
    table: int
    work: float


@dataclass(frozen=True)
class Schedule:
    """What an elimination would do, known before anything is computed.

    Attributes:
        steps: one per variable.
        arrays: by number; those of the problem, then one place for each new table.
        work: entries that are added up and minimised over.
        kept: entries of all new tables.
        largest: entries of the largest table before it is minimised.
    """

    steps: tuple[Step, ...]
    arrays: tuple[Costs | None, ...]
    work: float
    kept: float
    largest: float


def schedule(problem: Problem) -> Schedule:
    """Return how to eliminate the variables of a problem, nodes and edges alone."""
    sizes = problem.sizes
    order, largest = elimination_order(sizes, problem.edge_s)
    numbers: dict[object, int] = {}
    arrays: list[Costs | None] = []
    tables_of: list[dict[int, tuple[Axes, int]]] = [{} for _ in sizes]  # by serial number: scope, array
    serial = itertools.count()
    scopes = [((i,), costs) for i, costs in enumerate(problem.node_s)]
    for scope, costs in itertools.chain(scopes, problem.edge_s.items()):
        where = costs.__array_interface__["data"][0], costs.shape, costs.strides
        number = numbers.setdefault(where, len(arrays))
        if number == len(arrays):
            arrays.append(costs)
        place = next(serial)
        for v in scope:
            tables_of[v][place] = (scope, number)
    steps = []
    work = kept = 0.0
    for v in order:
        mine = tables_of[v]
        others = tuple(sorted({u for scope, _ in mine.values() for u in scope if u != v}))
        axis_of = {u: axis for axis, u in enumerate((v, *others))}
        read = [(number, tuple(axis_of[u] for u in scope)) for scope, number in mine.values()]
        entries = math.prod(float(sizes[u]) for u in others)
        key: Key = tuple(read)
        table = numbers.setdefault(key, len(arrays))
        new = table == len(arrays)
        if new:
            arrays.append(None)
            kept += entries
            work += sizes[v] * entries
        inputs, axes = zip(*read, strict=True)
        steps.append(Step(v, others, inputs, axes, table, sizes[v] * entries if new else 0.0))
        for place, (scope, _) in mine.items():
            for u in scope:
                if u != v:
                    del tables_of[u][place]
        place = next(serial)
        for u in others:
            tables_of[u][place] = (others, table)
    return Schedule(tuple(steps), tuple(arrays), work, kept, largest)


def eliminate(plan: Schedule) -> Choice:
    """Return the choice of least sum; ties go to the lowest option, last eliminated variable first."""
    arrays = list(plan.arrays)
    for step in plan.steps:
        if arrays[step.table] is None:
            look()
            tables = [_array(arrays, number) for number in step.inputs]
            arrays[step.table] = least(tables, step.axes, 1 + len(step.others))
    chosen: dict[int, int] = {}
    for step in reversed(plan.steps):
        at: tuple[slice | int, ...] = (slice(None), *(chosen[u] for u in step.others))
        total: Costs = np.zeros(1)
        for number, axes in zip(step.inputs, step.axes, strict=True):
            total = total + _array(arrays, number)[tuple(at[axis] for axis in axes)]
        chosen[step.variable] = int(total.argmin())
    return tuple(chosen[v] for v in range(len(plan.steps)))


def _array(arrays: Sequence[Costs | None], number: int) -> Costs:
    found = arrays[number]
    assert found is not None  # steps are in the order in which their tables are made
    return found


def least(tables: Sequence[Costs], axes: Sequence[Axes], num_axes: int) -> Costs:
    """Return the minimum over axis 0 of the sum of tables, as a table over axes 1 and up.

    Args:
        tables: float64 each.
        axes: for each table, which of the ``num_axes`` axes its own are; each has axis 0.
        num_axes: of the sum.
    """
    views = [_spread(table, own, num_axes) for table, own in zip(tables, axes, strict=True)]
    shape = np.broadcast_shapes(*(view.shape for view in views))
    if math.prod(shape) <= AT_ONCE:
        found: Costs = sum(views[1:], start=views[0]).min(axis=0)
        return found
    views = [np.ascontiguousarray(view) for view in _joined(views)]
    result = np.empty(shape[1:])
    for block in _blocks(shape[1:]):
        parts = [view[:, *(cut if n > 1 else slice(None) for cut, n in zip(block, view.shape[1:], strict=True))]
                 for view in views]  # fmt: skip
        into = result[block]
        buffer = np.empty_like(into)
        into[...] = _sum_of(parts, 0, buffer)
        for option in range(1, shape[0]):
            np.minimum(into, _sum_of(parts, option, buffer), out=into)
    return result


def _spread(table: Costs, own: Axes, num_axes: int) -> Costs:
    """Return a view with all axes in order, those that the table lacks of length 1."""
    order = sorted(range(len(own)), key=own.__getitem__)
    present = set(own)
    return table.transpose(order)[tuple(slice(None) if axis in present else None for axis in range(num_axes))]


def _joined(views: Sequence[Costs]) -> list[Costs]:
    """Return fewer views of the same sum: each is added to a larger one that has its axes, where there is one."""
    rest = sorted(views, key=lambda view: view.size)
    found: list[Costs] = []
    for k, view in enumerate(rest):
        for m in range(k + 1, len(rest)):
            if all(a in (1, b) for a, b in zip(view.shape, rest[m].shape, strict=True)):
                rest[m] = rest[m] + view
                break
        else:
            found.append(view)
    return found


def _blocks(shape: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    """Cut a table into blocks of at most ``BLOCK`` entries, as whole as can be from the last axis on."""
    steps, entries = [], 1
    for n in reversed(shape):
        pieces = math.ceil(n * entries / BLOCK) if entries * n > BLOCK else 1
        step = max(math.ceil(n / pieces), 1)
        steps.append([slice(start, min(start + step, n)) for start in range(0, n, step)])
        entries *= step
    yield from itertools.product(*reversed(steps))


def _sum_of(parts: Sequence[Costs], option: int, buffer: Costs) -> Costs:
    if len(parts) == 1:
        only: Costs = parts[0][option]
        return only
    np.add(parts[0][option], parts[1][option], out=buffer)
    for part in parts[2:]:
        buffer += part[option]
    return buffer
