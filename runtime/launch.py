"""Processes and their process group: under torchrun, or started here on one machine."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from planner.errors import RunError, UsageError
from runtime.ended import Ended, results_of
from runtime.namespaces import Hosts
from runtime.sigterm import sigterm_unwinds
from runtime.slurm import adopt_step, whole_number

JsonValue: TypeAlias = "bool | int | float | str | Sequence[JsonValue] | Mapping[str, JsonValue] | None"

FILE_STORE: Final = "LAYERWISE_FILE_STORE"  # environment variables between run_local and its ranks
PARENT: Final = "LAYERWISE_PARENT"
KEEP_MEMORY: Final = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**36)}
"""glibc gives tensors above 32 MiB back to the system and gets them anew, page by page, which a training step pays for
every time: an addition with a result of 51 MB took 38 ms, and 7 ms with these settings; those of the user win."""
INTERFACES: Final = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
_POLL_S: Final = 0.02
_SETTLE_S: Final = 1.0  # after the first failure: time for its cause to show up, when that is another rank
_TERMINATE_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class Process:
    """The place of this process in the job, and the device it computes on."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device


def initialize(*, timeout_s: float = 60.0) -> Process:
    """Join the process group that the environment describes, and return this process's place in it.

    Where CUDA has a device for every rank of this machine, the group is NCCL for CUDA tensors and
    gloo for CPU tensors, and the rank's device becomes the current one; otherwise it is gloo and
    the device the CPU. A group that exists already is kept.

    Each restart by ``torchrun --max-restarts`` gets keys of its own in the store, because ranks
    would read the addresses of dead peers otherwise.

    Args:
        timeout_s: for the ranks to meet, and for every collective of the group.

    Raises:
        UsageError: the environment describes no group.
        RunError: the ranks did not meet.
    """
    process = own_process()
    if not dist.is_initialized():
        _join_group(process, timedelta(seconds=timeout_s))
    return process


def own_process() -> Process:
    """Return this process's place in the job that the environment describes, without talking to the others.

    Raises:
        UsageError: the environment describes no group.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else _place()
    local_rank = whole_number("LOCAL_RANK", rank)
    return Process(rank, world_size, local_rank, _device(local_rank, world_size))


def leave() -> None:
    """Leave the process group at the end of a script.

    All ranks wait for each other first: a thread of gloo that still ends the last collective while
    the interpreter shuts down aborts the process (seen in 2 of 7 runs without, in 0 of 24 with it).
    """
    dist.barrier()
    dist.destroy_process_group()


def _join_group(process: Process, timeout: timedelta) -> None:
    rank, world_size, device = process.rank, process.world_size, process.device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    url = f"file://{os.environ[FILE_STORE]}" if FILE_STORE in os.environ else "env://"
    try:
        store, _, _ = next(rendezvous(url, rank, world_size, timeout=timeout))
        store.set_timeout(timeout)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=PrefixStore(f"attempt-{attempt}", store),
            rank=rank,
            world_size=world_size,
            timeout=timeout,
        )
    except (RuntimeError, ValueError) as error:  # torch's own of stores and backends, and of a port that is no number
        raise RunError(f"rank {rank} of {world_size} could not join the process group: {error}") from error


def _place() -> tuple[int, int]:
    """Return rank and world size from the environment."""
    adopt_step()
    needed = ["RANK", "WORLD_SIZE"]
    needed += [] if FILE_STORE in os.environ else ["MASTER_ADDR", "MASTER_PORT"]
    missing = [name for name in needed if not os.environ.get(name)]
    if missing:
        raise UsageError(
            f"this process belongs to no group: {', '.join(missing)} not set in the environment. "
            "Start it with `torchrun --nproc-per-node N ...`, or with srun"
        )
    rank, world_size = whole_number("RANK", 0), whole_number("WORLD_SIZE", 1)
    if rank >= world_size:
        raise UsageError(f"RANK is {rank}, but WORLD_SIZE is {world_size}: ranks are counted from 0")
    return rank, world_size


def _device(local_rank: int, world_size: int) -> torch.device:
    num_local = whole_number("LOCAL_WORLD_SIZE", world_size)
    if torch.cuda.is_available() and torch.cuda.device_count() >= num_local:
        return torch.device("cuda", local_rank)
    return torch.device("cpu")


def run_local(
    function: str,
    argument: JsonValue,
    *,
    num_ranks: int,
    timeout_s: float,
    threads_per_rank: int = 1,
    hosts: Hosts | None = None,
    while_waiting: Callable[[], object] | None = None,
) -> list[JsonValue]:
    """Call a function in new processes of this machine, and return its results in rank order.

    Every process joins the group (:func:`initialize`) and calls ``function(argument, process)``.
    They talk over loopback, or over the links of ``hosts``, and none outlives this call or this
    process, nor do files of theirs, also where SIGTERM ends it (when called in the main thread).
    What they print appears only in the error of a rank that failed.

    Args:
        function: ``package.module:name``, importable with this process's ``sys.path``.
        argument: goes to every rank, as JSON.
        num_ranks: number of processes.
        timeout_s: for the whole call, the start of the processes included: they import torch.
        threads_per_rank: CPU threads of each process.
        hosts: places the ranks on them, in consecutive blocks as equal as possible.
        while_waiting: is called again and again until they are done.

    Raises:
        LayerwiseError: the class that a rank raised, without the attributes of that class.
        RunError: a rank raised something else, died, or was not done in time.
    """
    if num_ranks < 1:
        raise UsageError(f"{num_ranks} ranks asked, but there must be at least one")
    deadline_s = time.monotonic() + timeout_s
    ranks: list[_Rank] = []
    with sigterm_unwinds(), tempfile.TemporaryDirectory(prefix="layerwise-") as name:
        folder = Path(name)
        call = {"function": function, "argument": argument, "timeout_s": timeout_s}
        (folder / "call.json").write_text(json.dumps(call), encoding="utf-8")
        try:
            for rank in range(num_ranks):
                prefix, interface = _place_on(hosts, rank, num_ranks)
                environment = _environment(folder, rank, num_ranks, threads_per_rank, interface)
                ranks.append(_Rank(rank, folder, prefix, environment))
            late = _watch(ranks, deadline_s, while_waiting or _nothing)
        finally:
            _end(ranks)
        return results_of([rank.ended() for rank in ranks], late, timeout_s)


def _place_on(hosts: Hosts | None, rank: int, num_ranks: int) -> tuple[list[str], str]:
    """Return the command prefix and the network interface of a rank."""
    if hosts is None:
        return [], "lo"
    index = rank * len(hosts.names) // num_ranks
    return hosts.command_prefix(index), hosts.interface(index)


def _environment(folder: Path, rank: int, num_ranks: int, num_threads: int, interface: str) -> dict[str, str]:
    return (
        KEEP_MEMORY
        | dict(os.environ)
        | place_variables(Place(rank, num_ranks, rank, num_ranks), num_threads)
        | dict.fromkeys(INTERFACES, interface)
        | {FILE_STORE: str(folder / "store"), PARENT: str(os.getpid())}
    )


class Place(NamedTuple):
    """The place of a rank in a job, and among the ranks of its machine."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


