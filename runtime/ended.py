"""How a rank's process ended, and the error that this is where it failed."""

import signal
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from planner import errors
from planner.errors import LayerwiseError, RunError

_NUM_LINES: Final = 12  # of a failed rank's output in the message


@dataclass(frozen=True, slots=True)
class Ended:
    """What a process of ``runtime.worker`` left.

    Attributes:
        rank: of the process.
        code: its exit code; minus the signal that killed it.
        outcome: what it wrote, see ``runtime.worker``; empty where it did not come to that.
        output: the end of what it printed.
    """

    rank: int
    code: int
    outcome: Mapping[str, Any]
    output: str

    @property
    def has_failed(self) -> bool:
        """Whether there is no result."""
        return self.code != 0 or "result" not in self.outcome

    @property
    def failed_at_s(self) -> float:
        """When it failed by the clock of its machine; 0 if it died without a word."""
        return float(self.outcome.get("failed_at_s", 0.0))

    def error(self) -> LayerwiseError:
        """Return the class that the rank raised, or a ``RunError`` with the end of its output."""
        if "error" in self.outcome:
            return raised_on(self.rank, self.outcome)
        if self.code < 0:
            return RunError(self.describe(f"was killed by {signal.Signals(-self.code).name}"))
        return RunError(self.describe(f"exited with code {self.code}"))

    def describe(self, how: str) -> str:
        """Return a sentence about the rank and the end of its output."""
        tail = "".join(f"\n    {line}" for line in self.output.splitlines()[-_NUM_LINES:])
        return f"rank {self.rank} {how}" + (f"; the end of its output:{tail}" if tail else "")


def told(error: BaseException) -> dict[str, str]:
    """Return message and nearest class in ``planner.errors`` of our own errors, for other processes; else nothing."""
    if not isinstance(error, LayerwiseError):
        return {}
    name = next(c.__name__ for c in type(error).__mro__ if c.__module__ == errors.__name__)
    return {"error": name, "message": str(error)}


def raised_on(rank: int, told: Mapping[str, Any]) -> LayerwiseError:
    """Return the error that a rank told of: its class, without the attributes of that class."""
    kind: type[LayerwiseError] = getattr(errors, told["error"])
    return kind.__new__(kind, f"rank {rank}: {told['message']}")


def results_of(ranks: Sequence[Ended], late: Collection[int], timeout_s: float) -> list[Any]:
    """Return the results in the order of the ranks.

    Args:
        ranks: all of them.
        late: those that were still running when the others were done, one had failed, or time was up, and were stopped.
        timeout_s: that they had.

    Raises:
        LayerwiseError: of the rank that failed first; else of all that were late.
    """
    if failed := [rank for rank in ranks if rank.has_failed and rank.rank not in late]:
        raise min(failed, key=lambda rank: rank.failed_at_s).error()
    if late:
        how = f"was not done within {timeout_s:g} s and was stopped"
        raise RunError("\n".join(rank.describe(how) for rank in ranks if rank.rank in late))
    return [rank.outcome["result"] for rank in ranks]
