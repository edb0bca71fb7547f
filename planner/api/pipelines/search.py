"""The search over pipelines: where to cut, how many devices each stage gets, how many micro-batches, which schedule.

In two rounds. First, stages are priced by adding up layers: the whole network is searched once for each number of
devices that a stage may have and each micro-batch; a stage costs what its layers cost there (``chain.py``). The best
ways to cut by these prices are then searched stage by stage as networks of their own, and simulated in the order in
which the runtime will execute them. What the first round leaves out (transfers where stages begin, halos that hide) the
second one has.
"""

import itertools
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from planner.api.pipelines.chain import Chain
from planner.api.pipelines.pieces import Pieces
from planner.cost.pipeline import PipelineTimeline, StageLink, StageTimes, simulate_pipeline
from planner.cost.stages import Crossing, stage_link, stage_times
from planner.cost.table import CostTable, collector_paused
from planner.errors import InfeasibleError, UsageError
from planner.frontend.lower import TracedModel
from planner.ir.mesh import Mesh
from planner.ir.ops import BatchNorm, Receive, Send
from planner.ir.schedule import ScheduleKind
from planner.ir.split import LayerId
from planner.ir.stages import SENT, legal_cuts, stage_graphs
from planner.search.auto import Planned, Search
from planner.search.stages import Cuts

if TYPE_CHECKING:
    from planner.api.planning import Planner

MAX_MICROBATCHES: Final = 64
WHOLE_BATCH: Final = ScheduleKind.ONE_F_ONE_B, ScheduleKind.ZERO_BUBBLE
"""What is tried of the synchronous kinds with one micro-batch, where the others are 1F1B, or have more to send."""
REFINED: Final = 8
"""Ways to cut that are searched stage by stage, for every schedule."""


@dataclass(frozen=True)
class Stage:
    """One stage of a found pipeline.

    Attributes:
        search: of its layers on its mesh.
        planned: the splits.
        times: of a micro-batch.
    """

    search: Search
    planned: Planned
    times: StageTimes

    @property
    def table(self) -> CostTable:
        """The priced space of the stage."""
        return self.search.table


@dataclass(frozen=True)
class Pipeline:
    """A pipeline that was found.

    Attributes:
        kind: of the schedule.
        num_microbatches: of a batch.
        stages: first to last.
        links: between them.
        timeline: the simulated step.
        positions: the position of every stage.
        traced: the model at micro-batch size.
        lower_bound_s: no pipeline of this schedule that was searched for is faster.
        num_candidates: ways to cut that there are, as text.
    """

    kind: ScheduleKind
    num_microbatches: int
    stages: tuple[Stage, ...]
    links: tuple[StageLink, ...]
    timeline: PipelineTimeline
    positions: tuple[int, ...]
    traced: TracedModel
    lower_bound_s: float = 0.0
    num_candidates: str = ""

    @property
    def memory_bytes(self) -> int:
        """On the fullest device."""
        return max(self.timeline.memory_bytes)


def best_pipeline(planner: "Planner") -> Pipeline:
    """Return the fastest pipeline of what the planner's options allow.

    Raises:
        InfeasibleError: none fits in memory.
        UsageError: the options do not fit the batch or the network.
    """
    with collector_paused():
        return _Search(planner, Pieces(planner)).best()


def pipeline_at(planner: "Planner", kind: ScheduleKind, starts: Sequence[LayerId], count: int = 1) -> Pipeline:
    """Return the pipeline whose stages begin at given layers, on one device each, in order.

    Args:
        planner: of the network on a machine.
        kind: of the schedule, with one stage for every position.
        starts: the first layer of every stage but the first, of ``planner.ir.stages.legal_cuts``.
        count: of micro-batches.

    Raises:
        InfeasibleError: it does not fit in memory.
        UsageError: a stage cannot begin there, or there are fewer devices than stages.
    """
    pieces, num_stages = Pieces(planner), len(starts) + 1
    legal = legal_cuts(pieces.traced(count).layers)
    if list(starts) != sorted(set(starts) & set(legal), key=legal.index):
        raise UsageError(f"stages cannot begin at {', '.join(starts)}; possible, in order: {', '.join(legal)}")
    if num_stages > len(planner.machine.graph.devices):
        raise UsageError(f"{num_stages} stages need as many devices; {planner.machine.graph.name} has fewer")
    meshes = [mesh for s in range(num_stages) if (mesh := pieces.mesh(s, 1)) is not None]
    for found in _Search(planner, pieces).staged(kind, count, starts, meshes, num_stages):
        return replace(found, lower_bound_s=found.timeline.step_s, num_candidates="1")
    raise InfeasibleError("these stages do not fit in memory, also where activations are computed again")


