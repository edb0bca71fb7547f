"""Options from keyword arguments, as ``plan_model`` and ``compare`` take them."""

from typing import Any

import pytest
import torch
from torch import nn

from planner.api import Constraints, Options, compare, plan_model
from planner.api.options import options_of
from planner.errors import LayerwiseError, UsageError
from planner.ir.dimension import Dimension


def test_pins_bans_and_ties_are_texts_or_lists_of_them() -> None:
    found = options_of(pin="fc*=out_channel", forbid=["conv*=in_channel"], tie=("layer1.*",), solver="dp")
    wanted = Constraints.of(pin=["fc*=out_channel"], forbid=["conv*=in_channel"], tie=["layer1.*"])
    assert found == Options(solver="dp", constraints=wanted)
    assert options_of(constraints=wanted).constraints == wanted


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"constraints": {"pin": ["a=sample"]}}, "pin="),
        ({"constraints": Constraints(), "pin": ["a=sample"]}, "either"),
        ({"pins": ["a=sample"]}, "pin"),
        ({"pin": ["a=nothing"]}, "nothing"),
    ],
)
def test_what_is_no_option_is_refused(asked: dict[str, Any], says: str) -> None:
    with pytest.raises(LayerwiseError, match=says) as refused:
        options_of(**asked)
    assert refused.value.exit_code == UsageError("").exit_code


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"memory_limit_bytes": "16GiB"}, "memory_limit_bytes is '16GiB', which is not int"),
        ({"memory_limit_bytes": 16e9}, "memory_limit_bytes is 16000000000.0, which is not int"),
        ({"time_limit_s": "60s"}, "time_limit_s is '60s', which is not float"),
        ({"stages": "2"}, "stages is '2', which is not Union[int"),
        ({"mesh": 2}, "mesh is 2, which is not str"),
        ({"all_devices": "no"}, "all_devices is 'no', which is not bool"),
        ({"halo_overlap": True}, "halo_overlap is True, which is not Literal"),
        ({"solver": None}, "solver is None, which is not str"),
        ({"optimizer": "momentun"}, "Did you mean 'momentum'"),
        ({"precision": "fp64"}, "has no fp64 rate, only fp32, tf32, bf16"),
        ({"dimensions": "sample,height"}, "which is one text: give a list"),
        ({"dimensions": ["samples"]}, "Did you mean 'sample'"),
        ({"devices": "2"}, "devices is '2', which is not a number"),
        ({"devices": -1}, "devices is -1, which is not a number"),
        ({"model": "alexnet"}, "the model is 'alexnet', which is no torch.nn.Module"),
        ({"model": nn.Linear}, "which is no torch.nn.Module"),
        ({"example_inputs": torch.empty(8, 4)}, "example_inputs is a tuple of tensors"),
        ({"example_inputs": [(8, 4)]}, "example_inputs is a tuple of tensors"),
    ],
)
def test_what_python_lets_through_is_refused_by_its_name(asked: dict[str, Any], says: str) -> None:
    given = {"model": nn.Linear(4, 2), "example_inputs": (torch.empty(8, 4),), "devices": 2, **asked}
    with pytest.raises(UsageError) as refused:
        plan_model(**given)
    assert says in str(refused.value)


def test_solvers_to_compare_with_are_a_list() -> None:
    with pytest.raises(UsageError, match="solvers is 'dp', which is one text"):
        compare(nn.Linear(4, 2), (torch.empty(8, 4),), devices=2, solvers="dp")


def test_names_of_dimensions_are_as_good_as_the_dimensions_themselves() -> None:
    model, inputs = nn.Linear(4, 2), (torch.empty(8, 4),)
    plans = [plan_model(model, inputs, devices=2, dimensions=each) for each in (["sample"], {Dimension.SAMPLE})]
    assert plans[0].strategy == plans[1].strategy
