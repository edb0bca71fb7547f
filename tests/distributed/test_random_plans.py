"""Random CNNs under random legal plans on gloo processes equal one device, see ``properties/test_runtime.py``."""

import os
import warnings

import numpy as np
import pytest

from runtime.launch import run_local
from support.random_networks import random_recipe
from support.random_plans import planner_for, random_plan

NUM_CASES = 40 if os.environ.get("LAYERWISE_FULL") else 6


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_random_networks_under_random_plans_equal_one_device(num_ranks: int) -> None:
    cases = []
    for seed in range(num_ranks * 1000, num_ranks * 1000 + NUM_CASES):
        rng = np.random.default_rng(seed)
        recipe = random_recipe(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # padding="same" of even kernels is slow, torch says
            planner = planner_for(recipe, num_ranks, "global" if seed % 4 == 0 else None)
            plan = random_plan(planner, lambda n, rng=rng: int(rng.integers(n)))  # type: ignore[misc]  # the default is bound
        cases.append({"recipe": recipe.to_json(), "plan": plan.to_json()})
    ranks = run_local("support.random_plans:on_process", {"cases": cases}, num_ranks=num_ranks, timeout_s=1200.0)
    failed = [
        f"{case['recipe']} under {case['plan']}: {found}"
        for case, found in zip(cases, zip(*ranks, strict=True), strict=True)
        if any(found)
    ]
    assert not failed, f"{len(failed)} of {len(cases)}, the first one: {failed[0]}"