_Candidate = tuple[float, ScheduleKind, int, Chain, Cuts]
"""A way to cut by its price, with its schedule, micro-batches and chain."""


def _in_turn(candidates: Sequence[_Candidate]) -> list[_Candidate]:
    """Return candidates by price, but the best for every schedule and number of micro-batches in front of all others.

    Prices of the first round leave out what grows with the number of micro-batches, such as waiting for messages.
    """
    ranked = sorted(candidates, key=lambda each: each[0])
    best = {(kind, count): i for i, (_, kind, count, _, _) in reversed(list(enumerate(ranked)))}
    first = set(best.values())
    return [ranked[i] for i in sorted(range(len(ranked)), key=lambda i: (i not in first, i))]


@dataclass
class _Search:
    planner: "Planner"
    pieces: Pieces
    _start: float = field(default_factory=time.perf_counter)

    def best(self) -> Pipeline:
        kinds, counts = self._kinds(), self._counts()
        candidates: list[_Candidate] = []
        bounds, num_ways = [], 0.0
        failure: InfeasibleError | None = None
        for count in counts if any(kind.is_synchronous for kind in kinds) else (1,):
            cut: list[tuple[Chain, tuple[Cuts, ...]]] = []
            for kind in kinds if count > 1 or len(kinds) == 1 else WHOLE_BATCH:
                if self._is_late() and candidates:
                    break
                try:
                    chain = cut[0][0].of_kind(kind) if cut else Chain.of(self.pieces, kind, count)
                    same = (ways for other, ways in cut if chain.same_prices(other))
                    found = next(same, None) or chain.best()
                except InfeasibleError as error:
                    failure = failure or error
                    continue
                cut.append((chain, found))
                candidates += [(cuts.cost_s, kind, count, chain, cuts) for cuts in found]
                bounds.append(chain.least_s)
                num_ways += chain.num_ways
        if not candidates:
            raise failure or InfeasibleError("no pipeline is possible: the network has no place to cut")
        refined: list[Pipeline] = []
        number = Counter[ScheduleKind]()
        for _, kind, count, chain, cuts in _in_turn(candidates):
            if self._is_late() and refined:
                break
            number[kind] += 1
            if number[kind] <= REFINED:
                refined += self._refined(kind, count, chain, cuts)
        if not refined:
            raise InfeasibleError(
                "no pipeline fits in memory, also where activations are computed again. Use more devices or a smaller "
                "batch, or raise --memory-limit."
            )
        fastest = min(refined, key=lambda each: each.timeline.step_s)
        return replace(fastest, lower_bound_s=min(bounds), num_candidates=f"{num_ways:.3g}")

    # ---- what is asked

    def _kinds(self) -> tuple[ScheduleKind, ...]:
        asked = self.planner.options.schedule
        if asked is not None:
            return (ScheduleKind(asked),)
        return (
            ScheduleKind.ONE_F_ONE_B, ScheduleKind.ZERO_BUBBLE, ScheduleKind.GPIPE, ScheduleKind.INTERLEAVED,
        )  # fmt: skip

    def _counts(self) -> tuple[int, ...]:
        """Return the numbers of micro-batches to try, most promising first."""
        batch, asked = self.planner.traced.layers.batch, self.planner.options.microbatches
        if asked is not None:
            if batch % asked:
                raise UsageError(f"--microbatches {asked} does not divide the batch of {batch}")
            return (asked,)
        if self.planner.options.stages == "auto" and self._normalises() and self.planner.options.sync_batch_norm:
            return (1,)  # statistics of micro-batches are not those of the batch, which the user asked for
        divisors = [n for n in range(1, min(batch, MAX_MICROBATCHES) + 1) if batch % n == 0]
        powers = [n for n in divisors if n & (n - 1) == 0]
        return tuple(powers if len(powers) > 1 else divisors[:6])

    def _normalises(self) -> bool:
        layers = self.planner.traced.layers.layers
        return any(isinstance(op, BatchNorm) for x in layers for op in (x.op, *(a.op for a in x.absorbed)))

    def _is_late(self) -> bool:
        return time.perf_counter() - self._start > self.planner.options.time_limit_s

    # ---- second round

    def _refined(self, kind: ScheduleKind, count: int, chain: Chain, cuts: Cuts) -> Iterator[Pipeline]:
        starts = [chain.first[part.first] for part in cuts.parts[1:]]
        return self.staged(kind, count, starts, chain.meshes_of(cuts), chain.num_positions(cuts))

    def staged(
        self, kind: ScheduleKind, count: int, starts: Sequence[LayerId], meshes: Sequence[Mesh], num_positions: int
    ) -> Iterator[Pipeline]:
        """Yield the pipeline of these stages, with recompute where it needs that; nothing where it does not fit."""
        traced = self.pieces.traced(count)
        graphs = stage_graphs(traced.layers, starts)
        keys = list(itertools.pairwise([None, *starts, None]))
        found = []
        for graph, key, mesh in zip(graphs, keys, meshes, strict=True):
            search, bare, options = self.pieces.searched(graph, key, mesh, quick=False)
            ways = [
                Stage(search, each, stage_times(search.table, each.choice, each.bucket_bytes, bare=bare))
                for each in options
            ]
            found.append(min(ways, key=lambda way: _work_s(way.times, count)))
        pipeline = pipeline_of(found, kind, count, num_positions, self.pieces, traced)
        while pipeline.memory_bytes > self.planner.limit_bytes:
            held = pipeline.timeline.memory_bytes
            short = [s for s, at in enumerate(pipeline.positions) if held[at] > self.planner.limit_bytes]
            left = [s for s in short if not found[s].times.recompute and found[s].times.saved_bytes > 0]
            if len({pipeline.positions[s] for s in left}) < len({pipeline.positions[s] for s in short}):
                return
            for s in {pipeline.positions[s]: s for s in reversed(left)}.values():  # the first of each position
                found[s] = replace(found[s], times=replace(found[s].times, recompute=True))
            pipeline = pipeline_of(found, kind, count, num_positions, self.pieces, traced)
        yield pipeline


