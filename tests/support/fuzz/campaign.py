"""Many mutated files of one kind, one after the other, each with a limit on its time and all with one on memory."""

import hashlib
import resource
import signal
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import numpy as np

from support.fuzz.mutations import mutated
from support.fuzz.targets import Target

MOST_CPU_S = 10.0
"""Of one file: a good one takes milliseconds."""
MOST_GROWTH_MIB = 512
"""Of the process while all files are read."""
SHOWN_FAILURES = 5


class HangError(Exception):
    """An input took too long."""


@dataclass
class Counts:
    """What became of the files.

    Attributes:
        tried, accepted, refused: files.
        distinct: of the files tried.
        growth_mib: by which the most memory of the process grew.
        failures: what went wrong, with the file that did it.
    """

    tried: int = 0
    accepted: int = 0
    refused: int = 0
    distinct: int = 0
    growth_mib: float = 0.0
    failures: list[str] = field(default_factory=list)


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise ``HangError`` in the body when it has computed for so long; waiting for other processes does not count."""

    def ring(_number: int, _frame: FrameType | None) -> None:
        raise HangError(f"more than {seconds:g} s")

    before = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def campaign(target: Target, count: int, seed: int = 0, keep: Path | None = None) -> Counts:
    """Try so many mutated files of a kind.

    Args:
        target: the kind.
        count: of files.
        seed: of the mutations.
        keep: a folder for files that something is wrong with.
    """
    rng = np.random.default_rng(seed)
    good = target.good()
    counts, seen = Counts(), set()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"file{target.suffix}")
        for raw in good:
            assert target.is_accepted(raw, path), f"a good {target.name} is refused"
        start_mib = peak_mib()
        for number in range(count):
            raw = mutated(good, rng)
            seen.add(hashlib.blake2b(raw, digest_size=8).digest())
            try:
                with limited(MOST_CPU_S):
                    accepted = target.is_accepted(raw, path)
            except BaseException as error:  # whatever it is, it should not be
                if isinstance(error, KeyboardInterrupt):
                    raise
                counts.failures.append(_failure(target, number, raw, error, keep))
                if len(counts.failures) >= SHOWN_FAILURES:
                    break
                continue
            counts.accepted += accepted
            counts.refused += not accepted
        counts.tried, counts.distinct = number + 1 if count else 0, len(seen)
        counts.growth_mib = peak_mib() - start_mib
        if counts.growth_mib > MOST_GROWTH_MIB:
            counts.failures.append(f"memory grew from {start_mib:.0f} to {peak_mib():.0f} MiB")
    return counts


def peak_mib() -> float:
    """Return the most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _failure(target: Target, number: int, raw: bytes, error: BaseException, keep: Path | None) -> str:
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        keep.joinpath(f"{target.name.replace(' ', '-')}-{number}{target.suffix}").write_bytes(raw)
    last = "".join(traceback.format_exception(error)[-4:])
    return f"{target.name} number {number}, {len(raw)} bytes: {type(error).__name__}: {str(error)[:300]}\n{last}"
