"""Random CNNs under random legal plans, on the real lowered modules of 2, 3, 4 and 8 ranks, against one device.

A failing case is shrunk to the operators, sizes and splits that matter, and printed: a recipe (see
``support.random_networks``) and a plan, both as JSON.
"""

import os
import warnings
from collections.abc import Callable, Sequence
from typing import Literal

from hypothesis import HealthCheck, Phase, assume, event, given, note, settings
from hypothesis import strategies as st

from planner.api import Planner
from planner.plan import Plan
from support.random_networks import BLOCKS, HEADS, LOSSES, Recipe
from support.random_plans import Pick, is_steady, on_threads, planner_for, random_plan, reference, unequal_plan

EXAMPLES = 600 if os.environ.get("LAYERWISE_FULL") else 30

IO: tuple[Literal["global"] | None, ...] = (None, None, "global")
NAMES = (*BLOCKS, "conv", "conv", "batch_norm", "activation", "pool", "save", "join", "join")
SPACES = st.sampled_from([14, 9, 9, 5]).flatmap(
    lambda high: st.tuples(*[st.integers(3, high)] * {14: 1, 9: 2, 5: 3}[high])
)


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    shape = (draw(st.integers(2, 9)), draw(st.integers(1, 7)), *draw(SPACES))
    blocks = draw(st.lists(st.tuples(st.sampled_from(NAMES), st.integers(0, 2**16)), min_size=1, max_size=9))
    return Recipe(
        shape, tuple(blocks), draw(st.sampled_from([*HEADS, "dense"])), draw(st.sampled_from(LOSSES)),
        draw(st.booleans()), draw(st.integers(0, 99)),
    )  # fmt: skip


def assert_equals_one_device(
    data: st.DataObject, recipe: Recipe, made: Callable[[Planner, Pick], Plan], ranks: Sequence[int]
) -> None:
    num_ranks = data.draw(st.sampled_from(ranks))
    io = data.draw(st.sampled_from(IO))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # padding="same" of even kernels is slow, torch says
        expected = reference(recipe)
        plan = made(planner_for(recipe, num_ranks, io), lambda n: data.draw(st.integers(0, n - 1)))
        event(f"{num_ranks} ranks, {plan.io}")
        note(f"Recipe.from_json({recipe.to_json()!r})")
        note(f"Plan.from_json({plan.model_dump_json()!r})")
        found = on_threads(recipe, plan, expected)
        assume(not found or is_steady(recipe))
        assert found == []


WITH_SHRINKING = settings(
    suppress_health_check=list(HealthCheck), phases=(Phase.reuse, Phase.generate, Phase.shrink)
)  # fmt: skip


@settings(WITH_SHRINKING, max_examples=EXAMPLES)
@given(data=st.data(), recipe=recipes())
def test_random_networks_under_random_plans_equal_one_device(data: st.DataObject, recipe: Recipe) -> None:
    assert_equals_one_device(data, recipe, random_plan, (2, 3, 4, 8))


@settings(WITH_SHRINKING, max_examples=EXAMPLES // 2)
@given(data=st.data(), recipe=recipes())
def test_pieces_in_shares_and_idle_ranks_equal_one_device(data: st.DataObject, recipe: Recipe) -> None:
    assert_equals_one_device(data, recipe, unequal_plan, (2, 3, 4, 6))
