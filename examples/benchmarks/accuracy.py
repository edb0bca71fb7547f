"""Predicted against measured step times: four networks, three link rates, four strategies, two hosts.

    sudo python -m examples.benchmarks.accuracy -o examples/benchmarks/accuracy.csv

For every network the pieces of its layers are timed first, on both hosts at once; for every rate the
link. Then the strategies are planned and trained, a step of each after the other. Writes a row for
each network, rate and strategy, and prints the table with the median absolute error and the rank
correlation of the strategies for each network and rate. `--only vgg16@1gbit` does a part; rows of the
file that are not measured again stay. Needs root and iproute2; takes about 20 minutes on 2 cores, which
should have nothing else to do.
"""

import argparse
import csv
import dataclasses
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from scipy.stats import rankdata, spearmanr

from examples.benchmarks.on_hosts import Case, iqr, plan_with, planner_on_hosts, raced
from planner.errors import LayerwiseError

RATES = ("200mbit", "1gbit", "10gbit")
STRATEGIES = ("data", "model", "conv-data-fc-model", "planned")
WARMUP = 1
ROUNDS = {"200mbit": 3, "1gbit": 5, "10gbit": 7}
TIE = 0.03
"""Steps that differ by less than this share count as equally fast: a second run would swap them."""


CASES = {
    "alexnet": Case("alexnet", 16, (3, 224, 224)),
    "vgg16": Case("vgg16", 2, (3, 224, 224)),
    "resnet50": Case("resnet50", 8, (3, 112, 112)),
    "mobilenet_v2": Case("torchvision:mobilenet_v2", 16, (3, 112, 112)),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One strategy of one network at one rate; seconds of a step."""

    network: str
    batch: int
    image: str
    rate: str
    strategy: str
    predicted_s: float
    measured_s: float
    iqr_s: float
    rounds: int

    @property
    def error(self) -> float:
        """Prediction over measurement, less 1."""
        return self.predicted_s / self.measured_s - 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], metavar="NETWORK[@RATE]")
    parser.add_argument("-o", "--output", type=Path, help="CSV file")
    parser.add_argument("--show", action="store_true", help="print the table of the file, measure nothing")
    arguments = parser.parse_args()
    rows = {key_of(row): row for row in read(arguments.output)}
    try:
        if not arguments.show:
            for found in measured(wanted(arguments.only)):
                rows.update((key_of(row), row) for row in found)
                if arguments.output:
                    write(arguments.output, rows.values())
    except LayerwiseError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for line in lines(list(rows.values())):
        print(line)
    return 0


def wanted(only: Sequence[str]) -> dict[str, list[str]]:
    """Return the rates to measure by network."""
    pairs = [(network, rate) for network in CASES for rate in RATES]
    known = {*CASES, *(f"{network}@{rate}" for network, rate in pairs)}
    for name in only:
        if name not in known:
            raise SystemExit(f"error: unknown {name!r}; one of {', '.join(sorted(known))}")
    kept = [(n, r) for n, r in pairs if not only or n in only or f"{n}@{r}" in only]
    return {network: [r for n, r in kept if n == network] for network, _ in kept}


def measured(cases: Mapping[str, Sequence[str]]) -> Iterator[list[Row]]:
    for network, rates in cases.items():
        layers = None
        for rate in rates:
            start = time.perf_counter()
            with planner_on_hosts(CASES[network], rate, layers) as (planner, hosts):
                layers = planner.machine.profile.layers
                plans = {name: plan_with(planner, solver="auto" if name == "planned" else name) for name in STRATEGIES}
                first = {plan.digest: name for name, plan in reversed(plans.items())}  # equal plans run once
                unequal = {name: plans[name] for name in first.values()}
                samples = raced(unequal, hosts, rounds=ROUNDS[rate], warmup=WARMUP)
            found = [
                _row(network, rate, name, plan.totals.step_s, samples[first[plan.digest]])
                for name, plan in plans.items()
            ]
            print(f"{network} at {rate}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
            yield found


def _row(network: str, rate: str, strategy: str, predicted_s: float, samples_s: list[float]) -> Row:
    case = CASES[network]
    return Row(
        network, case.batch, case.size, rate, strategy, predicted_s,
        statistics.median(samples_s), iqr(samples_s), len(samples_s),
    )  # fmt: skip


def key_of(row: Row) -> tuple[str, str, str]:
    return row.network, row.rate, row.strategy


def read(path: Path | None) -> list[Row]:
    if path is None or not path.exists():
        return []
    kinds = {field.name: field.type for field in dataclasses.fields(Row)}
    with path.open(newline="") as file:
        return [Row(**{name: kinds[name](text) for name, text in line.items()}) for line in csv.DictReader(file)]


def write(path: Path, rows: Iterable[Row]) -> None:
    order = {key: i for i, key in enumerate((n, r, s) for n in CASES for r in RATES for s in STRATEGIES)}
    temporary = path.with_suffix(".part")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Row)], lineterminator="\n")
        writer.writeheader()
        for row in sorted(rows, key=lambda row: order[key_of(row)]):
            writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in dataclasses.asdict(row).items()})
    temporary.replace(path)


def lines(rows: list[Row]) -> Iterator[str]:
    """Yield the table, and how far predictions are off."""
    yield f"{'network':14}{'rate':9}{'strategy':20}{'predicted':>11}{'measured':>11}{'iqr':>9}{'off':>8}"
    correlations = []
    for network, rate in dict.fromkeys((row.network, row.rate) for row in rows):
        group = [row for row in rows if (row.network, row.rate) == (network, rate)]
        for row in group:
            yield (
                f"{network:14}{rate:9}{row.strategy:20}{row.predicted_s:9.3f} s{row.measured_s:9.3f} s"
                f"{row.iqr_s:7.3f} s{row.error:+8.1%}"
            )
        correlations.append(rank_correlation(group))
        yield f"{'':23}rank correlation {correlations[-1]:.2f}"
    if rows:
        off = statistics.median(abs(row.error) for row in rows)
        yield f"median absolute error {off:.1%} of {len(rows)} predictions"
        yield f"rank correlation: {min(correlations):.2f} at least, {statistics.median(correlations):.2f} median"


def rank_correlation(group: Sequence[Row]) -> float:
    """Return Spearman's correlation; steps that differ by less than ``TIE`` are equal. 1 where all are."""
    predicted = rankdata(_tied([row.predicted_s for row in group]))
    measured = rankdata(_tied([row.measured_s for row in group]))
    if len(set(predicted)) == 1 or len(set(measured)) == 1:
        return 1.0 if len(set(predicted)) == len(set(measured)) else 0.0
    return float(spearmanr(predicted, measured).statistic)


def _tied(seconds: Sequence[float]) -> list[float]:
    """Return the values with those that follow each other closely replaced by the first of them."""
    found = dict[float, float]()
    last = start = 0.0
    for value in sorted(seconds):
        if value > last * (1 + TIE):
            start = value
        found[value] = start
        last = value
    return [found[value] for value in seconds]


if __name__ == "__main__":
    raise SystemExit(main())
