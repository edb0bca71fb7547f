"""Two processes, one of them slowed down: pieces in proportion to their speeds against equal pieces.

    python -m examples.benchmarks.unequal --model torchvision:squeezenet1_1 --image 3x96x96 --batch 36

gives the second process so much of a processor (a cgroup's CPU quota; where those are not writable, a busy loop shares
its processor), measures rates and links of both as ``layerwise profile links`` does, which finds their speeds, plans
with ``--shares equal`` and without, and trains both plans in the same slowed processes, a step of each after the other.
Prints medians on the slowest rank, predictions beside them.
"""

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from examples.benchmarks.on_hosts import iqr, ratio, ratio_interval
from planner.api import Options, Origin, example_inputs, machine_of, machine_of_links, prepare
from planner.devices.graph import Cluster
from planner.errors import LayerwiseError
from planner.frontend.source import load_model
from planner.plan import Plan
from runtime.launch import JsonValue, Process, run_local
from runtime.measuring import link_times
from runtime.training import race

GROUPS: Final = (Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup"))
"""Where the kernel keeps groups of processes and their quotas, versions 1 and 2."""
PERIOD_US: Final = 10_000
SLOW: Final = 1
"""The rank that is slowed down."""


@contextlib.contextmanager
def quota(share: float) -> Iterator[list[str]]:
    """Give a group for each process, the second one so much of a processor; none where groups are not writable.

    Both groups have a large weight, so that other work on this host disturbs neither.
    """
    root = next((r for r in GROUPS if (r / "cpu.cfs_quota_us").exists() or (r / "cgroup.controllers").exists()), None)
    folders = [] if root is None else [root / f"layerwise-{os.getpid()}-{rank}" for rank in range(2)]
    try:
        for rank, folder in enumerate(folders):
            folder.mkdir()
            allowed = str(round(share * PERIOD_US)) if rank == SLOW else None
            if (folder / "cpu.max").exists():
                (folder / "cpu.weight").write_text("10000")
                (folder / "cpu.max").write_text(f"{allowed or 'max'} {PERIOD_US}")
            else:
                (folder / "cpu.shares").write_text(str(2**18))
                (folder / "cpu.cfs_period_us").write_text(str(PERIOD_US))
                (folder / "cpu.cfs_quota_us").write_text(allowed or "-1")
        usable = folders
    except OSError:
        usable = []
    try:
        yield [str(folder) for folder in usable]
    finally:
        for folder in folders:
            with contextlib.suppress(OSError):
                folder.rmdir()


@contextlib.contextmanager
def slowed(groups: Sequence[str], rank: int) -> Iterator[None]:
    """Put this process into its group; without groups, a busy loop on its processor slows the second one down."""
    if groups:
        Path(groups[rank], "cgroup.procs").write_text(str(os.getpid()))
    if groups or rank != SLOW:
        yield
        return
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as loop:  # inherits the processor
        try:
            yield
        finally:
            loop.kill()


def slowed_links(argument: dict[str, Any], process: Process) -> JsonValue:
    """Return what ``layerwise profile links`` measures."""
    with slowed(argument["groups"], process.rank):
        return link_times(argument, process)


def slowed_race(argument: dict[str, Any], process: Process) -> JsonValue:
    """Return the seconds of every step of every plan, see ``runtime.training.race``."""
    with slowed(argument["groups"], process.rank):
        return race(argument, process)


def measured(groups: Sequence[str]) -> Cluster:
    """Return both processes as a machine."""
    argument = {"nodes": 1, "ranks_per_node": 2, "groups": groups}
    found = run_local(f"{__spec__.name}:slowed_links", argument, num_ranks=2, timeout_s=600.0, threads_per_rank=1)
    assert isinstance(found[0], dict)
    return machine_of_links("unequal", 1, 2, found[0])


def planned(machine: Cluster, model: str, image: tuple[int, ...], batch: int, shares: str) -> Plan:
    """Return the plan with these pieces."""
    options = Options(all_devices=True, shares=shares)  # type: ignore[arg-type]  # one of both names
    module = load_model(model, {}).module
    return prepare(module, example_inputs([image], batch), machine_of(machine), options, Origin(model, model)).plan()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="torchvision:squeezenet1_1")
    parser.add_argument("--image", default="3x96x96", help="of one sample, channels first")
    parser.add_argument("--batch", type=int, default=36, help="samples of both processes together")
    parser.add_argument("--share", type=float, default=0.5, help="of a processor for the second process")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    image = tuple(map(int, arguments.image.split("x")))
    try:
        with quota(arguments.share) as groups:
            print(f"the second process is slowed by {'a CPU quota' if groups else 'a busy loop'}")
            machine = measured(groups)
            print(f"measured speeds: {', '.join(f'{device.speed:g}' for device in machine.devices)}")
            plans = {shares: planned(machine, arguments.model, image, arguments.batch, shares)
                     for shares in ("equal", "auto")}  # fmt: skip
            argument = {"plans": {name: plan.to_json() for name, plan in plans.items()}, "rounds": arguments.rounds,
                        "warmup": 2, "groups": groups}  # fmt: skip
            function = f"{__spec__.name}:slowed_race"
            samples, _ = run_local(function, argument, num_ranks=2, timeout_s=600.0, threads_per_rank=1)
    except LayerwiseError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    assert isinstance(samples, dict)
    for name, plan in plans.items():
        inside = next(layer for layer in plan.stages[0].layers if layer.op == "conv")
        median = statistics.median(samples[name])
        print(f"{name:6} {inside.id}: {inside.assigned()!s:20} measured {median:.3f} s (iqr {iqr(samples[name]):.3f}), "
              f"predicted {plan.totals.step_s:.3f} s")  # fmt: skip
    low, high = ratio_interval(samples["equal"], samples["auto"])
    predicted = plans["equal"].totals.step_s / plans["auto"].totals.step_s
    print(f"in proportion against equal pieces: {ratio(samples['equal'], samples['auto']):.2f} times as fast "
          f"[{low:.2f}, {high:.2f}], predicted {predicted:.2f}")  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
