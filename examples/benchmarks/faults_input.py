"""Cases of ``faults``: bad files and command lines, and searches that are stopped; by what ``tests/fuzz`` uses."""

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from examples.benchmarks.faults import Case, Tally
from planner.errors import UsageError

ROOT = Path(__file__).parents[2]
SEED = 20
REFUSED = "refused with its place, or it verifies; no traceback, hang or growth of memory"


def cases() -> Iterator[Case]:
    """Yield the cases."""
    sys.path.append(str(ROOT / "tests"))
    from support.fuzz.checkpoints import METADATA
    from support.fuzz.targets import TARGETS

    for target in (*TARGETS.values(), METADATA):
        few, stated = (2000, 100_000) if target.name == "plan" else (300, 5_000)
        name = "mutated-" + re.sub(r"\W+", "-", target.name.lower())
        yield Case(name, f"mutated file: {target.name}", REFUSED, few, stated, functools.partial(_mutated, target))
    yield Case(
        "large", "files of 100 MiB, deep, or with millions of values, each in turn",
        "refused within 30 s of CPU time and 3 GiB of address space", 1, 1, functools.partial(_large, 100),
    )  # fmt: skip
    yield Case(
        "command-lines", "random command line", "a documented exit code, no traceback", 60, 300, _command_lines
    )  # fmt: skip
    yield Case(
        "ctrl-c", "Ctrl-C at any moment of `layerwise plan`", "exit code 130; a whole plan or no file", 20, 40,
        _stopped,
    )  # fmt: skip
    yield Case(
        "guided", "loader under libFuzzer (atheris): inputs", "as mutated files", 10, 30, _guided
    )  # fmt: skip


def _mutated(target: object, count: int) -> Tally:
    from support.fuzz.campaign import campaign

    found = campaign(target, count, SEED)
    _say(found.failures)
    print(
        f"{target.name}: {found.accepted} accepted, {found.refused} refused, {found.distinct} distinct, "
        f"memory grew by {found.growth_mib:.0f} MiB", file=sys.stderr,
    )  # fmt: skip
    return Tally(found.tried, found.tried - len(found.failures), len(found.failures))


def _large(scale_mib: int, _count: int) -> Tally:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "support.fuzz.large", folder, str(scale_mib)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    _say([str(row) for row in rows if row["ended"] != "refused"])
    slowest, largest = max(row["cpu_s"] for row in rows), max(row["peak_mib"] for row in rows)
    print(f"large: at most {slowest:.1f} s and {largest:.0f} MiB", file=sys.stderr)
    return Tally.of([row["ended"] == "refused" for row in rows])


def _command_lines(count: int) -> Tally:
    from support.fuzz.lines import written, wrong

    with tempfile.TemporaryDirectory() as folder:
        found = list(wrong(count, written(Path(folder)), Path(folder)))
    _say(found)
    return Tally(count, count - len(found), len(found))


def _stopped(count: int) -> Tally:
    from support.fuzz.stops import stopped

    found = []
    for number in range(1, count + 1):
        with tempfile.TemporaryDirectory() as folder:
            found.append(stopped(Path(folder), number / count))
    _say([text for text in found if text])
    return Tally.of([not text for text in found])


def _guided(seconds: int) -> Tally:
    from support.fuzz.targets import TARGETS

    try:
        import atheris  # noqa: F401
    except ImportError as error:
        raise UsageError("atheris is not installed") from error
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    tried, failures = 0, []
    for kind in TARGETS:
        if kind == "partition":  # its good file takes a search
            continue
        command = [sys.executable, "-m", "support.fuzz.guided", kind, str(seconds)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        counted = re.findall(r"Done (\d+) runs|^#(\d+)\s", done.stderr, re.MULTILINE)
        tried += max((int(a or b) for a, b in counted), default=0)
        failures += [f"{kind}: {done.stderr[-2000:]}"] if done.returncode else []
    _say(failures)
    return Tally(tried, tried - len(failures), len(failures))


def _say(failures: list[str]) -> None:
    for text in failures:
        print(text, file=sys.stderr)
