"""Where pipelines pay, measured: a pipeline that the planner picks by itself, the best plan of one stage, DDP.

    sudo python -m examples.benchmarks.pipelines_measured [--networks resnet50 ...] [--rate 200mbit]

makes two hosts joined by a link of that rate, measures cores, link and layers, plans with ``--stages auto``, then
trains in all ways side by side, a step of each after the other, and appends to a CSV file. Where a network has batch
norm, all ways take the statistics of a part of the batch: of a micro-batch, or of a rank's samples. ``--show`` prints
the file. Needs root and iproute2, and a machine that has nothing else to do.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from examples.benchmarks.contenders import DDP, UNDISTURBED
from examples.benchmarks.on_hosts import (
    Case,
    iqr,
    one_device,
    plan_with,
    planner_on_hosts,
    raced,
    ratio,
    ratio_interval,
)
from examples.benchmarks.rows import read_rows, write_rows
from planner.errors import LayerwiseError
from planner.plan import Plan
from planner.report import pipelines

OUTPUT: Final = Path(__file__).with_suffix(".csv")
AUTO, ONE_STAGE, GPIPE = "planned, stages auto", "planned, one stage", "GPipe"
_OPTIONS: Final = {"sync_batch_norm": False, "all_devices": False}
CASES: Final = {
    "resnet50": Case("resnet50", 32, (3, 64, 64), options=_OPTIONS),
    "resnet50-112": Case("resnet50", 32, (3, 112, 112), options=_OPTIONS),
    "vgg16": Case("vgg16", 16, (3, 64, 64), options=_OPTIONS),
    "resnet18": Case("resnet18", 32, (3, 64, 64), options=_OPTIONS),
}
MICROBATCHES: Final = (4,)
"""Sizes of batches whose layers are timed beside the whole one; half of each is timed, too."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One way to train a network over a link.

    Attributes:
        predicted_s: of a plan; 0 for others.
        stages: devices of every stage.
        median_s, iqr_s: of a step on the slowest rank.
        times_planned, low, high: by which factor ``AUTO`` is faster: the median ratio and its 95 % interval.
    """

    network: str
    batch: int
    image: str
    rate: str
    way: str
    schedule: str
    microbatches: int
    stages: str
    predicted_s: float
    median_s: float
    iqr_s: float
    times_planned: float
    low: float
    high: float
    rounds: int

    @property
    def cell(self) -> tuple[str, str]:
        """The network and the link."""
        return self.network, self.rate


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--rate", default="200mbit", help="of the link, per direction")
    parser.add_argument("--rounds", type=int, default=11, help="of steps, at most")
    parser.add_argument("--budget", type=float, default=60.0, metavar="SECONDS", help="for the rounds of a network")
    parser.add_argument("--show", action="store_true", help="print the table of the file, measure nothing")
    parser.add_argument("-o", "--output", type=Path, default=OUTPUT, help="CSV file")
    arguments = parser.parse_args()
    rows = read_rows(arguments.output, Row)
    try:
        for network in [] if arguments.show else arguments.networks:
            found = measured(network, arguments.rate, arguments.rounds, arguments.budget)
            rows = [row for row in rows if row.cell != found[0].cell] + found
            write_rows(arguments.output, rows, Row)
    except LayerwiseError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for line in lines(rows):
        print(line)
    return 0


def measured(network: str, rate: str, rounds: int, budget_s: float) -> list[Row]:
    """Plan and train a network; return a row for each way."""
    case, start = CASES[network], time.perf_counter()
    with planner_on_hosts(case, rate, microbatches=MICROBATCHES) as (planner, hosts):
        layered = time.perf_counter()
        plans = {
            AUTO: plan_with(planner, stages="auto"),
            ONE_STAGE: plan_with(planner, all_devices=True),
            GPIPE: plan_with(planner, stages=2, schedule="gpipe"),
        }
        alone_s = plan_with(planner, mesh=one_device(planner)).totals.step_s
        ready = time.perf_counter()
        samples = raced(
            plans, hosts, "examples.benchmarks.contenders:race", contenders=[DDP, UNDISTURBED], compute_only=[],
            warmup=1, rounds=rounds, seconds=budget_s,
        )  # fmt: skip
    spent = layered - start, ready - layered, time.perf_counter() - ready
    print(f"{network}: layers {spent[0]:.0f} s, planning {spent[1]:.0f} s, steps {spent[2]:.0f} s", file=sys.stderr)
    if plans[AUTO].is_pipelined:
        print(*pipelines.sentences(plans[AUTO]), sep="\n", file=sys.stderr)
    predicted = {name: plan.totals.step_s for name, plan in plans.items()} | {UNDISTURBED: alone_s}
    return [_row(network, rate, way, plans.get(way), predicted.get(way, 0.0), samples) for way in samples]


def _row(
    network: str, rate: str, way: str, plan: Plan | None, predicted_s: float, samples: dict[str, list[float]]
) -> Row:
    case, mine = CASES[network], samples[way]
    low, high = ratio_interval(mine, samples[AUTO])
    schedule, count = (plan.schedule.kind, plan.schedule.num_microbatches) if plan else ("", 1)
    stages = "+".join(str(len(stage.mesh.ranks)) for stage in plan.stages) if plan else ""
    return Row(
        network, case.batch, case.size, rate, way, schedule, count, stages, predicted_s, statistics.median(mine),
        iqr(mine), ratio(mine, samples[AUTO]), low, high, len(mine),
    )  # fmt: skip


def lines(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the table: seconds of a step, and by which factor the pipeline is faster."""
    yield (
        f"{'network':14}{'rate':9}{'way':24}{'schedule':16}{'stages':8}{'predicted':>10}{'median':>10}{'off':>7}"
        f"{'iqr':>9}{'/ auto':>8}  95 %"
    )
    for row in rows:
        predicted = f"{row.predicted_s:8.3f} s" if row.predicted_s else f"{'':10}"
        off = f"{row.predicted_s / row.median_s - 1:+7.0%}" if row.predicted_s else f"{'':7}"
        schedule = f"{row.schedule} x{row.microbatches}" if row.schedule else ""
        yield (
            f"{row.network:14}{row.rate:9}{row.way:24}{schedule:16}{row.stages:8}{predicted}{row.median_s:8.3f} s{off}"
            f"{row.iqr_s:7.3f} s{row.times_planned:8.2f}  {row.low:.2f} to {row.high:.2f}, {row.rounds} rounds"
        )


if __name__ == "__main__":
    raise SystemExit(main())
