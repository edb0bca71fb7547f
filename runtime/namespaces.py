"""Several hosts on one machine: network namespaces joined by links of a chosen rate.

Two hosts share one veth link; more meet at a switch, a bridge in a namespace of its own. Every end
of a link sends through a token bucket, so each direction has the rate to itself. Nothing leaves the
machine.

Measured with one TCP stream on 2 cores, 1 MB/s to 1.25 GB/s: payload arrives at 0.89 to 0.97 of the
asked rate, which counts Ethernet frames (1448 of 1514 bytes are payload). The bucket is small so
that short messages take their time too: 64 KiB let 20 kB pass 17 times too fast at 1 MB/s. It drops
no offloaded packets, because ``tbf`` cuts those that exceed the bucket.

Between two hosts messages may take their time as well: then a process carries the packets (``runtime.delayed``).
"""

import itertools
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from planner.errors import RunError, UsageError
from runtime.delayed import open_end, start_carrier
from runtime.sigterm import sigterm_unwinds

_INTERFACE: Final = "eth0"
_BUCKET_S: Final = 1e-3
_SMALLEST_BUCKET_BYTES: Final = 4000  # two frames of 1514 bytes and some room
_LARGE_PACKET_BYTES: Final = 16_000  # on a link that a process carries, which takes as long for each packet
_LONGEST_DELAY_S: Final = 1.0
_QUEUE_S: Final = 0.05  # a packet that would wait longer is dropped
_OWNER: Final = re.compile(r"layerwise-(\d+)-")
_serial = itertools.count()


@dataclass(frozen=True, slots=True)
class Hosts:
    """The hosts of a running :func:`two_hosts`, by index; each is one network namespace."""

    names: tuple[str, ...]

    def command_prefix(self, index: int) -> list[str]:
        """Return the words that, put before a command, run it on the host."""
        return ["ip", "netns", "exec", self.names[index]]

    def interface(self, index: int) -> str:  # noqa: ARG002  every host has its own eth0
        """Return the name of the network interface that leads to the other hosts."""
        return _INTERFACE

    def address(self, index: int) -> str:
        """Return the IPv4 address of the host."""
        return f"10.0.0.{index + 1}"


@contextmanager
def two_hosts(rate_bytes_per_s: float | None, num_hosts: int = 2, delay_s: float = 0.0) -> Iterator[Hosts]:
    """Make hosts that are joined by links of a rate, and remove them at the end.

    They are removed on errors, Ctrl-C and SIGTERM (when entered in the main thread) as well. What a
    killed process left behind is removed by the next call.

    Args:
        rate_bytes_per_s: of each link, per direction, in Ethernet frames; None does not limit it.
        num_hosts: 2 to 254.
        delay_s: that every packet takes; of two hosts only.

    Raises:
        UsageError: not root, ``ip`` or ``tc`` is missing, or an argument is out of range.
        RunError: the kernel refused, for example in a container without CAP_SYS_ADMIN.
    """
    _check(rate_bytes_per_s, num_hosts, delay_s)
    _remove_leftovers()
    prefix = f"layerwise-{os.getpid()}-{next(_serial)}-"
    hosts = Hosts(tuple(f"{prefix}{index}" for index in range(num_hosts)))
    with sigterm_unwinds(), ExitStack() as undone:
        undone.callback(lambda: _remove(name for name in _namespaces() if name.startswith(prefix)))
        if delay_s:
            _build_delayed(hosts, rate_bytes_per_s, delay_s, undone)
        else:
            _build(hosts, f"{prefix}switch", rate_bytes_per_s)
        yield hosts


def _build_delayed(hosts: Hosts, rate_bytes_per_s: float | None, delay_s: float, undone: ExitStack) -> None:
    """Join two hosts by a link that a process carries."""
    names = [f"lw{os.getpid() % 10**7}-{index}" for index in range(2)]  # no longer than 15 characters
    ends = open_end(names[0]), open_end(names[1])
    for end in ends:
        undone.callback(os.close, end)
    large = rate_bytes_per_s is None or rate_bytes_per_s * _BUCKET_S >= _LARGE_PACKET_BYTES
    for index, (host, name) in enumerate(zip(hosts.names, names, strict=True)):
        _run("ip", "netns", "add", host)
        _run("ip", "-n", host, "link", "set", "lo", "up")
        _run("ip", "link", "set", name, "netns", host, "name", _INTERFACE)
        if large:
            _run("ip", "-n", host, "link", "set", _INTERFACE, "mtu", str(_LARGE_PACKET_BYTES))
        _run("ip", "-n", host, "address", "add", f"{hosts.address(index)}/24", "dev", _INTERFACE)
        _run("ip", "-n", host, "link", "set", _INTERFACE, "addrgenmode", "none", "up")
        if rate_bytes_per_s is not None:
            _shape(host, _INTERFACE, rate_bytes_per_s)
    carrier = start_carrier(ends, delay_s)
    undone.callback(carrier.wait)
    undone.callback(carrier.kill)


