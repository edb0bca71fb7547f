"""Coverage-guided fuzzing of a loader: ``python -m support.fuzz.guided KIND SECONDS`` needs atheris.

libFuzzer mutates the good files towards code that has not run yet. What a loader raises beside ``LayerwiseError`` ends
it with a traceback and the exit code 77.
"""

import json
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["planner"]):
    from support.fuzz import targets
    from support.plans import document

MAX_BYTES = 20_000
MOST_S = 10
"""Of one input."""
MOST_MIB = 2048


def main(kind: str, seconds: int) -> None:
    target = targets.TARGETS[kind]
    with tempfile.TemporaryDirectory() as folder:
        corpus, path = Path(folder, "corpus"), Path(folder, f"file{target.suffix}")
        corpus.mkdir()
        good = [json.dumps(document()).encode()] if kind == "plan" else target.good()
        for number, raw in enumerate(good):
            corpus.joinpath(str(number)).write_bytes(raw)
        options = [
            f"-max_total_time={seconds}",
            f"-max_len={MAX_BYTES}",
            f"-timeout={MOST_S}",
            f"-rss_limit_mb={MOST_MIB}",
        ]
        atheris.Setup([sys.argv[0], *options, "-seed=1", str(corpus)], lambda raw: target.is_accepted(raw, path))
        atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
