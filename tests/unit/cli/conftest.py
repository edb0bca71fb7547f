"""Every command sets up logging; tests undo it."""

import logging
from collections.abc import Iterator

import pytest

from planner.cli import terminal


@pytest.fixture(autouse=True)
def _undo_logging() -> Iterator[None]:
    yield
    logging.getLogger().removeHandler(terminal._ON_STDERR)
    for package in ("planner", "runtime"):
        logging.getLogger(package).setLevel(logging.NOTSET)
