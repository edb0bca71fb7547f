"""Planned training against the best of torch's own on two hosts: DDP, FSDP2, tensor parallelism with DDP.

    sudo python -m examples.benchmarks.rivals --models alexnet unet --rates 1gbit

plans every network on every link, then trains it in all ways side by side, a step of each after the other, and appends
to a CSV file; cells that the file has are not measured again unless ``--again`` is given. A ratio is the median of the
ratios of paired steps, with a 95 % bootstrap interval. Where a network has batch norm, DDP and FSDP2 take each rank's
own statistics, and so does ``planned``; ``planned, synchronised`` takes those of the global batch, as one device does.
``--show`` prints the table of the file. Needs root and iproute2, and a machine that has nothing else to do.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from examples.benchmarks.contenders import ALONE, DDP, FSDP, TP, UNDISTURBED
from examples.benchmarks.on_hosts import Case, iqr, plan_with, planner_on_hosts, raced, ratio, ratio_interval
from examples.benchmarks.rows import read_rows, write_rows
from planner.api import Planner, measure_layers
from planner.errors import LayerwiseError
from planner.ir import ops as ir
from planner.ir.dimension import Dimension
from planner.plan import Plan
from planner.space.enumerate import DEFAULT_DIMENSIONS
from runtime.namespaces import Hosts
from runtime.training import compute_only

OUTPUT = Path(__file__).with_suffix(".csv")
RATES = ("200mbit", "1gbit", "10gbit")
PLANNED = "planned"
SYNCHRONISED = "planned, synchronised"
RIVALS = (DDP, FSDP, TP)

CASES = {
    "alexnet": Case("alexnet", 8, (3, 224, 224)),
    "alexnet-16": Case("alexnet", 16, (3, 224, 224)),
    "vgg16": Case("vgg16", 4, (3, 64, 64), optimizer="sgd"),
    "wide-cnn": Case("examples.benchmarks.wide:wide_cnn", 32, (3, 32, 32)),
    "resnet50": Case("resnet50", 8, (3, 112, 112)),
    "mobilenet_v2": Case("torchvision:mobilenet_v2", 16, (3, 112, 112)),
    "unet": Case(
        "unet",
        1,
        (1, 512, 512),
        {"width": 0.25},
        options={"io": "local", "dimensions": DEFAULT_DIMENSIONS | {Dimension.HEIGHT}},
    ),
}
"""Images are small where a step would take long: seconds without a link are those of two processors."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One way to train a network over one link.

    Attributes:
        predicted_s: of a plan; 0 for others.
        median_s, iqr_s: of a step on the slowest rank.
        times_planned, low, high: by which factor the plan is faster: the median ratio and its 95 % interval.
    """

    network: str
    batch: int
    image: str
    rate: str
    way: str
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
    parser.add_argument("--models", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--rates", nargs="*", choices=RATES, default=list(RATES))
    parser.add_argument("--rounds", type=int, default=15, help="of steps, at most")
    parser.add_argument("--budget", type=float, default=60.0, metavar="SECONDS", help="for the rounds of a cell")
    parser.add_argument("--again", action="store_true", help="measure cells that the file has, too")
    parser.add_argument("--show", action="store_true", help="print the table of the file, measure nothing")
    parser.add_argument("-o", "--output", type=Path, default=OUTPUT, help="CSV file")
    arguments = parser.parse_args()
    rows = read_rows(arguments.output, Row)
    try:
        for network in [] if arguments.show else arguments.models:
            rates = [r for r in arguments.rates if arguments.again or (network, r) not in {row.cell for row in rows}]
            for found in measured(network, rates, arguments.rounds, arguments.budget):
                rows = [row for row in rows if row.cell != found[0].cell] + found
                write(arguments.output, rows)
    except LayerwiseError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for line in lines(rows):
        print(line)
    return 0


def measured(network: str, rates: Sequence[str], rounds: int, budget_s: float) -> Iterator[list[Row]]:
    """Measure a network over some links, and yield the rows of each."""
    case, layers = CASES[network], None
    for rate in rates:
        start = time.perf_counter()
        with planner_on_hosts(case, rate, layers) as (synchronised, hosts):
            planner = with_local_statistics(synchronised, hosts)
            layers = planner.machine.profile.layers
            plans = plans_of(planner)
            contenders = [*RIVALS] if case.batch > 1 else [ALONE, UNDISTURBED]
            samples = raced(
                plans, hosts, "examples.benchmarks.contenders:race", contenders=contenders, compute_only=[PLANNED],
                warmup=2, rounds=rounds, seconds=budget_s,
            )  # fmt: skip
        print(f"{network} at {rate}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
        for layer in plans[PLANNED].stages[0].layers:
            if layer.op in {"conv", "linear"}:
                splits = " ".join(f"{axis}={dimension}" for axis, dimension in layer.split.items())
                print(f"  {layer.id:24} {splits}", file=sys.stderr)
        yield [_row(network, rate, way, plans.get(way), samples) for way in samples]


def with_local_statistics(planner: Planner, hosts: Hosts) -> Planner:
    """Return the planner with times of layers whose batch norm takes each rank's own statistics, too."""
    own = dataclasses.replace(planner, options=dataclasses.replace(planner.options, sync_batch_norm=False))
    return dataclasses.replace(planner, machine=measure_layers(own, hosts).machine)