def _check(rate_bytes_per_s: float | None, num_hosts: int, delay_s: float) -> None:
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        raise UsageError(f"hosts need {' and '.join(missing)}: install the Debian package iproute2")
    if os.geteuid() != 0:
        raise UsageError("hosts are network namespaces, which only root can make: run as root")
    if not 2 <= num_hosts <= 254:
        raise UsageError(f"{num_hosts} hosts asked, but 2 to 254 are possible")
    if rate_bytes_per_s is not None and not 1e3 <= rate_bytes_per_s < float("inf"):
        raise UsageError(f"a link rate of {rate_bytes_per_s} bytes/s asked, but 1000 is the least")
    if not 0 <= delay_s <= _LONGEST_DELAY_S or (delay_s and num_hosts != 2):
        raise UsageError(
            f"a delay of {delay_s} s between {num_hosts} hosts asked, but 0 to {_LONGEST_DELAY_S} s between two are "
            "possible"
        )


def _build(hosts: Hosts, switch: str, rate_bytes_per_s: float | None) -> None:
    direct = len(hosts.names) == 2
    for name in hosts.names if direct else (*hosts.names, switch):
        _run("ip", "netns", "add", name)
        _run("ip", "-n", name, "link", "set", "lo", "up")
    if direct:
        first, second = hosts.names
        ends = [(first, _INTERFACE), (second, _INTERFACE)]
        _join(ends[0], ends[1])
    else:
        _run("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
        _run("ip", "-n", switch, "link", "set", "bridge", "up")
        ends = []
        for index, name in enumerate(hosts.names):
            _join((name, _INTERFACE), (switch, f"port{index}"))
            _run("ip", "-n", switch, "link", "set", f"port{index}", "master", "bridge")
            ends += [(name, _INTERFACE), (switch, f"port{index}")]
    for index, name in enumerate(hosts.names):
        _run("ip", "-n", name, "address", "add", f"{hosts.address(index)}/24", "dev", _INTERFACE)
    for name, interface in ends:
        # no IPv6 address, so that libraries which take the interface's first one take ours
        _run("ip", "-n", name, "link", "set", interface, "addrgenmode", "none", "up")
        if rate_bytes_per_s is not None:
            _shape(name, interface, rate_bytes_per_s)


def _join(one: tuple[str, str], other: tuple[str, str]) -> None:
    veth = ("type", "veth", "peer", "name", other[1], "netns", other[0])
    _run("ip", "link", "add", one[1], "netns", one[0], *veth)


def _shape(name: str, interface: str, rate_bytes_per_s: float) -> None:
    burst_bytes = max(rate_bytes_per_s * _BUCKET_S, _SMALLEST_BUCKET_BYTES)
    bucket = ("rate", f"{rate_bytes_per_s * 8:.0f}bit", "burst", f"{burst_bytes:.0f}b")
    queue = ("latency", f"{_QUEUE_S * 1e3:.0f}ms")
    _run("tc", "-n", name, "qdisc", "add", "dev", interface, "root", "tbf", *bucket, *queue)


def _namespaces() -> list[str]:
    return [line.split()[0] for line in _run("ip", "netns", "list").splitlines()]


def _remove(names: Iterable[str]) -> None:
    for name in names:  # one that is gone already is no error: two processes may remove the same leftovers
        subprocess.run(["ip", "netns", "delete", name], stderr=subprocess.DEVNULL, check=False)


def _remove_leftovers() -> None:
    owned = ((name, _OWNER.match(name)) for name in _namespaces())
    _remove(name for name, owner in owned if owner and not Path("/proc", owner[1]).exists())


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RunError(f"{' '.join(command)!r} failed: {done.stderr.strip()}")
    return done.stdout
