"""When a search has to end: set once around it, looked at by all that takes long, however deep inside.

The clock decides only where a search is ended early; as long as it is not, nothing depends on it.
"""

import contextlib
import math
import time
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Final

from planner.errors import NoPlanError

_END_S: Final[ContextVar[float]] = ContextVar("deadline", default=math.inf)


class OutOfTimeError(NoPlanError):
    """The time limit ended a search; who called it may have a plan from before."""


@contextlib.contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Let ``look`` raise in the body from so many seconds on, or from an earlier deadline around this one."""
    token = _END_S.set(min(_END_S.get(), time.perf_counter() + seconds))
    try:
        yield
    finally:
        _END_S.reset(token)


def look() -> None:
    """Look at the clock; between two calls of a search lies little work.

    Raises:
        OutOfTimeError: the deadline has passed.
    """
    if time.perf_counter() > _END_S.get():
        raise OutOfTimeError("the time limit ended the search before there was a plan. Raise --time-limit.")


def left_s() -> float:
    """Return the seconds that are left; infinite without a deadline."""
    return max(_END_S.get() - time.perf_counter(), 0.0)
