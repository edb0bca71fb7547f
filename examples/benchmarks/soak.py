"""A long run: memory, files, threads and seconds of a step of two ranks over 2,000 steps with a checkpoint every 100.

    python -m examples.benchmarks.soak [--steps 2000] [--every 100]

trains a tiny network, saves behind training, and prints how each grows, by a line through its samples, as a share of
its mean, with a 95 % interval. Rows go to a CSV file; ``--show`` prints them again.
"""

import argparse
import dataclasses
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

import runtime
from examples.benchmarks.fault_training import batch_of, build, plan_of
from examples.benchmarks.rows import read_rows, write_rows
from planner.plan import Plan
from runtime import checkpoint
from runtime.data import own_part, own_samples
from runtime.launch import Process, run_local

OUTPUT: Final = Path(__file__).with_suffix(".csv")
SAMPLED: Final = 20
"""Steps between two samples."""
FLAT: Final = 0.05
"""Of its mean, so much may a quantity grow over the whole run."""
BLOCK: Final = 10
RESAMPLES: Final = 1000


@dataclasses.dataclass(frozen=True)
class Row:
    """A sample of one rank.

    Attributes:
        resident_bytes: memory of the process.
        files, threads: open ones.
        step_s: median of the steps since the last sample; those that wait for a checkpoint's copies included.
    """

    rank: int
    step: int
    resident_bytes: int
    files: int
    threads: int
    step_s: float


def train(argument: dict[str, Any], process: Process) -> list[list[float]]:
    """Train on one rank; return its samples."""
    plan, folder = Plan.from_json(argument["plan"]), Path(argument["folder"])
    net = runtime.parallelize(build(), plan)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    batches = [batch_of(k) for k in range(8)]
    found, seconds = [], []
    for step in range(1, argument["steps"] + 1):
        start = time.perf_counter()
        images, labels = batches[step % len(batches)]
        optimizer.zero_grad()
        scores = net(images[own_part(plan, process.rank)])
        functional.cross_entropy(scores, labels[own_samples(plan, process.rank)]).backward()
        optimizer.step()
        if step % argument["every"] == 0:
            checkpoint.start_saving(net, optimizer, folder / "checkpoint", step=step)
        seconds.append(time.perf_counter() - start)
        if step % SAMPLED == 0:
            found.append([process.rank, step, *_held(), float(np.median(seconds))])
            seconds.clear()
    checkpoint.Saving.finish()
    return found


def _held() -> tuple[int, int, int]:
    """Return resident bytes, open files and threads of this process."""
    own = Path("/proc/self")
    pages = int((own / "statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), len(list((own / "fd").iterdir())), len(list((own / "task").iterdir()))


def soaked(steps: int, every: int) -> list[Row]:
    """Return the samples of both ranks of a run."""
    with tempfile.TemporaryDirectory(prefix="layerwise-") as folder:
        argument = {"plan": plan_of("spatial", 2).to_json(), "folder": folder, "steps": steps, "every": every}
        ranks = run_local("examples.benchmarks.soak:train", argument, num_ranks=2, timeout_s=3600.0)
    return [Row(*(int(v) for v in sample[:-1]), sample[-1]) for rank in ranks for sample in rank]


@dataclasses.dataclass(frozen=True)
class Growth:
    """How a quantity grows over a run: of the steepest rank, a line through the samples.

    Attributes:
        mean: over the samples.
        share: of the mean, what the line rises over the run.
        low, high: its 95 % interval, by resampling runs of ``BLOCK`` samples, as a disturbance lasts for several.
    """

    mean: float
    share: float
    low: float
    high: float


def growth(rows: Sequence[Row]) -> dict[str, Growth]:
    """Return how every quantity grows; the first tenth, in which caches fill, is left out."""
    steps = max(row.step for row in rows)
    found = {}
    for field in ("resident_bytes", "files", "threads", "step_s"):
        of_ranks = []
        for rank in {row.rank for row in rows}:
            settled = [(row.step, getattr(row, field)) for row in rows if row.rank == rank and row.step > steps / 10]
            of_ranks.append(_line(np.array(settled, dtype=float), steps))
        found[field] = max(of_ranks, key=lambda line: abs(line.share))
    return found


def _line(samples: npt.NDArray[np.float64], steps: int) -> Growth:
    """Return the line through pairs of a step and a quantity."""

    def share(chosen: npt.NDArray[np.float64]) -> float:
        x, y = chosen.T
        return float(np.polyfit(x, y, 1)[0] * steps / y.mean())

    starts = np.arange(len(samples) - BLOCK + 1)
    rng = np.random.default_rng(0)
    drawn = [
        share(np.concatenate([samples[k : k + BLOCK] for k in rng.choice(starts, len(samples) // BLOCK)]))
        for _ in range(RESAMPLES)
    ]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Growth(float(samples[:, 1].mean()), share(samples), float(low), float(high))


def is_flat(rows: Sequence[Row]) -> bool:
    """Return whether nothing grows for sure: the lower end of no interval is above ``FLAT``."""
    return all(line.low <= FLAT for line in growth(rows).values())


def table(rows: Sequence[Row]) -> str:
    """Return what grew by how much."""
    found = growth(rows)
    shown = {
        "resident_bytes": ("memory", lambda v: f"{v / 2**20:.1f} MiB"), "files": ("open files", lambda v: f"{v:.1f}"),
        "threads": ("threads", lambda v: f"{v:.1f}"), "step_s": ("step", lambda v: f"{v * 1e3:.2f} ms"),
    }  # fmt: skip
    steps = max(row.step for row in rows)
    head = f"| of the steepest rank | mean | growth over {steps:,} steps | 95 % |\n|---|---|---|---|\n"
    return head + "\n".join(
        f"| {name} | {show(found[f].mean)} | {found[f].share:+.2%} | {found[f].low:+.2%} to {found[f].high:+.2%} |"
        for f, (name, show) in shown.items()
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--every", type=int, default=100, help="steps between two checkpoints")
    parser.add_argument("--show", action="store_true", help="print the file and run nothing")
    parser.add_argument("-o", "--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    if arguments.show:
        rows = read_rows(arguments.output, Row)
    else:
        rows = soaked(arguments.steps, arguments.every)
        write_rows(arguments.output, rows, Row)
    print(table(rows))
    return 0 if is_flat(rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
