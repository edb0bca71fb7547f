"""Executes plans on torch.distributed with the numerics of one device."""

from runtime.parallel import ParallelModule, parallelize

__all__ = ["ParallelModule", "parallelize"]
