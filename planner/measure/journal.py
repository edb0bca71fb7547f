"""What ranks that time the same layers write down as they go, and what their parent reads meanwhile.

Every rank appends a line for each layer to a file of its own, so nothing that was measured is lost when it is killed.
"""

import json
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from planner.measure.layers import slowest_of
from planner.profile.table import Measurement


class JournalWriter:
    """Appends measurements to the file of one rank.

    Args:
        folder: of all ranks' files.
        rank: whose file it is.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self._path = _path(folder, rank)

    def add(self, key: str, found: Measurement | None) -> None:
        """Append a layer; None: it has no kernel."""
        row = None if found is None else [
            found.forward_s, found.backward_data_s, found.backward_weight_s, found.iqr_s, found.num_repeats,
        ]  # fmt: skip
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([key, row]) + "\n")


class JournalReader:
    """Reads the files of all ranks while they are written.

    Args:
        folder: of the files.
        num_ranks: that write.
    """

    def __init__(self, folder: Path, num_ranks: int) -> None:
        self._paths = [_path(folder, rank) for rank in range(num_ranks)]
        self._places = [0] * num_ranks
        self._waiting: list[deque[tuple[str, list[float] | None]]] = [deque() for _ in range(num_ranks)]

    def new(self) -> Iterator[tuple[str, Measurement | None]]:
        """Yield the layers that every rank has timed since the last call, with the medians over the ranks."""
        for rank, path in enumerate(self._paths):
            self._waiting[rank].extend(self._lines(rank, path))
        while all(self._waiting):
            rows = [waiting.popleft() for waiting in self._waiting]
            times = [row for _, row in rows if row is not None]
            yield rows[0][0], slowest_of(times) if times else None

    def _lines(self, rank: int, path: Path) -> Iterator[tuple[str, list[float] | None]]:
        if not path.exists():
            return
        with path.open("rb") as file:
            file.seek(self._places[rank])
            for line in file:
                if not line.endswith(b"\n"):
                    return  # half a line: the next call reads it whole
                self._places[rank] += len(line)
                key, row = json.loads(line)
                yield key, row


def _path(folder: Path, rank: int) -> Path:
    return folder / f"layers-{rank}.jsonl"
