"""Halos that every rank computes itself: the numerics of one device, with no message inside a run."""

import os

import pytest

from planner.errors import MismatchError
from planner.frontend.lower import TracedModel
from planner.ir.split import LayerId
from planner.plan import Plan
from runtime.module import ParallelModule
from support.equality import run_ranks
from support.halos import TOLERANCE, on_threads
from support.recomputing import CASES, Counting, plans, recomputing

SUBSETS = 8 if os.environ.get("LAYERWISE_FULL") else 1


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", CASES)
def test_recomputed_halos_equal_one_device(name: str) -> None:
    found = plans(CASES[name], SUBSETS)
    assert recomputing(found[0])
    for plan in found:
        assert on_threads(CASES[name], plan) == [{}] * plan.mesh.size, recomputing(plan)


def test_nothing_is_sent_inside_a_run() -> None:
    case = CASES["margins reach past the neighbour"]
    every, _ = plans(case, 1)
    counts = []
    for layers in (recomputing(every), ()):
        Counting.count = 0
        assert on_threads(case, every.with_recomputing(layers), Counting) == [{}] * 4
        counts.append(Counting.count)
    # four ranks, two batches; three of four convolutions read what another one makes, forward and backward;
    # the addends of the input's gradient are summed in front of the run, which is whole on every rank
    assert counts == [4 * 2, 4 * 2 * (3 * 2 + 1)]


def test_evaluation_with_a_graph_of_its_own_equals_one_device() -> None:
    case = CASES["another graph in evaluation"]
    every, _ = plans(case, 1)
    x = case.data()
    expected = case.build().eval()(x)

    def worst(net: ParallelModule, _traced: TracedModel, _position: int) -> float:
        before = (net(x), net.eval()(x))[1]
        net.train()(x)
        return max(float((y - expected).detach().abs().max()) for y in (before, net.eval()(x)))

    assert max(run_ranks(case.build, every, worst)) < TOLERANCE


def test_layers_between_ranks_that_recompute_are_refused_with_their_name() -> None:
    case = CASES["norms end runs"]
    every, _ = plans(case, 1)
    norm = next(part.id for part in every.only_stage.layers if part.op == "group_norm")
    with pytest.raises(MismatchError, match=f"halo: recompute, but layer '{norm}' .* depends on more than its windows"):
        on_threads(case, every.with_recomputing([LayerId(norm)]))


def test_recomputing_is_a_decision_of_the_file() -> None:
    every, _ = plans(CASES["two ranks"], 1)
    again = Plan.from_json(every.to_json())
    assert recomputing(again) == recomputing(every)
    assert again.digest != again.with_recomputing([]).digest
