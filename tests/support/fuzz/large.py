"""Files that are too large, too deep, or have too much in them: ``python -m support.fuzz.large FOLDER MIB ...``.

Reads them in a process of its own, whose memory is limited: what needs more fails as ``MemoryError``. Prints a line of
JSON for each file: its name and size, how it ended, seconds of CPU time and the peak of the process until then.
"""

import json
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from support.fuzz.campaign import HangError, limited, peak_mib
from support.fuzz.targets import TARGETS, Target
from support.plans import document

ADDRESS_SPACE_BYTES = 3 * 2**30
"""Python and the libraries that loaders import have 0.7 GiB of it before anything is read."""
MOST_CPU_S = 30.0
MIB = 2**20


def files(scale: float) -> Iterator[tuple[str, str, bytes]]:
    """Yield name, kind and content of each file; ``scale`` in MiB."""
    plan = json.dumps(document())

    def filled(place: str, item: str, count: int) -> bytes:
        return plan.replace(place, place + f"{item}, " * count, 1).encode()

    many = int(scale * MIB)
    yield "only zeros", "plan", b"\0" * many
    yield "only spaces", "plan", b" " * many
    yield "one number", "plan", b"1" * many
    yield "one text", "plan", b'{"schema_version": "' + b"a" * many + b'"}'
    yield "one key", "plan", b'{"' + b"a" * many + b'": 1}'
    yield "lists in lists", "plan", b"[" * many
    yield "objects in objects", "plan", b'{"a":' * (many // 5)
    yield "empty lists", "plan", b"[" + b"[]," * (many // 3) + b"1]"
    yield "empty objects", "plan", b"[" + b"{}," * (many // 3) + b"1]"
    yield "keys", "plan", ("{" + ",".join(f'"{k}":1' for k in range(many // 12)) + "}").encode()
    for place in ('"stages": [', '"layers": [', '"ranks": [', '"baselines": [', '"inputs": [', '"shape": ['):
        yield f"{place} many numbers", "plan", filled(place, "1", many // 3)
        yield f"{place} many objects", "plan", filled(place, "{}", many // 4)
    yield "a mesh of 10^9", "plan", plan.replace('"size": 2', '"size": 1000000000').encode()
    yield "a shape of 10^18", "plan", plan.replace("[8, 64]", "[8, 2000000000, 2000000000, 2000000000]").encode()
    yield "cluster, many devices", "cluster", b'{"devices": [' + b"{}," * (many // 3) + b"{}]}"
    yield "profile, many layers", "device profile", b'{"layers": [' + b"{}," * (many // 3) + b"{}]}"
    yield "measured, many layers", "measured run", b'{"layers": [' + b"{}," * (many // 3) + b"{}]}"
    yield "partition, many links", "partition", b'{"links": [' + b"{}," * (many // 3) + b"{}]}"
    yield "table, many cells", "measurements, CSV", b"op,forward_ms\n" + b"conv,1\n" * min(many // 7, 200_000)
    yield "table, one line", "measurements, CSV", b"op," * (many // 3)
    yield "edges", "PipeDream profile", b"\tnode1 -- node2\n" * min(many // 16, 200_000)


def read(target: Target, raw: bytes, path: Path) -> str:
    """Return how reading a file ended: ``refused`` is what it should be."""
    path.write_bytes(raw)
    try:
        with limited(MOST_CPU_S):
            target.use(path)
    except (MemoryError, HangError) as error:
        return type(error).__name__
    except Exception as error:  # what is no refusal is a failure, whatever it is
        from planner.errors import LayerwiseError

        return "refused" if isinstance(error, LayerwiseError) else f"{type(error).__name__}: {error}"[:300]
    return "accepted"


def main(folder: Path, scales: Sequence[float], say: Callable[[str], None] = print) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE_BYTES, ADDRESS_SPACE_BYTES))
    for name, kind, raw in (file for scale in scales for file in files(scale)):
        target, start_s = TARGETS[kind], time.process_time()
        ended = read(target, raw, folder / f"file{target.suffix}")
        seconds = round(time.process_time() - start_s, 2)
        row = {"file": name, "mib": round(len(raw) / MIB, 1), "ended": ended, "cpu_s": seconds, "peak_mib": peak_mib()}
        say(json.dumps(row))


if __name__ == "__main__":
    main(Path(sys.argv[1]), [float(text) for text in sys.argv[2:]])
