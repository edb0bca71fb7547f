"""SLURM's variables of a task under torchrun's names."""

import pytest

from planner.errors import UsageError
from runtime.slurm import adopt_step, first_node, tasks_per_node

STEP = {
    "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "2", "SLURM_STEP_NUM_TASKS": "7", "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_TASKS_PER_NODE": "4,3",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}  # fmt: skip


def test_a_task_of_a_step_is_a_rank() -> None:
    found = dict(STEP)
    adopt_step(found)
    assert {name: value for name, value in found.items() if name not in STEP} == {
        "RANK": "5", "WORLD_SIZE": "7", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "3",
        "MASTER_ADDR": "gpu07", "MASTER_PORT": "24713",
    }  # fmt: skip


def test_a_master_that_is_given_stays() -> None:
    found = {**STEP, "MASTER_ADDR": "10.1.2.3", "MASTER_PORT": "5000"}
    adopt_step(found)
    assert (found["MASTER_ADDR"], found["MASTER_PORT"], found["RANK"]) == ("10.1.2.3", "5000", "5")


@pytest.mark.parametrize(
    "given",
    [
        {},
        {**STEP, "RANK": "0", "WORLD_SIZE": "2"},  # torchrun in a task of srun
        {**STEP, "SLURM_STEP_NUM_TASKS": "1"},  # an interactive shell
        {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8"},  # the script of sbatch
    ],
)
def test_elsewhere_nothing_changes(given: dict[str, str]) -> None:
    found = dict(given)
    adopt_step(found)
    assert found == given


def test_a_step_without_a_place_is_told_what_is_missing() -> None:
    with pytest.raises(UsageError, match=r"one of 7 tasks, but SLURM_PROCID, SLURM_NODEID not set"):
        adopt_step({name: value for name, value in STEP.items() if name not in {"SLURM_PROCID", "SLURM_NODEID"}})


@pytest.mark.parametrize(("text", "counts"), [("4", [4]), ("4(x3)", [4, 4, 4]), ("2(x2),3,1(x2)", [2, 2, 3, 1, 1])])
def test_tasks_of_nodes_are_read(text: str, counts: list[int]) -> None:
    assert tasks_per_node(text) == counts


@pytest.mark.parametrize(
    ("text", "node"),
    [
        ("login", "login"),
        ("node1,node2", "node1"),
        ("node[003-017,20],login", "node003"),
        ("rack[2,4]-node[09-12]", "rack2-node09"),
        ("10.0.0.[1-2]", "10.0.0.1"),
    ],
)
def test_the_first_node_is_read(text: str, node: str) -> None:
    assert first_node(text) == node
