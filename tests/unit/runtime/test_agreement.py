"""What ranks compare: facts before they begin, and whether this step's numbers are finite."""

import re

import pytest
import torch

from planner.api import Options, Origin, example_inputs, machine_of, prepare
from planner.errors import MismatchError, RunError
from planner.frontend.source import load_model
from planner.plan import Plan
from runtime.agreement import code_digest, refuse_differing
from runtime.finite import require_finite
from runtime.launch import Process
from runtime.module import ParallelModule
from runtime.training import measure_plan
from support.equality import run_ranks
from support.loops import build, images, loss_of, own, planned
from support.threads import on_threads


def test_every_difference_is_said_with_the_ranks_that_have_it() -> None:
    same = {"plan": "a" * 64, "code": code_digest(), "step": "3"}
    refuse_differing([same] * 4)
    with pytest.raises(MismatchError) as caught:
        refuse_differing([same, same | {"step": "4"}, same | {"plan": "b" * 64, "step": "5"}, same])
    plan, step = str(caught.value).split("; ")
    assert plan == "rank 2 has another plan than rank 0: Give all ranks the same plan file."
    assert step.startswith("ranks [1, 2] have another step than rank 0 (4, not 3): They have drifted apart")


def lenet(options: Options) -> Plan:
    """Return a plan for two ranks, which names its model."""
    model, machine = load_model("lenet5", {}), machine_of("2xt4-pcie", None, "fp32", None)
    origin = Origin(model.name, model.source, {}, "layerwise plan lenet5")
    return prepare(model.module, example_inputs(model.input_shapes, 8), machine, options, origin).plan()


@pytest.mark.parametrize("kinds", [("gpipe", "1f1b"), ("gpipe", "none"), ("stale", "gpipe")], ids=" and ".join)
def test_a_run_begins_with_comparing_the_plans_pipelined_or_not(kinds: tuple[str, str]) -> None:
    def plan(kind: str) -> Plan:
        if kind == "none":
            return lenet(Options(solver="data"))
        return lenet(Options(stages=2, schedule=kind, microbatches=None if kind == "stale" else 2))

    plans = [plan(kind) for kind in kinds]

    def rank(index: int) -> str:
        place = Process(index, 2, index, torch.device("cpu"))
        with pytest.raises(MismatchError) as caught:
            measure_plan({"plan": plans[index].to_json(), "steps": 1, "warmup": 0}, place)
        return str(caught.value)

    said = on_threads(2, rank)
    assert said[0] == said[1]
    assert re.fullmatch(r"rank 1 has another plan than rank 0: .*", said[0])


@pytest.mark.parametrize("solver", ["data", "model"])
@pytest.mark.parametrize("where", ["nowhere", "loss", "gradient"])
def test_what_is_not_finite_on_one_rank_is_the_same_error_on_all(solver: str, where: str) -> None:
    x, target = images()

    def work(net: ParallelModule, _: object, position: int) -> str:
        mine, labels = own(net, position, x, target)
        loss = loss_of(net, mine, labels)
        loss.backward()
        said = loss.detach()
        if position == 1 and where == "loss":
            said = torch.tensor(torch.nan)
        if position == 1 and where == "gradient":
            last = list(net.parameters())[-1].grad
            assert last is not None
            last.view(-1)[0] = -torch.inf
        try:
            require_finite(net, said)
        except RunError as error:
            return str(error)
        return ""

    first, second = run_ranks(build, planned(solver), work)
    assert first == second
    last = list(dict(build().named_parameters()))[-1]
    expected = {"nowhere": "", "loss": "the loss of rank 1", "gradient": f"the gradient of {last} on rank 1"}[where]
    assert first == (f"infinite or not a number: {expected}. The weights were not updated." if expected else "")


def test_a_norm_that_overflows_is_no_number_that_is_not_finite() -> None:
    def work(net: ParallelModule, _: object, position: int) -> None:
        del position
        for parameter in net.parameters():
            parameter.grad = torch.full_like(parameter, 1e300)
        require_finite(net)

    run_ranks(build, planned("data"), work)
