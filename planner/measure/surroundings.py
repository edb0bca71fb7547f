"""What a machine offers to training on it: versions, devices, threads, settings, and what it lacks."""

import importlib.util
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Final

import platformdirs
import torch
import torch.distributed as dist

from planner.measure.host import cpu_name, threads_per_rank
from planner.units import format_bytes

KEEP_MEMORY: Final = "export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=68719476736"
NOT_SET: Final = "not set"


@dataclass(frozen=True, slots=True)
class Fact:
    """One thing about this machine.

    Attributes:
        name: what it is about.
        value: as found.
        advice: what to do about it; empty where nothing is missing.
    """

    name: str
    value: str
    advice: str = ""


def surroundings(num_ranks: int) -> list[Fact]:
    """Return what jobs of so many ranks find on this machine."""
    return [*_versions(), *_processors(num_ranks), *_memory(), *_accelerators(), *_backends(), *_extras()]


def _versions() -> Iterator[Fact]:
    yield Fact("layerwise", _version("layerwise") or "not installed, run from its folder")
    yield Fact("Python", platform.python_version())
    yield Fact("torch", torch.__version__)
    yield Fact(
        "system", f"{platform.system()} {platform.release()}, {' '.join(platform.libc_ver()) or 'unknown C library'}"
    )


def _processors(num_ranks: int) -> Iterator[Fact]:
    cores = len(os.sched_getaffinity(0))
    shared = f"{num_ranks} ranks share {cores}: fine for checks, too slow to measure" if num_ranks > cores else ""
    yield Fact("processor", cpu_name() or platform.machine())
    yield Fact("cores this process may use", f"{cores} of {os.cpu_count()}", shared)
    yield Fact("threads of a rank", f"{threads_per_rank(num_ranks)} with {num_ranks} ranks, if `layerwise` starts them")
    threads = os.environ.get("OMP_NUM_THREADS")
    advice = "" if threads else "torchrun sets it to 1 for several ranks: set it to cores / ranks where they are more"
    yield Fact("OMP_NUM_THREADS", threads or NOT_SET, advice)


def _memory() -> Iterator[Fact]:
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield Fact("memory", format_bytes(whole))
    names = ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_")
    missing = [name for name in names if name not in os.environ]
    is_glibc = platform.libc_ver()[0] == "glibc"
    advice = f"on CPUs, before torchrun: {KEEP_MEMORY} (`layerwise run` sets it itself)" if missing and is_glibc else ""
    for name in names:
        yield Fact(name, os.environ.get(name, NOT_SET), advice)
        advice = ""


def _accelerators() -> Iterator[Fact]:
    if torch.version.cuda is None:
        has_driver = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None
        advice = "a GPU driver is installed: install a CUDA build of torch to use it" if has_driver else ""
        yield Fact("CUDA", "none: torch is built without it", advice)
        return
    found = torch.cuda.device_count()
    advice = "" if found else "no device is visible: see nvidia-smi and CUDA_VISIBLE_DEVICES"
    yield Fact("CUDA", f"{torch.version.cuda}, {found} devices", advice)
    for index in range(found):
        device = torch.cuda.get_device_properties(index)
        yield Fact(
            f"cuda:{index}", f"{device.name}, {format_bytes(device.total_memory)}, sm_{device.major}{device.minor}"
        )


def _backends() -> Iterator[Fact]:
    has_gloo = dist.is_available() and dist.is_gloo_available()
    yield Fact("gloo", "yes" if has_gloo else "no", "" if has_gloo else "install a torch that is built with gloo")
    if dist.is_available() and dist.is_nccl_available():
        yield Fact("NCCL", ".".join(map(str, torch.cuda.nccl.version())))
    else:
        yield Fact("NCCL", "no", "install a torch that is built with NCCL" if torch.cuda.is_available() else "")
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        yield Fact(name, os.environ.get(name, f"{NOT_SET}, `layerwise` uses lo for the ranks that it starts"))


def _extras() -> Iterator[Fact]:
    for name in ("torchvision", "timm"):
        is_there = importlib.util.find_spec(name) is not None
        advice = "" if is_there else f"for models of {name}: pip install 'layerwise[zoo]'"
        yield Fact(name, (_version(name) or "yes") if is_there else "no", advice)
    lacks = [*(["root"] if os.geteuid() else []), *(name for name in ("ip", "tc") if shutil.which(name) is None)]
    advice = f"for several hosts on one machine (benchmarks only): {', '.join(lacks)}; see iproute2" if lacks else ""
    yield Fact("network namespaces", "no" if lacks else "can be made", advice)
    yield Fact("measurements of this host", str(Path(platformdirs.user_cache_dir("layerwise"))))


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
