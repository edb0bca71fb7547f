"""Sizes are bounded before they are used: large files are refused within seconds, in a process with limited memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

from support.command_line import ROOT

SCALES_MIB = (2.5, 100) if os.environ.get("LAYERWISE_FULL") else (0.1,)
"""2.5: lists with as many values as are read at all; 100: what is refused before that."""


def test_files_that_are_too_large_or_too_deep_are_refused_without_much_memory_or_time(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run(
        [sys.executable, "-m", "support.fuzz.large", str(tmp_path), *map(str, SCALES_MIB)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) > 25 * len(SCALES_MIB)
    assert [row for row in rows if row["ended"] != "refused"] == []
