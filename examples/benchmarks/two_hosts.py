"""Two hosts on one machine: torch DDP, fixed strategies and the plan, step by step in turn.

    sudo python examples/benchmarks/two_hosts.py --model alexnet --batch 32 --rate 1gbit

makes two network namespaces joined by a link of that rate, measures cores, link and the model's
layers, plans, then trains one rank on each host: a step of each strategy after the other, so that
noise hits all of them. Prints medians on the slowest rank, ratios, and how far the prediction was
off. The namespaces are removed at the end, also when interrupted. Needs root and iproute2.
"""

import argparse
import dataclasses
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from planner.api import (
    Machine,
    Options,
    Origin,
    compare_with,
    example_inputs,
    measure_host,
    measure_layers,
    prepare,
)
from planner.errors import LayerwiseError
from planner.frontend.source import load_model
from planner.measure.host import machine_from
from planner.plan import Plan
from planner.units import format_bytes, parse_bit_rate
from runtime.launch import run_local
from runtime.namespaces import two_hosts
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
    loaded = load_model(model)
    with two_hosts(parse_bit_rate(rate)) as hosts:
        machine = Machine(*machine_from(measure_host(2, hosts), 2))
        planner = prepare(
            loaded.module,
            example_inputs(loaded.input_shapes, batch),
            machine,
            Options(all_devices=True),
            Origin(model, model),
        )
        planner = measure_layers(planner, hosts)
        comparison = compare_with(planner)
        names = ["data", "conv-data-fc-model"]
        plans = {n: dataclasses.replace(planner, options=Options(solver=n, all_devices=True)).plan() for n in names}
        plans["planned"] = planner.plan()
        argument = {
            "plans": {n: p.to_json() for n, p in plans.items()},
            "rounds": rounds,
            "warmup": 2,
            "ddp": "planned",
            "compute_only": ["planned"],
        }
        (samples, _) = run_local(
            "runtime.training:race",
            argument,
            num_ranks=2,
            timeout_s=3600.0,
            threads_per_rank=1,
            hosts=hosts,
        )
    assert isinstance(samples, dict)
    _print(model, batch, rate, plans, samples)
    del comparison
    return {"model": model, "batch": batch, "rate": rate, "samples_s": samples,
            "predicted_s": {n: p.totals.step_s for n, p in plans.items()}}  # fmt: skip


def _print(model: str, batch: int, rate: str, plans: dict[str, Plan], samples: dict[str, list[float]]) -> None:
    print(f"{model}, global batch {batch}, 2 hosts at {rate}, {len(samples[DDP])} interleaved rounds")
    print(f"{'strategy':24}{'median s':>10}{'iqr s':>9}{'DDP / it':>10}{'predicted s':>13}{'off':>8}{'sent':>12}")
    ddp = statistics.median(samples[DDP])
    for name in [DDP, *plans, COMPUTE]:
        median = statistics.median(samples[name])
        quartiles = statistics.quantiles(samples[name], n=4)
        line = f"{name:24}{median:10.3f}{quartiles[2] - quartiles[0]:9.3f}{_ratio(samples[DDP], samples[name]):10.2f}"
        if name in plans:
            predicted = plans[name].totals.step_s
            sent = format_bytes(plans[name].totals.communication_bytes)
            line += f"{predicted:13.3f}{predicted / median - 1:+8.0%}{sent:>12}"
        print(line)
    planned = samples["planned"]
    print(f"planned against DDP: {_ratio(samples[DDP], planned):.2f} times as fast")
    print(f"planned against conv-data-fc-model: {_ratio(samples['conv-data-fc-model'], planned):.2f} times as fast")
    print(f"planned / its own compute: {_ratio(planned, samples[COMPUTE]):.3f}")
    print(f"our data plan / DDP: {_ratio(samples['data'], samples[DDP]):.3f} (DDP {ddp:.3f} s)")
    for layer in plans["planned"].stages[0].layers:
        if layer.op in {"conv", "linear"}:
            print(f"  {layer.id:24} {' '.join(f'{a}={d}' for a, d in layer.split.items())}")


def _ratio(a: list[float], b: list[float]) -> float:
    """Return the median of the ratios of paired samples."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


if __name__ == "__main__":
    raise SystemExit(main())
