"""PipeDream's partitioner [PipeDream19]: stages, each on several devices, the slowest as fast as can be.

A^k(i..j, m) is the time per mini-batch of the slowest stage when m groups of level k run layers i..j, a group being all
devices of level k - 1; T^k(i..j, m) is that of one stage on m groups:

    A^0(i..j)    = sum of the measured times
    T^k(i..j, m) = 1/m max( A^(k-1)(i..j, m_(k-1)),  2 (m - 1) sum |w| / B_k )
    A^k(i..j, m) = min( T^k(i..j, m),  min over s, p of max( A^k(i..s, m - p),  2 a_s / B_k,  T^k(s+1..j, p) ) )

with |w| the bytes of the weights, a_s those of the activations that stage i..s sends, B_k the bandwidth of a link of
level k. One level is the flat form. The minimum is exact: every choice of cuts and replicas is covered.

The released planner computes something else, ``SyncTerm.RELEASED``:

    T(i..j, m) = 1/m ( A(i..j) + 4 (m - 1) sum |w| / (B m) )

that is, the reduction follows the computation instead of hiding behind it, and moves 4 (m - 1) / m of the weights.
A stage but the first is charged for what it receives and for what it sends, both divided by its replicas. Where a
stage is the first of its interval, its reduction is further divided by the groups of the level inside. On one level
this gives the released planner's plans (``layerwise reproduce pipedream``).

**Deviations.** Cuts are down-sets of the layer graph, and all that crosses one counts (``states_of``); the paper's
formula is that of a chain (``chain_of``). Of equal choices one stage counts before several, then the earlier cut, then
fewer replicas behind it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
import numpy.typing as npt

from planner.errors import UsageError
from planner.search.published.pipedream_states import States

_Numbers = npt.NDArray[np.float64]
_Whole = npt.NDArray[np.int32]


class SyncTerm(Enum):
    """How the reduction of the gradients of a stage on several groups counts; see above."""

    PRINTED = "printed"
    RELEASED = "released"


@dataclass(frozen=True, slots=True)
class Level:
    """A level of the machine.

    Attributes:
        size: groups of the level inside, or devices.
        bandwidth_bytes_per_s: of the links between them.
    """

    size: int
    bandwidth_bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage.

    Attributes:
        start, end: states; its layers are in the second and not in the first.
        replicas: devices, each of which works on other mini-batches.
    """

    start: int
    end: int
    replicas: int


