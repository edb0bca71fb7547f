"""The network of a plan on other numbers of devices of a machine."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from planner.api.comparing import Comparison
from planner.api.planning import Planner
from planner.api.what_if import cases, what_if
from planner.plan.schema import Plan
from planner.report.scaling import ScalePoint
from planner.report.tables import counted


def scaled(
    plan: Plan, planner: Planner, devices: Sequence[int], progress: Callable[[str], None] = lambda _: None
) -> Iterator[ScalePoint]:
    """Plan the same batch for the first so many devices of a machine, each with all that ``auto`` tries.

    Args:
        plan: whose batch and memory limit hold.
        planner: of its model on the machine.
        devices: how many.
        progress: is told what is being done.

    Raises:
        UsageError: the machine has no such part.
    """
    if not devices:
        return
    options = replace(planner.options, memory_limit_bytes=plan.search.memory_limit_bytes, io=None)
    asked = cases([planner.machine], devices=sorted(devices), batches=[plan.batch])
    said = what_if(
        replace(planner, options=options), asked,
        progress=lambda case: progress(f"planning for {counted(case.num_devices, 'device')}"),
    )  # fmt: skip
    for outcome in said:
        found = outcome.comparison
        planned_s = None if found is None else found.planned.timeline.step_s
        yield ScalePoint(outcome.case.num_devices, planned_s, None if found is None else _data_s(found))


def _data_s(found: Comparison) -> float | None:
    rows = zip(found.rows[:-1], found.fits[:-1], strict=True)
    return next((row.timeline.step_s for row, fits in rows if row.solver == "data" and fits), None)
