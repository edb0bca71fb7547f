"""The coherent CNN-DNN as a MODEL: traced, planned, run on ranks; its plan says that it changes the model."""

import json
from pathlib import Path

import pytest
import torch

from planner.api import Options, Origin, machine_of, plan_model, prepare, price_decomposition
from planner.errors import UsageError
from planner.frontend.decomposition import Decomposition, decomposed
from planner.frontend.source import load_model
from planner.ir.rules import InputOutput
from planner.plan import Plan
from support.command_line import layerwise
from support.decomposition import CLASSES, tiny_cnn
from support.equality import random_plan, run_ranks

ARGUMENTS = "cnn=support.decomposition:tiny_cnn,shape=1x8x8,grid=1x2,overlap=2,hidden=6"
MODEL = "planner.frontend.decomposition:decomposed"
SENTENCE = "domain decomposition (CNN-DNN, 1x2 parts, overlap 2)"


def test_a_plan_of_it_says_that_it_changes_the_model_wherever_it_is_shown(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    asked = (MODEL, "--model-args", ARGUMENTS, "--devices", "2", "--batch", "8")
    planned = layerwise("plan", *asked, "-o", file)
    assert planned.code == 0
    (change,) = Plan.load(file).model.changes
    assert change.startswith(SENTENCE)
    for ran, text in (
        (planned, planned.err), (shown := layerwise("show", file), shown.out),
        (checked := layerwise("check", file), checked.out), (compared := layerwise("compare", *asked), compared.out),
    ):  # fmt: skip
        assert ran.code == 0
        assert f"Changes the model: {SENTENCE}" in " ".join(text.split())
    assert json.loads(layerwise("compare", *asked, "--json").out)["changes"] == [change]


def test_plans_of_other_models_say_nothing_and_older_plan_files_are_read() -> None:
    plan = plan_model(tiny_cnn((1, 8, 8)), (torch.empty(8, 1, 8, 8),), devices=2)
    assert plan.model.changes == []
    older = json.loads(plan.to_json())
    del older["model"]["changes"]
    assert Plan.from_json(json.dumps(older)) == plan
    said = plan.model_copy(update={"model": plan.model.model_copy(update={"changes": ["another"]})})
    assert said.digest == plan.digest  # checkpoints and measurements of older plans stay valid


def test_its_price_is_that_of_its_networks_alone() -> None:
    machine = machine_of(devices=4)
    cut = Decomposition((1, 8, 8), (1, 3), 1)
    found = price_decomposition(tiny_cnn, cut, machine, 16)
    one = machine_of(devices=1)

    def alone(net: torch.nn.Module, shape: tuple[int, ...]) -> float:
        return plan_model(net, (torch.empty(16, *shape, device="meta"),), machine=one).totals.step_s

    assert found.whole.step_s == pytest.approx(alone(tiny_cnn((1, 8, 8)), (1, 8, 8)))
    assert [net.input_shape for net in found.local] == [(1, 8, 3), (1, 8, 5), (1, 8, 4)]
    steps = [alone(tiny_cnn(net.input_shape), net.input_shape) for net in found.local]
    assert [net.step_s for net in found.local] == pytest.approx(steps)
    a, b, c = steps
    for ranks, expected in ((1, a + b + c), (2, max(a + c, b)), (3, max(a, b, c)), (9, max(a, b, c))):
        assert found.local_step_s(ranks) == pytest.approx(expected)
    assert found.coarse.input_shape == (3 * CLASSES,)
    assert found.coarse.num_params == 9 * 64 + 64 + 64 * CLASSES + CLASSES
    assert found.sent_bytes == 4 * CLASSES
    assert found.changes.startswith("domain decomposition")


def test_the_command_prices_it_and_says_that_it_changes_the_model() -> None:
    asked = ("support.decomposition:tiny_cnn", "--input", "1,8,8", "--grid", "1x2", "--overlap", "2")
    ran = layerwise("decompose", *asked, "--devices", "4")
    assert ran.code == 0
    said = " ".join(ran.out.split())
    assert "local 1 1x8x6" in said
    assert "Local networks on 2 of 4 devices:" in said
    assert "12 B of each local network" in said
    assert f"Changes the model: {SENTENCE}" in said
    refused = layerwise("decompose", *asked[:-1], "5", "--devices", "4")
    assert refused.code == 2
    assert "the overlap must be 0 to 4 pixels, and is 5" in refused.err


@pytest.mark.parametrize("seed", [0, 1])
def test_under_a_random_plan_it_computes_what_one_device_does(seed: int) -> None:
    def build() -> torch.nn.Module:
        torch.manual_seed(0)
        return decomposed(tiny_cnn, (1, 8, 8), (2, 2), 1).double().eval()

    x = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    planner = prepare(
        build(), (x,), machine_of(devices=4), Options(all_devices=True, io="global"), Origin("net", "net")
    )
    plan = random_plan(planner, seed)
    assert plan.input_output is InputOutput.GLOBAL
    whole = build()(x)
    for found in run_ranks(build, plan, lambda net, _traced, _rank: net.eval()(x)):
        assert torch.allclose(found, whole, rtol=0, atol=1e-12)


def test_it_is_built_from_texts_without_memory_for_weights() -> None:
    arguments = {"cnn": "support.decomposition:tiny_cnn", "shape": "2x4x4x4", "grid": "1x2x1", "hidden": "8x6"}
    found = load_model(MODEL, arguments)
    assert found.input_shapes == ((2, 4, 4, 4),)
    assert all(parameter.is_meta for parameter in found.module.parameters())
    assert isinstance(found.module.decomposition, Decomposition)
    assert found.module.decomposition.local_shapes == ((2, 4, 2, 4),) * 2
    sizes = [tuple(p.shape) for name, p in found.module.named_parameters() if name.startswith("coarse")]
    assert sizes == [(8, 2 * CLASSES), (8,), (6, 8), (6,), (CLASSES, 6), (CLASSES,)]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"cnn": "tiny_cnn"}, "factory of local networks 'tiny_cnn': give package.module:callable"),
        ({"cnn": "support.decomposition:huge_cnn"}, "has no 'huge_cnn'"),
        ({"grid": "2"}, "for each of the 2 dimensions"),
        ({"overlap": 9}, "overlap must be 0 to 4"),
        ({"shape": "1,8"}, "shape '1,8' is not a whole number for each dimension, such as 3x32x32"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_reason(changed: dict[str, object], said: str) -> None:
    arguments = {"cnn": "support.decomposition:tiny_cnn", "shape": "1x8x8", "grid": "1x2", **changed}
    with pytest.raises(UsageError, match=said):
        load_model(MODEL, arguments)
