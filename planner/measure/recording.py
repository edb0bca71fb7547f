"""A device profile in the making: a file that keeps what was measured, whatever happens to the measuring.

The file is written anew, whole and atomically, every few seconds. A later call with the same file goes on with what is
missing, on the same device with the same software only. Calls that write one file at the same time keep each other's
measurements. A fit in the file is dropped with the first new measurement: it would not be of all that the file has.
"""

import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import torch

from planner.errors import MismatchError
from planner.measure.host import cpu_name
from planner.measure.locks import locked
from planner.profile.file import ProfileFile, read_profile, with_measurements, write_profile
from planner.profile.table import Measurement

SAVE_EVERY_S: Final = 3.0
DIGITS: Final = 5
"""Of a time in the file."""
IDENTITY: Final = ("processor", "torch", "threads", "ranks_at_once")
"""What must not change between two calls that write one file."""


def environment(device: torch.device, threads: int, ranks_at_once: int, command: str) -> dict[str, str]:
    """Return what measurements of this moment depend on.

    Args:
        device: that is measured.
        threads: with which each process computes.
        ranks_at_once: processes that compute at the same time.
        command: that was typed.
    """
    on_cuda = device.type == "cuda"
    found = {
        "processor": torch.cuda.get_device_name(device) if on_cuda else cpu_name(),
        "torch": torch.__version__,
        "threads": str(threads),
        "ranks_at_once": str(ranks_at_once),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "command": command,
        "utc": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return found | ({"cuda": str(torch.version.cuda)} if on_cuda else {})


@dataclass
class Recording:
    """Measurements that go to a file as they come; a context that saves when it is left, however that happens.

    Attributes:
        path: of the file.
        device: name of what is measured.
        environment: of ``environment``.
        layers: everything found so far, by ``LocalLayer.key``. What else the file has stays in it.
        clock: seconds; for tests.
    """

    path: Path
    device: str
    environment: Mapping[str, str]
    layers: dict[str, Measurement] = field(default_factory=dict)
    clock: Callable[[], float] = time.monotonic
    _saved_s: float = 0.0
    _is_saved: bool = True

    @staticmethod
    def open(path: Path, device: str, environment: Mapping[str, str]) -> "Recording":
        """Return a recording that goes on where the file ends, if there is one.

        Raises:
            UsageError: the file cannot be read.
            FormatError: it is no device profile.
            MismatchError: it was measured on another device or with other software.
        """
        if not path.exists():
            return Recording(path, device, dict(environment))
        known = read_profile(path)
        return Recording(path, known.device, _joined(path, known, environment), dict(known.measurements()))

    def add(self, key: str, found: Measurement) -> None:
        """Keep a layer; the file is written when it is older than a few seconds."""
        self.layers[key] = _rounded(found)
        self._is_saved = False
        if self.clock() - self._saved_s >= SAVE_EVERY_S:
            self.save()

    def save(self) -> None:
        """Write the file, unless nothing is new.

        Raises:
            UsageError: it cannot be written.
            MismatchError: another process has written it meanwhile, on another device or with other software.
        """
        if self._is_saved:
            return
        with locked(self.path):
            known = read_profile(self.path) if self.path.exists() else None
            here = self.environment if known is None else _joined(self.path, known, self.environment)
            before = () if known is None else known.layers
            write_profile(self.path, with_measurements(self.device, here, before, self.layers))
        self._saved_s, self._is_saved = self.clock(), True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.save()


def _rounded(found: Measurement) -> Measurement:
    """Return the times as the file has them: with as many digits as they are worth."""
    forward_s, data_s, weight_s, iqr_s = (
        float(f"{s:.{DIGITS}g}") for s in (found.forward_s, found.backward_data_s, found.backward_weight_s, found.iqr_s)
    )
    return Measurement(forward_s, data_s, weight_s, iqr_s, found.num_repeats)


def _joined(path: Path, known: ProfileFile, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a file with measurements of this one too: the commands of both, and the first moment.

    Raises:
        MismatchError: they were measured on different devices or with different software.
    """
    for name in IDENTITY:
        mine, theirs = environment.get(name), known.environment.get(name)
        if mine != theirs:
            raise MismatchError(
                f"{path} was measured with {name} {theirs!r}, here it is {mine!r}: times of both cannot be in one "
                "file. Give another -o, or delete the file to measure everything anew."
            )
    both = [environments.get("command", "").split("; ") for environments in (known.environment, environment)]
    commands = dict.fromkeys(command for each in both for command in each if command)
    utc = known.environment.get("utc", environment.get("utc", ""))
    return {**environment, "command": "; ".join(commands), "utc": utc}
