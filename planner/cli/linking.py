"""`layerwise profile links`: measure the links of the machine that the ranks run on."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from planner.cli.launched import is_rank
from planner.cli.planning import refuse_unwritable
from planner.cli.terminal import Terminal
from planner.errors import UsageError
from planner.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from planner.devices.graph import Cluster

TIMEOUT_S = 1800.0


def links(
    terminal: Terminal,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the cluster file goes.", show_default=False)],
    ranks: Annotated[
        int | None, typer.Option(help="Processes to start here; under torchrun its ranks are used.", min=2, max=64)
    ] = None,
    name: Annotated[str, typer.Option(help="Of the machine, in its file.")] = "measured",
    device: Annotated[
        str | None, typer.Option(help="Kind of the accelerators, see `layerwise clusters`; found by their name.")
    ] = None,
) -> None:
    """Time every collective over every level of this machine and write it as a cluster file.

    Under torchrun or srun on all hosts (rank 0 writes), or with --ranks on processes of this host. Plans for
    --cluster FILE then use the measured times.
    """
    under_launcher = is_rank()
    if os.environ.get("RANK", "0") == "0":
        refuse_unwritable(output)
    if under_launcher == (ranks is not None):
        raise UsageError(
            "give --ranks N, or start this command with torchrun on every host"
            if ranks is None
            else "--ranks starts processes here, but torchrun has started this one: leave it out"
        )
    from planner.api import machine_of_links, refuse_unknown_accelerator

    refuse_unknown_accelerator(device)
    nodes, per_node = _layout() if ranks is None else (1, ranks)
    argument = {"nodes": nodes, "ranks_per_node": per_node}
    with terminal.working("timing links"):
        found = _as_rank(argument) if ranks is None else _locally(argument, ranks)
    if found is None:
        return
    from planner.devices import write_cluster

    graph = machine_of_links(name, nodes, per_node, found, device)
    write_cluster(graph, output)
    terminal.err.print(_fits(graph, {"node": nodes}, per_node))
    terminal.err.print(f"wrote {output}: plan with --cluster {output if '/' in str(output) else f'./{output}'}")


def _layout() -> tuple[int, int]:
    """Return the nodes of torchrun's job and the ranks of each."""
    world, local = int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    if world < 2:
        raise UsageError("one rank has no links: start at least two (torchrun --nproc-per-node)")
    if world % local:
        raise UsageError(f"{world} ranks are not equally many on every host, {local} on this one")
    return world // local, local


def _as_rank(argument: dict[str, Any]) -> dict[str, Any] | None:
    from runtime.launch import initialize, leave
    from runtime.measuring import link_times

    process = initialize()
    found = link_times(argument, process)
    leave()
    return found if process.rank == 0 else None


def _locally(argument: dict[str, Any], ranks: int) -> dict[str, Any]:
    from planner.measure.host import threads_per_rank
    from runtime.launch import run_local

    found = run_local(
        "runtime.measuring:link_times", argument, num_ranks=ranks, timeout_s=TIMEOUT_S,
        threads_per_rank=threads_per_rank(ranks),
    )  # fmt: skip
    assert isinstance(found[0], dict)
    return found[0]


def _fits(graph: "Cluster", sizes: dict[str, int], per_node: int) -> Table:
    """Return latency and bandwidth of every measured collective, and how well they explain its times."""
    from planner.measure.links import fit_alpha_beta

    table = Table(
        title="Measured collectives",
        caption="latency and bandwidth of a ring that explains the times best, and how far it is off over the sizes; "
        "plans use the times themselves",
    )
    table.add_column("levels")
    for column in ("collective", "latency", "bandwidth / s", "off, median", "off, worst"):
        table.add_column(column, justify="left" if column == "collective" else "right")
    for measured in graph.collectives:
        count = 1
        for level in measured.levels:
            count *= sizes.get(level, per_node)
        fit = fit_alpha_beta(measured, count)
        table.add_row(
            "+".join(measured.levels), measured.kind.value, format_seconds(fit.latency_s),
            format_bytes(fit.bandwidth_bytes_per_s), f"{fit.median_error:.0%}", f"{fit.worst_error:.0%}",
        )  # fmt: skip
    return table
