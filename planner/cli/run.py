"""`layerwise run`: execute a plan, time it, hold it against the prediction."""

import os
import statistics
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from planner.cli.terminal import Terminal
from planner.errors import UsageError
from planner.plan import Plan
from planner.units import format_seconds

TIMEOUT_S = 1800.0


def run(
    path: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan file.", show_default=False)],
    terminal: Terminal,
    steps: Annotated[int, typer.Option(help="Timed steps.", min=1, max=100_000)] = 10,
    warmup: Annotated[int, typer.Option(help="Steps before them.", min=0, max=1000)] = 2,
    timeout: Annotated[float, typer.Option(help="Seconds after which the run is given up.", min=1)] = TIMEOUT_S,
) -> None:
    """Run a plan on synthetic data and print predicted and measured step time.

    Under torchrun, this process is one of the plan's ranks; otherwise local processes are started.
    The model's code is run, so run plans of people you trust.
    """
    from planner.plan.schema import require_single_rank_count

    found = Plan.load(path)
    argument = {"plan": found.to_json(), "steps": steps, "warmup": warmup}
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        require_single_rank_count(found, int(os.environ["WORLD_SIZE"]))
        measured = _as_rank(argument)
        if measured is None:
            return
    else:
        measured = _locally(found, argument, timeout)
    _report(found, measured, terminal)


def _as_rank(argument: dict[str, Any]) -> dict[str, Any] | None:
    """Run as one rank of torchrun's; return the measurements on rank 0."""
    from runtime.launch import initialize, leave
    from runtime.training import measure_plan

    process = initialize()
    measured = measure_plan(argument, process)
    leave()
    return measured if process.rank == 0 else None


def _locally(plan: Plan, argument: dict[str, Any], timeout_s: float) -> dict[str, Any]:
    from planner.measure.host import threads_per_rank
    from runtime.launch import run_local

    size, cores = plan.mesh.size, len(os.sched_getaffinity(0))
    if size > 8 * cores:
        raise UsageError(
            f"the plan needs {size} processes, this host has {cores} cores. Run it on its cluster with torchrun, or "
            f"plan for this host with --cluster local-{cores}."
        )
    results = run_local(
        "runtime.training:measure_plan", argument, num_ranks=size, timeout_s=timeout_s,
        threads_per_rank=threads_per_rank(size),
    )  # fmt: skip
    measured = results[0]
    assert isinstance(measured, dict)
    return measured


def _report(plan: Plan, measured: dict[str, Any], terminal: Terminal) -> None:
    from planner.api import machine_of, reprice

    machine = machine_of(cluster=f"local-{plan.mesh.size}")
    here_s = reprice(plan, machine).step_s
    step_s = statistics.median(measured["steps_s"])
    table = Table(
        "",
        "step",
        "samples/s",
        "against measured",
        title=f"{plan.model.name}, batch {plan.batch}, {plan.mesh.size} ranks",
    )
    rows = []
    if machine.graph.digest != plan.cluster.sha256:
        terminal.err.print(
            f"warning: the plan was made for {plan.cluster.name}; this is another machine",
            highlight=False,
        )
        rows.append((f"predicted for {plan.cluster.name}", plan.totals.step_s))
    rows += [
        ("predicted for this host", here_s),
        ("measured", step_s),
        ("measured, compute only", measured["compute_s"]),
    ]
    for name, seconds in rows:
        off = "" if name == "measured" else f"{seconds / step_s - 1:+.0%}"
        table.add_row(name, format_seconds(seconds), f"{plan.batch / seconds:.4g}", off)
    terminal.out.print(table)
