"""Holds the planner's times of collectives against SimGrid, a simulator that nobody here wrote.

    python -m examples.benchmarks.simgrid_validation

prices collectives on several machines, runs the messages of the same algorithms on the same machines in
SimGrid (``simgrid_worker.py``), writes both to a CSV file and prints the ratios. SimGrid is Debian's
package ``python3-simgrid`` (``apt-get install python3-simgrid``), which only the system's Python can
import; the rest runs in the environment of ``layerwise``. Takes about a minute and a half on two cores.

SimGrid shares links by max-min fairness among the messages that are under way. Its network model is CM02
without corrections for TCP: latencies and bandwidths as given (factors of 1), no share of the bandwidth
for acknowledgements (``crosstraffic:0``), no window (``TCP-gamma:0``) and no slow-down by round-trip
times (``weight-S:0``), none of which the planner's links have. One remains: where messages share a link,
SimGrid gives each a share that is inversely proportional to the latency of its route, as TCP does, while
the planner shares evenly. ``--no-latency`` takes all latencies away, and the difference with them.
``--model LV08`` is SimGrid's default instead, whose factors were fitted to TCP: 13.01 on latencies, 0.97 on
bandwidths.
"""

import csv
import json
import math
import statistics
import subprocess
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from planner.cost import collectives
from planner.cost.collectives import Library
from planner.devices import Cluster, Router, bus_kinds, cluster, device_kinds, network_kinds, two_level
from planner.devices.schema import FatTree
from planner.errors import LayerwiseError, UsageError

