"""The first round: a network as a chain of units, between which cuts may lie, priced by adding up layers."""

import contextlib
import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final, cast

import numpy as np
from numpy.typing import NDArray

from planner.api.pipelines.pieces import MAX_UNITS, Pieces
from planner.cost.pipeline import InFlight, played
from planner.cost.table import CostTable
from planner.errors import InfeasibleError, UsageError
from planner.ir.graph import LayerGraph
from planner.ir.mesh import Mesh
from planner.ir.schedule import ScheduleKind
from planner.ir.split import LayerId
from planner.ir.stages import legal_cuts, without_redistribution
from planner.search.stages import Cuts, Part, Seconds, StageSpace, best_cuts, cycle_s, step_s

Figures = NDArray[np.float64]
_Computed = list[list[tuple[float, float]]]
"""By first unit and last unit + 1: seconds of a micro-batch, and what comes once a step."""

MAX_STAGES: Final = 8
"""That are searched unless the user asks for more."""
CANDIDATES: Final = 4
"""Ways to cut that go into the second round, for every number of micro-batches."""
VIRTUAL: Final = 2
"""Stages of a position of the interleaved schedule."""


@dataclass(frozen=True)
class Chain:
    """The first round, for one schedule and number of micro-batches.

    Attributes:
        pieces: of the network.
        kind, count: schedule and micro-batches.
        first: of every unit, its first layer.
        graph: of the network, at micro-batch size.
        figures: by number of devices, of every layer what ``_figures`` has, with the splits that are fastest.
        ends: of every unit, where its layers begin, and at last where they end.
        crossing: of every unit, bytes that enter it from the one before.
        work_s: of all devices for a micro-batch, at least: each layer on as many of them, and so split, as takes least.
    """

    pieces: Pieces
    kind: ScheduleKind
    count: int
    graph: LayerGraph
    first: tuple[LayerId, ...]
    ends: tuple[int, ...]
    figures: dict[int, Figures]
    crossing: tuple[int, ...]
    work_s: float
    _kept: dict[tuple[InFlight, float], dict[int, _Computed]] = field(init=False, default_factory=dict, compare=False)
    _flights: dict[tuple[int, int], InFlight] = field(init=False, default_factory=dict, compare=False)
    _leaner: dict[tuple[int, int], NDArray[np.float64] | None] = field(init=False, default_factory=dict, compare=False)

    @staticmethod
    def of(pieces: Pieces, kind: ScheduleKind, count: int) -> "Chain":
        """Return the chain of a network for a schedule and a number of micro-batches."""
        graph = pieces.traced(count).layers
        plain = without_redistribution(graph)
        figures = {}
        least: dict[int, Figures] = {}
        cuts = [plain.index[cut] for cut in legal_cuts(graph)]
        for mesh in pieces.first_meshes(len(cuts) + 1):
            found = pieces.searched(graph, (None, None), mesh, quick=True)
            figures[mesh.size] = _figures(found[0].table, found[2][0].choice, plain)
            every = found[0].table.layers
            least[mesh.size] = np.array([min(c.forward_s + c.backward_s for c in costs) for costs in every])
        work_s = float(np.min([size * each for size, each in least.items()], axis=0).sum())
        entering = _entering(plain, pieces)
        ends = _joined([0, *cuts, len(plain.layers)], figures[1][:, 0] + figures[1][:, 1], entering)
        crossing = tuple(entering[start] for start in ends[:-1])
        first = tuple(plain.layers[start].id for start in ends[:-1])
        return Chain(pieces, kind, count, graph, first, ends, figures, crossing, work_s)

    def of_kind(self, kind: ScheduleKind) -> "Chain":
        """Return the chain for another schedule with as many micro-batches."""
        return replace(self, kind=kind)

    @property
    def num_units(self) -> int:
        """How many there are."""
        return len(self.ends) - 1

    @property
    def num_ways(self) -> float:
        """How many ways to cut there are, at one size of stages."""
        most = self._most_stages()
        return float(sum(math.comb(self.num_units - 1, k - 1) for k in range(2, most + 1)))

    def _most_stages(self) -> int:
        asked = self.pieces.planner.options.stages
        devices = len(self.pieces.planner.machine.graph.devices)
        most = asked if isinstance(asked, int) else min(MAX_STAGES, devices)
        return min(most, self.num_units)

    def best(self) -> tuple[Cuts, ...]:
        """Return the best ways to cut, by added up prices."""
        planner = self.pieces.planner
        devices, asked = len(planner.machine.graph.devices), planner.options.stages
        most = self._most_stages()
        self._refuse(devices, asked)
        objective = step_s if self.kind.is_synchronous else cycle_s
        if self.kind is ScheduleKind.INTERLEAVED:
            counts = self._interleaved(devices, asked)
            found = tuple(cuts for n in counts for cuts in self._best_interleaved(n, devices))
            if not found:
                raise InfeasibleError("the interleaved schedule needs two stages for every position")
            return found
        exact = asked if isinstance(asked, int) else None

        def price(part: Part, behind: int, num_stages: int | None) -> Seconds | None:
            is_first, here = part.first == 0, behind + 1
            if is_first and (here < 2 or (num_stages is not None and here != num_stages)):
                return None  # not a pipeline, or not one of so many stages
            return self._price(part, part.num_devices, self._in_flight(behind, num_stages or here), None)

        sizes = tuple(sorted(self.figures))
        cheapest: list[Cuts] = []
        failure: InfeasibleError | None = None
        each = [exact] if exact is not None or not self._counts_stages(most) else [*range(2, most + 1)]
        for used, num_stages in itertools.product(self._used(devices, exact or 2), each):
            space = StageSpace(self.num_units, used, sizes, num_stages or most)
            asking = functools.partial(lambda part, behind, _, k: price(part, behind, k), k=num_stages)
            try:
                cheapest += best_cuts(space, asking, [self.count], count=CANDIDATES, objective=objective)
            except InfeasibleError as error:
                failure = error
        if failure is not None and not cheapest:
            raise failure
        return tuple(sorted(cheapest, key=lambda cuts: cuts.cost_s)[:CANDIDATES])

    def _counts_stages(self, most: int) -> bool:
        """Return whether it matters for the price of a stage how many are in front of it.

        Only for ``zero-bubble``, whose positions hold as much as the first one, and where memory is short.
        """
        if self.kind is not ScheduleKind.ZERO_BUBBLE:
            return False
        return any(
            self._computed(self._in_flight(b, b + 1)) != self._computed(self._in_flight(b, most)) for b in range(most)
        )

    def _used(self, devices: int, least: int) -> list[int]:
        """Return numbers of devices to use, the first of the machine: all, powers of two, and one for each stage."""
        if self.pieces.planner.options.all_devices:
            return [devices]
        return sorted({n for n in range(least, devices) if n & (n - 1) == 0} | {min(least, devices), devices})

    def _best_interleaved(self, positions: int, devices: int) -> tuple[Cuts, ...]:
        """Return the best cuts where each stage has its part of a position's memory, and where it has all of it.

        What the stages of a position hold together is known in the second round.
        """
        count = VIRTUAL * positions
        by_position = InFlight.by_position(self.kind, count, positions, self.count)
        space = StageSpace(self.num_units, count, (1,), count)
        found: dict[tuple[Part, ...], Cuts] = {}
        for share in (1 / VIRTUAL, 1.0):

            def price(part: Part, behind: int, _count: int, share: float = share) -> Seconds | None:
                stage = count - 1 - behind
                in_flight = by_position[stage % positions].at(stage)
                return self._price(part, devices // positions, replace(in_flight, stages=(0,)), count, share)

            with contextlib.suppress(InfeasibleError):
                cuts = best_cuts(space, price, [self.count], objective=_interleaved_s)
                found.update({each.parts: each for each in cuts})
        return tuple(found.values())

    def _refuse(self, devices: int, asked: int | str) -> None:
        if isinstance(asked, int) and not 2 <= asked <= self.num_units:
            raise UsageError(
                f"--stages {asked}: this network can be cut in at most {self.num_units} stages"
                if asked > 1 else f"--stages {asked}: a pipeline has at least 2 stages"
            )  # fmt: skip
        if isinstance(asked, int) and asked > devices and self.kind is not ScheduleKind.INTERLEAVED:
            raise UsageError(
                f"--stages {asked}: the machine has {devices} devices; several stages on one device are the "
                "interleaved schedule (--schedule interleaved)"
            )
        if devices < 2 or self.num_units < 2:
            raise InfeasibleError("a pipeline needs at least 2 devices, and a network that can be cut")

    def _interleaved(self, devices: int, asked: int | str) -> list[int]:
        """Return numbers of positions, each with ``VIRTUAL`` stages."""
        if isinstance(asked, int):
            if asked % VIRTUAL or devices % (asked // VIRTUAL):
                if self.pieces.planner.options.schedule is None:
                    return []
                raise UsageError(
                    f"--stages {asked}: the interleaved schedule has {VIRTUAL} stages on each of a number of positions "
                    f"that divides the {devices} devices"
                )
            wanted = [asked // VIRTUAL]
        else:
            wanted = [n for n in (2, 4, 8) if devices % n == 0]
        return [
            n for n in wanted
            if n > 1 and VIRTUAL * n <= self.num_units and devices // n in self.figures
            and self.pieces.mesh(devices // n, devices // n) is not None
        ]  # fmt: skip

    def meshes_of(self, cuts: Cuts) -> list[Mesh]:
        """Return the meshes of the stages; interleaved, positions come round again."""
        if self.kind is not ScheduleKind.INTERLEAVED:
            found = [self.pieces.mesh(part.first_device, part.num_devices) for part in cuts.parts]
        else:
            positions = self.num_positions(cuts)
            size = len(self.pieces.planner.machine.graph.devices) // positions
            found = [self.pieces.mesh(k % positions * size, size) for k in range(len(cuts.parts))]
        return [mesh for mesh in found if mesh is not None]

    def num_positions(self, cuts: Cuts) -> int:
        """Return how many groups of ranks there are."""
        return len(cuts.parts) // (VIRTUAL if self.kind is ScheduleKind.INTERLEAVED else 1)

    @property
    def least_s(self) -> float:
        """What no pipeline can be faster than: all devices always at work."""
        return self.work_s * self.count / len(self.pieces.planner.machine.graph.devices)

    def _price(
        self, part: Part, size: int, in_flight: InFlight, virtual: int | None, share: float = 1.0
    ) -> Seconds | None:
        if virtual is None and self.pieces.mesh(part.first_device, size) is None:
            return None
        compute_s, tail_s = self._computed(in_flight, share)[size][part.first][part.stop]
        if compute_s < 0:
            return None
        received_s = self._link_s(part.first, part.first_device - 1, size, virtual)
        sent_s = self._link_s(part.stop, part.stop_device - 1, size, virtual)
        tail_s /= self.count
        return Seconds(compute_s + received_s + sent_s + tail_s, max(compute_s, received_s, sent_s) + tail_s)

    @functools.cached_property
    def _runs(self) -> dict[int, Figures]:
        """By number of devices, figures of the runs of units with the splits that are fastest; see ``_runs_of``."""
        return {size: self._runs_of(rows) for size, rows in self.figures.items()}

    def _runs_of(self, rows: Figures) -> Figures:
        """Return by first unit and last unit + 1 what ``rows`` has of the layers of that run."""
        runs = np.zeros((self.num_units, self.num_units + 1, rows.shape[1]))
        units = [rows[start:stop] for start, stop in itertools.pairwise(self.ends)]
        sums, most = np.array([unit.sum(axis=0) for unit in units]), np.array([unit.max(axis=0) for unit in units])
        for first in range(self.num_units):
            runs[first, first + 1 :] = np.cumsum(sums[first:], axis=0)
            runs[first, first + 1 :, TRANSIENT] = np.maximum.accumulate(most[first:, TRANSIENT])
        return runs

    def _computed(self, in_flight: InFlight, share: float = 1.0) -> dict[int, _Computed]:
        """Return what the same runs compute; recomputing, or with other splits, where memory is short.

        Args:
            in_flight: what a stage holds at once, as of stage 0.
            share: of the memory that it may fill.
        """
        key = in_flight, share
        if key not in self._kept:
            self._kept[key] = {size: self._with_memory(size, in_flight, share) for size in self.figures}
        return self._kept[key]

    def _with_memory(self, size: int, in_flight: InFlight, share: float) -> _Computed:
        """Return of every run seconds for a micro-batch, -1 where it does not fit, and what comes once a step."""
        limit = share * self.pieces.planner.limit_bytes
        seconds, tails, is_short = self._fitting(self._runs[size], size, in_flight, limit)
        if is_short and (runs := self._lean_runs(size, in_flight.most)) is not None:
            others, other_tails, _ = self._fitting(runs, size, in_flight, limit)
            totals = [s + t / self.count for s, t in ((seconds, tails), (others, other_tails))]
            is_other = totals[1] < totals[0]
            seconds, tails = np.where(is_other, others, seconds), np.where(is_other, other_tails, tails)
        seconds = np.where(np.isinf(seconds), -1.0, seconds)
        return cast("_Computed", np.stack([seconds, tails], axis=-1).tolist())

    def _fitting(self, runs: Figures, size: int, in_flight: InFlight, limit: float) -> tuple[Figures, Figures, bool]:
        """Return seconds of every run, infinite where it does not fit, and tails; and whether memory is short."""
        forward_s, backward_s, tail_s, resident, saved, transient, params = np.moveaxis(runs, -1, 0)
        received = np.broadcast_to(np.array(self.crossing, dtype=np.float64)[:, None] / size, saved.shape)
        saved = saved + received

        def held(waiting: Figures) -> Figures:
            return in_flight.held_bytes([resident + transient], [params], [waiting], [saved])

        seconds = np.where(held(saved) <= limit, forward_s + backward_s, np.inf)
        is_short = bool(np.isinf(seconds).any())
        if is_short and self.kind.is_synchronous:  # kinds in cycles do not compute again
            again = np.where(held(received) <= limit, 2 * forward_s + backward_s, np.inf)
            seconds = np.minimum(seconds, again)
        return seconds, tail_s, is_short

    def _lean_runs(self, size: int, copies: int) -> Figures | None:
        """Return figures of the runs with splits that hold few bytes; None where there are no others."""
        mesh = self.pieces.mesh(0, size)
        if size == 1 or mesh is None:
            return None
        key = size, copies
        if key not in self._leaner:
            key_of = (None, None)
            choice = self.pieces.lean(self.graph, key_of, mesh, copies)
            table = self.pieces.searched(self.graph, key_of, mesh, quick=True)[0].table
            plain = without_redistribution(self.graph)
            self._leaner[key] = None if choice is None else self._runs_of(_figures(table, choice, plain))
        return self._leaner[key]

    def same_prices(self, other: "Chain") -> bool:
        """Return whether memory decides nothing in which the schedules of these chains differ: they are cut alike."""
        if ScheduleKind.INTERLEAVED in {self.kind, other.kind} or self.count != other.count:
            return False
        if self.kind.is_synchronous != other.kind.is_synchronous:
            return False
        pairs = [(b, k) for k in range(2, self._most_stages() + 1) for b in range(k)]
        return all(self._computed(self._in_flight(*x)) == other._computed(other._in_flight(*x)) for x in pairs)

    def _in_flight(self, behind: int, num_stages: int) -> InFlight:
        """Return what the stage with so many stages behind it holds, as of stage 0."""
        key = behind, num_stages
        if key not in self._flights:
            stage = num_stages - 1 - behind
            order = played(self.kind, num_stages, num_stages, self.count)[stage]
            self._flights[key] = replace(InFlight.of(self.kind, num_stages, order), stages=(0,))
        return self._flights[key]

    def _link_s(self, unit: int, before: int, size: int, virtual: int | None) -> float:
        """Return what a rank of a stage of so many devices sends or receives where a unit begins a stage.

        Each of the ``size`` ranks has its share, so the smaller one of two neighbouring stages is the slower one.

        Args:
            unit: that begins a stage.
            before: the last device of the stage in front of it.
            size: devices of the stage that sends or receives.
            virtual: stages of the interleaved schedule, where devices are stages, and positions come round again.
        """
        if not 0 < unit < self.num_units:
            return 0.0
        here = before + 1
        if virtual is not None:
            positions = virtual // VIRTUAL
            here, before = here % positions * size, before % positions * size
        return self.pieces.link_s(before, here, self.crossing[unit] // size)


def _interleaved_s(sum_s: float, slowest_s: float, num_microbatches: int) -> float:
    """Return the step of the interleaved schedule: a position does ``VIRTUAL`` stages of every micro-batch.

    Of equal stages, what Megatron-LM's bubble says: (P - 1) / ``VIRTUAL`` micro-batches of a position, for P of them.
    """
    return sum_s / VIRTUAL + (VIRTUAL * num_microbatches - 1) * slowest_s


TRANSIENT: Final = 5
"""The figure of which a run has the most of its layers, not the sum."""


def _figures(table: CostTable, choice: Sequence[int], plain: LayerGraph) -> Figures:
    """Return figures of every layer but redistribute layers.

    They are forward, backward and tail in seconds; bytes that are held whatever is in flight, bytes saved for backward,
    transient bytes, and bytes of a version of the parameters.
    """
    graph = table.space.graph
    bare = table.model.without_tail
    rows = np.zeros((len(plain.layers), 7))
    into = np.zeros((len(graph.layers), 2))
    for (i, j, _), edge in table.edges.items():
        into[j] += float(edge.forward_s[choice[i], choice[j]]), float(edge.backward_s[choice[i], choice[j]])
    for j, (layer, c) in enumerate(zip(graph.layers, choice, strict=True)):
        whole = table.layers[j][c]
        cost = bare(whole)
        at = plain.index[layer.id if layer.id in plain.index else layer.inputs[0]]
        gathers_s = table.model.gathers(cost).seconds
        sync_s = sum(table.model.sync(axes, b).seconds for axes, b in whole.sync.items()) - gathers_s
        memory = whole.memory
        rows[at, 0] += cost.forward_s + cost.blocking_forward.seconds + into[j, 0] + gathers_s / 2
        rows[at, 1] += cost.backward_s + cost.collect_s + cost.blocking_backward.seconds + into[j, 1] + gathers_s / 2
        rows[at, 2] += whole.update_s + whole.collect_s - cost.collect_s + sync_s
        rows[at, 3] += memory.resident - memory.activations
        rows[at, 4] += memory.activations
        rows[at, TRANSIENT] = max(rows[at, TRANSIENT], memory.transient)
        rows[at, 6] += memory.parameters
    return rows


def _entering(plain: LayerGraph, pieces: Pieces) -> list[int]:
    """Return for every layer the bytes that enter a stage that begins with it."""
    last_reader = {layer.id: i for i, layer in enumerate(plain.layers)}
    for i, layer in enumerate(plain.layers):
        for producer in layer.inputs:
            last_reader[producer] = i
    changes = [0] * (len(plain.layers) + 1)
    for i, layer in enumerate(plain.layers):
        num_bytes = layer.output.numel * pieces.planner.settings.activation_dtype(layer.output.dtype).item_bytes
        changes[i + 1] += num_bytes
        changes[last_reader[layer.id] + 1] -= num_bytes
    return list(itertools.accumulate(changes))


def _joined(ends: list[int], seconds: Figures, entering: Sequence[int]) -> tuple[int, ...]:
    """Return fewer places to cut, where there are too many: one in each interval of compute, where fewest bytes cross.

    Args:
        ends: places, of layers, from 0 to their number.
        seconds: of every layer.
        entering: of every layer, the bytes that cross in front of it.
    """
    if len(ends) - 1 <= MAX_UNITS:
        return tuple(ends)
    passed = np.concatenate(([0.0], np.cumsum(seconds)))
    width = float(passed[-1]) / MAX_UNITS
    kept: dict[int, int] = {}
    for end in ends[1:-1]:
        mark = min(max(round(float(passed[end]) / width), 1), MAX_UNITS - 1)
        now, distance = kept.get(mark), abs(float(passed[end]) - mark * width)
        if now is None or (entering[end], distance) < (entering[now], abs(float(passed[now]) - mark * width)):
            kept[mark] = end
    return tuple(sorted({ends[0], ends[-1], *kept.values()}))
