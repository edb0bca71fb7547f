"""This host as a machine: rates of its cores and links between its processes, measured.

``measure_host`` runs on every rank of a local job at the same time, because ranks that compute at
once share the memory's bandwidth. Results are kept in the user's cache folder, so that the same
command gives the same plan again; delete the file (its place is logged) to measure anew.
"""

import hashlib
import logging
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import platformdirs
import torch
from torch import nn

from planner.devices.graph import Cluster
from planner.devices.library import device_kinds
from planner.devices.schema import CollectiveEntry, DeviceKind
from planner.errors import UsageError
from planner.ir.canonical import Memory, PositiveSeconds, Rate, StrictModel, decode_file, write_atomically
from planner.measure.clock import time_call
from planner.measure.links import measured_graph
from planner.profile.roofline import Roofline
from planner.profile.table import ProfileTable

_log = logging.getLogger(__name__)

LAUNCH_LAYERS: Final = 16
"""Of the chain of tiny layers whose training step is all launches."""
COPY_ELEMENTS: Final = 2**23
"""32 MiB in fp32: larger than a core's share of the last-level cache."""
MAX_LOCAL_RANKS: Final = 64
SUSTAINED_S: Final = 1.0
"""Of ``sustained_rate``."""
SPEED_NOISE: Final = 0.15
"""Relative difference between ranks that is none: equal processors differ so from second to second."""
FORMAT: Final = 2
"""Of the cached measurements; files of another format are left alone and measured anew."""


class HostRates(StrictModel):
    """What was measured of one rank of a local job.

    Attributes:
        conv_flop_per_s, linear_flop_per_s: reached by forward and backward of typical layers.
        bandwidth_bytes_per_s: of element-wise operators, bytes read and written.
        update_bytes_per_s: of an SGD-momentum step, bytes read and written.
        launch_s: of an operator on a tiny tensor; backward starts two for each of forward.
        memory_bytes: of the host, per rank.
        collectives: between all processes; none for one process.
    """

    conv_flop_per_s: Rate
    linear_flop_per_s: Rate
    bandwidth_bytes_per_s: Rate
    update_bytes_per_s: Rate
    launch_s: PositiveSeconds
    memory_bytes: Memory
    collectives: tuple[CollectiveEntry, ...] = ()


def parse_local(name: str) -> int:
    """Return N of ``local-N``.

    Raises:
        UsageError: N is no number from 1 to 64.
    """
    text = name.removeprefix("local-")
    if not text.isdigit() or not 1 <= int(text) <= MAX_LOCAL_RANKS:
        raise UsageError(f"cluster {name!r}: local-N needs a number of processes from 1 to {MAX_LOCAL_RANKS}")
    return int(text)


def threads_per_rank(num_ranks: int) -> int:
    """Return how many threads each of N processes of this host computes with."""
    return max(len(os.sched_getaffinity(0)) // num_ranks, 1)


def local_machine(num_ranks: int, measure: Callable[[int], HostRates]) -> tuple[Cluster, ProfileTable]:
    """Return this host with N processes, from the cache or measured now.

    Args:
        num_ranks: processes.
        measure: starts them and returns what ``measure_host`` found.
    """
    path = cache_path(num_ranks)
    if path.exists():
        rates = decode_file(HostRates, path, f"host measurements {path}")
    else:
        _log.warning("measuring this host with %d processes, a few seconds; kept in %s", num_ranks, path)
        rates = measure(num_ranks)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, rates.model_dump_json(indent=2) + "\n")
    return machine_from(rates, num_ranks)


def machine_from(rates: HostRates, num_ranks: int) -> tuple[Cluster, ProfileTable]:
    """Return the cluster and profile of these measurements."""
    collectives = [entry.collective() for entry in rates.collectives]
    roofline = Roofline(
        {"conv": rates.conv_flop_per_s, "linear": rates.linear_flop_per_s, "": rates.linear_flop_per_s},
        rates.bandwidth_bytes_per_s, rates.launch_s, rates.update_bytes_per_s, measured=True,
    )  # fmt: skip
    graph = measured_graph(f"local-{num_ranks}", 1, num_ranks, device_of(rates), collectives)
    return graph, ProfileTable(f"{platform.processor() or 'cpu'} (measured)", roofline)


def device_of(rates: HostRates) -> DeviceKind:
    """Return a rank of this host as a kind of device."""
    return device_kinds()["cpu"].model_copy(update={
        "memory_bytes": rates.memory_bytes,
        "peak_flop_per_s": {"fp32": max(rates.conv_flop_per_s, rates.linear_flop_per_s)},
        "memory_bandwidth_bytes_per_s": rates.bandwidth_bytes_per_s,
    })  # fmt: skip


