"""Accuracy of variable batch on real images: linear layers updated once a batch, and in each of its turns.

    python -m examples.benchmarks.variable_accuracy -o examples/benchmarks/variable_accuracy.csv

Trains two convolutions and three linear layers on scikit-learn's digits on two ranks, with `runtime.variable_batch`
on the strategy conv-data-fc-model: batches of m images for the convolutions and of n for the linear layers, in m / n
turns of scheme (c). As in [OWT14] the learning rate is proportional to the batch, for the convolutions to m and for the
linear layers to n, momentum is 0.9, weight decay 0.0005, and the rate falls by 250^(-1/3) behind 25, 50 and 75 % of the
steps.
Start values and order of images depend on the seed only. Writes accuracy and cross-entropy of the test images for every
seed, and prints means, with the standard deviation over seeds. Some minutes on two cores.
"""

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional

from examples.benchmarks.rows import write_rows
from planner.api import Options, Origin, machine_of, prepare
from planner.models.digits import digits_alexnet
from planner.plan import Plan
from runtime import variable_batch
from runtime.data import own_samples
from runtime.demo import load_digits
from runtime.launch import Process, run_local

RANKS, WIDTH = 2, 0.25
BATCHES = ((32, 32), (64, 64), (64, 32), (128, 128), (128, 32), (256, 256), (256, 64), (256, 32))
RATE, OF_BATCH = 0.02, 32
"""The learning rate of a batch of so many images."""
EPOCHS, SEEDS = 20, 3
MOMENTUM, DECAY = 0.9, 5e-4
FALLS, FALL = (0.25, 0.5, 0.75), 250 ** (-1 / 3)


@dataclasses.dataclass(frozen=True)
class Row:
    """One training; of the test images."""

    m: int
    n: int
    seed: int
    epochs: int
    accuracy_percent: float
    cross_entropy: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("-o", "--output", type=Path, help="CSV file")
    arguments = parser.parse_args()
    cases = [
        {"m": m, "n": n, "seed": seed, "epochs": arguments.epochs, "plan": plan_for(m).to_json()}
        for m, n in BATCHES
        for seed in range(arguments.seeds)
    ]
    argument: Any = {"cases": cases}
    found, *_ = run_local("examples.benchmarks.variable_accuracy:train", argument, num_ranks=RANKS, timeout_s=3600)
    rows = [Row(**row) for row in found]
    if arguments.output:
        write_rows(arguments.output, rows, Row)
    for line in lines(rows):
        print(line)
    return 0


def plan_for(batch: int) -> Plan:
    """Return conv-data-fc-model for a batch."""
    machine, images = machine_of(devices=RANKS), torch.zeros(batch, 1, 8, 8)
    net = digits_alexnet(WIDTH)
    planner = prepare(net, (images,), machine, Options(all_devices=True), Origin("digits-alexnet", "digits-alexnet"))
    search = planner.search(planner.meshes()[0])
    return planner.plan_of(search, search.fixed("conv-data-fc-model"))


def train(argument: dict[str, Any], process: Process) -> list[dict[str, Any]]:
    """Return a row for each case; every rank calls it."""
    torch.set_num_threads(1)
    return [trained(case, process) for case in argument["cases"]]


def trained(case: dict[str, Any], process: Process) -> dict[str, Any]:
    plan, m, n = Plan.from_json(case["plan"]), case["m"], case["n"]
    torch.manual_seed(case["seed"])
    net = variable_batch(digits_alexnet(WIDTH), plan, functional.cross_entropy, scheme="c", num_turns=m // n)
    groups = [
        {"params": list(net.front.parameters()), "lr": RATE * m / OF_BATCH},
        {"params": list(net.linear.parameters()), "lr": RATE * n / OF_BATCH},
    ]
    optimizer = torch.optim.SGD(groups, momentum=MOMENTUM, weight_decay=DECAY)
    images, _ = load_digits()
    steps = case["epochs"] * (len(images.labels) // m)
    falls = torch.optim.lr_scheduler.MultiStepLR(optimizer, [round(steps * share) for share in FALLS], FALL)
    generator = torch.Generator().manual_seed(case["seed"])
    for _ in range(case["epochs"]):
        order = torch.randperm(len(images.labels), generator=generator)
        for whole in order.split(m)[: len(order) // m]:
            own = whole[own_samples(plan, process.rank)]
            net.step(images.images[own], target=images.labels[own], optimizer=optimizer)
            falls.step()
    accuracy, entropy = tested(net, plan, process)
    return dataclasses.asdict(Row(m, n, case["seed"], case["epochs"], accuracy, entropy))


def tested(net: Any, plan: Plan, process: Process) -> tuple[float, float]:
    """Return accuracy in percent and cross-entropy of the test images."""
    _, images = load_digits()
    own = own_samples(plan, process.rank, len(images.labels))
    net.eval()
    scores, labels = net.evaluate(images.images[own]), images.labels[own]
    net.train()
    found = torch.stack([(scores.argmax(1) == labels).sum(), functional.cross_entropy(scores, labels, reduction="sum")])
    dist.all_reduce(found)
    return 100 * float(found[0]) / len(images.labels), float(found[1]) / len(images.labels)


def lines(rows: Sequence[Row]) -> Iterator[str]:
    """Yield means over seeds, with standard deviations."""
    yield f"{'(m, n)':14}{'test accuracy, %':>20}{'cross-entropy':>20}"
    for m, n in dict.fromkeys((row.m, row.n) for row in rows):
        group = [row for row in rows if (row.m, row.n) == (m, n)]
        accuracy, entropy = [r.accuracy_percent for r in group], [r.cross_entropy for r in group]
        yield f"{f'({m}, {n})':14}{over_seeds(accuracy, 2):>20}{over_seeds(entropy, 3):>20}"


def over_seeds(values: Sequence[float], digits: int) -> str:
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


if __name__ == "__main__":
    sys.exit(main())
