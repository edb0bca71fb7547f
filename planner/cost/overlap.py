"""Streams that run at once: what a device computes or waits for, and reductions behind it.

A fluid model: whatever runs at the same time shares what it shares evenly, until one of it ends.

- A reduction starts when it is posted and no earlier one uses a level of the machine that it uses:
  one communication stream per level, in the order of posting.
- Behind computation a reduction takes ``loaded_s``, and the computation is delayed by ``lost_s``
  (both measured; on accelerators as on their own).
- A transfer that the device waits for shares the links of its levels with the reduction that runs
  there: each has half.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from planner.cost.transfer import Reduction

LEAST_SHARE = 0.1
"""Of its speed that computation keeps, however many reductions run behind it."""


@dataclass(frozen=True, slots=True)
class Event:
    """Something that took time on a stream."""

    name: str
    stream: str
    start_s: float
    stop_s: float


@dataclass(slots=True)
class _Running:
    name: str
    reduction: Reduction
    start_s: float | None = None
    left: float = 1.0
    """Share of it that is still to do."""


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
    _posted: list[_Running] = field(default_factory=list)
    _running: list[_Running] = field(default_factory=list)
    _events: list[Event] = field(default_factory=list)

    def compute(self, name: str, seconds: float) -> None:
        """Compute for so long, longer where reductions take from it."""
        self._advance(name, "compute", seconds, _compute_share, lambda r: r.loaded_s)

    def transfer(self, name: str, seconds: float, levels: int) -> None:
        """Wait for a transfer that takes so long where nothing else uses its levels."""

        def share(running: list[_Running]) -> float:
            return 1 / (1 + sum(1 for r in running if r.reduction.levels & levels))

        self._advance(name, "transfer", seconds, share, lambda r: r.seconds * (2 if r.levels & levels else 1))

    def start(self, name: str, reduction: Reduction) -> None:
        """Post a reduction."""
        self._posted.append(_Running(name, reduction))
        self._admit()

    def finish(self) -> None:
        """Wait for all reductions."""
        while self._running:
            seconds = min(r.left * r.reduction.seconds for r in self._running)
            self._pass(seconds, lambda r: r.seconds)

    def events(self) -> tuple[Event, ...]:
        """Return what happened, in order of the start."""
        return tuple(sorted(self._events, key=lambda e: (e.start_s, e.stop_s, e.name)))

    def _advance(
        self,
        name: str,
        stream: str,
        seconds: float,
        share: Callable[[list[_Running]], float],
        duration_s: Callable[[Reduction], float],
    ) -> None:
        start_s = self.now_s
        while self._running and seconds > 0:
            own = share(self._running)
            passed_s = min(seconds / own, *(r.left * duration_s(r.reduction) for r in self._running))
            seconds -= passed_s * own
            self._pass(passed_s, duration_s)
        self.now_s += max(seconds, 0.0)
        if self.keeps_events and self.now_s > start_s:
            self._events.append(Event(name, stream, start_s, self.now_s))

    def _pass(self, seconds: float, duration_s: Callable[[Reduction], float]) -> None:
        """Let time pass for the device and all running reductions."""
        self.now_s += seconds
        ended = False
        for running in self._running:
            whole_s = duration_s(running.reduction)
            running.left = running.left - seconds / whole_s if whole_s else 0.0
            if running.left <= 1e-12:
                ended = True
                if self.keeps_events:
                    assert running.start_s is not None
                    self._events.append(Event(running.name, self._stream(running), running.start_s, self.now_s))
        if ended:
            self._running = [r for r in self._running if r.left > 1e-12]
            self._admit()

    def _stream(self, running: _Running) -> str:
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


def _compute_share(running: list[_Running]) -> float:
    lost = sum(r.reduction.lost_s / r.reduction.loaded_s for r in running if r.reduction.loaded_s)
    return max(1 - lost, LEAST_SHARE)
