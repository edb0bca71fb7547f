"""Ranks as forks of one process that has imported torch, so that a run of a few steps takes a second or two.

``Ranks`` starts that process and gives it jobs. A rank ends as a script of a user's ends: by its own exception, through
the interpreter's orderly exit. Nobody stops the others when one fails, as torchrun and ``layerwise run`` would.
"""

import contextlib
import ctypes
import dataclasses
import json
import os
import pkgutil
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any, Final, Self

_POLL_S: Final = 0.02
_DIE_WITH_PARENT: Final = 1  # linux/prctl.h
_NEW_NETWORK: Final = 0x40000000  # CLONE_NEWNET of linux/sched.h
HUNG: Final = -999
"""The code of a rank that had to be ended from outside."""


@dataclasses.dataclass(frozen=True)
class Left:
    """What a rank left.

    Attributes:
        code: of its exit; minus the signal that killed it; ``HUNG``.
        ended_s: when, by ``time.monotonic()``.
        output: what it printed.
        orphans: processes that it left running.
    """

    rank: int
    code: int
    ended_s: float
    output: str
    orphans: int


class Ranks:
    """A process that forks ranks.

    Args:
        preload: statements that it runs first, such as imports.
    """

    def __init__(self, preload: str = "import examples.benchmarks.fault_training") -> None:
        command = [sys.executable, "-c", f"{preload}\nfrom examples.benchmarks.fault_ranks import serve\nserve()"]
        threads = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        path = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
        self._process = subprocess.Popen(
            command, env=os.environ | threads | {"PYTHONPATH": path}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True,
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe(self._process.stdin).close()
        self._process.wait(30)
        self._pipe(self._process.stdout).close()

    def run(
        self, function: str, argument: Any, num_ranks: int, *, limit_s: float = 120.0, hosts: list[str] | None = None
    ) -> list[Left]:
        """Call ``module:function`` with an argument on new ranks, and wait for all; see ``start``."""
        self.start(function, argument, num_ranks, limit_s=limit_s, hosts=hosts)
        return self.ended()

    def start(
        self, function: str, argument: Any, num_ranks: int, *, limit_s: float = 120.0, hosts: list[str] | None = None
    ) -> None:
        """Begin a call; ``ended`` waits for it.

        Args:
            function: gets the argument, and calls ``initialize``.
            argument: as JSON.
            num_ranks: that are forked.
            limit_s: after which those that still run are killed.
            hosts: names of the network namespaces of the ranks.
        """
        call = {"function": function, "argument": argument, "ranks": num_ranks, "limit_s": limit_s, "hosts": hosts}
        pipe = self._pipe(self._process.stdin)
        pipe.write(json.dumps(call) + "\n")
        pipe.flush()

    def ended(self) -> list[Left]:
        """Return what the ranks of the last call left, in order."""
        line = self._pipe(self._process.stdout).readline()
        if not line:
            raise RuntimeError(f"the process that forks ranks ended with code {self._process.wait()}")
        return [Left(**each) for each in json.loads(line)]

    @staticmethod
    def _pipe(pipe: IO[str] | None) -> IO[str]:
        assert pipe is not None
        return pipe


def serve() -> None:
    """Fork ranks as asked on stdin, one call in a line, and say on stdout what they left.

    In a rank this does not return: its exception, or its orderly exit, goes past here.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        call, folder = json.loads(line), Path(tempfile.mkdtemp(prefix="layerwise-"))
        pids = [_forked(call, rank, folder) for rank in range(call["ranks"])]
        left = _collected(pids, time.monotonic() + call["limit_s"], folder)
        shutil.rmtree(folder)
        answers.write(json.dumps([dataclasses.asdict(each) for each in left]) + "\n")
        answers.flush()


def _forked(call: dict[str, Any], rank: int, folder: Path) -> int:
    """Return the id of a new rank; in the rank itself leave by ``SystemExit``, or what its function raises."""
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0)
    output = os.open(folder / f"{rank}.log", os.O_CREAT | os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(output, stream)
    place = {"RANK": rank, "WORLD_SIZE": call["ranks"], "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": call["ranks"]}
    os.environ.update({name: str(value) for name, value in place.items()}, LAYERWISE_FILE_STORE=str(folder / "store"))
    if call["hosts"]:
        _enter(call["hosts"][rank])
        os.environ["GLOO_SOCKET_IFNAME"] = "eth0"
    pkgutil.resolve_name(call["function"])(call["argument"])
    raise SystemExit(0)


def _enter(host: str) -> None:
    """Let this process talk over the network of a namespace."""
    with Path("/var/run/netns", host).open() as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), _NEW_NETWORK):
            raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {host}")


def _collected(pids: list[int], deadline_s: float, folder: Path) -> list[Left]:
    """Wait for ranks; end those that are stopped when all others are done, and those that are late."""
    codes: dict[int, tuple[int, float]] = {}
    late: set[int] = set()
    while running := [pid for pid in pids if pid not in codes]:
        for pid in running:
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                codes[pid] = os.waitstatus_to_exitcode(status), time.monotonic()
        running = [pid for pid in running if pid not in codes]
        if time.monotonic() > deadline_s:
            late.update(running)
        if late or all(_state(pid) == "T" for pid in running):
            for pid in running:
                os.kill(pid, signal.SIGKILL)
        time.sleep(_POLL_S)
    return [
        Left(
            rank, HUNG if pid in late else codes[pid][0], codes[pid][1],
            (folder / f"{rank}.log").read_text(errors="replace"), _remaining(pid),
        )
        for rank, pid in enumerate(pids)
    ]  # fmt: skip


def _state(pid: int) -> str:
    return _stat(Path("/proc", str(pid)))[0]


def _remaining(session: int) -> int:
    """Return how many processes of a session run."""
    found = 0
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):
            state, _, _, own, *_ = _stat(folder)
            found += int(own) == session and state != "Z"
    return found


def _stat(folder: Path) -> list[str]:
    """Return what the kernel says of a process: its state, parent, group, session, …"""
    return (folder / "stat").read_text().rpartition(")")[2].split()
