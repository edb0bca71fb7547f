"""Ranks that ``srun`` has started: its variables under the names that ``torchrun`` gives them.

Only inside a job step of several tasks. The shell of ``sbatch`` and ``salloc`` has some of SLURM's variables too, but
none of a step (``SLURM_STEP_…``); a process there is no rank.
"""

import os
import re
from collections.abc import Mapping, MutableMapping
from typing import Final

from planner.errors import UsageError

_FIRST_PORT: Final = 20_000
_NUM_PORTS: Final = 10_000
_COUNT: Final = re.compile(r"(\d+)(?:\(x(\d+)\))?")
_RANGE: Final = re.compile(r"\[(\d+)[^\]]*\]")
_NEEDED: Final = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_STEP_TASKS_PER_NODE")


def adopt_step(environment: MutableMapping[str, str] = os.environ) -> None:
    """Add torchrun's variables to an environment that describes a task of ``srun`` and has none of them.

    ``MASTER_ADDR`` and ``MASTER_PORT`` are kept where they are set; else they are the step's first node and a port that
    follows from the numbers of job and step, so that every task comes to the same.

    Args:
        environment: of this process.

    Raises:
        UsageError: the environment describes a step, but not this task's place in it.
    """
    if "RANK" in environment or whole_number("SLURM_STEP_NUM_TASKS", 1, environment) < 2:
        return
    if missing := [name for name in _NEEDED if not environment.get(name)]:
        raise UsageError(
            f"srun has started this process as one of {environment['SLURM_STEP_NUM_TASKS']} tasks, but "
            f"{', '.join(missing)} not set: pass the environment on (srun --export=ALL)"
        )
    for name, value in variables_of(environment).items():
        environment.setdefault(name, value)


def whole_number(name: str, otherwise: int, environment: Mapping[str, str] = os.environ) -> int:
    """Return the value of a variable.

    Raises:
        UsageError: it is no whole number of at least 0.
    """
    text = environment.get(name, str(otherwise))
    if not text.isdecimal():
        raise UsageError(f"{name} in the environment must be a whole number of at least 0, not {text!r}")
    return int(text)


def variables_of(environment: Mapping[str, str]) -> dict[str, str]:
    """Return what torchrun would set in a task of a step."""
    counts = tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])
    nodes = environment.get("SLURM_STEP_NODELIST") or environment["SLURM_JOB_NODELIST"]
    job, step = (whole_number(name, 0, environment) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(counts[int(environment["SLURM_NODEID"])]),
        "MASTER_ADDR": first_node(nodes),
        "MASTER_PORT": str(_FIRST_PORT + (job + step) % _NUM_PORTS),
    }


def tasks_per_node(text: str) -> list[int]:
    """Return the tasks of every node, from such as ``4(x2),3`` for 4, 4 and 3."""
    found = [_COUNT.fullmatch(part) for part in text.split(",")]
    return [int(match[1]) for match in found if match is not None for _ in range(int(match[2] or 1))]


def first_node(text: str) -> str:
    """Return the first node of a list, from such as ``rack1-node[03-05,8],login`` rack1-node03."""
    return _RANGE.sub(r"\1", text).partition(",")[0]