def plans_of(planner: Planner) -> dict[str, Plan]:
    """Return the plan that computes what its rivals do, and with batch norm also the one that equals one device."""
    operators = (part.op for layer in planner.traced.layers.layers for part in (layer, *layer.absorbed))
    if not any(isinstance(op, ir.BatchNorm) for op in operators):
        return {PLANNED: planner.plan()}
    return {PLANNED: plan_with(planner, sync_batch_norm=False), SYNCHRONISED: planner.plan()}


def _row(network: str, rate: str, way: str, plan: Plan | None, samples: dict[str, list[float]]) -> Row:
    case, mine = CASES[network], samples[way]
    low, high = ratio_interval(mine, samples[PLANNED])
    predicted = plan.totals.step_s if plan else 0.0
    return Row(
        network, case.batch, case.size, rate, way, predicted, statistics.median(mine), iqr(mine),
        ratio(mine, samples[PLANNED]), low, high, len(mine),
    )  # fmt: skip


def write(path: Path, rows: Iterable[Row]) -> None:
    """Write the rows, in the order of the tables."""
    networks, rates = list(CASES), list(RATES)
    write_rows(path, sorted(rows, key=lambda row: (networks.index(row.network), rates.index(row.rate))), Row)


def lines(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the table: seconds of a step, and by which factor the plan is faster."""
    yield f"{'network':14}{'rate':9}{'way':24}{'predicted':>10}{'median':>10}{'iqr':>9}{'/ planned':>11}  95 %"
    for row in rows:
        predicted = f"{row.predicted_s:8.3f} s" if row.predicted_s else f"{'':10}"
        yield (
            f"{row.network:14}{row.rate:9}{row.way:24}{predicted}{row.median_s:8.3f} s{row.iqr_s:7.3f} s"
            f"{row.times_planned:10.3f}  {row.low:.3f} to {row.high:.3f}, {row.rounds} rounds"
        )
    cells = {cell: {row.way: row for row in rows if row.cell == cell} for cell in dict.fromkeys(r.cell for r in rows)}
    trained = {cell: ways for cell, ways in cells.items() if DDP in ways}
    best = {cell: min((ways[w].times_planned, w) for w in RIVALS if w in ways) for cell, ways in trained.items()}
    yield f"planned more than 3 % slower than the best rival: {_listed(c for c, (r, _) in best.items() if r < 0.97)}"
    twice = [c for c, ways in trained.items() if min(ways[DDP].times_planned, ways[FSDP].times_planned) >= 2]
    yield f"at least 2 times faster than DDP and FSDP2: {_listed(twice)}"
    beaten = [c for c, ways in trained.items() if ways[TP].times_planned >= 1.1]
    yield f"at least 1.1 times faster than TP + DDP: {_listed(beaten)}"
    for cell, ways in cells.items():
        compute = ways[compute_only(PLANNED)].times_planned
        text = f"{cell[0]} at {cell[1]}: planned is {1 / compute:.2f} times its compute"
        if cell in best:
            text += f", {best[cell][0]:.2f} times as fast as {best[cell][1]}, {ways[DDP].times_planned:.2f} as DDP"
        if ALONE in ways:
            text += f", {ways[ALONE].times_planned:.2f} times as fast as one device"
            text += f", {ways[UNDISTURBED].times_planned:.2f} times where the other one is idle"
        if ALONE in ways and SYNCHRONISED in ways:
            text += f"; synchronised {ways[ALONE].times_planned / ways[SYNCHRONISED].times_planned:.2f} times"
        yield text


def _listed(cells: Iterable[tuple[str, str]]) -> str:
    return ", ".join(f"{network} at {rate}" for network, rate in cells) or "none"


if __name__ == "__main__":
    raise SystemExit(main())
