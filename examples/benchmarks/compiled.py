"""What torch.compile gains: one step of a parallel ResNet-18, plain and compiled, on two gloo ranks of this machine.

    python -m examples.benchmarks.compiled [--batch 8] [--side 64] [--rounds 12]

The data plan, with batch norm over all ranks (a graph ends in front of every norm) and with that of each rank (the
graph ends at input and output only). Steps take turns; the median of each is printed, and the seconds of the first two.
"""

import argparse
import statistics
import time
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from planner.api import plan_model
from planner.plan import Plan
from planner.plan.schema import ModelPart
from runtime.launch import Process, run_local
from runtime.parallel import parallelize
from runtime.training import build_model

SOURCE = "torchvision:resnet18"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=12)
    arguments = parser.parse_args()
    for sync in (True, False):
        plan = planned(arguments.batch, arguments.side, sync)
        found = run_local(
            "examples.benchmarks.compiled:measure",
            {"plan": plan.to_json(), "rounds": arguments.rounds},
            num_ranks=2,
            timeout_s=600.0,
        )
        plain, compiled, first = found[0]
        print(
            f"batch norm of {'all ranks' if sync else 'each rank'}: {plain * 1e3:.1f} ms plain, {compiled * 1e3:.1f} "
            f"ms compiled ({plain / compiled:.2f} times as fast); the first two steps took {first:.1f} s"
        )


def planned(batch: int, side: int, sync_batch_norm: bool) -> Plan:
    """Return the data plan."""
    from torchvision.models import resnet18

    plan = plan_model(
        resnet18(), (torch.empty(batch, 3, side, side),), devices=2, solver="data", all_devices=True,
        sync_batch_norm=sync_batch_norm,
    )  # fmt: skip
    model: ModelPart = plan.model.model_copy(update={"source": SOURCE})
    return plan.model_copy(update={"model": model})


def measure(argument: dict[str, Any], process: Process) -> tuple[float, float, float]:
    """Return the median seconds of a plain and a compiled step, and the seconds of the first two compiled ones."""
    plan = Plan.from_json(argument["plan"])
    plain: nn.Module = parallelize(build_model(plan, process.device), plan)
    compiled: Any = torch.compile(parallelize(build_model(plan, process.device), plan))
    count = plan.batch // process.world_size
    x, target = torch.randn(count, *plan.model.inputs[0].shape[1:]), torch.arange(count)

    def seconds(net: nn.Module) -> float:
        start = time.perf_counter()
        net.zero_grad()
        functional.cross_entropy(net(x), target).backward()
        return time.perf_counter() - start

    seconds(plain)
    first = seconds(compiled) + seconds(compiled)
    times: list[list[float]] = [[], []]
    for _ in range(argument["rounds"]):
        for each, net in zip(times, (plain, compiled), strict=True):
            each.append(seconds(net))
    return statistics.median(times[0]), statistics.median(times[1]), first


if __name__ == "__main__":
    main()
