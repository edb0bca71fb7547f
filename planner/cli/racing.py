"""What ``compare --measure`` runs: every strategy that can be, in one job of local processes."""

import os
from typing import TYPE_CHECKING, Any, Final

from planner.cli.options import Timed
from planner.cli.terminal import Terminal
from planner.errors import UsageError
from planner.report.measured import Raced, race_row
from planner.units import format_bytes

if TYPE_CHECKING:
    from planner.api import Comparison
    from planner.plan import Plan

RANKS_PER_CORE: Final = 8
"""Local processes that a core is asked to stand for, at most."""


def refuse_too_many(num_ranks: int, what: str) -> None:
    """Refuse more local processes than this host's cores can stand for.

    Raises:
        UsageError: with both numbers.
    """
    cores = len(os.sched_getaffinity(0))
    if num_ranks > RANKS_PER_CORE * cores:
        raise UsageError(
            f"{what} needs {num_ranks} processes, this host has {cores} cores. Run it on its cluster with torchrun, or "
            f"plan for this host with --cluster local-{cores}."
        )


def refuse_unraceable(name: str | None, devices: int | None) -> None:
    """Refuse a machine that local processes cannot stand for, before anything is measured or traced.

    Args:
        name: of its cluster.
        devices: that are asked for, if it is not all of a cluster.

    Raises:
        UsageError: it has too many devices, or is none.
    """
    from planner.devices.library import cluster
    from planner.measure.host import parse_local

    if devices is not None:
        count = devices
    elif name is None:
        return  # refused with the usual message
    elif name.startswith("local-"):
        count = parse_local(name)
    else:
        count = len(cluster(name).devices)
    refuse_too_many(count, "compare --measure")


def raced(found: "Comparison", timed: Timed, terminal: Terminal, num_devices: int) -> tuple[Raced, ...]:
    """Run the strategies that fit and that the runtime takes, a step of each in turn; one job for each number of ranks.

    Args:
        found: the strategies.
        timed: how many steps.
        terminal: for warnings.
        num_devices: of the whole machine: a process has as many threads as beside that many, also where fewer run.

    Raises:
        RunError: a process failed or was not done in time.
    """
    plans = found.plans()
    reasons = [_reason(plan, fits) for plan, fits in zip(plans, found.fits, strict=True)]
    first: dict[str, str] = {}  # equal plans run once
    for plan, row, reason in zip(plans, found.rows, reasons, strict=True):
        if not reason:
            first.setdefault(plan.digest, row.solver)
    jobs: dict[int, dict[str, Plan]] = {}  # by their number of ranks
    for plan, reason in zip(plans, reasons, strict=True):
        if not reason:
            jobs.setdefault(plan.mesh.size, {})[plan.digest] = plan
    samples = {
        digest: steps for job in jobs.values() for digest, steps in _run(job, timed, terminal, num_devices).items()
    }
    rows = []
    for plan, row, reason in zip(plans, found.rows, reasons, strict=True):
        same = first.get(plan.digest, row.solver)
        note = f"not run: {reason}" if reason else (f"the same plan as {same}" if same != row.solver else "")
        measured = [] if reason else samples[plan.digest]
        rows.append(race_row(row.solver, plan.totals.step_s, measured, note, is_planned=row is found.planned))
    return tuple(rows)


def _reason(plan: "Plan", fits: bool) -> str:
    """Return why a plan cannot be run; empty if it can."""
    if not fits:
        limit = format_bytes(plan.search.memory_limit_bytes)
        return f"needs {format_bytes(plan.totals.memory_bytes)} of memory per device, the limit is {limit}"
    return ""


def _run(plans: dict[str, "Plan"], timed: Timed, terminal: Terminal, num_devices: int) -> dict[str, list[float]]:
    from planner.measure.host import threads_per_rank
    from runtime.launch import run_local

    size = next(iter(plans.values())).mesh.size
    needed = size * sum(plan.totals.memory_bytes for plan in plans.values())
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        terminal.err.print(
            f"warning: {len(plans)} strategies on {size} processes need about {format_bytes(needed)} at once, this "
            f"host has {format_bytes(there)}"
        )
    argument: dict[str, Any] = {
        "plans": {name: plan.to_json() for name, plan in plans.items()},
        "rounds": timed.steps,
        "warmup": timed.warmup,
    }
    (samples, *_) = run_local(
        "runtime.training:race", argument, num_ranks=size, timeout_s=timed.timeout,
        threads_per_rank=threads_per_rank(num_devices),
    )  # fmt: skip
    assert isinstance(samples, dict)
    return samples
