"""The search over pipelines: where to cut, how many devices each stage gets, how many micro-batches, which schedule.

In two rounds. First, stages are priced by adding up layers: the whole network is searched once for each number of
devices that a stage may have and each micro-batch; a stage costs what its layers cost there (``chain.py``). The best
ways to cut by these prices are then searched stage by stage as networks of their own, and simulated in the order in
which the runtime will execute them. What the first round leaves out (transfers where stages begin, halos that hide) the
second one has.
"""

import contextlib
import itertools
import logging
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from planner.api.pipelines.chain import Chain
from planner.api.pipelines.pieces import Key, Pieces
from planner.cost.pipeline import (
    InFlight,
    PipelineTimeline,
    StageLink,
    StageTimes,
    position_bytes,
    simulate_pipeline,
)
from planner.cost.sharding import ParameterSharding
from planner.cost.stages import Crossing, stage_link, stage_times
from planner.cost.table import CostTable, collector_paused
from planner.deadline import OutOfTimeError, deadline, look
from planner.errors import InfeasibleError, LayerwiseError, TraceError, UsageError
from planner.frontend.lower import TracedModel
from planner.ir.graph import Layer, LayerGraph
from planner.ir.mesh import Mesh
from planner.ir.ops import BatchNorm, Receive, Send
from planner.ir.schedule import ActionKind, ScheduleKind
from planner.ir.split import LayerId
from planner.ir.stages import SENT, legal_cuts, stage_graphs
from planner.search.problem import Choice
from planner.search.stages import Cuts

if TYPE_CHECKING:
    from planner.api.planning import Planner

_log = logging.getLogger(__name__)

PRICING: Final = 0.5
"""Of the time limit: what the first round may take."""
MAX_MICROBATCHES: Final = 64
WHOLE_BATCH: Final = ScheduleKind.ONE_F_ONE_B, ScheduleKind.ZERO_BUBBLE
"""What is tried of the synchronous kinds with one micro-batch, where the others are 1F1B, or have more to send."""
REFINED: Final = 8
"""Ways to cut that are searched stage by stage, for every schedule."""


@dataclass(frozen=True)
class Stage:
    """One stage of a found pipeline.

    Attributes:
        table: the priced space of its layers on its mesh.
        choice: the position of every layer's split.
        bucket_bytes: of its gradient reductions.
        times: of a micro-batch.
    """

    table: CostTable
    choice: Choice
    bucket_bytes: int
    times: StageTimes


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


def best_pipeline(planner: "Planner", time_limit_s: float | None = None) -> Pipeline:
    """Return the fastest pipeline of what the planner's options allow.

    The time limit ends the search once there is a pipeline; the first one is searched for however long that takes.

    Args:
        planner: of the network on a machine.
        time_limit_s: that of the options if left out.

    Raises:
        InfeasibleError: none fits in memory.
        UsageError: the options do not fit the batch or the network.
    """
    with collector_paused():
        limit_s = planner.options.time_limit_s if time_limit_s is None else time_limit_s
        return _Search(planner, Pieces(planner), limit_s).best()


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


def refuse_uneven(count: int, batch: int) -> None:
    """Check that a batch can be divided into so many micro-batches.

    Raises:
        UsageError: it cannot.
    """
    if count < 1 or batch % count:
        raise UsageError(f"--microbatches {count} does not divide the batch of {batch}")


