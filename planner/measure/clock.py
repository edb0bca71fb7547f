"""Timing: warm-up, repeats, median and inter-quartile range; clocks of the host and of an accelerator."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from planner.units import MIB

MIN_REPEATS: Final = 5
MAX_REPEATS: Final = 30
ENOUGH_S: Final = 0.3
"""Beyond the fewest, repeats take about this long together."""
LONG_S: Final = 4.0
FEW_REPEATS: Final = 3
"""Are enough where more would take so long."""
_CACHE: Final = Path("/sys/devices/system/cpu/cpu0/cache")
_USUAL_CACHE_BYTES: Final = 32 * MIB


@dataclass(frozen=True, slots=True)
class Timing:
    """Repeated timings of the same thing, in seconds."""

    median_s: float
    iqr_s: float
    num_samples: int


def summarize(samples_s: list[float]) -> Timing:
    """Return median and inter-quartile range of at least two samples."""
    quartiles = statistics.quantiles(samples_s, n=4)
    return Timing(statistics.median(samples_s), quartiles[2] - quartiles[0], len(samples_s))


def synchronize(device: torch.device) -> None:
    """Wait until everything started on an accelerator has ended."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Alone:
    """This process times by itself; the base of those that time together with others."""

    def start(self) -> None:
        """Wait until every process is about to start what is timed."""

    def largest(self, seconds: float) -> float:
        """Return the largest value of all processes."""
        return seconds


def time_phases(phases: Callable[[], tuple[float, ...]], others: Alone) -> tuple[Timing, ...]:
    """Return timings of the phases that one call goes through and times itself.

    Args:
        phases: returns their seconds.
        others: that call the same phases; all do so equally often, for as long as the slowest needs.
    """
    start = time.perf_counter()
    phases()
    repeats = repeats_of(others.largest(time.perf_counter() - start))
    samples = [phases() for _ in range(repeats)]
    return tuple(summarize(list(phase)) for phase in zip(*samples, strict=True))


def repeats_of(seconds: float) -> int:
    """Return how often something is repeated that took so long to warm up."""
    if seconds * MIN_REPEATS > LONG_S:
        return max(FEW_REPEATS, min(MIN_REPEATS, int(LONG_S / seconds)))
    return max(MIN_REPEATS, min(MAX_REPEATS, int(ENOUGH_S / max(seconds, 1e-9))))


def time_call(call: Callable[[], object], device: torch.device) -> Timing:
    """Return the timing of a function without arguments."""

    def once() -> tuple[float]:
        return (elapsed(call, device),)

    return time_phases(once, Alone())[0]


def elapsed(call: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that a function takes on a device: by the device's own events on CUDA.

    Events are put into the stream behind whatever is running, so that a function whose kernels are started while
    that runs is not charged for being started: in a training step the host runs ahead as well.
    """
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    before.record()
    call()
    after.record()
    after.synchronize()
    milliseconds: float = before.elapsed_time(after)
    return milliseconds / 1000


class Evictor:
    """Puts other things into a device's caches, as the layers in between do in a training step.

    Args:
        device: whose caches.

    Attributes:
        num_bytes: that it reads and writes, twice the size of the last cache.
    """

    def __init__(self, device: torch.device) -> None:
        self._buffer = torch.zeros(2 * cache_bytes(device) // 4, device=device)
        self.num_bytes = self._buffer.nbytes

    def __call__(self) -> None:
        """Read and write as much."""
        self._buffer.add_(1.0)


def cache_bytes(device: torch.device) -> int:
    """Return the size of the last cache: of an accelerator, or of a processor of this host (32 MiB if unknown)."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    found = [_parsed_size(path) for path in _CACHE.glob("index*/size")]
    return max((size for size in found if size), default=_USUAL_CACHE_BYTES)


def _parsed_size(path: Path) -> int:
    text = path.read_text().strip()
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    return int(text[:-1]) * units[text[-1]] if text[-1:] in units and text[:-1].isdigit() else 0