def place_variables(place: Place, num_threads: int) -> dict[str, str]:
    """Return what tells a process of ``runtime.worker`` its place and its threads, and where modules are."""
    threads = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return (
        {name.upper(): str(value) for name, value in place._asdict().items()}
        | dict.fromkeys(threads, str(num_threads))
        | {"PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path)}
    )


class _Rank:
    """A process of :func:`run_local` and the files that it leaves: its outcome and its output."""

    def __init__(self, rank: int, folder: Path, prefix: list[str], environment: dict[str, str]) -> None:
        self.rank = rank
        self._outcome = folder / f"{rank}.json"
        self._output = folder / f"{rank}.log"
        command = [*prefix, sys.executable, "-P", "-m", "runtime.worker", str(folder)]
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                process_group=0,
            )

    def is_running(self) -> bool:
        return self.process.poll() is None

    def has_failed(self) -> bool:
        return not self.is_running() and (self.process.returncode != 0 or not self._outcome.exists())

    def ended(self) -> Ended:
        """Return what it left; once it has ended."""
        outcome = json.loads(self._outcome.read_text(encoding="utf-8")) if self._outcome.exists() else {}
        output = self._output.read_text(encoding="utf-8", errors="replace")
        return Ended(self.rank, self.process.returncode, outcome, output)

    def send(self, number: signal.Signals) -> None:
        """Signal the process and its descendants."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


def _nothing() -> None:
    return None


def _watch(ranks: Sequence[_Rank], deadline_s: float, while_waiting: Callable[[], object]) -> set[int]:
    """Wait until all are done, the others had time to fail too, or time is up; return those that still run."""
    has_failed = False
    while any(rank.is_running() for rank in ranks) and time.monotonic() < deadline_s:
        if not has_failed and any(rank.has_failed() for rank in ranks):
            has_failed, deadline_s = True, min(deadline_s, time.monotonic() + _SETTLE_S)
        while_waiting()
        time.sleep(_POLL_S)
    return {rank.rank for rank in ranks if rank.is_running()}


def _end(ranks: Sequence[_Rank]) -> None:
    """Ask all that still run to end, and soon make them."""
    for rank in ranks:
        rank.send(signal.SIGTERM)
    deadline_s = time.monotonic() + _TERMINATE_S
    while any(rank.is_running() for rank in ranks) and time.monotonic() < deadline_s:
        time.sleep(_POLL_S)
    for rank in ranks:
        rank.send(signal.SIGKILL)
        rank.process.wait()