_Part = tuple[LayerGraph, Key, Mesh]
"""A stage that is searched: its layers, what it is known by, and its devices."""
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
    limit_s: float = math.inf
    _start: float = field(default_factory=time.perf_counter)

    def best(self) -> Pipeline:
        kinds, counts = self._kinds(), self._counts()
        candidates: list[_Candidate] = []
        bounds, num_ways = [], 0.0
        failure: LayerwiseError | None = None
        for count in counts if any(kind.is_synchronous for kind in kinds) else (1,):
            _log.info("pricing stages for %d micro-batches", count)
            try:
                cut = self._cut(kinds, count, must_end=bool(candidates))
            except InfeasibleError as error:
                failure = failure or error
                continue
            except TraceError as error:
                if self.planner.options.microbatches is not None:
                    raise
                failure = failure or error  # a model that cannot take so few samples may take more
                continue
            for chain, found in cut:
                candidates += [(cuts.cost_s, chain.kind, count, chain, cuts) for cuts in found]
                bounds.append(chain.least_s)
                num_ways += chain.num_ways
        if not candidates:
            raise failure or InfeasibleError("no pipeline is possible: the network has no place to cut")
        refined = self._best_refined(candidates)
        if not refined:
            raise InfeasibleError(
                "no pipeline fits in memory, also with splits that hold less and where activations are computed again. "
                "Use more devices or a smaller batch, or raise --memory-limit."
            )
        fastest = min(refined, key=lambda each: each.timeline.step_s)
        return replace(fastest, lower_bound_s=min(bounds), num_candidates=f"{num_ways:.3g}")

    def _cut(
        self, kinds: Sequence[ScheduleKind], count: int, *, must_end: bool
    ) -> list[tuple[Chain, tuple[Cuts, ...]]]:
        """Return the best ways to cut for each schedule and a number of micro-batches.

        Args:
            kinds: of schedules.
            count: of micro-batches.
            must_end: there are other ways to cut, so that nothing new is begun when time is up.

        Raises:
            InfeasibleError: no schedule has any.
            TraceError: the model does not take so few samples.
        """
        cut: list[tuple[Chain, tuple[Cuts, ...]]] = []
        failure: InfeasibleError | None = None
        for kind in kinds if count > 1 or len(kinds) == 1 else [k for k in WHOLE_BATCH if k in kinds]:
            try:
                with self._until(PRICING * self.limit_s, ends=must_end or bool(cut)):
                    chain = cut[0][0].of_kind(kind) if cut else Chain.of(self.pieces, kind, count)
                    same = next((ways for other, ways in cut if chain.same_prices(other)), None)
                    cut.append((chain, same or chain.best()))
            except OutOfTimeError:
                if not cut and not must_end:
                    raise
                break
            except InfeasibleError as error:
                failure = failure or error
        if failure is not None and not cut:
            raise failure
        return cut

    def _best_refined(self, candidates: Sequence[_Candidate]) -> list[Pipeline]:
        """Return the promising ways to cut, searched stage by stage, those that fit in memory."""
        refined: list[Pipeline] = []
        number = Counter[ScheduleKind]()
        for _, kind, count, chain, cuts in _in_turn(candidates):
            number[kind] += 1
            if number[kind] > REFINED:
                continue
            _log.info("searching stages of %s, %d micro-batches", kind, count)
            try:
                with self._until(self.limit_s, ends=bool(refined)):
                    refined += self._refined(kind, count, chain, cuts)
            except OutOfTimeError:
                if not refined:
                    raise
                _log.warning("time limit: this is the best pipeline until then; a longer one may find better ones")
                break
        return refined

    # ---- what is asked

    def _kinds(self) -> tuple[ScheduleKind, ...]:
        asked = self.planner.options.schedule
        if asked is not None:
            return (ScheduleKind(asked),)
        every = ScheduleKind.ONE_F_ONE_B, ScheduleKind.ZERO_BUBBLE, ScheduleKind.GPIPE, ScheduleKind.INTERLEAVED
        is_sharded = self.planner.sharding is not ParameterSharding.NONE
        return tuple(kind for kind in every if not (is_sharded and kind.splits_backward))

    def _counts(self) -> tuple[int, ...]:
        """Return the numbers of micro-batches to try, most promising first."""
        batch, asked = self.planner.traced.layers.batch, self.planner.options.microbatches
        if asked is not None:
            refuse_uneven(asked, batch)
            if self._normalises_one(asked):
                raise UsageError(
                    f"--microbatches {asked} leaves a batch norm a single value of each channel, of which there are no "
                    "statistics; use fewer"
                )
            return (asked,)
        if self.planner.options.stages == "auto" and self._normalises() and self.planner.options.sync_batch_norm:
            return (1,)  # statistics of micro-batches are not those of the batch, which the user asked for
        every = range(1, min(batch, MAX_MICROBATCHES) + 1)
        divisors = [n for n in every if batch % n == 0 and (n == 1 or not self._normalises_one(n))]
        powers = [n for n in divisors if n & (n - 1) == 0]
        return tuple(powers if len(powers) > 1 else divisors[:6])

    def _normalises(self) -> bool:
        return next(self._norms(), None) is not None

    def _normalises_one(self, count: int) -> bool:
        """Return whether a batch norm has a single value of each channel in so many micro-batches."""
        return any(x.output.numel <= op.channels * count for x, op in self._norms())

    def _norms(self) -> Iterator[tuple[Layer, BatchNorm]]:
        for layer in self.planner.traced.layers.layers:
            every = layer.op, *(absorbed.op for absorbed in layer.absorbed)
            yield from ((layer, op) for op in every if isinstance(op, BatchNorm))

    @contextlib.contextmanager
    def _until(self, limit_s: float, *, ends: bool) -> Iterator[None]:
        """Let ``look`` end the body so many seconds after the search began, where it may end; else not.

        Raises:
            OutOfTimeError: it is later already.
        """
        if not ends:
            yield
            return
        with deadline(limit_s - (time.perf_counter() - self._start)):
            look()
            yield

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
        parts = list(zip(graphs, keys, meshes, strict=True))
        stages = [min(self._ways(part), key=lambda way: _work_s(way.times, count)) for part in parts]
        for in_flight in InFlight.by_position(kind, len(parts), num_positions, count):
            self._fit(stages, parts, in_flight, kind, count)
        pipeline = pipeline_of(stages, kind, count, num_positions, self.pieces, traced)
        if pipeline.memory_bytes <= self.planner.limit_bytes:
            yield pipeline

    def _ways(self, part: "_Part") -> list[Stage]:
        """Return a stage split in the ways that are fastest with and without what comes once a step."""
        search, bare, options = self.pieces.searched(*part, quick=False)
        return [_stage((search.table, bare), x.choice, x.bucket_bytes) for x in options]

    def _fit(
        self, stages: list[Stage], parts: Sequence["_Part"], in_flight: InFlight, kind: ScheduleKind, count: int
    ) -> None:
        """Change the stages of a position until it fits in memory, or none of them can hold less.

        A stage is changed to the fastest way with which the position fits: other splits, activations that are computed
        again, or both; where there is none, to that with the fewest bytes, and the next stage of the position is too.
        """
        for s in in_flight.stages:
            if position_bytes([x.times for x in stages], in_flight) <= self.planner.limit_bytes:
                return

            def total(way: Stage, s: int = s) -> int:
                return position_bytes([way.times if i == s else x.times for i, x in enumerate(stages)], in_flight)

            ways = [stages[s], *self._leaner(parts[s], in_flight.at(s), kind)]
            fitting = [way for way in ways if total(way) <= self.planner.limit_bytes]
            stages[s] = min(fitting, key=lambda x: _work_s(x.times, count)) if fitting else min(ways, key=total)

    def _leaner(self, part: "_Part", in_flight: InFlight, kind: ScheduleKind) -> Iterator[Stage]:
        """Yield ways to have a stage hold less."""
        search, bare, options = self.pieces.searched(*part, quick=False)
        for recompute in (False, True) if kind.is_synchronous else (False,):
            choices = {x.choice: x.bucket_bytes for x in options}
            if part[2].size > 1:
                choices |= {x.choice: x.bucket_bytes for x in self.pieces.within(*part, in_flight, recompute=recompute)}
                lean = self.pieces.lean(*part, in_flight.most)
                if lean is not None:
                    choices.setdefault(lean, options[0].bucket_bytes)
            for choice, bucket_bytes in choices.items():
                yield _stage((search.table, bare), choice, bucket_bytes, recompute=recompute)


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
    links = [stage_link(crossing(a, b), pieces.pricer) for a, b in itertools.pairwise(stages)]
    most = max((link.forward_bytes for link in links), default=0.0)
    timeline = simulate_pipeline(
        kind, [stage.times for stage in stages], links, count, num_positions=num_positions,
        cpu_s_per_byte=pieces.pricer.lost_s_per_byte(most),
    )  # fmt: skip
    positions = tuple(s % num_positions for s in range(len(stages)))
    return Pipeline(kind, count, tuple(stages), tuple(links), timeline, positions, traced)


