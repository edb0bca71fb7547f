"""Memory of pipelines in cycles, with PipeDream's stashed weights and without: predicted, measured, and published.

    python -m examples.benchmarks.stash_memory [--networks lenet5 ...]

plans the networks of table 9 of [Zhang & Abdelrahman 2021] for two processes, cut behind the layers that it names, and
trains them for some cycles. ``measured`` is the most that torch's CPU allocator had given out at once, of both
processes together, beside that of one process without a pipeline. ``paper way`` counts as its printed numbers do: the
weights, and the outputs of all modules twice (activations and their gradients); the pipeline adds two more batches of
the first stage's activations, PipeDream four more copies of all weights besides. Two more versions of the first stage's
weights are enough, which is what runs here. Appends to a CSV file; ``--show`` prints it.
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from examples.benchmarks.contenders import pipelined_step
from examples.benchmarks.on_hosts import one_device
from examples.benchmarks.rows import read_rows, write_rows
from planner.api import Options, Origin, Planner, example_inputs, machine_of, prepare
from planner.api.pipelines import pipeline_at
from planner.errors import LayerwiseError
from planner.frontend.source import load_model
from planner.ir.graph import LayerGraph, is_boundary
from planner.ir.ops import Conv, Linear
from planner.ir.schedule import ScheduleKind
from planner.ir.split import LayerId
from planner.ir.stages import legal_cuts, without_redistribution
from planner.measure.allocated import allocated_peak
from planner.plan import Plan
from runtime.launch import Process, run_local
from runtime.training import build_model, synthetic_batch, training_step

OUTPUT: Final = Path(__file__).with_suffix(".csv")
CYCLES: Final = 6
"""Enough to fill a pipeline of two stages, and for batches in flight to have seen different weights."""
KINDS: Final = {"stale": ScheduleKind.STALE, "PipeDream": ScheduleKind.PIPEDREAM}
COPIES: Final = 4
"""Of all weights, that the paper counts for PipeDream."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A row of the paper's table.

    Attributes:
        model: as the command line takes it.
        batch: of the paper.
        behind: number of the layer with weights behind which the registers are. The paper says 2 for VGG-16; its
            printed increases of both VGG-16 are those of a cut behind 6.
        published: increase of memory in percent, by the ways of ``KINDS``.
        is_run: it is trained here, too.
    """

    model: str
    batch: int
    behind: int
    published: tuple[int, int]
    is_run: bool = True


CASES: Final = {
    "lenet5": Case("lenet5", 128, 2, (97, 109)),
    "alexnet-cifar": Case("examples.benchmarks.cifar_networks:alexnet", 128, 3, (37, 214)),
    "vgg16-cifar": Case("examples.benchmarks.cifar_networks:vgg16", 128, 6, (75, 124)),
    "resnet20": Case("resnet20", 128, 7, (60, 61)),
    "vgg16": Case("vgg16", 32, 6, (77, 105), is_run=False),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """A network in one way; bytes are those of both devices together.

    Attributes:
        cut: the first layer of the second stage.
        weights_bytes: of the network.
        activations_bytes: that backward needs of a batch, of all stages.
        alone_bytes, predicted_bytes: of one device, and of the pipeline.
        alone_measured_bytes, measured_bytes: the same; 0 where it was not run.
        paper_way: increase in percent, counted as the paper does.
        published: that it prints.
    """

    network: str
    batch: int
    way: str
    cut: str
    weights_bytes: int
    activations_bytes: int
    alone_bytes: int
    predicted_bytes: int
    alone_measured_bytes: int
    measured_bytes: int
    paper_way: float
    published: int


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--show", action="store_true", help="print the table of the file, measure nothing")
    parser.add_argument("-o", "--output", type=Path, default=OUTPUT, help="CSV file")
    arguments = parser.parse_args()
    rows = read_rows(arguments.output, Row)
    try:
        for network in [] if arguments.show else arguments.networks:
            found = list(measured(network))
            rows = [row for row in rows if row.network != network] + found
            write(arguments.output, rows)
            print(network, file=sys.stderr)
    except LayerwiseError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for line in lines(rows):
        print(line)
    return 0


def measured(network: str) -> Iterator[Row]:
    """Plan and train a network; yield a row for each way."""
    case = CASES[network]
    loaded = load_model(case.model)
    planner = prepare(
        loaded.module, example_inputs(loaded.input_shapes, case.batch), machine_of("2xcpu-shm"),
        Options(sync_batch_norm=False, memory_limit_bytes=2**40), Origin(case.model, case.model),
    )  # fmt: skip
    cut = cut_behind(planner, case.behind)
    asked = dataclasses.replace(planner.options, mesh=one_device(planner))
    search, planned = dataclasses.replace(planner, options=asked).best()
    alone, alone_plan = planned.timeline.memory, planner.plan_of(search, planned)
    weights = alone.moments[0].parameters
    alone_measured = live_bytes(alone_plan) if case.is_run else 0
    for (way, kind), published in zip(KINDS.items(), case.published, strict=True):
        found = pipeline_at(planner, kind, [cut])
        activations = sum(stage.times.saved_bytes for stage in found.stages)
        counted = [outputs_bytes(stage.table.space.graph) for stage in found.stages]
        more = counted[0] + (COPIES * weights if kind is ScheduleKind.PIPEDREAM else 0)
        yield Row(
            network, case.batch, way, cut, weights, activations, alone.peak.total, sum(found.timeline.memory_bytes),
            alone_measured, live_bytes(planner.plan_of_pipeline(found)) if case.is_run else 0,
            100 * more / (sum(counted) + weights), published,
        )  # fmt: skip


def cut_behind(planner: Planner, count: int) -> LayerId:
    """Return the layer with weights that follows so many others on the main path; registers lie in front of it.

    Shortcuts of residual networks do not count.
    """
    layers = planner.traced.layers
    legal = set(legal_cuts(layers))
    weighted = [x.id for x in layers.layers if isinstance(x.op, Conv | Linear) and "shortcut" not in x.id]
    return next(layer for layer in weighted[count:] if layer in legal)


def outputs_bytes(graph: LayerGraph) -> int:
    """Return the outputs of all modules of a stage, twice."""
    return 8 * sum(
        x.output.numel * (1 + len(x.absorbed)) for x in without_redistribution(graph).layers if not is_boundary(x.op)
    )


def live_bytes(plan: Plan) -> int:
    """Train by a plan; return the most bytes of its processes together."""
    found = run_local(
        f"{__spec__.parent}.stash_memory:train", {"plan": plan.to_json()}, num_ranks=plan.num_ranks,
        timeout_s=900.0, threads_per_rank=1,
    )  # fmt: skip
    return sum(each for each in found if isinstance(each, int))


def train(argument: dict[str, Any], process: Process) -> int:
    """Train some steps or cycles on this rank; return the most bytes that were live."""
    plan = Plan.from_json(argument["plan"])

    def make() -> Any:
        if plan.is_pipelined:
            return pipelined_step(plan, process)
        net = build_model(plan, process.device)
        return training_step(net, plan, synthetic_batch(plan, process, slice(0, plan.batch)))[0]

    return allocated_peak(make, CYCLES).num_bytes


def write(path: Path, rows: Iterable[Row]) -> None:
    """Write the rows, in the paper's order."""
    write_rows(path, sorted(rows, key=lambda row: list(CASES).index(row.network)), Row)


