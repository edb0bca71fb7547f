"""Speed of training in cycles with stale weights on two processes of one core each, beside GPipe and 1F1B.

    python -m examples.benchmarks.stale_speed [--networks resnet56 resnet110]

measures this machine and the layers, plans, then trains ResNets of CIFAR size with batches of 32 in all ways side by
side, some steps of each after the other: on one process while the other one is idle, on both at the same time, each by
itself (twice the first over this is what two processes can gain on this machine at all, because they share caches and
memory), as a pipeline in cycles [Zhang & Abdelrahman 2021] with the cut of the planner and with the paper's, behind one
third of the layers, and in micro-batches with the planner's cut. Appends to a CSV file; ``--show`` prints it.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from examples.benchmarks.contenders import ALONE, UNDISTURBED
from examples.benchmarks.on_hosts import Case, iqr, one_device, plan_with, planner_of, raced, ratio, ratio_interval
from examples.benchmarks.rows import read_rows, write_rows
from planner.api import Planner
from planner.api.pipelines import pipeline_at
from planner.errors import LayerwiseError
from planner.ir.dimension import Dimension
from planner.ir.schedule import ScheduleKind
from planner.ir.stages import legal_cuts
from planner.plan import Plan

OUTPUT: Final = Path(__file__).with_suffix(".csv")
_OPTIONS: Final = {"sync_batch_norm": False, "all_devices": False, "dimensions": frozenset({Dimension.SAMPLE})}
CASES: Final = {name: Case(name, 32, (3, 32, 32), options=_OPTIONS) for name in ("resnet56", "resnet110")}
MICROBATCHES: Final = (8, 2)
"""Sizes of batches whose layers are timed beside the whole one, and half of each."""
STALE, STALE_THIRD = "stale", "stale, cut at 1/3"
GPIPE, ONE_F_ONE_B = "GPipe", "1F1B"
PUBLISHED: Final = {"resnet56": 1.65, "resnet110": 1.73}
"""[Zhang & Abdelrahman 2021, table 5]: of two GPUs over one, cut behind layers 19 and 37."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One way to train a network.

    Attributes:
        cut: the first layer of the second stage.
        predicted_s: of a plan's step; of one device too.
        median_s, iqr_s: of a step on the slowest process, a mean over some steps in a row.
        faster, low, high: by which factor it is faster than one process with the other one idle, in samples per second:
            the median ratio and its 95 % interval.
        published: the same factor in the paper.
    """

    network: str
    batch: int
    way: str
    microbatches: int
    cut: str
    predicted_s: float
    median_s: float
    iqr_s: float
    faster: float
    low: float
    high: float
    published: float
    rounds: int


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=9, help="at most")
    parser.add_argument("--steps", type=int, default=3, help="in a row, of each way in a round")
    parser.add_argument("--budget", type=float, default=90.0, metavar="SECONDS", help="for the rounds of a network")
    parser.add_argument("--show", action="store_true", help="print the table of the file, measure nothing")
    parser.add_argument("-o", "--output", type=Path, default=OUTPUT, help="CSV file")
    arguments = parser.parse_args()
    rows = read_rows(arguments.output, Row)
    try:
        for network in [] if arguments.show else arguments.networks:
            found = measured(network, arguments.rounds, arguments.steps, arguments.budget)
            rows = [row for row in rows if row.network != network] + found
            write_rows(arguments.output, rows, Row)
    except LayerwiseError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for line in lines(rows):
        print(line)
    return 0


def measured(network: str, rounds: int, steps: int, budget_s: float) -> list[Row]:
    """Plan and train a network; return a row for each way."""
    start = time.perf_counter()
    planner = planner_of(CASES[network], None, microbatches=MICROBATCHES)
    layered = time.perf_counter()
    plans = {
        STALE: plan_with(planner, stages=2, schedule="stale"),
        STALE_THIRD: cut_at_a_third(planner),
        GPIPE: plan_with(planner, stages=2, schedule="gpipe"),
        ONE_F_ONE_B: plan_with(planner, stages=2, schedule="1f1b"),
    }
    alone_s = plan_with(planner, mesh=one_device(planner)).totals.step_s
    ready = time.perf_counter()
    samples = raced(
        plans, None, "examples.benchmarks.contenders:race", contenders=[UNDISTURBED, ALONE], compute_only=[],
        warmup=3, rounds=rounds, steps=steps, seconds=budget_s,
    )  # fmt: skip
    spent = layered - start, ready - layered, time.perf_counter() - ready
    print(f"{network}: layers {spent[0]:.0f} s, planning {spent[1]:.0f} s, steps {spent[2]:.0f} s", file=sys.stderr)
    predicted = {name: plan.totals.step_s for name, plan in plans.items()} | {ALONE: alone_s}
    return [_row(network, way, plans.get(way), predicted.get(way, 0.0), samples) for way in samples]


def cut_at_a_third(planner: Planner) -> Plan:
    """Return the plan in cycles whose second stage begins behind the first of three groups of blocks, as published."""
    first = next(cut for cut in legal_cuts(planner.traced.layers) if cut.startswith("layer2"))
    return planner.plan_of_pipeline(pipeline_at(planner, ScheduleKind.STALE, [first]))


def _row(network: str, way: str, plan: Plan | None, predicted_s: float, samples: dict[str, list[float]]) -> Row:
    mine, batches = samples[way], 2 if way == ALONE else 1  # of both processes
    faster = batches * ratio(samples[UNDISTURBED], mine)
    low, high = (batches * x for x in ratio_interval(samples[UNDISTURBED], mine))
    count, cut = 1, ""
    if plan:
        count = plan.schedule.num_microbatches
        cut = next(x.id for x in plan.stages[1].layers if x.op not in {"receive", "redistribute"})
    published = PUBLISHED[network] if way == STALE_THIRD else 0.0
    return Row(
        network, CASES[network].batch, way, count, cut, predicted_s, statistics.median(mine), iqr(mine), faster, low,
        high, published, len(mine),
    )  # fmt: skip


def lines(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the table: seconds of a step, and the factors over one process."""
    yield (
        f"{'network':11}{'way':24}{'micro-batches':>13}  {'cut at':22}{'predicted':>10}{'median':>10}{'off':>7}"
        f"{'iqr':>9}{'faster':>8}{'paper':>7}  95 %"
    )
    for row in rows:
        predicted = f"{row.predicted_s:8.3f} s" if row.predicted_s else f"{'':10}"
        off = f"{row.predicted_s / row.median_s - 1:+7.0%}" if row.predicted_s else f"{'':7}"
        published = f"{row.published:6.2f}x" if row.published else f"{'':7}"
        yield (
            f"{row.network:11}{row.way:24}{row.microbatches:13}  {row.cut:22}{predicted}{row.median_s:8.3f} s{off}"
            f"{row.iqr_s:7.3f} s{row.faster:7.2f}x{published}  {row.low:.2f} to {row.high:.2f}, {row.rounds} rounds"
        )
    for network in dict.fromkeys(row.network for row in rows):
        ways = {row.way: row for row in rows if row.network == network}
        bound = ways[ALONE].faster
        yield (
            f"{network}: two trainings side by side are {bound:.2f} times one; stale reaches "
            f"{ways[STALE].faster / bound:.0%} of that, cut at 1/3 {ways[STALE_THIRD].faster / bound:.0%}, "
            f"GPipe {ways[GPIPE].faster / bound:.0%}, 1F1B {ways[ONE_F_ONE_B].faster / bound:.0%}"
        )
    off = [abs(row.predicted_s / row.median_s - 1) for row in rows if row.predicted_s and row.way != ALONE]
    if off:
        yield f"predictions of {len(off)} pipelines are off by {statistics.median(off):.0%} (median)"


if __name__ == "__main__":
    raise SystemExit(main())
