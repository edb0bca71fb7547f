"""Kernighan-Lin passes over many parts: moves and swaps, good and bad, of which the best prefix is kept."""

import time
from dataclasses import dataclass
from typing import Final

import numpy as np

from planner.inference.problem import FREE, Booleans, Floats, Integers
from planner.inference.state import State

_PATIENCE: Final = 40
"""Operations without a new best after which a pass ends."""
_NUMBERS: Final = 150_000
"""Groups x devices x devices that are looked at for one operation; of larger networks, a sample."""
_LEAST: Final = 48
"""Groups that are looked at for one operation, at least."""
_EXCHANGES: Final = 3
"""Moves to full devices for which a group is looked for that could come back."""
_ROUNDING: Final = 1e-9


@dataclass(frozen=True, slots=True)
class Operation:
    """A move, or a swap of two groups.

    Attributes:
        change: of the potential.
        moves: group and new device, one or two.
    """

    change: float
    moves: tuple[tuple[int, int], ...]


def run_pass(state: State, generator: np.random.Generator, deadline_s: float = float("inf")) -> bool:
    """Change a partition to the best one met on one pass; return False if that is the one it began with.

    Each operation is the one that lowers the potential most, and moves groups that have not moved yet. As in
    [KernighanLin70] it is carried out even if it raises the potential, which leads out of local minima; everything
    behind the best partition is taken back at the end. Partitions stay valid throughout.

    Args:
        state: a valid partition.
        generator: of the groups that are looked at where there are many.
        deadline_s: by ``time.monotonic``; the pass ends there.
    """
    state.rescale()
    first = best = (state.value, state.potential())
    potential = best[1]
    free = state.problem.fixed == FREE
    done: list[tuple[int, int]] = []
    kept = since = 0
    while since < _PATIENCE and time.monotonic() < deadline_s:
        operation = _best_operation(state, free, generator)
        if operation is None:
            break
        for group, there in operation.moves:
            done.append((group, int(state.part[group])))
            state.move(group, there)
            free[group] = False
        potential += operation.change
        since += 1
        if is_less((value := (state.value, potential)), best):
            best, kept, since = value, len(done), 0
    for group, before in reversed(done[kept:]):
        state.move(group, before)
    return is_less(best, first)


def improve(state: State, generator: np.random.Generator, max_passes: int, deadline_s: float = float("inf")) -> None:
    """Run passes until one of them finds nothing better."""
    for _ in range(max_passes):
        if not run_pass(state, generator, deadline_s):
            return


def kick(state: State, generator: np.random.Generator) -> None:
    """Move some groups at random, as memory allows: a layer's share to another device, or some of the bottleneck."""
    free = state.problem.fixed == FREE
    if generator.uniform() < 0.5:
        members = np.flatnonzero(free & np.isin(state.part, state.bottleneck()))
        members = members[generator.uniform(size=len(members)) < generator.uniform(0.05, 0.4)]
        for group in members.tolist():
            there = np.flatnonzero(state.fits(np.array([group]))[0])
            if len(there):
                state.move(group, int(generator.choice(there)))
        return
    here, layer = generator.choice(np.argwhere(state.present > 0))
    there_all = int(generator.integers(state.num_devices))
    for group in np.flatnonzero(free & (state.part == here) & (state.graph.layer_of == layer)).tolist():
        if state.fits(np.array([group]))[0, there_all]:
            state.move(group, there_all)


def is_less(new: tuple[float, float], old: tuple[float, float]) -> bool:
    """Return whether a value is smaller, or as small with less potential."""
    if abs(new[0] - old[0]) > _ROUNDING * abs(old[0]):
        return new[0] < old[0]
    return new[1] < old[1] - _ROUNDING * abs(old[1])


def _candidates(state: State, free: Booleans, generator: np.random.Generator) -> Integers:
    """Return the groups to look at: all, or half from around the bottleneck and half from anywhere."""
    found = np.flatnonzero(free)
    size = max(_NUMBERS // state.num_devices**2, _LEAST)
    if len(found) <= size:
        return found
    hot = found[np.isin(state.part[found], state.bottleneck())]
    if len(hot) > size // 2:
        hot = generator.choice(hot, size // 2, replace=False)
    return np.unique(np.concatenate([hot, generator.choice(found, size - len(hot), replace=False)]))


def _best_operation(state: State, free: Booleans, generator: np.random.Generator) -> Operation | None:
    groups = _candidates(state, free, generator)
    if not len(groups):
        return None
    changes = state.changes(groups)
    changes[np.arange(len(groups)), state.part[groups]] = np.inf
    fits = state.fits(groups)
    found: Operation | None = None
    for position, there in _least(np.where(fits, changes, np.inf), 1):
        found = Operation(float(changes[position, there]), ((int(groups[position]), there),))
    for position, there in _least(np.where(fits, np.inf, changes), _EXCHANGES):
        change = float(changes[position, there])
        if found is not None and change >= found.change - _ROUNDING:
            break  # what comes back seldom makes it better
        swap = _best_swap(state, free, int(groups[position]), there, change)
        if swap is not None and (found is None or swap.change < found.change):
            found = swap
    return found


def _least(values: Floats, num: int) -> list[tuple[int, int]]:
    """Return the places of the least finite values, ascending."""
    flat = values.ravel()
    num = min(num, len(flat))
    places = np.argpartition(flat, num - 1)[:num]
    places = places[np.argsort(flat[places], kind="stable")]
    return [divmod(int(place), values.shape[1]) for place in places if np.isfinite(flat[place])]


def _best_swap(state: State, free: Booleans, group: int, there: int, change: float) -> Operation | None:
    """Return the best exchange of a group, whose move there changes the potential so, with a group from there."""
    here, graph, limits = int(state.part[group]), state.graph, state.problem.devices.memory_bytes
    members = np.flatnonzero(free & (state.part == there))
    if not len(members):
        return None
    state.move(group, there)
    changes = state.changes(members)[:, here]
    layers, own = graph.layer_of[members], graph.memory_bytes[members]
    coming = own + np.where(state.present[here, layers] == 0, graph.shared_bytes[layers], 0)
    going = own + np.where(state.present[there, layers] == 1, graph.shared_bytes[layers], 0)
    fits = (state.used[here] + coming <= limits[here]) & (state.used[there] - going <= limits[there])
    state.move(group, here)
    changes = np.where(fits, changes, np.inf)
    best = int(np.argmin(changes))
    if np.isinf(changes[best]):
        return None
    return Operation(change + float(changes[best]), ((group, there), (int(members[best]), here)))
