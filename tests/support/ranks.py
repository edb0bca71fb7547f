"""What the ranks of the process tests run, by the name ``support.ranks:function``."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from planner.errors import UnknownNameError
from runtime.launch import JsonValue, Process, initialize


def describe(argument: JsonValue, process: Process) -> JsonValue:
    total = torch.tensor([process.rank + 1.0])
    dist.all_reduce(total)
    return {
        "argument": argument,
        "place": [process.rank, process.world_size, process.local_rank],
        "same": initialize() == process,
        "num_threads": torch.get_num_threads(),
        "sum": total.item(),
    }


def fail(kind: JsonValue, process: Process) -> JsonValue:
    """Rank 1 fails in a way, while rank 0 waits for it in a collective."""
    if process.rank == 1:
        print("rank 1 was here", file=sys.stderr, flush=True)
        match kind:
            case "exception":
                raise ValueError("boom")
            case "our own":
                raise UnknownNameError("layer", "conv9", ["conv1"])
            case "silence":
                sys.exit(0)
            case "hang":
                time.sleep(60)
            case _:
                os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.zeros(1))
    return None


def stay(folder: JsonValue, process: Process) -> JsonValue:
    """Leave the ids of this rank and of a child in a file, and stay."""
    child = subprocess.Popen(["sleep", "60"])
    unfinished = Path(str(folder), f"{process.rank}.part")
    unfinished.write_text(f"{os.getpid()} {child.pid}")
    unfinished.rename(unfinished.with_suffix(".pids"))
    time.sleep(60)
    return None


def transfer(argument: JsonValue, process: Process) -> JsonValue:
    """Send bytes from rank 0 to rank 1 by a plain socket; return the seconds it took."""
    assert isinstance(argument, dict)
    address, num_bytes = argument["address"], argument["num_bytes"]
    if process.rank == 1:
        with socket.create_server((address, argument["port"])) as server:
            dist.barrier()
            connection, _ = server.accept()
            with connection:
                left = num_bytes
                while left > 0:
                    left -= len(connection.recv(1 << 20))
                connection.sendall(b"!")
        return None
    dist.barrier()
    if process.rank > 1:
        return None
    with socket.create_connection((address, argument["port"])) as connection:
        start_s = time.perf_counter()
        connection.sendall(bytes(num_bytes))
        connection.recv(1)
        return time.perf_counter() - start_s
