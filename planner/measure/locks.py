"""Files that several processes read, change and write."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from planner.errors import UsageError
from planner.ir.canonical import target_of


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let no other process that calls this for the same file be in the body; it waits.

    The lock is on a file beside it, as the file itself is replaced when it is written; beside the file that a link
    leads to, so that those who come by another name wait too. The system lets go of it when its process ends, however
    that happens.

    Raises:
        UsageError: the folder is missing or not writable.
    """
    target = target_of(path)
    lock = target.with_name(f".{target.name}.lock")
    while True:
        try:
            file = os.fdopen(os.open(lock, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o666), "wb")
        except OSError as error:
            raise UsageError(f"cannot write beside {str(path)!r}: {error.strerror}") from error
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_still(lock, file.fileno()):  # who held it has removed it
                continue
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
            return


def _is_still(lock: Path, number: int) -> bool:
    """Return whether an open file is the one that others would open now."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(lock.stat(), os.fstat(number))
    return False
