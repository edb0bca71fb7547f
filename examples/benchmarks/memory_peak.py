"""Predicted against measured bytes of training steps: live tensors, and what the process holds.

    python -m examples.benchmarks.memory_peak

trains each network on ranks that are processes, and writes a row for each case to a CSV file. ``live_bytes`` is the
most that torch's CPU allocator had given out at once in the steps (``planner.measure.allocated``): parameters,
gradients, buckets, state, activations, and what kernels allocate for a while. ``resident_bytes`` is the most that the
process held beyond what it held before the model was built (``ru_maxrss``), in a run without the profiler, with freed
memory given back at once (``GIVE_BACK``); ``kept_bytes`` is the same with what ``run_local`` sets for speed
(``KEEP_MEMORY``): the C library keeps what was freed, in pieces of the wrong sizes too. Both contain what no plan
decides: ``fixed_bytes``, which the smallest training step of such a process holds (libraries, compiled kernels,
stacks).
"""

import argparse
import csv
import os
import resource
import sys
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from examples.benchmarks.big_sample import GIVE_BACK, status
from planner.api import Options, Origin, Planner, machine_of, prepare
from planner.errors import LayerwiseError
from planner.frontend.source import load_model
from planner.ir.dimension import Dimension
from planner.measure.allocated import allocated_peak
from planner.plan import Plan
from planner.space.enumerate import DEFAULT_DIMENSIONS
from planner.units import format_bytes
from runtime.launch import Process, run_local
from runtime.training import planned_step

OUTPUT = Path(__file__).with_suffix(".csv")
STEPS = 3


@dataclass(frozen=True, slots=True)
class Case:
    """What is trained, and how.

    Attributes:
        model: as the command line takes it.
        shape: of the global batch.
        strategy: a solver's name.
        ranks: processes.
        arguments: of the model, as text.
        space: the dimension of space that may be split beside the usual ones.
    """

    model: str
    shape: tuple[int, ...]
    strategy: str
    ranks: int
    arguments: tuple[tuple[str, Any], ...] = ()
    space: Dimension | None = None

    def planner(self) -> Planner:
        """Return what plans it."""
        arguments = dict(self.arguments)
        module = load_model(self.model, arguments).module
        options = Options(solver=self.strategy, all_devices=True)
        if self.space is not None:
            options = Options(dimensions=DEFAULT_DIMENSIONS | {self.space}, io="local", all_devices=True)
        origin = Origin(self.model, self.model, arguments)
        machine = machine_of(f"{self.ranks}xcpu-shm")
        return prepare(module, (torch.empty(self.shape, device="meta"),), machine, options, origin)


CASES = (
    Case("alexnet", (8, 3, 224, 224), "data", 1),
    Case("vgg16", (2, 3, 64, 64), "data", 1),
    Case("resnet50", (8, 3, 112, 112), "data", 1),
    Case("torchvision:mobilenet_v2", (16, 3, 112, 112), "data", 1),
    Case("torchvision:densenet121", (4, 3, 112, 112), "data", 1),
    Case("unet", (1, 1, 256, 256), "data", 1, (("width", 0.25),)),
    Case("unet3d", (1, 1, 64, 64, 64), "data", 1, (("width", 0.25),)),
    Case("alexnet", (8, 3, 224, 224), "data", 2),
    Case("alexnet", (8, 3, 224, 224), "conv-data-fc-model", 2),
    Case("resnet50", (8, 3, 112, 112), "data", 2),
    Case("resnet50", (8, 3, 112, 112), "model", 2),
    Case("unet", (1, 1, 512, 512), "auto", 2, (("width", 0.25),), Dimension.HEIGHT),
    Case("unet3d", (1, 1, 96, 96, 96), "auto", 2, (("width", 0.25),), Dimension.DEPTH),
    Case("unet3d", (1, 1, 96, 96, 96), "auto", 4, (("width", 0.25),), Dimension.DEPTH),
)