def lines(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the table."""
    yield (
        f"{'network':15}{'way':11}{'cut at':18}{'one device':>12}{'predicted':>12}{'more':>7}{'measured':>12}"
        f"{'more':>7}{'pred./meas.':>13}{'paper way':>11}{'published':>11}"
    )
    for row in rows:
        more = 100 * (row.predicted_bytes / row.alone_bytes - 1)
        alone, predicted = (f"{x / 1e6:9.1f} MB" for x in (row.alone_bytes, row.predicted_bytes))
        texts = f"{'':12}{'':7}{'':13}"
        if row.measured_bytes:
            off = row.predicted_bytes / row.measured_bytes
            more_measured = 100 * (row.measured_bytes / row.alone_measured_bytes - 1)
            texts = f"{row.measured_bytes / 1e6:9.1f} MB{more_measured:5.0f} %{off:13.3f}"
        yield (
            f"{row.network:15}{row.way:11}{row.cut:18}{alone}{predicted}{more:5.0f} %{texts}{row.paper_way:9.0f} %"
            f"{row.published:9} %"
        )
    for stale, stashed in zip(rows[::2], rows[1::2], strict=True):
        text = f"{stale.network}: stashed weights are {(stashed.predicted_bytes - stale.predicted_bytes) / 1e6:.2f} MB"
        if stale.measured_bytes:
            text += f", measured {(stashed.measured_bytes - stale.measured_bytes) / 1e6:.2f} MB"
        yield f"{text}; in the paper's way {COPIES * stale.weights_bytes / 1e6:.1f} MB"


if __name__ == "__main__":
    raise SystemExit(main())
