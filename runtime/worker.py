"""Entry point of the processes that ``run_local`` and ``run_on_ray`` start: ``python -m runtime.worker FOLDER``.

Reads ``call.json`` of the folder and writes ``RANK.json``: ``{"result": ...}``, or
``{"failed_at_s": ...}`` and, for one of our own errors, its class and message.
"""

import contextlib
import ctypes
import faulthandler
import json
import os
import pkgutil
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Final

import torch
import torch.distributed as dist

from runtime.ended import told
from runtime.launch import PARENT, JsonValue, initialize, leave

_PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h


def main() -> None:
    """Run this rank's call; leaves with a non-zero code when it fails."""
    _die_with_parent(int(os.environ[PARENT]))
    faulthandler.register(signal.SIGTERM, chain=True)  # a rank that is stopped shows where it was
    folder = Path(sys.argv[1])
    outcome = folder / f"{os.environ['RANK']}.json"
    try:
        outcome.write_text(json.dumps({"result": _call(folder / "call.json")}), encoding="utf-8")
    except (Exception, SystemExit) as error:  # a rank returns, it does not leave
        failed_at_s = time.time_ns() / 1e9  # on several machines there is no other clock to say who was first
        traceback.print_exc()
        outcome.write_text(json.dumps({"failed_at_s": failed_at_s} | told(error)), encoding="utf-8")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(getattr(error, "exit_code", 1))  # threads of a broken group could hold up an orderly exit
    if dist.is_initialized():
        with contextlib.suppress(RuntimeError):  # the result is written; what a peer does now is its own matter
            leave()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # past this process's threads, see leave()


def _call(file: Path) -> JsonValue:
    call = json.loads(file.read_text(encoding="utf-8"))
    threads = int(os.environ["OMP_NUM_THREADS"])
    _stay_apart(int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"]), threads)
    torch.set_num_threads(threads)
    process = initialize(timeout_s=call["timeout_s"])
    result: JsonValue = pkgutil.resolve_name(call["function"])(call["argument"], process)
    return result


def _stay_apart(rank: int, num_ranks: int, threads: int) -> None:
    """Keep this rank on processors of its own, where there are enough and the system can.

    A rank that is woken by another one's message often starts on that one's processor. Both then share it for some
    milliseconds while another is idle: of the time between barriers, two ranks on two processors computed 49 to 72 %,
    kept apart 85 to 90 %.
    """
    if not hasattr(os, "sched_setaffinity"):
        return
    processors = sorted(os.sched_getaffinity(0))
    if num_ranks * threads <= len(processors):
        os.sched_setaffinity(0, processors[rank * threads :][:threads])


def _die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent ends, however that happens."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


if __name__ == "__main__":
    main()
