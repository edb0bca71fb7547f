"""Streams that run at once: what a device computes or waits for, and reductions behind it.

A fluid model: whatever runs at the same time shares what it shares evenly, until one of it ends.

- A reduction starts when it is posted and no earlier one uses a level of the machine that it uses:
  one communication stream per level, in the order of posting.
- Behind computation a reduction takes ``loaded_s``, and the computation is delayed by ``lost_s``
  (both measured; on accelerators as on their own).
- A transfer that the device waits for shares the links of its levels with the reduction that runs
  there: each has half.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from planner.cost.transfer import Reduction

LEAST_SHARE = 0.1
"""Of its speed that computation keeps, however many reductions run behind it."""
LEAST_LEFT = 1e-12
"""Share of a reduction below which it has ended: what rounding may leave of it."""


@dataclass(frozen=True, slots=True)
class Event:
    """Something that took time on a stream."""

    name: str
    stream: str
    start_s: float
    stop_s: float


@dataclass(slots=True)
class Running:
    """A reduction that was posted."""

    name: str
    reduction: Reduction
    start_s: float | None = None
    left: float = 1.0
    """Share of it that is still to do."""


State = tuple[tuple[tuple[Reduction, float], ...], tuple[Reduction, ...]]
"""What runs, with the share of it that is still to do, and what waits, in the order of posting."""


@dataclass
class Streams:
    """The streams of one device in one step.

    Attributes:
        level_names: of the machine, in the order of their bits.
        keeps_events: note what happens.
        now_s: how far the device is.
    """

    level_names: tuple[str, ...]
    keeps_events: bool
    now_s: float = 0.0
    _posted: list[Running] = field(default_factory=list)
    _running: list[Running] = field(default_factory=list)
    _events: list[Event] = field(default_factory=list)
    _compute_share: float = 1.0
    """Of its speed that computation has behind what runs."""

    @property
    def is_idle(self) -> bool:
        """Whether no reduction runs, and so none waits."""
        return not self._running

    def compute(self, name: str, seconds: float) -> None:
        """Compute for so long, longer where reductions take from it."""
        start_s = self.now_s
        while self._running and seconds > 0:
            seconds = self._pass(seconds, self._compute_share, [r.reduction.loaded_s for r in self._running])
        self._end(name, "compute", start_s, seconds)

    def rest(self, until_s: float) -> None:
        """Do nothing until then, if that is later."""
        while self._running and self.now_s < until_s:
            self._pass(until_s - self.now_s, 1.0, [r.reduction.seconds for r in self._running])
        self.now_s = max(self.now_s, until_s)

    def transfer(self, name: str, seconds: float, levels: int) -> None:
        """Wait for a transfer that takes so long where nothing else uses its levels."""
        start_s = self.now_s
        while self._running and seconds > 0:
            factors = [2 if r.reduction.levels & levels else 1 for r in self._running]
            durations_s = [r.reduction.seconds * f for r, f in zip(self._running, factors, strict=True)]
            seconds = self._pass(seconds, 1 / (1 + factors.count(2)), durations_s)
        self._end(name, "transfer", start_s, seconds)

    def beside(self, name: str, seconds: float, levels: int) -> None:
        """Compute for so long, while a transfer that takes as long alone goes on; end with the later of both."""
        start_s, computing_s, sending_s = self.now_s, seconds, seconds
        while self._running and computing_s > 0 and sending_s > 0:
            factors = [2 if r.reduction.levels & levels else 1 for r in self._running]
            durations_s = [r.reduction.loaded_s * f for r, f in zip(self._running, factors, strict=True)]
            shares = self._compute_share, 1 / (1 + factors.count(2))
            whole_s = min(computing_s / shares[0], sending_s / shares[1])
            passed_s = whole_s - self._pass(whole_s, 1.0, durations_s)
            computing_s, sending_s = computing_s - passed_s * shares[0], sending_s - passed_s * shares[1]
        if self._running:  # one of both is done
            self.compute(name, max(computing_s, 0.0))
            self.transfer(name, max(sending_s, 0.0), levels)
        else:
            self._end(name, "compute", start_s, max(computing_s, sending_s))

    def start(self, name: str, reduction: Reduction) -> Running:
        """Post a reduction; return what ``wait`` takes."""
        posted = Running(name, reduction)
        self._posted.append(posted)
        self._admit()
        return posted

    def wait(self, posted: Running) -> None:
        """Wait for a reduction that was posted."""
        while posted.left > LEAST_LEFT:
            self._pass(math.inf, 1.0, [r.reduction.seconds for r in self._running])

    def finish(self) -> None:
        """Wait for all reductions."""
        while self._running:
            self._pass(math.inf, 1.0, [r.reduction.seconds for r in self._running])

    def events(self) -> tuple[Event, ...]:
        """Return what happened, in order of the start."""
        return tuple(sorted(self._events, key=lambda e: (e.start_s, e.stop_s, e.name)))

    def state(self) -> State:
        """Return what runs and what waits; it does not depend on when."""
        return tuple((r.reduction, r.left) for r in self._running), tuple(r.reduction for r in self._posted)

    def resume(self, now_s: float, state: State) -> None:
        """Go on from a state; events are not known any more."""
        running, posted = state
        self.now_s, self.keeps_events = now_s, False
        self._running = [Running("", reduction, None, left) for reduction, left in running]
        self._posted = [Running("", reduction) for reduction in posted]
        self._compute_share = _compute_share(self._running)

    def _end(self, name: str, stream: str, start_s: float, seconds: float) -> None:
        """Do the rest of something at full speed, with nothing behind it."""
        self.now_s += max(seconds, 0.0)
        if self.keeps_events and self.now_s > start_s:
            self._events.append(Event(name, stream, start_s, self.now_s))

    def _pass(self, seconds: float, share: float, durations_s: Sequence[float]) -> float:
        """Let time pass until so much work is done, at a share of its speed, or a reduction ends.

        Args:
            seconds: of work at full speed.
            share: that it has.
            durations_s: of every running reduction, whole, meanwhile.

        Returns:
            The seconds of work that are left.
        """
        passed_s = seconds / share
        for running, whole_s in zip(self._running, durations_s, strict=True):
            passed_s = min(passed_s, running.left * whole_s)
        self.now_s += passed_s
        ended = False
        for running, whole_s in zip(self._running, durations_s, strict=True):
            running.left = running.left - passed_s / whole_s if whole_s else 0.0
            if running.left <= LEAST_LEFT:
                ended = True
                if self.keeps_events:
                    assert running.start_s is not None
                    self._events.append(Event(running.name, self._stream(running), running.start_s, self.now_s))
        if ended:
            self._running = [r for r in self._running if r.left > LEAST_LEFT]
            self._admit()
        return seconds - passed_s * share

    def _stream(self, running: Running) -> str:
        used = [name for i, name in enumerate(self.level_names) if running.reduction.levels >> i & 1]
        return f"sync {'+'.join(used)}"

    def _admit(self) -> None:
        """Start what is posted and finds its levels free; none overtakes an earlier one that shares a level."""
        busy = 0
        for running in self._running:
            busy |= running.reduction.levels
        waiting = []
        for posted in self._posted:
            if posted.reduction.levels & busy:
                waiting.append(posted)
            else:
                posted.start_s = self.now_s
                self._running.append(posted)
            busy |= posted.reduction.levels
        self._posted = waiting
        self._compute_share = _compute_share(self._running)


def _compute_share(running: Sequence[Running]) -> float:
    lost = sum(r.reduction.lost_s / r.reduction.loaded_s for r in running if r.reduction.loaded_s)
    return max(1 - lost, LEAST_SHARE)
