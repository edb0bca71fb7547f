"""A training loop with all that people use, on gloo processes, against one device."""

from typing import Any

import pytest

from runtime.launch import run_local
from support.loops import planned


@pytest.mark.dist
@pytest.mark.slow
def test_scaled_clipped_averaged_and_compiled_training_on_processes_equals_one_device() -> None:
    plans = [planned(solver).to_json() for solver in ("data", "model")]
    ranks: Any = run_local("support.loop_ranks:loops", {"plans": plans}, num_ranks=2, timeout_s=600.0)
    for results in ranks:
        for found in results:
            mine, expected = found["norms"]
            assert mine[1] == expected[1] == float("inf")
            assert [mine[0], mine[2]] == pytest.approx([expected[0], expected[2]], rel=1e-9)
            assert found["scales"][0] == found["scales"][1] == [256.0, 128.0, 128.0]
            assert found["average"] < 1e-9
            assert found["weights"] < 1e-9
            assert found["half"] == {
                "torch.bfloat16": ["torch.bfloat16", "torch.float32"],
                "torch.float16": ["torch.float16", "torch.float32"],
            }
            assert found["compiled"] < 1e-12
