"""Train on one sample that does not fit one rank: the planes of a volume are spread over 2 and 4 ranks.

    python -m examples.benchmarks.big_sample

Every rank is a process whose data segment is limited (``RLIMIT_DATA``) to what it holds without its
model plus ``--limit``. One rank fails to allocate; 2 and 4 ranks, each of
which reads its own planes only, train. Prints the predicted peak of each rank beside the measured one:
the most that the process held resident beyond what it held before (``ru_maxrss``).
"""

import argparse
import os
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from planner.api import Options, Origin, machine_of, prepare
from planner.errors import LayerwiseError
from planner.ir.dimension import Dimension
from planner.models.cosmoflow import cosmoflow
from planner.models.unet3d import unet3d
from planner.plan import Plan
from planner.units import format_bytes
from runtime.data import own_part
from runtime.launch import Process, run_local
from runtime.parallel import parallelize

DIMENSIONS = frozenset({Dimension.SAMPLE, Dimension.DEPTH})
GIVE_BACK = {"MALLOC_MMAP_MAX_": "65536", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
"""So that what is freed is not held."""
STEPS = 2


def build(name: str, size: int) -> tuple[nn.Module, tuple[int, ...]]:
    """Return a network and the shape of its batch: one volume."""
    torch.manual_seed(0)
    if name == "cosmoflow":
        return cosmoflow(0.5, size=size), (1, 4, size, size, size)
    return unet3d(0.25), (1, 1, size, size, size)


def loss_of(y: torch.Tensor) -> torch.Tensor:
    """Return the loss of a region of the output, or of all of it."""
    return functional.mse_loss(y, torch.full_like(y, 0.5))


def status(key: str) -> int:
    """Return a figure of this process in bytes, such as ``VmRSS``."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def train(argument: dict[str, Any], process: Process) -> dict[str, float]:
    """Train this rank's region for some steps under the limit; return losses and bytes."""
    torch.set_num_threads(1)
    nn.Conv3d(1, 8, 3)(torch.ones(1, 1, 8, 8, 8)).sum().backward()  # libraries are loaded
    before = status("VmRSS")
    net, shape = build(argument["model"], argument["size"])
    generator = torch.Generator().manual_seed(1)
    part = [slice(0, n) for n in shape]
    if argument["plan"]:
        plan = Plan.from_json(argument["plan"])
        part = list(own_part(plan, process.rank))
        net = parallelize(net, plan)
    mine = sum(tensor.nbytes for tensor in (*net.parameters(), *net.buffers()))
    limit = status("VmData") - mine + int(argument["limit_bytes"])  # threads of the process groups have their stacks
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    sizes = [s.stop - s.start for s in part]
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)
    for _ in range(STEPS):
        x = torch.randn(sizes, generator=generator)
        optimizer.zero_grad(set_to_none=False)
        loss = loss_of(net(x))
        loss.backward()
        optimizer.step()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    return {"loss": float(loss.detach()), "peak_bytes": float(peak)}


def plan_for(name: str, size: int, num_ranks: int, limit_bytes: int | None) -> tuple[Plan, int]:
    """Return the plan on so many ranks, and the predicted peak of a rank."""
    net, shape = build(name, size)
    options = Options(
        dimensions=DIMENSIONS, io="local" if num_ranks > 1 else None, all_devices=True, memory_limit_bytes=limit_bytes
    )
    origin = Origin(name, name)
    planner = prepare(net, (torch.empty(shape, device="meta"),), machine_of(devices=num_ranks), options, origin)
    search, planned = planner.best()
    return planner.plan_of(search, planned), planned.timeline.memory.peak.total


def main() -> int:
    """Print the table; return 1 if one rank trains, or several do not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("unet3d", "cosmoflow"), default="unet3d")
    parser.add_argument("--size", type=int, default=128, help="of the volume, in each dimension")
    parser.add_argument("--limit", type=float, default=0.75, help="of a rank, as a share of one rank's predicted peak")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    asked = parser.parse_args()
    os.environ.update(GIVE_BACK)
    _, whole = plan_for(asked.model, asked.size, 1, None)
    limit = int(asked.limit * whole)
    print(f"{asked.model}, one volume of {asked.size}^3; each rank may hold {format_bytes(limit)}")
    is_sound = True
    for num_ranks in asked.ranks:
        alone = num_ranks == 1
        plan, predicted = plan_for(asked.model, asked.size, num_ranks, None)
        argument = {
            "model": asked.model, "size": asked.size, "limit_bytes": limit, "plan": "" if alone else plan.to_json(),
        }  # fmt: skip
        try:
            found = run_local(f"{__spec__.parent}.big_sample:train", argument, num_ranks=num_ranks, timeout_s=600.0)
        except LayerwiseError as error:
            last = str(error).strip().splitlines()[-1].strip()
            print(f"{num_ranks} ranks: predicted {format_bytes(predicted)} each; fails: {last[:150]}")
            is_sound &= alone
            continue
        peaks = [each["peak_bytes"] for each in found]  # type: ignore[index,call-overload]  # as ``train`` returns it
        ratio = predicted / max(peaks)
        measured = ", ".join(format_bytes(int(peak)) for peak in peaks)
        said = format_bytes(predicted)
        print(f"{num_ranks} ranks: predicted {said} each, measured {measured}; ratio {ratio:.2f}; trains")
        is_sound &= not alone
    return 0 if is_sound else 1


if __name__ == "__main__":
    sys.exit(main())