def cache_path(num_ranks: int) -> Path:
    """Return where the measurements of N processes of this host are kept."""
    facts = [
        platform.node(),
        platform.machine(),
        cpu_name(),
        torch.__version__,
        str(threads_per_rank(num_ranks)),
    ]
    key = hashlib.sha256("|".join(facts).encode()).hexdigest()[:12]
    return Path(platformdirs.user_cache_dir("layerwise")) / f"host{FORMAT}-{key}-{num_ranks}.json"


def cpu_name() -> str:
    """Return what the system calls this host's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


def measure_host(num_ranks: int) -> HostRates:
    """Measure this rank while the others do the same; every rank of the job must call it."""
    device = torch.device("cpu")
    generator = torch.Generator().manual_seed(0)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return HostRates(
        conv_flop_per_s=_conv_rate(generator, device),
        linear_flop_per_s=_linear_rate(generator, device),
        bandwidth_bytes_per_s=_bandwidth(device),
        update_bytes_per_s=_update_rate(device),
        launch_s=_launch(device),
        memory_bytes=total // num_ranks,
    )


def median_rates(found: list[HostRates]) -> HostRates:
    """Return the median over the ranks of every figure; collectives are those of the slowest rank already."""
    names = [name for name in HostRates.model_fields if name != "collectives"]
    merged = {name: float(np.median([getattr(r, name) for r in found])) for name in names}
    return found[0].model_copy(update={**merged, "memory_bytes": int(merged["memory_bytes"])})


def relative_speeds(found: Sequence[HostRates], sustained: Sequence[float]) -> tuple[HostRates, list[float]]:
    """Return what the fast ranks reach, and the speed of every rank relative to that; small differences are noise.

    Args:
        found: of every rank.
        sustained: of every rank, ``sustained_rate``.
    """
    fast = [k for k, rate in enumerate(sustained) if rate > (1 - SPEED_NOISE) * max(sustained)]
    typical = float(np.median([sustained[k] for k in fast]))
    speeds = [1.0 if k in fast else round(rate / typical, 2) for k, rate in enumerate(sustained)]
    return median_rates([found[k] for k in fast]), speeds


def sustained_rate() -> float:
    """Return how often a second this rank trains a convolution, over a whole second.

    A rank that gets a processor for a part of the time only is as quick as any other in most single calls.
    """
    x, conv = torch.randn(8, 64, 28, 28, generator=torch.Generator().manual_seed(0)), nn.Conv2d(64, 64, 3, padding=1)
    conv(x).sum().backward()
    count, start = 0, time.perf_counter()
    while (passed_s := time.perf_counter() - start) < SUSTAINED_S:
        conv(x).sum().backward()
        count += 1
    return count / passed_s


def _trained_rate(
    call: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, flop: int, device: torch.device
) -> float:
    def step() -> None:
        call(x).sum().backward()

    return 3 * flop / time_call(step, device).median_s


def _conv_rate(generator: torch.Generator, device: torch.device) -> float:
    x = torch.randn(8, 64, 28, 28, generator=generator, requires_grad=True)
    conv = nn.Conv2d(64, 64, 3, padding=1)
    return _trained_rate(conv, x, 2 * 8 * 64 * 28 * 28 * 64 * 9, device)


def _linear_rate(generator: torch.Generator, device: torch.device) -> float:
    x = torch.randn(128, 1024, generator=generator, requires_grad=True)
    return _trained_rate(nn.Linear(1024, 1024), x, 2 * 128 * 1024 * 1024, device)


def _launch(device: torch.device) -> float:
    layers = [nn.Conv2d(2, 2, 1) for _ in range(LAUNCH_LAYERS)]
    net = nn.Sequential(*[part for layer in layers for part in (layer, nn.ReLU())])
    x = torch.ones(1, 2, 2, 2, requires_grad=True)

    def step() -> None:
        net(x).sum().backward()

    return time_call(step, device).median_s / (2 * LAUNCH_LAYERS * 3)


def _bandwidth(device: torch.device) -> float:
    x, y = torch.ones(COPY_ELEMENTS), torch.empty(COPY_ELEMENTS)
    return 2 * x.nbytes / time_call(lambda: torch.add(x, 1.0, out=y), device).median_s


def _update_rate(device: torch.device) -> float:
    parameter = nn.Parameter(torch.ones(COPY_ELEMENTS))
    parameter.grad = torch.ones(COPY_ELEMENTS)
    optimizer = torch.optim.SGD([parameter], 1e-3, momentum=0.9)
    return 5 * parameter.nbytes / time_call(optimizer.step, device).median_s
