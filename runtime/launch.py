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
from typing import Any, Final, TypeAlias

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from planner import errors
from planner.errors import LayerwiseError, RunError, UsageError
from runtime.namespaces import Hosts

JsonValue: TypeAlias = "bool | int | float | str | Sequence[JsonValue] | Mapping[str, JsonValue] | None"

FILE_STORE: Final = "LAYERWISE_FILE_STORE"  # environment variables between run_local and its ranks
PARENT: Final = "LAYERWISE_PARENT"
KEEP_MEMORY: Final = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**36)}
"""glibc gives tensors above 32 MiB back to the system and gets them anew, page by page, which a training step pays for
every time: an addition with a result of 51 MB took 38 ms, and 7 ms with these settings; those of the user win."""
_POLL_S: Final = 0.02
_SETTLE_S: Final = 0.1  # after the first failure: time for its cause to show up, when that is another rank
_TERMINATE_S: Final = 1.0
_NUM_LINES: Final = 12  # of a failed rank's output in the message


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
    joined = dist.is_initialized()
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if joined else _place()
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    process = Process(rank, world_size, local_rank, _device(local_rank, world_size))
    if not joined:
        _join_group(process, timedelta(seconds=timeout_s))
    return process


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
    except RuntimeError as error:  # torch's own errors of stores and backends are RuntimeErrors
        raise RunError(f"rank {rank} of {world_size} could not join the process group: {error}") from error


def _place() -> tuple[int, int]:
    """Return rank and world size from the environment."""
    needed = ["RANK", "WORLD_SIZE"]
    needed += [] if FILE_STORE in os.environ else ["MASTER_ADDR", "MASTER_PORT"]
    missing = [name for name in needed if not os.environ.get(name)]
    if missing:
        raise UsageError(
            f"this process belongs to no group: {', '.join(missing)} not set in the environment. "
            "Start it with `torchrun --nproc-per-node N ...`"
        )
    try:
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except ValueError as error:
        raise UsageError(f"RANK and WORLD_SIZE must be whole numbers: {error}") from error


def _device(local_rank: int, world_size: int) -> torch.device:
    num_local = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
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
    process. What they print appears only in the error of a rank that failed.

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
    with tempfile.TemporaryDirectory(prefix="layerwise-") as name:
        folder = Path(name)
        call = {"function": function, "argument": argument, "timeout_s": timeout_s}
        (folder / "call.json").write_text(json.dumps(call), encoding="utf-8")
        try:
            for rank in range(num_ranks):
                prefix, interface = _place_on(hosts, rank, num_ranks)
                environment = _environment(folder, rank, num_ranks, threads_per_rank, interface)
                ranks.append(_Rank(rank, folder, prefix, environment))
            failed, late = _watch(ranks, deadline_s, while_waiting or _nothing)
        finally:
            _end(ranks)
        if failed:
            raise min(failed, key=_Rank.failed_at_s).error()
        if late:
            how = f"was not done within {timeout_s:g} s and was stopped"
            raise RunError("\n".join(rank.describe(how) for rank in late))
        return [rank.result() for rank in ranks]


def _place_on(hosts: Hosts | None, rank: int, num_ranks: int) -> tuple[list[str], str]:
    """Return the command prefix and the network interface of a rank."""
    if hosts is None:
        return [], "lo"
    index = rank * len(hosts.names) // num_ranks
    return hosts.command_prefix(index), hosts.interface(index)


def _environment(folder: Path, rank: int, num_ranks: int, num_threads: int, interface: str) -> dict[str, str]:
    place = {
        "RANK": rank,
        "WORLD_SIZE": num_ranks,
        "LOCAL_RANK": rank,
        "LOCAL_WORLD_SIZE": num_ranks,
    }
    threads = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return (
        KEEP_MEMORY
        | dict(os.environ)
        | {key: str(value) for key, value in place.items()}
        | dict.fromkeys(threads, str(num_threads))
        | dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), interface)
        | {FILE_STORE: str(folder / "store"), PARENT: str(os.getpid())}
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

    def failed_at_s(self) -> float:
        """Return when it failed by the machine's monotonic clock; 0 if it died without a word."""
        return float(self._read().get("failed_at_s", 0.0))

    def result(self) -> JsonValue:
        result: JsonValue = self._read()["result"]
        return result

    def error(self) -> LayerwiseError:
        outcome, code = self._read(), self.process.returncode
        if "error" in outcome:
            kind: type[LayerwiseError] = getattr(errors, outcome["error"])
            return kind.__new__(kind, f"rank {self.rank}: {outcome['message']}")
        if code < 0:
            return RunError(self.describe(f"was killed by {signal.Signals(-code).name}"))
        return RunError(self.describe(f"exited with code {code}"))

    def describe(self, how: str) -> str:
        lines = self._output.read_text(encoding="utf-8", errors="replace").splitlines()
        tail = "".join(f"\n    {line}" for line in lines[-_NUM_LINES:])
        return f"rank {self.rank} {how}" + (f"; the end of its output:{tail}" if tail else "")

    def send(self, number: signal.Signals) -> None:
        """Signal the process and its descendants."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def _read(self) -> dict[str, Any]:
        if not self._outcome.exists():
            return {}
        outcome: dict[str, Any] = json.loads(self._outcome.read_text(encoding="utf-8"))
        return outcome


def _nothing() -> None:
    return None


def _watch(
    ranks: Sequence[_Rank], deadline_s: float, while_waiting: Callable[[], object]
) -> tuple[list[_Rank], list[_Rank]]:
    """Wait until all are done, one has failed or time is up.

    Returns:
        the ranks that failed, and those still running.
    """
    while any(rank.is_running() for rank in ranks) and time.monotonic() < deadline_s:
        if any(rank.has_failed() for rank in ranks):
            time.sleep(_SETTLE_S)
            break
        while_waiting()
        time.sleep(_POLL_S)
    return [r for r in ranks if r.has_failed()], [r for r in ranks if r.is_running()]


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
