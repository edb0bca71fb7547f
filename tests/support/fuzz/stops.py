"""Ctrl-C at a chosen moment of a search, and what it leaves behind."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Final

from planner.cli import main
from planner.errors import EXIT_INTERRUPTED
from planner.plan import Plan
from support.command_line import Ran, layerwise

PLAN: Final = ("plan", "lenet5", "--cluster", "2x2-t4-eth10", "--batch", "64", "-q")
SECONDS: Final = 0.6
"""Of CPU time: about what planning it takes."""


def stopped(folder: Path, part: float) -> str:
    """Plan into an empty folder, with Ctrl-C after a part of the time; return what is wrong then, or nothing."""
    ran = Ran(EXIT_INTERRUPTED, "", "")
    with suppress(KeyboardInterrupt), interrupted_after(SECONDS * part):
        ran = layerwise(*PLAN, "-o", folder / "plan.json")  # the last lines of `main` raise it themselves
    left = sorted(path.name for path in folder.iterdir())
    if left not in ([], ["plan.json"]):
        return f"left behind: {left}"
    if ran.code not in {0, EXIT_INTERRUPTED} or (ran.code == 0 and not left):
        return f"exit code {ran.code}: {ran.err}"
    if left:
        plan = Plan.load(folder / "plan.json")
        if plan.search.lower_bound_s > plan.totals.step_s * (1 + 1e-9):
            return f"the bound {plan.search.lower_bound_s} is above the step {plan.totals.step_s}"
    return ""


@contextmanager
def interrupted_after(cpu_s: float) -> Iterator[None]:
    """Raise ``KeyboardInterrupt`` wherever a command is then, as Ctrl-C does; not in what is around it."""

    def ring(_number: int, frame: FrameType | None) -> None:
        while frame is not None and frame.f_code is not main._run.__code__:
            frame = frame.f_back
        if frame is not None:
            raise KeyboardInterrupt
        signal.setitimer(signal.ITIMER_PROF, 1e-3)

    before = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
