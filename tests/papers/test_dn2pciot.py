"""DN2PCIoT's set-ups; see ``layerwise reproduce dn2pciot``."""

import numpy as np
import pytest

from planner.inference.evaluate import evaluate
from planner.inference.metis import is_installed, metis_partitions
from planner.inference.passes import improve
from planner.inference.problem import Objective, Problem
from planner.inference.starts import tiled
from planner.inference.state import State
from planner.reproduce.dn2pciot import GAIN, METIS_RATES, devices, lenet

ELEVEN = "11xstm32l433-wlan11"


def test_passes_from_one_start_beat_the_published_metis_by_what_the_paper_says() -> None:
    problem = Problem.of(lenet(2), devices(ELEVEN), Objective.INFERENCE_RATE)
    generator = np.random.default_rng(0)
    start = tiled(problem, generator)
    assert start is not None
    state = State(problem, start)
    improve(state, generator, 3)
    found = evaluate(problem, state.part)
    assert found.fits
    assert found.rate_per_s >= GAIN * METIS_RATES[ELEVEN]


@pytest.mark.skipif(not is_installed(), reason="needs pymetis: pip install 'layerwise[metis]'")
@pytest.mark.parametrize(("setup", "is_possible"), [("2xstm32f469-wlan2", True), ("63xstm32l151-wlan63", False)])
def test_metis_finds_nothing_valid_where_devices_are_tiny(setup: str, is_possible: bool) -> None:
    problem = Problem.of(lenet(2), devices(setup), Objective.INFERENCE_RATE)
    assert any(evaluate(problem, part).fits for part in metis_partitions(problem)) is is_possible