OUTPUT: Final = Path(__file__).with_suffix(".csv")
WORKER: Final = Path(__file__).with_name("simgrid_worker.py")
INTERPRETER: Final = "/usr/bin/python3"
MISSING: Final = "SimGrid is missing: apt-get install python3-simgrid, for the system's Python"
SIZES: Final = (2**10, 2**15, 2**20, 2**25, 2**28)
LARGE: Final = 0.15
SETTINGS: Final = {
    "CM02": (
        "network/model:CM02", "network/latency-factor:1", "network/bandwidth-factor:1", "network/weight-S:0",
        "network/TCP-gamma:0", "network/crosstraffic:0",
    ),
    "LV08": ("network/model:LV08",),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Row:
    """One case: which groups of which machine did what, and how long that takes."""

    topology: str
    collective: str
    bytes: int
    ours_s: float
    simgrid_s: float
    ratio: float


@dataclass(frozen=True, slots=True)
class Case:
    """One case before it is simulated; ``axes`` None is a case over all axes."""

    collective: str
    axes: tuple[int, ...]
    num_bytes: int


def machines() -> dict[str, Cluster]:
    """Return a machine of every topology."""
    wire = bus_kinds()["shm"].model_copy(update={"duplex": "half"})
    leaves = FatTree(kind="fat_tree", per_switch=4, spines=2, uplink_bandwidth_bytes_per_s=1.25e9)
    ethernet = network_kinds()["eth10"].model_copy(update={"topology": leaves})
    t4, pcie3 = device_kinds()["t4"], bus_kinds()["pcie3"]
    return {
        "NVSwitch, 8": cluster("8xa100-nvlink"),
        "PCIe, 2 switches of 4": cluster("8xk20-pcie"),
        "PCIe, 2 sockets x 2 switches x 2": cluster("8xk80-qpi"),
        "NVLink and Ethernet, 4 x 4": cluster("4x4-p100-eth10"),
        "fat tree, 4 leaves x 4, 2 spines, 2:1": two_level("leaves", 16, 1, t4, pcie3, ethernet),
        "torus, 4 x 4": cluster("16xhmc-torus"),
        "H-tree, 16": cluster("16xhmc-htree"),
        "half-duplex star, 8": two_level("half", 1, 8, device_kinds()["cpu"], wire),
    }


def priced(router: Router, case: Case) -> float:
    """Return the planner's seconds of one algorithm."""
    axes, size = case.axes, math.prod(router.mesh.shape[a] for a in case.axes)
    path = router.ring(axes)
    by_name: dict[str, Callable[[], float]] = {
        "all_gather": lambda: collectives.ring_all_gather_s(case.num_bytes, size, path),
        "reduce_scatter": lambda: collectives.ring_reduce_scatter_s(case.num_bytes, size, path),
        "all_reduce_ring": lambda: collectives.ring_all_reduce_s(case.num_bytes, size, path),
        "all_reduce_tree": lambda: collectives.tree_all_reduce_s(router, axes, case.num_bytes),
        "all_reduce_halving": lambda: collectives.halving_doubling_all_reduce_s(router, axes, case.num_bytes),
        "all_reduce_levels": lambda: collectives.hierarchical_all_reduce_s(
            router, axes, 1, case.num_bytes, Library.GLOO
        ),
        "all_to_all": lambda: collectives.exchange_s(router, axes, case.num_bytes),
        "halo": lambda: collectives.halo_s(router, axes, case.num_bytes),
        "broadcast": lambda: collectives.binomial_broadcast_s(router, axes, case.num_bytes),
    }
    return by_name[case.collective]()


NAMES: Final = (
    "all_reduce_ring", "all_reduce_tree", "all_reduce_halving", "all_gather", "reduce_scatter", "all_to_all", "halo",
    "broadcast",
)  # fmt: skip


def cases(graph: Cluster) -> list[Case]:
    """Return every collective over all ranks, then in several groups at once along each axis."""
    num_axes = len(graph.mesh().axes)
    everything = tuple(range(num_axes))
    named = [(name, everything) for name in NAMES]
    if num_axes > 1:
        named.append(("all_reduce_levels", everything))
        named += [(name, (axis,)) for axis in everything for name in NAMES]
    return [Case(name, axes, size) for name, axes in named for size in SIZES]


def job(graph: Cluster, todo: Sequence[Case], settings: Iterable[str]) -> dict[str, Any]:
    """Return what the worker reads: links, the paths of every pair, and the groups of every case."""
    ids = [device.id for device in graph.devices]
    hops = {(link.a, link.b): (index, 0) for index, link in enumerate(graph.links)}
    hops |= {(link.b, link.a): (index, 1) for index, link in enumerate(graph.links)}
    mesh, router = graph.mesh(), Router(graph, graph.mesh())
    entries = []
    for case in todo:
        groups = [[ids[position] for position in group] for group in mesh.groups(case.axes)]
        size = len(groups[0])
        chunks = collectives.tree_chunks(router, case.axes, case.num_bytes)
        inner = size // mesh.shape[case.axes[0]]
        entry = {"collective": case.collective, "groups": groups, "bytes": case.num_bytes}
        entries.append({**entry, "chunks": chunks, "inner": inner})
    return {
        "settings": list(settings),
        "devices": ids,
        "links": [
            (str(i), link.bandwidth_bytes_per_s, link.latency_s, link.duplex) for i, link in enumerate(graph.links)
        ],
        "ways": {
            f"{src}|{dst}": [(share, [hops[hop] for hop in way]) for share, way in graph.paths.ways(src, dst)]
            for src in ids for dst in ids if src != dst
        },
        "cases": entries,
    }  # fmt: skip


def simulated(content: dict[str, Any]) -> list[float]:
    """Return SimGrid's seconds of every case.

    Raises:
        UsageError: SimGrid is missing, or failed; says what it printed.
    """
    try:
        done = subprocess.run(
            [INTERPRETER, str(WORKER)], input=json.dumps(content), capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise UsageError(f"{MISSING} ({error})") from error
    if "No module named 'simgrid'" in done.stderr:
        raise UsageError(MISSING)
    if done.returncode:
        raise UsageError(f"SimGrid failed:\n{done.stderr.strip()[-2000:]}")
    found: list[float] = json.loads(done.stdout)
    return found


def compared(name: str, graph: Cluster, settings: Iterable[str]) -> list[Row]:
    """Return every case of one machine."""
    todo = cases(graph)
    router, axes = Router(graph, graph.mesh()), graph.mesh().axes
    rows = []
    for case, simgrid_s in zip(todo, simulated(job(graph, todo, settings)), strict=True):
        ours_s = priced(router, case)
        along = "" if len(case.axes) == len(axes) else f", groups along {axes[case.axes[0]].name}"
        rows.append(Row(name + along, case.collective, case.num_bytes, ours_s, simgrid_s, ours_s / simgrid_s))
    return rows


def summary(rows: Sequence[Row]) -> Table:
    """Return the ratios ours / SimGrid by topology and collective."""
    table = Table(box=box.SIMPLE_HEAD, title="Ours / SimGrid, over all sizes")
    for header in ("topology", "collective"):
        table.add_column(header)
    for header in ("median", "lowest", "highest", "beyond 15%"):
        table.add_column(header, justify="right")
    found = defaultdict[tuple[str, str], list[float]](list)
    for row in rows:
        found[row.topology, row.collective].append(row.ratio)
    for (topology, collective), ratios in found.items():
        beyond = sum(abs(ratio - 1) > LARGE for ratio in ratios)
        figures = (f"{statistics.median(ratios):.3f}", f"{min(ratios):.3f}", f"{max(ratios):.3f}", str(beyond or ""))
        table.add_row(topology, collective, *figures)
    return table


def write(rows: Sequence[Row], output: Path) -> None:
    """Write the CSV file, its times with six digits."""
    with output.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            shown = {"ours_s": f"{row.ours_s:.6g}", "simgrid_s": f"{row.simgrid_s:.6g}", "ratio": f"{row.ratio:.4f}"}
            writer.writerow({**asdict(row), **shown})


def main(
    *,
    model: Annotated[Literal["CM02", "LV08"], typer.Option(help="SimGrid's network model.")] = "CM02",
    no_latency: Annotated[bool, typer.Option("--no-latency", help="Take the latencies of all links as 0.")] = False,
    only: Annotated[str, typer.Option(metavar="TEXT", help="Topologies whose name has it.")] = "",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="CSV file; by default the shipped one.")] = None,
) -> None:
    """Compare the planner's collectives with SimGrid's."""
    notes = Console(stderr=True, highlight=False, markup=False)
    rows: list[Row] = []
    try:
        for name, graph in machines().items():
            if only in name:
                notes.print(name)
                links = tuple(replace(link, latency_s=0.0) for link in graph.links) if no_latency else graph.links
                rows += compared(name, replace(graph, links=links), SETTINGS[model])
    except LayerwiseError as error:
        notes.print(f"error: {error}")
        raise typer.Exit(error.exit_code) from error
    Console(highlight=False, width=130).print(summary(rows))
    ratios = [row.ratio for row in rows]
    if ratios:
        beyond = sum(abs(ratio - 1) > LARGE for ratio in ratios)
        notes.print(f"{len(rows)} cases: median {statistics.median(ratios):.3f}, {beyond} beyond 15%")
    if output is not None or (model == "CM02" and not only and not no_latency):
        write(rows, output or OUTPUT)
        notes.print(f"wrote {output or OUTPUT}")


if __name__ == "__main__":
    typer.run(main)
