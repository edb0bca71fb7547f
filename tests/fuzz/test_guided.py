"""Loaders under libFuzzer, two minutes each; atheris is there for some versions of Python only."""

import os
import re
import subprocess
import sys

import pytest

from support.command_line import ROOT
from support.fuzz.targets import TARGETS

SECONDS = 120
KINDS = [kind for kind in TARGETS if kind != "partition"]
"""A good partition takes a search, with torch, which guides the fuzzer elsewhere."""


@pytest.mark.skipif(not os.environ.get("LAYERWISE_FULL"), reason="two minutes a kind of file: LAYERWISE_FULL=1")
@pytest.mark.parametrize("kind", KINDS)
def test_a_loader_holds_against_mutations_that_look_for_new_code(kind: str) -> None:
    pytest.importorskip("atheris")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [sys.executable, "-m", "support.fuzz.guided", kind, str(SECONDS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    runs = re.search(r"Done (\d+) runs", done.stderr)
    assert runs is not None
    assert int(runs[1]) > 10
