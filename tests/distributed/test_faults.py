"""Faults on real processes, some of ``examples.benchmarks.fault_cases``, which says what must come of each."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from examples.benchmarks import fault_cases
from examples.benchmarks.fault_training import Fault

pytestmark = [pytest.mark.dist, pytest.mark.slow]


@pytest.fixture(scope="module", autouse=True)
def _forks(host_cache: Path) -> Iterator[None]:
    """Ranks are forks of one process that has imported torch; it ends with the tests, and measures no host anew."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(host_cache))
        yield
    fault_cases.bench().close()
    fault_cases.bench.cache_clear()


def seeded(number: int) -> np.random.Generator:
    return np.random.default_rng(number)


def test_faults_end_all_ranks_with_their_names_and_the_run_goes_on_bit_for_bit() -> None:
    problems = [
        fault_cases.struck("kill", "sync", 2, seeded(1), timeout_s=30.0),
        fault_cases.struck("kill", "transfer", 2, seeded(0), timeout_s=30.0),
        fault_cases.struck("stop", "save", 2, seeded(0), timeout_s=6.0),
        fault_cases.not_a_number(2, seeded(0)),
        fault_cases.damaged(2, seeded(1)),
    ]
    assert not any(problems), "\n".join(problems)


def test_ranks_that_differ_are_refused_on_all_of_them() -> None:
    problems = [fault_cases.differing(2, seeded(seed)) for seed in (0, 1)]  # other weights, another model
    assert not any(problems), "\n".join(problems)


def test_torchrun_starts_killed_ranks_again_and_the_weights_are_those_of_an_uninterrupted_run() -> None:
    job = fault_cases.bench().job("data", 2, faults=(Fault("kill", "save", 0, 3),), timeout_s=60.0)
    done = fault_cases.torchrun(job, 2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert Path(job.folder, "fault-0").exists()
    assert fault_cases.difference(fault_cases.final(job), fault_cases.bench().reference("data", 2)) == 0.0


def test_the_elastic_example_goes_on_with_fewer_and_more_ranks_where_the_losses_were() -> None:
    assert not (problem := fault_cases.elastic(2, seeded(1))), problem
