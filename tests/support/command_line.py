"""``layerwise`` as a user meets it: in this process, or in one of its own."""

import io
import logging
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from planner.cli import terminal
from planner.cli.main import main

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Ran:
    """How a command ended. ``error`` is stderr in one line, without the box that typer draws."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        return " ".join(self.err.replace("│", " ").split())


def layerwise(*arguments: str | Path, stdin: str = "") -> Ran:
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        for name, stream in (("stdin", io.StringIO(stdin)), ("stdout", out), ("stderr", err)):
            patch.setattr(sys, name, stream)
        try:
            with pytest.raises(SystemExit) as ended:
                main(list(map(str, arguments)))
        finally:
            undo_logging()
    assert isinstance(ended.value.code, int)
    return Ran(ended.value.code, out.getvalue(), err.getvalue())


def undo_logging() -> None:
    """Undo what every command sets up."""
    logging.getLogger().removeHandler(terminal._ON_STDERR)
    for package in ("planner", "runtime"):
        logging.getLogger(package).setLevel(logging.NOTSET)


def process(*arguments: str, hash_seed: str = "random") -> Ran:
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    return Ran(done.returncode, done.stdout, done.stderr)
