"""Where pipelines pay, predicted: the best SPMD plan against the best pipelined one, over clusters and networks.

    python -m examples.benchmarks.pipelines_pay [--clusters 2x1-t4-eth1 ...] [--networks resnet50 ...]

plans every network on every cluster in both ways, and appends to a CSV file; cells that the file has are not planned
again unless ``--again`` is given; ``--show`` prints the file. Both plans may use fewer devices. Pipelines have the
schedules whose step equals that of one device for the samples of a micro-batch (1F1B, interleaved, zero-bubble). Where
a network has batch norm, statistics are those of a part of the batch in both: of a micro-batch, and of a rank's
samples. Layers are priced by data sheets.
"""

import argparse
import dataclasses
import itertools
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

from examples.benchmarks.rows import read_rows, write_rows
from planner.api import Options, Origin, Planner, example_inputs, machine_of, prepare
from planner.api.pipelines import Pipeline, best_pipeline
from planner.errors import InfeasibleError, LayerwiseError
from planner.frontend.source import load_model
from planner.search.auto import Planned
from planner.units import format_seconds

OUTPUT: Final = Path(__file__).with_suffix(".csv")
CLUSTERS: Final = (
    "2x1-t4-eth1", "4x1-t4-eth1", "4x1-t4-eth10", "16x1-t4-eth10", "4x4-p100-ib100", "8xk20-pcie", "4xa100-nvlink",
)  # fmt: skip
NETWORKS: Final = {"alexnet": (32,), "vgg16": (8, 32), "resnet50": (32,), "unet": (8,), "resnet110": (32,)}
"""The batches of each."""
TIME_LIMIT_S: Final = 300.0
"""For each of the two searches; where there is no more time, fewer pipelines are searched."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A network on a cluster; a step is 0 where nothing fits in memory.

    Attributes:
        spmd_s, pipelined_s: the predicted steps.
        spmd_devices: that the SPMD plan uses.
        stages: devices of every stage; interleaved, positions come round again.
        cuts: the first layers of the stages behind the first one.
        times: by which factor the pipeline is faster.
        bubble: share of the devices' time.
        spmd_search_s, pipeline_search_s: seconds of planning.
    """

    cluster: str
    network: str
    batch: int
    spmd_s: float
    spmd_devices: int
    pipelined_s: float
    stages: str
    schedule: str
    microbatches: int
    cuts: str
    recomputed: int
    bubble: float
    times: float
    spmd_search_s: float
    pipeline_search_s: float

    @property
    def cell(self) -> tuple[str, str, int]:
        """The cluster, the network and the batch."""
        return self.cluster, self.network, self.batch


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clusters", nargs="*", default=list(CLUSTERS))
    parser.add_argument("--networks", nargs="*", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--again", action="store_true", help="plan cells that the file has, too")
    parser.add_argument("--show", action="store_true", help="print the table of the file, plan nothing")
    parser.add_argument("-o", "--output", type=Path, default=OUTPUT, help="CSV file")
    arguments = parser.parse_args()
    rows = read_rows(arguments.output, Row)
    pairs = [] if arguments.show else itertools.product(arguments.clusters, arguments.networks)
    cells = [(cluster, network, batch) for cluster, network in pairs for batch in NETWORKS[network]]
    try:
        for cell in cells:
            if arguments.again or cell not in {row.cell for row in rows}:
                row = planned(*cell)
                rows = [each for each in rows if each.cell != cell] + [row]
                write(arguments.output, rows)
                print(*lines([row]), sep="\n", file=sys.stderr)
    except LayerwiseError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for line in lines(rows):
        print(line)
    return 0


def planned(cluster: str, network: str, batch: int) -> Row:
    """Plan a network on a cluster in both ways."""
    loaded = load_model(network)
    options = Options(sync_batch_norm=False, time_limit_s=TIME_LIMIT_S)
    machine = machine_of(cluster, None, "fp32", None)
    spmd = prepare(loaded.module, example_inputs(loaded.input_shapes, batch), machine, options, Origin(network))
    planner = dataclasses.replace(spmd, options=dataclasses.replace(options, stages="auto"))
    start = time.perf_counter()
    alone = one_stage(spmd)
    between = time.perf_counter()
    found = pipeline(planner)
    end = time.perf_counter()
    spmd_s, devices = (alone[1].timeline.step_s, alone[0]) if alone else (0.0, 0)
    searched = round(between - start, 1), round(end - between, 1)
    if found is None:
        return Row(cluster, network, batch, spmd_s, devices, 0.0, "", "", 0, "", 0, 0.0, 0.0, *searched)
    step_s = found.timeline.step_s
    cuts = [
        next(x.id for x in stage.table.space.graph.layers if x.op.kind not in {"receive", "redistribute"})
        for stage in found.stages[1:]
    ]
    return Row(
        cluster, network, batch, spmd_s, devices, step_s, "+".join(str(s.table.space.mesh.size) for s in found.stages),
        found.kind.value, found.num_microbatches,
        " ".join(cuts),
        sum(stage.times.recompute for stage in found.stages), found.timeline.bubble, spmd_s / step_s, *searched,
    )  # fmt: skip


def one_stage(planner: Planner) -> tuple[int, Planned] | None:
    """Return the best plan without stages and its number of devices; None where nothing fits in memory."""
    try:
        search, found = planner.best()
    except InfeasibleError:
        return None
    return search.table.space.mesh.size, found


def pipeline(planner: Planner) -> Pipeline | None:
    """Return the best pipeline; None where nothing fits in memory."""
    try:
        return best_pipeline(planner)
    except InfeasibleError:
        return None


def write(path: Path, rows: Iterable[Row]) -> None:
    """Write the rows, those of shipped clusters in the order of the tables."""

    def place(row: Row) -> tuple[int, str, int, int]:
        order = CLUSTERS.index(row.cluster) if row.cluster in CLUSTERS else len(CLUSTERS)
        return order, row.cluster, list(NETWORKS).index(row.network), row.batch

    write_rows(path, sorted(rows, key=place), Row)


def lines(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the table."""
    yield (
        f"{'cluster':16}{'network':11}{'batch':>5}{'SPMD':>12}{'devices':>9}{'pipelined':>12}{'faster':>8}  "
        f"{'stages':18}{'schedule':13}{'micro-batches':>13}{'bubble':>8}{'planned in':>14}"
    )
    for row in rows:
        steps = [format_seconds(s) if s else "does not fit" for s in (row.spmd_s, row.pipelined_s)]
        times = f"{row.times:.2f}x" if row.times else ""
        recomputed = f", {row.recomputed} recomputed" if row.recomputed else ""
        yield (
            f"{row.cluster:16}{row.network:11}{row.batch:5}{steps[0]:>12}{row.spmd_devices:9}{steps[1]:>12}{times:>8}  "
            f"{row.stages:18}{row.schedule:13}{row.microbatches:13}{row.bubble:8.0%}"
            f"{row.spmd_search_s:7.0f} +{row.pipeline_search_s:4.0f} s{recomputed}"
        )
    both = [row for row in rows if row.times]
    yield f"pipelines are at least 1.05 times faster in {sum(row.times >= 1.05 for row in both)} of {len(rows)} cells"


if __name__ == "__main__":
    raise SystemExit(main())
