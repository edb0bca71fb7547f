"""Every error that a user can meet.

::

    LayerwiseError               exit code
    ├── UsageError               2   unknown name, wrong argument, missing extra
    │   ├── UnknownNameError     2   a name that is not in a known list
    │   ├── FormatError          2   a file that does not follow its schema; lists every problem with its JSON path
    │   └── MismatchError        2   a plan that does not belong to this model, machine or number of ranks
    ├── TraceError               2   the model cannot be traced or has an operator without a rule
    ├── InfeasibleError          3   no strategy obeys the limits
    ├── NoPlanError              4   stopped before there was a plan
    └── RunError                 5   the run failed: a rank died, a timeout

Code 1 is a bug of ours, 6 is ``compare --fail-if-lost`` with a planned strategy that lost, 130 is Ctrl-C
(``plan`` still writes the best plan until then, if it has one).
A message says what was wrong with its value, where, and what to do next.
"""

import difflib
from collections.abc import Iterable, Sequence
from typing import ClassVar, Final

EXIT_INTERRUPTED: Final = 130
"""Of a command that Ctrl-C ended."""
MAX_LISTED: Final = 50
"""Names and problems that a message lists; the libraries of models know more than a thousand."""
_MAX_TEXT: Final = 1000
"""Characters of a name, path or sentence that a message repeats: files can hold any."""


class LayerwiseError(Exception):
    """Base of all errors that are the input's fault or the machine's, not ours."""

    exit_code: ClassVar[int] = 1


class UsageError(LayerwiseError):
    """The request itself is wrong."""

    exit_code = 2


class UnknownNameError(UsageError):
    """A name that is not known; says the closest known ones."""

    def __init__(self, kind: str, name: str, known: Iterable[str], hint: str = "") -> None:
        self.kind, self.name, self.known = kind, name, tuple(sorted(known))
        name = shortened(name)
        close = difflib.get_close_matches(name, self.known, n=3, cutoff=0.5)
        guess = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
        listing = f" Known: {', '.join(self.known)}." if not close and 0 < len(self.known) <= MAX_LISTED else ""
        super().__init__(f"unknown {kind} {name!r}.{guess}{listing}{' ' + hint if hint else ''}")


class FormatError(UsageError):
    """A file does not follow its schema.

    Args:
        what: the kind of file and its place, such as ``plan plan.json``.
        problems: pairs of JSON path and sentence, all that were found; the message has the first ones.
    """

    def __init__(self, what: str, problems: Sequence[tuple[str, str]]) -> None:
        self.what, self.problems = what, tuple(problems)
        lines = "".join(f"\n  {shortened(path)}: {shortened(text)}" for path, text in self.problems[:MAX_LISTED])
        more = len(self.problems) - MAX_LISTED
        super().__init__(f"{what} is not valid:{lines}" + (f"\n  and {more:,} more" if more > 0 else ""))


def shortened(text: str) -> str:
    """Return a text without its middle, where it is too long for a message."""
    half = _MAX_TEXT // 2
    return text if len(text) <= _MAX_TEXT else f"{text[:half]} … {text[-half:]}"


class MismatchError(UsageError):
    """Two valid things do not belong together."""


class TraceError(LayerwiseError):
    """The model cannot be traced, or contains an operator without a partition rule."""

    exit_code = 2


class InfeasibleError(LayerwiseError):
    """No strategy obeys the limits; says which layer or which limit, and what would help."""

    exit_code = 3


class NoPlanError(LayerwiseError):
    """The search was stopped before it had any plan."""

    exit_code = 4


class RunError(LayerwiseError):
    """A distributed run failed; names rank and layer or collective where known."""

    exit_code = 5