@dataclass(frozen=True, slots=True)
class Row:
    """A case: bytes of the busiest rank."""

    model: str
    shape: str
    strategy: str
    ranks: int
    predicted_bytes: int
    live_bytes: int
    live_ratio: float
    resident_bytes: int
    kept_bytes: int
    fixed_bytes: int
    predicted_at: str
    live_at: str


def train(argument: dict[str, Any], process: Process) -> dict[str, Any]:
    """Train this rank's part for some steps; return bytes."""
    torch.set_num_threads(1)
    before = status("VmRSS")
    warm_up()
    fixed = _resident() - before
    plan = Plan.from_json(argument["plan"])
    if not argument["profiled"]:
        step = planned_step(plan, process)
        for _ in range(STEPS):
            step()
        return {"resident": _resident() - before, "fixed": fixed}
    found = allocated_peak(lambda: planned_step(plan, process), STEPS)
    return {"live": found.num_bytes, "at": " < ".join(found.place)}


def warm_up() -> None:
    """Train the smallest network: libraries are loaded, and kernels of every kind have run."""
    for conv, norm, size in (
        (nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), (1, 1, 8, 8)),
        (nn.Conv3d(1, 8, 3), nn.BatchNorm3d(8), (1, 1, 8, 8, 8)),
    ):
        net = nn.Sequential(conv, norm, nn.ReLU(), nn.Flatten(1), nn.LazyLinear(4))
        net(torch.ones(size))
        optimizer = torch.optim.SGD(net.parameters(), 1e-3, momentum=0.9)
        net(torch.ones(size)).sum().backward()
        optimizer.step()


def _resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(case: Case) -> Row:
    """Return the row of a case."""
    planner = case.planner()
    search, planned = planner.best()
    peak, plan = planned.timeline.memory.peak, planner.plan_of(search, planned)
    live = _run(plan, profiled=True, settings=GIVE_BACK)
    given_back, kept = (_run(plan, profiled=False, settings=each) for each in (GIVE_BACK, {}))
    most = max(live, key=lambda each: int(each["live"]))
    return Row(
        case.model, "x".join(map(str, case.shape)), case.strategy, case.ranks, peak.total, most["live"],
        round(peak.total / most["live"], 3), max(each["resident"] for each in given_back),
        max(each["resident"] for each in kept), max(each["fixed"] for each in given_back),
        f"{peak.name} {peak.phase}", most["at"],
    )  # fmt: skip


def _run(plan: Plan, *, profiled: bool, settings: dict[str, str]) -> list[dict[str, Any]]:
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        found = run_local(
            f"{__spec__.parent}.memory_peak:train", {"plan": plan.to_json(), "profiled": profiled},
            num_ranks=plan.mesh.size, timeout_s=600.0, threads_per_rank=1,
        )  # fmt: skip
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    assert isinstance(found, list | tuple)
    return [each for each in found if isinstance(each, dict)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], metavar="MODEL", help="print these networks, write no file")
    parser.add_argument("--output", "-o", type=Path, default=OUTPUT)
    asked = parser.parse_args()
    rows = []
    try:
        for case in CASES:
            if not asked.only or case.model in asked.only:
                rows.append(row := measure(case))
                print(line_of(row), flush=True)
    except LayerwiseError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if not asked.only:
        with asked.output.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(field.name for field in fields(Row))
            writer.writerows(astuple(row) for row in rows)
    return 0


def line_of(row: Row) -> str:
    """Return a row as text."""
    ranks = f"{row.ranks} rank{'s' * (row.ranks > 1)}"
    predicted, live, resident, kept, fixed = map(
        format_bytes, (row.predicted_bytes, row.live_bytes, row.resident_bytes, row.kept_bytes, row.fixed_bytes)
    )
    return (
        f"{row.model:26}{row.shape:16}{row.strategy:19}{ranks:8} predicted {predicted:>9}, live {live:>9}, "
        f"ratio {row.live_ratio:.3f}; resident {resident:>9}, kept {kept:>9}, fixed {fixed:>9}"
    )


if __name__ == "__main__":
    sys.exit(main())
