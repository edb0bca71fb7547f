"""The Ray actor of a rank.

Ray sends this file to the cluster's machines, where importing it must not cost a torch: only the standard library.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

Left: TypeAlias = "tuple[int, dict[str, Any], str]"
"""Exit code, outcome and the end of the output: ``runtime.ended.Ended`` without the rank."""


class Keeper:
    """Keeps the process of one rank, which ends with it.

    A process of its own, because allocator, threads and processors are set before one starts, and because what kills
    it can then be told.
    """

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="layerwise-"))
        self._process: subprocess.Popen[bytes] | None = None

    def devices(self) -> str:
        """Return the GPUs that Ray gave this actor, as ``CUDA_VISIBLE_DEVICES`` names them."""
        return os.environ.get("CUDA_VISIBLE_DEVICES", "")

    def free_port(self) -> int:
        """Return a port of this machine that is free now."""
        with socket.create_server(("", 0)) as server:
            port: int = server.getsockname()[1]
            return port

    def start(self, call: str, environment: Mapping[str, str], defaults: Mapping[str, str], folder: str) -> None:
        """Start the rank.

        Args:
            call: JSON that ``runtime.worker`` reads.
            environment: variables beside those of this machine.
            defaults: variables that those of this machine override.
            folder: to start in, where this machine has it.
        """
        (self._folder / "call.json").write_text(call, encoding="utf-8")
        self._rank = environment["RANK"]
        modules = filter(None, (environment["PYTHONPATH"], os.environ.get("PYTHONPATH")))
        own = {"LAYERWISE_PARENT": str(os.getpid()), "PYTHONPATH": os.pathsep.join(modules)}
        with (self._folder / "output").open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "runtime.worker", str(self._folder)],
                env={**defaults, **os.environ, **environment, **own},
                cwd=folder if Path(folder).is_dir() else None,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                process_group=0,
            )

    def wait(self, seconds: float) -> "Left | None":
        """Return what the rank left, or None while it runs on."""
        assert self._process is not None
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        outcome = self._folder / f"{self._rank}.json"
        found = json.loads(outcome.read_text(encoding="utf-8")) if outcome.exists() else {}
        output = (self._folder / "output").read_bytes()[-16_384:].decode(errors="replace")
        return code, found, output

    def stop(self, grace_s: float) -> "Left | None":
        """Ask the rank and its descendants to end, and soon make them; return what it left, None if it never was."""
        found = None
        if self._process is not None and self._folder.exists():  # the first time
            self._send(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(grace_s)
            self._send(signal.SIGKILL)
            self._process.wait()
            found = self.wait(0)
        shutil.rmtree(self._folder, ignore_errors=True)
        return found

    def _send(self, number: signal.Signals) -> None:
        assert self._process is not None
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)