def pipeline_of(
    stages: Sequence[Stage], kind: ScheduleKind, count: int, num_positions: int, pieces: Pieces, traced: TracedModel
) -> Pipeline:
    """Return stages as a pipeline, simulated.

    Args:
        stages: first to last.
        kind: of the schedule.
        count: of micro-batches.
        num_positions: groups of ranks, which hold stages in turn.
        pieces: of the network.
        traced: the model at micro-batch size.
    """
    links = [stage_link(_crossing(a, b), pieces.pricer) for a, b in itertools.pairwise(stages)]
    most = max((link.forward_bytes for link in links), default=0.0)
    timeline = simulate_pipeline(
        kind, [stage.times for stage in stages], links, count, num_positions=num_positions,
        cpu_s_per_byte=pieces.pricer.lost_s_per_byte(most),
    )  # fmt: skip
    positions = tuple(s % num_positions for s in range(len(stages)))
    return Pipeline(kind, count, tuple(stages), tuple(links), timeline, positions, traced)


def _work_s(times: StageTimes, count: int) -> float:
    """Return what a stage's ranks are busy in a step."""
    both_s = times.forward_s + times.backward_input_s + times.backward_weight_s
    return count * both_s + times.update_s + times.sync_s


def _crossing(sender: Stage, receiver: Stage) -> Iterator[Crossing]:
    here, there = sender.table, receiver.table
    ours, theirs = here.strategy(sender.planned.choice), there.strategy(receiver.planned.choice)
    settings = here.model.settings
    for layer in there.space.graph.layers:
        if isinstance(layer.op, Receive):
            sent = here.space.graph[LayerId(layer.id + SENT)]
            assert isinstance(sent.op, Send)
            yield Crossing(
                here.model.layouts(sent, ours[sent.id]).output, there.model.layouts(layer, theirs[layer.id]).output,
                settings.activation_dtype(layer.output.dtype).item_bytes, layer.op.has_gradient,
            )  # fmt: skip
