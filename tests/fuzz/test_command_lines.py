"""Random command lines, in this process: each ends with a documented code, and never with a traceback."""

from pathlib import Path

import numpy as np

from support.fuzz.lines import commands, line, written, wrong

COUNT = 8
"""A sample of what ``python -m examples.benchmarks.faults --full`` tries."""


def test_random_command_lines_end_with_a_documented_code(tmp_path: Path) -> None:
    found = list(wrong(COUNT, written(tmp_path), tmp_path))
    assert not found, "\n".join(found)


def test_every_command_is_tried() -> None:
    rng = np.random.default_rng(0)
    tried = [" ".join(line(rng, [])) + " " for _ in range(1000)]
    assert [name for name in commands() if not any(text.startswith(f"{name} ") for text in tried)] == []
