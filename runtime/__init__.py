"""Executes plans on torch.distributed with the numerics of one device."""

from runtime.amp import GradScaler
from runtime.data import ArrayDataset, loader
from runtime.parallel import ParallelModule, parallelize
from runtime.pipeline.module import pipelined

__all__ = ["ArrayDataset", "GradScaler", "ParallelModule", "loader", "parallelize", "pipelined"]
