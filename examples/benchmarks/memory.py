"""Predicted against measured bytes: what autograd holds for backward at its peak, and the parameters.

    python -m examples.benchmarks.memory

trains one step of each network on this CPU, or of one rank of two (ranks are threads), counts the
storages that autograd holds (each once; parameters and buffers are added once), and writes predicted,
measured and their ratio to a CSV file. DenseNet-121 needs ``pip install 'layerwise[zoo]'``.
"""

import argparse
import csv
import sys
import threading
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import torch
from torch import nn

from planner.api import Options, Origin, machine_of, prepare
from planner.errors import LayerwiseError
from planner.frontend.source import load_model
from planner.measure.saved import SavedBytes
from planner.plan import Plan
from runtime.comm.communicator import ThreadCommunicator, ThreadWorld
from runtime.data import own_samples
from runtime.parallel import lower, trace_for

OUTPUT = Path(__file__).with_suffix(".csv")
CASES = (  # model, samples of a step, strategy, ranks
    ("alexnet", 4, "data", 1),
    ("vgg16", 2, "data", 1),
    ("resnet50", 2, "data", 1),
    ("unet", 1, "data", 1),
    ("torchvision:densenet121", 2, "data", 1),
    ("alexnet", 8, "data", 2),
    ("alexnet", 8, "conv-data-fc-model", 2),
    ("alexnet", 8, "model", 2),
    ("resnet50", 4, "data", 2),
    ("resnet50", 4, "model", 2),
)


@dataclass(frozen=True, slots=True)
class Row:
    """A case: predicted and measured bytes of the busiest rank."""

    model: str
    batch: int
    strategy: str
    ranks: int
    parameter_bytes: int
    predicted_saved_bytes: int
    measured_saved_bytes: int

    @property
    def ratio(self) -> float:
        """Predicted / measured, parameters included."""
        return (self.predicted_saved_bytes + self.parameter_bytes) / (self.measured_saved_bytes + self.parameter_bytes)


def measure(model: str, batch: int, strategy: str, ranks: int) -> Row:
    """Return a case."""
    loaded = load_model(model)
    shape = (batch, *loaded.input_shapes[0])
    options = Options(solver=strategy)
    planner = prepare(
        loaded.module, (torch.empty(shape, device="meta"),), machine_of(devices=ranks), options, Origin(model, model)
    )
    search, planned = planner.best()
    memory = planned.timeline.memory
    parameters = memory.moments[0].parameters
    measured = max(_saved_on_ranks(model, planner.plan_of(search, planned), shape))
    return Row(model, batch, strategy, ranks, parameters, memory.saved_bytes - parameters, measured)


def _saved_on_ranks(model: str, plan: Plan, shape: tuple[int, ...]) -> list[int]:
    """Train a step on ranks that are threads; return what autograd held on each at its peak."""
    world, x = ThreadWorld(plan.mesh), torch.randn(shape)
    modules = [load_model(model, device="cpu").module for _ in range(plan.mesh.size)]
    traces = [trace_for(module, plan) for module in modules]
    found: dict[int, int] = {}
    errors: list[BaseException] = []

    def run(position: int) -> None:
        try:
            net: nn.Module = modules[position]
            if plan.mesh.size > 1:
                net = lower(net, traces[position], plan, ThreadCommunicator(world, position))
            counter = SavedBytes([*net.parameters(), *net.buffers()])
            samples = x[own_samples(plan, plan.mesh.ranks[position])].clone()
            with counter.counting():
                y = net(samples)
            y.sum().backward()
            found[position] = counter.peak
        except BaseException as error:
            errors.append(error)
            world.abort()

    threads = [threading.Thread(target=run, args=(position,)) for position in range(plan.mesh.size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return list(found.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", "-o", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    rows = []
    try:
        for case in CASES:
            rows.append(row := measure(*case))
            print(
                f"{row.model:24} batch {row.batch:2} {row.strategy:18} {row.ranks} rank{'s' * (row.ranks > 1):1} "
                f"predicted {(row.predicted_saved_bytes + row.parameter_bytes) / 1e6:8.1f} MB, "
                f"measured {(row.measured_saved_bytes + row.parameter_bytes) / 1e6:8.1f} MB, ratio {row.ratio:.4f}",
                flush=True,
            )
    except LayerwiseError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    with arguments.output.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*(field.name for field in fields(Row)), "ratio"])
        writer.writerows([*astuple(row), f"{row.ratio:.4f}"] for row in rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
