"""What keeps working: faults and bad inputs, how often each was tried, survived and lost.

    python -m examples.benchmarks.faults [--only NAME ...] [--full]

runs every case of ``cases()``, a few times each, or as often as is stated with ``--full``, and writes its row of a CSV
file when it is done; rows of other cases stay. ``--show`` prints the file. A case that needs root, or an extra that is
missing, is said and left out. Exits with 1 where something was lost.
"""

import argparse
import dataclasses
import datetime
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from examples.benchmarks.rows import read_rows, write_rows
from planner.errors import UsageError

OUTPUT: Final = Path(__file__).with_suffix(".csv")


class Tally(NamedTuple):
    """How often something was tried, and how that ended; the last two add up to the first."""

    tried: int
    survived: int
    lost: int

    @classmethod
    def of(cls, outcomes: Sequence[bool]) -> "Tally":
        """Count what survived."""
        return cls(len(outcomes), sum(outcomes), len(outcomes) - sum(outcomes))


@dataclasses.dataclass(frozen=True)
class Case:
    """A fault, or a kind of bad input.

    Attributes:
        name: for ``--only``.
        fault: what happens.
        promise: what has to come of it; else it counts as lost.
        few, stated: how often it is tried, without ``--full`` and with it.
        run: tries it so often. Says of everything that was lost, on stderr, what a developer needs.
    """

    name: str
    fault: str
    promise: str
    few: int
    stated: int
    run: Callable[[int], Tally]


@dataclasses.dataclass(frozen=True)
class Row:
    """What came of a case."""

    name: str
    fault: str
    promise: str
    tried: int
    survived: int
    lost: int
    seconds: float
    date: str


def cases() -> list[Case]:
    """Return all cases, in the order of the table; a module with more of them is named here."""
    from examples.benchmarks import fault_cases, faults_input  # here, as they take their classes from this module

    return [*fault_cases.CASES, *faults_input.cases()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of the cases")
    parser.add_argument("--full", action="store_true", help="as often as is stated")
    parser.add_argument("--show", action="store_true", help="print the file and run nothing")
    parser.add_argument("-o", "--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    if arguments.show:
        print(table(read_rows(arguments.output, Row)))
        return 0
    known = {case.name: case for case in cases()}
    if unknown := sorted(set(arguments.only or ()) - set(known)):
        print(f"error: no case {', '.join(unknown)}; there are {', '.join(known)}", file=sys.stderr)
        return UsageError.exit_code
    lost = 0
    for name in arguments.only or known:
        lost += _run(known[name], arguments.full, arguments.output, list(known))
    return int(lost > 0)


def _run(case: Case, full: bool, output: Path, order: Sequence[str]) -> int:
    """Run a case and write its row; return how often it lost."""
    start = time.perf_counter()
    try:
        tally = case.run(case.stated if full else case.few)
    except UsageError as error:
        print(f"{case.name}: left out: {error}", file=sys.stderr)
        return 0
    today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    row = Row(case.name, case.fault, case.promise, *tally, time.perf_counter() - start, today)
    kept = {each.name: each for each in read_rows(output, Row)} | {row.name: row}
    write_rows(output, sorted(kept.values(), key=lambda r: order.index(r.name) if r.name in order else -1), Row)
    print(table([row]), flush=True)
    return row.lost


def table(rows: Sequence[Row]) -> str:
    """Return rows as the README has them."""
    head = "| fault or input | what has to come of it | tried | survived | lost |\n|---|---|---|---|---|\n"
    return head + "\n".join(f"| {r.fault} | {r.promise} | {r.tried:,} | {r.survived:,} | {r.lost:,} |" for r in rows)


if __name__ == "__main__":
    raise SystemExit(main())
