"""`layerwise doctor`: does everything that training needs work on this machine?"""

import os
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Final

import typer

from planner.cli.launched import is_rank
from planner.cli.racing import refuse_too_many
from planner.cli.terminal import Terminal, rendered
from planner.errors import LayerwiseError, RunError, UsageError
from planner.report.tables import Table
from planner.units import format_seconds

STRATEGIES: Final = ("data", "model", "model-in", "conv-data-fc-model", "channel-filter", "spatial", "sample-spatial")
SHARING: Final = (2, 4)
"""Ranks that share the GPUs of a machine that has fewer."""

Row = dict[str, Any]


def doctor(
    terminal: Terminal,
    ranks: Annotated[
        int | None,
        typer.Option(
            help="Processes to start here, 2 if left out; under torchrun its ranks are used.",
            min=1,
            max=64,
            show_default=False,
        ),
    ] = None,
    timeout: Annotated[
        float, typer.Option(help="Seconds after which a group of checks is given up.", min=1, max=86_400)
    ] = 180.0,
) -> None:
    """Check this machine: versions, devices and settings, every collective, and a small training against one device.

    Checks run on local processes, or on the ranks of torchrun or srun: over gloo on the CPU, over NCCL where every rank
    has a GPU, and with several ranks on one GPU where there are fewer. Exits with 5 where a check fails.
    """
    under_launcher = is_rank()
    if under_launcher and ranks is not None:
        raise UsageError("--ranks starts processes here, but torchrun has started this one: leave it out")
    if not under_launcher:
        refuse_too_many(ranks or 2, "doctor --ranks")
    if under_launcher:
        size, is_first = _world_size(), os.environ["RANK"] == "0"
    else:
        size, is_first = ranks or 2, True
    if is_first:
        terminal.out.print(rendered(_machine_table(size)))
        terminal.out.print()
    found = _as_rank(size, timeout) if under_launcher else _locally(size, timeout, terminal)
    if is_first:
        terminal.out.print(rendered(_checks_table(found)))
    failed = [row for row in found if row["reason"]]
    if failed:
        raise RunError(f"{len(failed)} of {len(found)} checks failed, the first: {_sentence(failed[0])}")
    if is_first:
        terminal.err.print(f"all {len(found)} checks passed")


def _world_size() -> int:
    try:
        return int(os.environ["WORLD_SIZE"])
    except ValueError as error:
        raise UsageError(f"WORLD_SIZE must be a whole number, not {os.environ['WORLD_SIZE']!r}") from error


def _as_rank(size: int, timeout_s: float) -> list[Row]:
    """Check as one rank of torchrun's; return the rows of this rank."""
    import torch

    from runtime.doctor import examine
    from runtime.launch import initialize, leave

    process = initialize(timeout_s=timeout_s)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    argument: dict[str, Any] = {"plans": _plans(size), "timeout_s": timeout_s, "shared": False}
    found = examine(argument, process)
    if 0 < torch.cuda.device_count() < local and not any(row["reason"] for row in found):
        found += examine({**argument, "shared": True}, process)
    if not any(row["reason"] for row in found):
        leave()  # where a group is broken, nobody can wait for anybody
    return found


def _locally(size: int, timeout_s: float, terminal: Terminal) -> list[Row]:
    """Start the jobs that this machine can run, one after another; return the rows of all."""
    import torch

    num_gpus = torch.cuda.device_count()
    found = _job(size, False, timeout_s, terminal)
    if 0 < num_gpus < size:
        found += _job(num_gpus, False, timeout_s, terminal)  # NCCL cannot put two ranks on one GPU
        for sharing in SHARING:
            found += _job(sharing, True, timeout_s, terminal) if sharing > num_gpus else []
    return found


def _job(size: int, shared: bool, timeout_s: float, terminal: Terminal) -> list[Row]:
    from planner.measure.host import threads_per_rank
    from runtime.launch import run_local

    kind = "sharing GPUs" if shared else "each with what it finds"
    # a collective gives up first, so that the report names it
    argument: dict[str, Any] = {"plans": _plans(size), "timeout_s": timeout_s / 2, "shared": shared}
    try:
        with terminal.working(f"checking with {size} local processes, {kind}"):
            results = run_local(
                "runtime.doctor:examine", argument, num_ranks=size, timeout_s=timeout_s,
                threads_per_rank=threads_per_rank(size),
            )  # fmt: skip
    except LayerwiseError as error:
        return [{"where": f"{size} local processes", "check": "start and end", "seconds": 0.0, "reason": str(error)}]
    return _merged(results)  # type: ignore[arg-type]  # what examine returns


def _plans(size: int) -> dict[str, str]:
    """Return plans of the little network for so many ranks, by strategy."""
    import torch

    from planner.api import Origin, plan_model
    from runtime.doctor import INPUT_SHAPE, SAMPLES_PER_RANK, network

    net = network().to("meta")
    x = torch.empty(SAMPLES_PER_RANK * size, *INPUT_SHAPE, dtype=torch.float64, device="meta")
    origin = Origin("doctor", "runtime.doctor:network")
    return {
        name: plan_model(net, (x,), devices=size, solver=name, all_devices=True, origin=origin).to_json()
        for name in STRATEGIES
    }


def _merged(ranks: Sequence[Sequence[Row]]) -> list[Row]:
    """Return one row for each check: the longest time, and what the ranks say where it failed."""
    found = []
    for rows in zip(*ranks, strict=True):
        reasons = [f"rank {rank}: {row['reason']}" for rank, row in enumerate(rows) if row["reason"]]
        seconds = max(row["seconds"] for row in rows)
        found.append({**rows[0], "seconds": seconds, "reason": reasons[0] if reasons else ""})
    return found


def _machine_table(size: int) -> Table:
    from planner.measure.surroundings import surroundings

    facts = surroundings(size)
    return Table("This machine", ("what", "found", "to do"), tuple((f.name, f.value, f.advice) for f in facts), 3)


def _checks_table(found: Iterable[Row]) -> Table:
    rows = tuple(
        (
            row["where"],
            row["check"],
            "FAILED" if row["reason"] else "ok",
            row["reason"] or format_seconds(row["seconds"]),
        )
        for row in found
    )
    return Table("Checks", ("where", "check", "result", "seconds, or why"), rows, num_text=4)


def _sentence(row: Row) -> str:
    return f"{row['where']}, {row['check']}: {row['reason']}"
