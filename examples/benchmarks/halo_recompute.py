"""Halos exchanged, or computed by every rank that needs them: two hosts, links of several delays, step by step in turn.

    sudo python -m examples.benchmarks.halo_recompute --delay-ms 0 1 4 16

trains a network that restores one image (residual blocks of convolutions without batch norm, as EDSR [Lim and others
2017, arXiv:1707.02921]), whose rows are cut over two hosts: two network namespaces joined by a link of ``--rate`` on
which every packet takes the delay (``runtime.delayed``). Cores, link and layers are measured, and plans made of that:
every halo exchanged, every halo recomputed, and what the planner chooses. A step of each follows the other.
Needs root, iproute2 and TUN devices.
"""

import argparse
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from examples.benchmarks.on_hosts import Case, Layers, plan_with, planner_on_hosts, raced, ratio
from examples.benchmarks.rows import write_rows
from planner.errors import LayerwiseError
from planner.ir.dimension import Dimension
from planner.plan import Plan

WISHES = {
    "exchange": {"halo_recompute": "never"},
    "recompute": {"halo_recompute": "always"},
    "chosen": {"halo_recompute": "auto", "solver": "auto"},
}
"""Names of plans, and the options of each."""


@dataclass(frozen=True)
class Row:
    """Medians of one plan over a link of a delay; ``layers``: that recompute."""

    delay_ms: float
    plan: str
    layers: int
    compute_s: float
    predicted_s: float
    measured_s: float
    against_exchange: float


class Block(nn.Module):
    """Two convolutions around which the image goes as well."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.second(torch.relu(self.first(x)))


def restorer(blocks: int = 4, channels: int = 32) -> nn.Module:
    """Return a network from an image to one of the same size."""
    ends = nn.Conv2d(3, channels, 3, padding=1), nn.Conv2d(channels, 3, 3, padding=1)
    return nn.Sequential(ends[0], *(Block(channels) for _ in range(blocks)), ends[1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--delay-ms", type=float, nargs="+", default=[0.0, 1.0, 4.0, 16.0])
    parser.add_argument("--rate", default="1gbit", help="of the link, per direction")
    parser.add_argument("--size", type=int, default=128, help="of the image")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--channels", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--csv", type=Path, help="write every row to this file")
    arguments = parser.parse_args()
    network = {"blocks": arguments.blocks, "channels": arguments.channels}
    case = Case(
        "examples.benchmarks.halo_recompute:restorer", 1, (3, arguments.size, arguments.size), network,
        options={"solver": "spatial", "dimensions": frozenset(Dimension), "io": "local"},
    )  # fmt: skip
    rows: list[Row] = []
    layers: Layers | None = None
    try:
        for delay_ms in arguments.delay_ms:
            found, layers = measured(case, arguments.rate, delay_ms, arguments.rounds, layers)
            rows += found
            _print(found)
    except LayerwiseError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if arguments.csv:
        write_rows(arguments.csv, rows, Row)
    return 0


def measured(case: Case, rate: str, delay_ms: float, rounds: int, layers: Layers | None) -> tuple[list[Row], Layers]:
    """Return the rows of a link, and the times of the layers, which do not depend on it."""
    with planner_on_hosts(case, rate, layers, delay_s=delay_ms * 1e-3) as (planner, hosts):
        plans = {name: plan_with(planner, **wish) for name, wish in WISHES.items()}
        samples = raced(plans, hosts, rounds=rounds, warmup=2)
    rows = [
        Row(
            delay_ms, name, _num_recomputing(plan), plan.totals.compute_s, plan.totals.step_s,
            statistics.median(samples[name]), ratio(samples["exchange"], samples[name]),
        )
        for name, plan in plans.items()
    ]  # fmt: skip
    return rows, planner.machine.profile.layers


def _num_recomputing(plan: Plan) -> int:
    return len(plan.only_stage.recomputing())


def _print(rows: list[Row]) -> None:
    for row in rows:
        print(
            f"{row.delay_ms:4.1f} ms  {row.plan:10}{row.layers:3} layers recompute, compute {row.compute_s:6.3f} s"
            f"  predicted {row.predicted_s:6.3f} s  measured {row.measured_s:6.3f} s"
            f"  exchange / it {row.against_exchange:5.2f}",
            flush=True,
        )


if __name__ == "__main__":
    raise SystemExit(main())
