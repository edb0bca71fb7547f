"""What it costs when gloo's threads interrupt those that send: two hosts of one processor each, step by step in turn.

    sudo python -m examples.benchmarks.interrupting --models mobilenet_v2 --rate 1gbit

plans as users would, and trains: steps with gloo's threads as the runtime has them scheduled
(``runtime.comm.scheduling``) and steps with threads that interrupt, as torch leaves them, follow each other in the same
processes. Prints medians, and the ratio of steps that follow each other with a 95 % bootstrap interval.
Needs root and iproute2; about 2 minutes for each network.
"""

import argparse
import os
import statistics
import sys
from typing import Any

from examples.benchmarks.on_hosts import Samples, plan_with, planner_on_hosts, ratio, ratio_interval
from examples.benchmarks.rivals import CASES
from planner.errors import LayerwiseError
from planner.plan.schema import Plan
from runtime.comm.scheduling import let_others_finish, watching
from runtime.launch import Process, run_local
from runtime.training import planned_step, timed_steps

STRATEGIES = ("data", "planned")
LETTING, INTERRUPTING = "lets finish", "interrupts"


def race(argument: dict[str, Any], process: Process) -> Samples:
    """Train plans with both kinds of threads.

    Args:
        argument: ``plans`` (name to JSON text), ``rounds``.
        process: of this rank.

    Returns:
        The seconds of every step on the slowest rank, by plan and kind of threads.
    """
    steps = {name: planned_step(Plan.from_json(text), process) for name, text in argument["plans"].items()}
    found: Samples = {f"{name}, {way}": [] for name in steps for way in (LETTING, INTERRUPTING)}
    for turn in range(argument["rounds"] + 1):
        for name, step in steps.items():
            for way in (LETTING, INTERRUPTING):
                if way == LETTING:
                    let_others_finish()
                else:
                    interrupt()
                timed_steps(step, 1, process.device)
                if turn:
                    found[f"{name}, {way}"] += timed_steps(step, 2, process.device)
    return found


def interrupt() -> None:
    """Schedule gloo's threads as the system schedules all threads."""
    for thread in watching():
        os.sched_setscheduler(thread, os.SCHED_OTHER, os.sched_param(0))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", choices=CASES, default=["mobilenet_v2"])
    parser.add_argument("--rate", default="1gbit")
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    try:
        for network in arguments.models:
            for line in lines(network, arguments.rate, arguments.rounds):
                print(line, flush=True)
    except LayerwiseError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def lines(network: str, rate: str, rounds: int) -> list[str]:
    """Return what was measured of a network."""
    with planner_on_hosts(CASES[network], rate) as (planner, hosts):
        plans = {name: plan_with(planner, solver="auto" if name == "planned" else name) for name in STRATEGIES}
        argument = {"plans": {name: plan.to_json() for name, plan in plans.items()}, "rounds": rounds}
        samples, _ = run_local(
            "examples.benchmarks.interrupting:race", argument, num_ranks=2, timeout_s=3600.0, hosts=hosts
        )
    assert isinstance(samples, dict)
    found = []
    for name in plans:
        mine, theirs = samples[f"{name}, {LETTING}"], samples[f"{name}, {INTERRUPTING}"]
        low, high = ratio_interval(theirs, mine)
        medians = f"{statistics.median(theirs):.3f} s interrupted, {statistics.median(mine):.3f} s not"
        found.append(f"{network} at {rate}, {name}: {medians}, {ratio(theirs, mine):.2f}x ({low:.2f} to {high:.2f})")
    return found


if __name__ == "__main__":
    sys.exit(main())
