"""The scripts ``layerwise`` and ``plan``: commands take a second to be imported, in which Ctrl-C may come too."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from planner.errors import EXIT_INTERRUPTED


def main() -> None:
    """Run ``layerwise``."""
    with _interrupted_in_a_line():
        from planner.cli.main import main

        main()


def plan() -> None:
    """Run ``plan``, which is ``layerwise plan``."""
    with _interrupted_in_a_line():
        from planner.cli.main import plan

        plan()


@contextmanager
def _interrupted_in_a_line() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
