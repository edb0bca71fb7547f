"""Every command sets up logging; tests undo it."""

from collections.abc import Iterator

import pytest

from support.command_line import undo_logging


@pytest.fixture(autouse=True)
def _undo_logging() -> Iterator[None]:
    yield
    undo_logging()
