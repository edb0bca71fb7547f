"""Timing a function: warm-up, repeats, median and inter-quartile range."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch

MIN_REPEATS: Final = 5
MAX_REPEATS: Final = 30
ENOUGH_S: Final = 0.15
"""Repeats stop once they have taken this long and there are enough of them."""


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


def time_phases(phases: Callable[[], tuple[float, ...]]) -> tuple[Timing, ...]:
    """Return timings of the phases that one call goes through and times itself."""
    phases()
    samples: list[tuple[float, ...]] = []
    start = time.perf_counter()
    while len(samples) < MIN_REPEATS or (len(samples) < MAX_REPEATS and time.perf_counter() - start < ENOUGH_S):
        samples.append(phases())
    return tuple(summarize(list(phase)) for phase in zip(*samples, strict=True))


def time_call(call: Callable[[], object], device: torch.device) -> Timing:
    """Return the timing of a function without arguments."""

    def once() -> tuple[float]:
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        return (time.perf_counter() - start,)

    return time_phases(once)[0]
