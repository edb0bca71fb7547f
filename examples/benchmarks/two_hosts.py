"""Two hosts on one machine: torch DDP, fixed strategies and the plan, step by step in turn.

    sudo python -m examples.benchmarks.two_hosts --model alexnet --batch 32 --rate 1gbit

makes two network namespaces joined by a link of that rate, measures cores, link and the model's
layers, plans, then trains one rank on each host: a step of each strategy after the other, so that
noise hits all of them. Prints medians on the slowest rank, ratios, and how far the prediction was
off. The namespaces are removed at the end, also when interrupted. Needs root and iproute2.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from examples.benchmarks.on_hosts import Case, Samples, iqr, plan_with, planner_on_hosts, raced, ratio
from planner.errors import LayerwiseError
from planner.frontend.source import load_model
from planner.plan import Plan
from planner.units import format_bytes
from runtime.training import DDP, compute_only

COMPUTE = compute_only("planned")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="alexnet")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", default="1gbit", help="of the link, per direction")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write every sample to this file")
    arguments = parser.parse_args()
    try:
        report = run(arguments.model, arguments.batch, arguments.rate, arguments.rounds)
    except LayerwiseError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def run(model: str, batch: int, rate: str, rounds: int) -> dict[str, Any]:
    (shape,) = load_model(model).input_shapes
    with planner_on_hosts(Case(model, batch, tuple(shape)), rate) as (planner, hosts):
        plans = {name: plan_with(planner, solver=name) for name in ("data", "conv-data-fc-model")}
        plans["planned"] = planner.plan()
        samples = raced(plans, hosts, rounds=rounds, warmup=2, ddp="planned", compute_only=["planned"])
    _print(model, batch, rate, plans, samples)
    return {"model": model, "batch": batch, "rate": rate, "samples_s": samples,
            "predicted_s": {n: p.totals.step_s for n, p in plans.items()}}  # fmt: skip


def _print(model: str, batch: int, rate: str, plans: dict[str, Plan], samples: Samples) -> None:
    print(f"{model}, global batch {batch}, 2 hosts at {rate}, {len(samples[DDP])} interleaved rounds")
    print(f"{'strategy':24}{'median s':>10}{'iqr s':>9}{'DDP / it':>10}{'predicted s':>13}{'off':>8}{'sent':>12}")
    ddp = statistics.median(samples[DDP])
    for name in [DDP, *plans, COMPUTE]:
        median = statistics.median(samples[name])
        line = f"{name:24}{median:10.3f}{iqr(samples[name]):9.3f}{ratio(samples[DDP], samples[name]):10.2f}"
        if name in plans:
            predicted = plans[name].totals.step_s
            sent = format_bytes(plans[name].totals.communication_bytes)
            line += f"{predicted:13.3f}{predicted / median - 1:+8.0%}{sent:>12}"
        print(line)
    planned = samples["planned"]
    print(f"planned against DDP: {ratio(samples[DDP], planned):.2f} times as fast")
    print(f"planned against conv-data-fc-model: {ratio(samples['conv-data-fc-model'], planned):.2f} times as fast")
    print(f"planned / its own compute: {ratio(planned, samples[COMPUTE]):.3f}")
    print(f"our data plan / DDP: {ratio(samples['data'], samples[DDP]):.3f} (DDP {ddp:.3f} s)")
    for layer in plans["planned"].stages[0].layers:
        if layer.op in {"conv", "linear"}:
            print(f"  {layer.id:24} {' '.join(f'{a}={d}' for a, d in layer.split.items())}")


if __name__ == "__main__":
    raise SystemExit(main())