@dataclass(frozen=True, slots=True)
class Partition:
    """A partition, and its time by the partitioner's own model.

    Attributes:
        stages: in order.
        bottleneck_s: per mini-batch, of the slowest stage or transfer.
        data_parallel_s: per mini-batch, with all layers on every device.
    """

    stages: tuple[Stage, ...]
    bottleneck_s: float
    data_parallel_s: float

    @property
    def text(self) -> str:
        """Replicas of each stage, as ``15-1``; a single number is data parallelism."""
        return "-".join(str(stage.replicas) for stage in self.stages)

    @property
    def speed_up(self) -> float:
        """Over data parallelism, by the partitioner's own model."""
        return self.data_parallel_s / self.bottleneck_s

    @property
    def in_flight(self) -> int:
        """Mini-batches that each replica of the first stage has under way: NOAM.

        The devices over the replicas of the first stage, rounded up.
        """
        return -(-sum(stage.replicas for stage in self.stages) // self.stages[0].replicas)


def partition(states: States, levels: Sequence[Level], sync: SyncTerm = SyncTerm.PRINTED) -> Partition:
    """Return the partition whose slowest stage takes the least time; every device is used.

    Args:
        states: where the network may be cut, with times and bytes of one mini-batch on one device.
        levels: of the machine, innermost first; one is the flat form.
        sync: how the reduction of gradients counts.

    Raises:
        UsageError: there is no level, or one without devices or bandwidth.
    """
    if not levels or any(level.size < 1 or not level.bandwidth_bytes_per_s > 0 for level in levels):
        raise UsageError("PipeDream's partitioner needs at least one level, each with devices and a bandwidth above 0")
    inner_s = np.where(states.extends, states.compute_s[None, :] - states.compute_s[:, None], np.inf)
    within, tables = 1, []
    data_parallel_s = float(states.compute_s[-1])
    last = len(states.compute_s) - 1
    for number, level in enumerate(levels, 1):
        stage_s = _StageTimes(states, level, within, sync)
        starts = range(1 if number == len(levels) else last)
        tables.append(_Table.solved(states, level, inner_s, stage_s, starts))
        data_parallel_s = float(stage_s.first(np.array(data_parallel_s), states.weight_bytes[-1], level.size))
        inner_s = tables[-1].best_s[level.size - 1]
        within = level.size
    return Partition(tuple(_stages(tables, 0, last)), float(inner_s[0, last]), data_parallel_s)


@dataclass(frozen=True, slots=True)
class _StageTimes:
    """T^k and the transfers of a level."""

    states: States
    level: Level
    within: int
    sync: SyncTerm

    def first(self, inner_s: _Numbers, weight_bytes: _Numbers, m: int) -> _Numbers:
        """Return the time of the first stage of an interval on m groups, or of the only one."""
        return self._time(inner_s, weight_bytes, m, self.within)

    def later(self, inner_s: _Numbers, weight_bytes: _Numbers, m: int) -> _Numbers:
        """Return the time of any other stage on m groups."""
        return self._time(inner_s, weight_bytes, m, 1)

    def _time(self, inner_s: _Numbers, weight_bytes: _Numbers, m: int, within: int) -> _Numbers:
        bandwidth = self.level.bandwidth_bytes_per_s
        if self.sync is SyncTerm.PRINTED:
            return np.maximum(inner_s, 2 * (m - 1) * weight_bytes / bandwidth) / m
        return (inner_s + 4 * (m - 1) * weight_bytes / (bandwidth * m) / within) / m

    def received_s(self, m: int) -> _Numbers:
        """Return the seconds to send what crosses each state to a stage on m groups, and its gradient back."""
        share = m if self.sync is SyncTerm.RELEASED else 1
        return 2 * self.states.sent_bytes / (self.level.bandwidth_bytes_per_s * share)

    def sent_s(self, m: int) -> _Numbers:
        """Return the seconds that a stage on m groups is charged for what crosses the state at its end."""
        return self.received_s(m) if self.sync is SyncTerm.RELEASED else np.zeros_like(self.states.sent_bytes)


@dataclass(frozen=True, slots=True)
class _Table:
    """A^k of a level for every interval and number of groups, and how it is reached.

    Attributes:
        best_s: float64[m - 1, start, end]; infinite where there is no such interval.
        cut: of the last stage, the state that it begins with; -1 where there is one stage.
        groups: of the last stage.
    """

    best_s: _Numbers
    cut: _Whole
    groups: _Whole

    @classmethod
    def solved(cls, states: States, level: Level, inner_s: _Numbers, times: _StageTimes, starts: range) -> "_Table":
        weight_bytes = states.weight_bytes[None, :] - states.weight_bytes[:, None]
        sizes = range(1, level.size + 1)
        best_s = np.stack([times.first(inner_s, weight_bytes, m) for m in sizes])
        stage_s = [times.later(inner_s, weight_bytes, m) for m in sizes]
        cut, groups = np.full(best_s.shape, -1, np.int32), np.zeros(best_s.shape, np.int32)
        groups += np.arange(1, level.size + 1, dtype=np.int32)[:, None, None]
        for m in sizes[1:]:
            last = range(1, m)  # groups of the last stage
            received_s = np.stack([times.received_s(p) for p in last], axis=1)
            ends_s = np.stack([np.maximum(stage_s[p - 1], times.sent_s(p)) for p in last], axis=1)
            for i in starts:
                before_s = np.maximum(best_s[: m - 1, i][::-1].T, received_s)  # m - 1 groups, ..., 1 group
                candidates = np.maximum(before_s[:, :, None], ends_s).reshape(-1, best_s.shape[2])
                at = candidates.argmin(axis=0)
                least = np.take_along_axis(candidates, at[None], axis=0)[0]
                better = least < best_s[m - 1, i]
                best_s[m - 1, i, better] = least[better]
                cut[m - 1, i, better], groups[m - 1, i, better] = at[better] // (m - 1), at[better] % (m - 1) + 1
        return cls(best_s, cut, groups)

    def stages(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Yield the stages of an interval on all groups, the last one first: states and groups."""
        m, at = len(self.best_s), end
        while True:
            cut, groups = int(self.cut[m - 1, start, at]), int(self.groups[m - 1, start, at])
            if cut < 0:
                yield start, at, m
                return
            yield cut, at, groups
            m, at = m - groups, cut


def _stages(tables: Sequence[_Table], start: int, end: int) -> list[Stage]:
    """Return the stages of an interval on all devices of the outermost level given."""
    if not tables:
        return [Stage(start, end, 1)]
    found = []
    for i, j, groups in reversed(list(tables[-1].stages(start, end))):
        found += [Stage(inner.start, inner.end, groups * inner.replicas) for inner in _stages(tables[:-1], i, j)]
    return found
