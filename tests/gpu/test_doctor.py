"""`layerwise doctor` on a machine with a GPU: NCCL, and several ranks that share the GPU over gloo."""

import pytest
import torch

from support.command_line import layerwise

pytestmark = [pytest.mark.gpu, pytest.mark.dist, pytest.mark.slow]


def test_every_check_passes_over_nccl_and_with_ranks_that_share_the_gpus() -> None:
    ran = layerwise("doctor", "--ranks", str(torch.cuda.device_count() + 1))  # more than GPUs, so that some share one
    assert ran.code == 0, ran.out + ran.err
    assert "NCCL, GPU, " in ran.out
    assert ("gloo, GPU shared, 4 ranks" in ran.out) == (torch.cuda.device_count() < 4)
    assert "order of kernels and messages" in ran.out
