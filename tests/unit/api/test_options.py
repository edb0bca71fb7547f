"""Options from keyword arguments, as ``plan_model`` and ``compare`` take them."""

from typing import Any

import pytest

from planner.api import Constraints, Options
from planner.api.options import options_of
from planner.errors import LayerwiseError, UsageError


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
