"""Collectives of two ranks on both sides of the size from which messages are sent directly."""

import itertools
import os
from typing import Any

import torch

from planner.ir.mesh import Mesh
from runtime.comm.communicator import TorchCommunicator
from runtime.comm.groups import ProcessGroups
from runtime.comm.messages import LARGE_BYTES
from runtime.comm.scheduling import watching
from runtime.launch import Process

AXES = (0,)
LARGE = LARGE_BYTES // 4 + 3
COUNTS = tuple(itertools.product((0, 5, LARGE), repeat=2))


def numbers(source: int, target: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """Return what a rank has for another one."""
    return (torch.arange(count) % 97 + 100 * source + 10 * target).to(dtype)


def sums(target: int, count: int) -> torch.Tensor:
    """Return what both ranks have for one of them, added up."""
    return numbers(0, target, count, torch.float32) + numbers(1, target, count, torch.float32)


def check(_argument: dict[str, Any], process: Process) -> dict[str, int]:
    """Run every collective for many counts; return how many elements of each are wrong, and threads that interrupt."""
    mesh = Mesh.of(rank=2)
    communicator = TorchCommunicator(mesh, ProcessGroups(mesh, [AXES], 60.0))
    me, wrong = process.rank, dict.fromkeys(("exchange", "gather", "scatter", "beside", "sum"), 0)
    for (there, back), kept, dtype in itertools.product(COUNTS, (0, 7), (torch.float32, torch.int64)):
        between = [[kept, there], [back, kept]]
        sends, receives = between[me], [row[me] for row in between]
        buffer = torch.cat([numbers(me, r, n, dtype) for r, n in enumerate(sends)])
        expected = torch.cat([numbers(r, me, n, dtype) for r, n in enumerate(receives)])
        wrong["exchange"] += int((communicator.exchange(buffer, sends, receives, AXES) != expected).sum())
    for counts in [pair for pair in COUNTS if all(pair)]:
        buffer = numbers(me, 0, counts[me], torch.float32)
        expected = torch.cat([numbers(r, 0, n, torch.float32) for r, n in enumerate(counts)])
        wrong["gather"] += int((communicator.all_gather(buffer, counts, AXES) != expected).sum())
        buffer = torch.cat([numbers(me, r, n, torch.float32) for r, n in enumerate(counts)])
        expected = sums(me, counts[me])
        wrong["scatter"] += int((communicator.reduce_scatter(buffer, counts, AXES) != expected).sum())
    for count in (0, 5, LARGE):
        buffer = numbers(me, 0, count, torch.float32)
        communicator.all_reduce(buffer, AXES)
        wrong["sum"] += int((buffer != sums(0, count)).sum())
    for count in (5, LARGE):
        parts = torch.cat([numbers(me, r, count, torch.float32) for r in (0, 1)])
        own, whole = torch.empty(count), torch.empty(2 * count)
        communicator.start_reduce_scatter(parts, own, AXES).wait()
        communicator.start_all_gather(whole, own, AXES).wait()
        wrong["beside"] += int((whole != torch.cat([sums(r, count) for r in (0, 1)])).sum())
    policies = [os.sched_getscheduler(thread) for thread in watching()]
    wrong["interrupting"] = sum(policy != os.SCHED_BATCH for policy in policies) + (not policies)
    return wrong
