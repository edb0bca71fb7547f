"""Errors of collectives and messages whose peer is gone."""

import threading

from planner.errors import RunError

_seen = threading.Event()


def peer_failed(rank: int, what: str, error: Exception) -> RunError:
    """Return the error of a collective or message that failed.

    Args:
        rank: this one, of the job.
        what: was done, such as ``exchange of conv1``: collective, and layer or parameters.
        error: torch's.
    """
    _seen.set()
    return RunError(f"rank {rank}: {what} failed: {error}. If a peer died or hangs, see its own message.")


def has_failed() -> bool:
    """Return whether a collective of this process has failed: its job cannot go on."""
    return _seen.is_set()
