"""Two hosts whose ranks a launcher has started, one of it on each: plans train as one device does."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from runtime.namespaces import Hosts, two_hosts
from support.equality import TOLERANCE, loss_difference, planner_for, reference

pytestmark = [pytest.mark.dist, pytest.mark.netns]
NET, TIMEOUT_S = "lenet5", 240


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with two_hosts(None) as found:
        yield found


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file with the planned strategy of a small network and two fixed ones."""
    path = tmp_path_factory.mktemp("plans") / "cases.json"
    plans = [planner_for(NET, 2, solver=solver).plan() for solver in ("auto", "model", "spatial")]
    path.write_text(json.dumps([{"net": NET, "plan": plan.to_json()} for plan in plans]), encoding="utf-8")
    return path


def start(hosts: Hosts, index: int, command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[str]:
    """Run a command on a host; its output is that of the test."""
    own = {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": hosts.interface(index),
    }  # fmt: skip
    outside = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    return subprocess.Popen([*hosts.command_prefix(index), *command], env={**outside, **own, **environment}, text=True)


def run(
    hosts: Hosts,
    cases: Path,
    folder: Path,
    commands: Sequence[Sequence[str]],
    environments: Sequence[Mapping[str, str]],
) -> None:
    """Start one launcher on each host, wait for both, and hold what their ranks wrote against one device."""
    with ExitStack() as stack:
        started = []
        for index, (command, environment) in enumerate(zip(commands, environments, strict=True)):
            process = start(hosts, index, [*command, str(cases), str(folder)], environment)
            stack.callback(process.kill)
            started.append(process)
        assert [process.wait(TIMEOUT_S) for process in started] == [0, 0]
    results = [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)]
    expected = reference(NET)
    for result in results:
        assert (result["world_size"], result["local_rank"], len(result["found"])) == (2, 0, 3)
        assert max(found["worst"] for found in result["found"]) < TOLERANCE
    for shares in zip(*(result["found"] for result in results), strict=True):
        losses = [sum(of_ranks) for of_ranks in zip(*(share["losses"] for share in shares), strict=True)]
        assert loss_difference(losses, expected) < TOLERANCE


def test_torchrun_on_two_hosts_meets_over_their_link(hosts: Hosts, cases: Path, tmp_path: Path) -> None:
    commands = [
        [
            sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1",
            "--rdzv-backend", "c10d", "--rdzv-id", "7", "--rdzv-endpoint", f"{hosts.address(0)}:29400",
            "--rdzv-conf", f"is_host={index == 0}".lower(),  # the hosts of the test share their name
            "--local-addr", hosts.address(index), "-m", "support.joined",
        ]
        for index in (0, 1)
    ]  # fmt: skip
    run(hosts, cases, tmp_path, commands, [{}, {}])


def test_tasks_of_srun_meet_without_torchrun(hosts: Hosts, cases: Path, tmp_path: Path) -> None:
    step = {
        "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
        "SLURM_STEP_NODELIST": "10.0.0.[1-2]", "SLURM_LOCALID": "0",
    }  # fmt: skip
    tasks = [{**step, "SLURM_PROCID": str(index), "SLURM_NODEID": str(index)} for index in (0, 1)]
    command = [sys.executable, "-m", "support.joined"]
    run(hosts, cases, tmp_path, [command, command], tasks)