def _stage(tables: tuple[CostTable, CostTable], choice: Choice, bucket_bytes: int, *, recompute: bool = False) -> Stage:
    """Return a stage with given splits, from its table and the same without the tail of a step."""
    table, bare = tables
    times = stage_times(table, choice, bucket_bytes, bare=bare, recompute=recompute)
    return Stage(table, choice, bucket_bytes, times)


def _work_s(times: StageTimes, count: int) -> float:
    """Return what a stage's ranks are busy in a step."""
    both_s = times.seconds(ActionKind.FORWARD) + times.seconds(ActionKind.BACKWARD)
    return count * both_s + times.update_s + times.sync_s


def crossing(sender: Stage, receiver: Stage) -> Iterator[Crossing]:
    """Yield the tensors that a stage sends to the next one."""
    here, there = sender.table, receiver.table
    ours, theirs = here.strategy(sender.choice), there.strategy(receiver.choice)
    settings = here.model.settings
    for layer in there.space.graph.layers:
        if isinstance(layer.op, Receive):
            sent = here.space.graph[LayerId(layer.id + SENT)]
            assert isinstance(sent.op, Send)
            yield Crossing(
                here.model.layouts(sent, ours[sent.id]).output, there.model.layouts(layer, theirs[layer.id]).output,
                settings.activation_dtype(layer.output.dtype).item_bytes, layer.op.has_gradient,
            )  # fmt: skip
