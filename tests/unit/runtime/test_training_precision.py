"""The steps that are timed compute in the precision that the plan names."""

import pytest
import torch

from planner.api import Options, Origin, machine_of, prepare
from planner.frontend.lower import TracedModel
from runtime.data import own_samples
from runtime.parallel import ParallelModule
from runtime.training import Batch, training_step
from support.equality import build, data, run_ranks


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
@pytest.mark.parametrize("solver", ["data", "model", "model-in"])
def test_scores_are_in_the_plans_precision_and_gradients_in_fp32(
    solver: str, precision: str, dtype: torch.dtype
) -> None:
    x = data("lenet5")[0].float()
    options = Options(solver=solver, precision=precision)  # type: ignore[arg-type]  # one of the three
    plan = prepare(build("lenet5").float(), (x,), machine_of(devices=2), options, Origin("lenet5")).plan()

    def work(net: ParallelModule, _traced: TracedModel, position: int) -> tuple[torch.dtype, dict[str, torch.Tensor]]:
        found: list[torch.dtype] = []
        net.register_forward_hook(lambda _module, _inputs, output: found.append(output.dtype))
        step, _ = training_step(net, plan, Batch([x[own_samples(plan, plan.mesh.ranks[position])]]))
        step()
        return found[0], {name: p.grad for name, p in net.named_parameters() if p.grad is not None}

    for scores, gradients in run_ranks(lambda: build("lenet5").float(), plan, work):
        assert scores is dtype
        assert len(gradients) == len(list(build("lenet5").parameters()))
        assert all(g.dtype is torch.float32 and bool(g.isfinite().all()) for g in gradients.values())
