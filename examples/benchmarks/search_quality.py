"""Simulated steps of the planned strategy against every fixed strategy and every other solver.

    python -m examples.benchmarks.search_quality [--networks papers|torchvision|NAME ...] [--machine NAME] [-o FILE]

A row for each network, machine and solver; all dimensions are allowed; all on the mesh of whole levels, so that every
solver has the same choices. Prints for each machine the geometric means of the speed-up over ``data`` and over
``conv-data-fc-model``, the median gap to the lower bound, and every row that ``auto`` lost. Devices are priced by
their data sheets. ``ilp`` is asked for networks of up to 60 layers and for so many seconds as TIME_LIMIT_S says.
"""

import argparse
import csv
import math
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Final

from planner.api import Options, Origin, example_inputs, machine_of, prepare
from planner.cli.planning import refuse_unwritable
from planner.errors import LayerwiseError
from planner.frontend.source import load_model
from planner.ir.dimension import Dimension
from planner.search.auto import SOLVERS
from planner.search.fixed import ALIASES, FIXED

OUTPUT: Final = Path(__file__).with_suffix(".csv")
PAPERS: Final = (
    "alexnet", "alexnet-hypar", "alexnet-owt", "cifar-c", "digits-alexnet", "digits-cnn", "lenet-c", "lenet5",
    "resnet110", "resnet18", "resnet20", "resnet50", "resnet56", "sconv", "sfc", "unet", "vgg-a", "vgg-b", "vgg-c",
    "vgg-d", "vgg-e",
)  # fmt: skip
TORCHVISION: Final = tuple(
    f"torchvision:{name}"
    for name in (
        "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "inception_v3", "mnasnet1_0", "mobilenet_v2",
        "mobilenet_v3_large", "regnet_y_400mf", "resnet101", "resnet152", "resnext50_32x4d", "shufflenet_v2_x1_0",
        "squeezenet1_0", "wide_resnet50_2",
    )
)  # fmt: skip
MACHINES: Final = (
    "8xa100-nvlink", "8xh100-nvlink", "4x8-h100-ib400", "4x4-p100-ib100", "8xk20-pcie", "16x1-t4-eth10", "8xk80-qpi",
    "36x4-p100-fat100", "16xhmc-htree", "16xhmc-torus",
)  # fmt: skip
DIMENSIONS: Final = frozenset({
    Dimension.SAMPLE, Dimension.HEIGHT, Dimension.WIDTH,
    Dimension.OUT_CHANNEL, Dimension.IN_CHANNEL, Dimension.IN_CHANNEL_SCATTER,
})  # fmt: skip
SAMPLES: Final = 32
"""Of each device."""
FEWER_SAMPLES: Final = {"unet": 2}
"""Where images of 512 x 512 would not fit."""
ILP_LAYERS: Final = 60
TIME_LIMIT_S: Final = 20.0


@dataclass(frozen=True, slots=True)
class Row:
    """One solver on one network and machine; seconds are of the simulated step, and of the search without the table.

    ``note`` says why a fixed strategy is not among what could have been planned.
    """

    machine: str
    network: str
    solver: str
    step_s: float
    lower_bound_s: float
    search_s: float
    note: str


def rows_of(network: str, machine_name: str) -> Iterator[Row]:
    """Yield what every solver finds."""
    machine = machine_of(machine_name, None, "fp32", None)
    loaded = load_model(network)
    inputs = example_inputs(loaded.input_shapes, FEWER_SAMPLES.get(network, SAMPLES) * len(machine.graph.devices))
    mesh = ",".join(f"{level.name}={level.size}" for level in machine.graph.levels)
    options = Options(dimensions=DIMENSIONS, mesh=mesh, time_limit_s=TIME_LIMIT_S)
    planner = prepare(loaded.module, inputs, machine, options, Origin(network))
    search = planner.search(planner.meshes()[0])
    for solver in SOLVERS:
        if solver in {"exhaustive", *FIXED, *ALIASES} or (
            solver == "ilp" and len(planner.traced.layers.layers) > ILP_LAYERS
        ):
            continue
        start = time.perf_counter()
        try:
            planned = search.solve(solver)
        except LayerwiseError as error:
            sys.stderr.write(f"{network} on {machine_name}, {solver}: {error}\n")
            continue
        seconds = time.perf_counter() - start
        yield Row(machine_name, network, solver, planned.timeline.step_s, planned.lower_bound_s, seconds, "")
    for baseline in planner.baselines():
        found = baseline.planned
        yield Row(machine_name, network, found.solver, found.timeline.step_s, 0.0, 0.0, baseline.note)


def summary(rows: list[Row]) -> Iterator[str]:
    """Yield a line for each machine, and one for each row that the planned strategy lost."""
    planned = {(row.machine, row.network): row for row in rows if row.solver == "auto"}
    for machine in dict.fromkeys(row.machine for row in rows):
        mine = [row for (name, _), row in planned.items() if name == machine]
        gaps = [max(1 - row.lower_bound_s / row.step_s, 0.0) for row in mine]
        line = f"{machine}: {len(mine)} networks"
        for other in ("data", "conv-data-fc-model"):
            ratios = [
                row.step_s / planned[machine, row.network].step_s
                for row in rows
                if row.machine == machine and row.solver == other and (machine, row.network) in planned
            ]
            if ratios:
                line += f", {math.exp(statistics.fmean(map(math.log, ratios))):.3g}x over {other}"
        yield f"{line}, median gap {statistics.median(gaps):.2%}, largest {max(gaps):.2%}" if gaps else line
    for row in rows:
        best = planned.get((row.machine, row.network))
        if best is not None and not row.note and row.step_s < best.step_s * (1 - 1e-9):
            yield f"lost: {row.network} on {row.machine}: {row.solver} {row.step_s:.6g} s, auto {best.step_s:.6g} s"


def main() -> None:
    """Run every case, write the rows as they come, print the summary."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--networks", nargs="+", default=["papers"])
    parser.add_argument("--machine", action="append")
    parser.add_argument("-o", "--output", type=Path, default=OUTPUT)
    asked = parser.parse_args()
    groups = {"papers": PAPERS, "torchvision": TORCHVISION}
    networks = [name for each in asked.networks for name in groups.get(each, (each,))]
    machines = asked.machine or MACHINES
    try:  # a wrong name must not cost the rows of an earlier run
        for name in machines:
            machine_of(name, None, "fp32", None)
        for name in networks:
            load_model(name)
        refuse_unwritable(asked.output)
    except LayerwiseError as error:
        parser.error(str(error))
    rows: list[Row] = []
    with asked.output.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([field.name for field in fields(Row)])
        for machine in machines:
            for network in networks:
                found = list(rows_of(network, machine))
                rows += found
                writer.writerows(asdict(row).values() for row in found)
                file.flush()
    sys.stdout.write("\n".join(summary(rows)) + "\n")


if __name__ == "__main__":
    main()
