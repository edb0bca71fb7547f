"""Executes plans on torch.distributed with the numerics of one device."""

from runtime.agreement import require_agreement
from runtime.amp import GradScaler
from runtime.data import ArrayDataset, loader
from runtime.finite import require_finite
from runtime.parallel import ParallelModule, parallelize
from runtime.pipeline.module import pipelined
from runtime.variable import variable_batch

__all__ = [
    "ArrayDataset", "GradScaler", "ParallelModule", "loader", "parallelize", "pipelined", "require_agreement",
    "require_finite", "variable_batch",
]  # fmt: skip
