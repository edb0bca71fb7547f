"""The first round: a network as a chain of units, between which cuts may lie, priced by adding up layers."""

import bisect
import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final, cast

import numpy as np
from numpy.typing import NDArray

from planner.api.pipelines.pieces import Pieces
from planner.cost.table import CostTable
from planner.errors import InfeasibleError, UsageError
from planner.ir.graph import LayerGraph
from planner.ir.mesh import Mesh
from planner.ir.schedule import ScheduleKind
from planner.ir.split import LayerId
from planner.ir.stages import legal_cuts, without_redistribution
from planner.search.stages import Cuts, Part, Seconds, StageSpace, best_cuts, cycle_s, step_s

Figures = NDArray[np.float64]

MAX_UNITS: Final = 40
"""Between which cuts may lie; of more, neighbours of little compute are joined."""
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
        figures: by number of devices, of every layer: forward, backward, tail, resident and saved bytes, transient.
        ends: of every unit, where its layers begin, and at last where they end.
        crossing: of every unit, bytes that enter it from the one before.
        work_s: of all devices for a micro-batch, at least: each layer on as many of them, and so split, as takes least.
    """

    pieces: Pieces
    kind: ScheduleKind
    count: int
    first: tuple[LayerId, ...]
    ends: tuple[int, ...]
    figures: dict[int, Figures]
    crossing: tuple[int, ...]
    work_s: float
    _kept: dict[int, dict[int, list[list[float]]]] = field(init=False, default_factory=dict, compare=False)

    @staticmethod
    def of(pieces: Pieces, kind: ScheduleKind, count: int) -> "Chain":
        """Return the chain of a network for a schedule and a number of micro-batches."""
        graph = pieces.traced(count).layers
        plain = without_redistribution(graph)
        figures = {}
        least: dict[int, Figures] = {}
        for size in _sizes(pieces):
            mesh = pieces.mesh(0, size)
            if mesh is not None:
                found = pieces.searched(graph, (None, None), mesh, quick=True)
                figures[size] = _figures(found[0].table, found[2][0].choice, plain)
                every = found[0].table.layers
                least[size] = np.array([min(c.forward_s + c.backward_s for c in costs) for costs in every])
        work_s = float(np.min([size * each for size, each in least.items()], axis=0).sum())
        cuts = [plain.index[cut] for cut in legal_cuts(graph)]
        ends = _joined([0, *cuts, len(plain.layers)], figures[1][:, 0] + figures[1][:, 1])
        last_reader = {layer.id: i for i, layer in enumerate(plain.layers)}
        for i, layer in enumerate(plain.layers):
            for producer in layer.inputs:
                last_reader[producer] = i
        settings = pieces.planner.settings
        crossing = tuple(
            sum(
                x.output.numel * settings.activation_dtype(x.output.dtype).item_bytes
                for x in plain.layers[:start]
                if last_reader[x.id] >= start
            )
            for start in ends[:-1]
        )
        first = tuple(plain.layers[start].id for start in ends[:-1])
        return Chain(pieces, kind, count, first, ends, figures, crossing, work_s)

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

        def price(part: Part, behind: int, _count: int) -> Seconds | None:
            first = part.first == 0
            if exact is not None and first and behind + 1 != exact:
                return None
            if first and behind == 0:
                return None  # not a pipeline
            return self._price(part, part.num_devices, behind, None)

        sizes = tuple(sorted(self.figures))
        cheapest: list[Cuts] = []
        failure: InfeasibleError | None = None
        for used in self._used(devices, exact or 2):
            space = StageSpace(self.num_units, used, sizes, most)
            try:
                cheapest += best_cuts(space, price, [self.count], count=CANDIDATES, objective=objective)
            except InfeasibleError as error:
                failure = error
        if failure is not None and not cheapest:
            raise failure
        return tuple(sorted(cheapest, key=lambda cuts: cuts.cost_s)[:CANDIDATES])

    def _used(self, devices: int, least: int) -> list[int]:
        """Return numbers of devices to use, the first of the machine: all, powers of two, and one for each stage."""
        if self.pieces.planner.options.all_devices:
            return [devices]
        return sorted({n for n in range(least, devices) if n & (n - 1) == 0} | {min(least, devices), devices})

    def _best_interleaved(self, positions: int, devices: int) -> tuple[Cuts, ...]:
        count = VIRTUAL * positions

        def price(part: Part, behind: int, _count: int) -> Seconds | None:
            return self._price(part, devices // positions, behind, count)

        space = StageSpace(self.num_units, count, (1,), count)
        return best_cuts(space, price, [self.count], objective=_interleaved_s)

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

    def _price(self, part: Part, size: int, behind: int, virtual: int | None) -> Seconds | None:
        if virtual is None and self.pieces.mesh(part.first_device, size) is None:
            return None
        compute_s = self._computed(self._in_flight(behind, virtual))[size][part.first][part.stop]
        if compute_s < 0:
            return None
        received_s = self._link_s(part.first, part.first_device - 1, size, virtual)
        sent_s = self._link_s(part.stop, part.stop_device - 1, size, virtual)
        tail_s = self._runs[size][part.first][part.stop][2] / self.count
        return Seconds(compute_s + received_s + sent_s + tail_s, max(compute_s, received_s, sent_s) + tail_s)

    @functools.cached_property
    def _runs(self) -> dict[int, list[list[list[float]]]]:
        """By number of devices, first unit and last unit + 1: what ``figures`` has of the layers of that run."""
        found = {}
        for size, rows in self.figures.items():
            runs = np.zeros((self.num_units, self.num_units + 1, rows.shape[1]))
            units = [rows[start:stop] for start, stop in itertools.pairwise(self.ends)]
            sums, most = np.array([unit.sum(axis=0) for unit in units]), np.array([unit.max(axis=0) for unit in units])
            for first in range(self.num_units):
                runs[first, first + 1 :] = np.cumsum(sums[first:], axis=0)
                runs[first, first + 1 :, 5] = np.maximum.accumulate(most[first:, 5])
            found[size] = runs.tolist()
        return found

    def _computed(self, in_flight: int) -> dict[int, list[list[float]]]:
        """Return forward and backward of the same runs, recomputing where memory is short; -1 where it does not help.

        Args:
            in_flight: micro-batches whose activations are held at once.
        """
        if in_flight not in self._kept:
            self._kept[in_flight] = {size: self._with_memory(size, in_flight) for size in self.figures}
        return self._kept[in_flight]

    def _with_memory(self, size: int, in_flight: int) -> list[list[float]]:
        forward_s, backward_s, _, resident, saved, transient = np.moveaxis(np.array(self._runs[size]), -1, 0)
        received = np.array(self.crossing)[:, None] / size
        limit = self.pieces.planner.limit_bytes
        again = resident + transient + in_flight * (saved + received) > limit
        never = resident + transient + in_flight * received + saved > limit
        seconds = np.where(again, 2 * forward_s, forward_s) + backward_s
        return cast("list[list[float]]", np.where(again & never, -1.0, seconds).tolist())

    def same_prices(self, other: "Chain") -> bool:
        """Return whether memory decides nothing in which the schedules of these chains differ: they are cut alike."""
        if ScheduleKind.INTERLEAVED in {self.kind, other.kind} or self.count != other.count:
            return False
        if self.kind.is_synchronous != other.kind.is_synchronous:
            return False
        most = range(self._most_stages())
        return all(self._computed(self._in_flight(b, None)) == other._computed(other._in_flight(b, None)) for b in most)

    def _in_flight(self, behind: int, virtual: int | None) -> int:
        if not self.kind.is_synchronous:
            return 2 * behind + 1
        if self.kind is ScheduleKind.GPIPE:
            return self.count
        return min(self.count, behind + 1 if virtual is None else virtual)

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


def _sizes(pieces: Pieces) -> list[int]:
    devices = len(pieces.planner.machine.graph.devices)
    inner = pieces.planner.machine.graph.levels[-1].size
    found = {n for n in range(1, devices) if n & (n - 1) == 0 or (n % inner == 0)}
    if devices <= 8:
        found = set(range(1, devices))
    return sorted(found)


def _figures(table: CostTable, choice: Sequence[int], plain: LayerGraph) -> Figures:
    """Return forward, backward, tail, resident, saved and transient of every layer but redistribute layers."""
    graph = table.space.graph
    rows = np.zeros((len(plain.layers), 6))
    into = np.zeros((len(graph.layers), 2))
    for (i, j, _), edge in table.edges.items():
        into[j] += float(edge.forward_s[choice[i], choice[j]]), float(edge.backward_s[choice[i], choice[j]])
    for j, (layer, c) in enumerate(zip(graph.layers, choice, strict=True)):
        cost = table.layers[j][c]
        at = plain.index[layer.id if layer.id in plain.index else layer.inputs[0]]
        sync_s = sum(table.model.sync(axes, b).seconds for axes, b in cost.sync.items())
        memory = cost.memory
        rows[at, 0] += cost.forward_s + cost.blocking_forward.seconds + into[j, 0]
        rows[at, 1] += cost.backward_s + cost.blocking_backward.seconds + into[j, 1]
        rows[at, 2] += cost.update_s + cost.collect_s + sync_s
        rows[at, 3] += memory.parameters + memory.gradients + memory.state
        rows[at, 4] += memory.activations
        rows[at, 5] = max(rows[at, 5], memory.transient)
    return rows


def _joined(ends: list[int], seconds: Figures) -> tuple[int, ...]:
    """Return fewer places to cut, where there are too many: about equally far apart in compute."""
    if len(ends) - 1 <= MAX_UNITS:
        return tuple(ends)
    passed = np.concatenate(([0.0], np.cumsum(seconds)))
    marks = [passed[end] for end in ends]
    wanted = np.linspace(0.0, marks[-1], MAX_UNITS + 1)[1:-1]
    kept = {ends[min(bisect.bisect_left(marks, w), len(ends) - 1)] for w in wanted}
    return tuple(sorted({ends[0], ends[-1], *kept}))
