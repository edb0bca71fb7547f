"""A link between two network namespaces whose packets take their time, carried by a process of ours.

``tc netem`` is not in every kernel; a pair of TUN devices is. What one host sends is read here, kept for the delay, and
written to the other host, in order. The rate of the link is still that of the token bucket in front of it.

Run as ``python -m runtime.delayed FD FD SECONDS``, with both ends of the link open.
"""

import fcntl
import os
import selectors
import struct
import subprocess
import sys
import time
from collections import deque
from typing import Final

from planner.errors import RunError

_DEVICE: Final = "/dev/net/tun"
_SET_INTERFACE: Final = 0x400454CA  # TUNSETIFF of linux/if_tun.h
_PACKETS: Final = 0x0001 | 0x1000  # IFF_TUN, IFF_NO_PI: packets of IP with nothing in front of them
_LONGEST_PACKET: Final = 1 << 16


def open_end(name: str) -> int:
    """Make a TUN device in this process's namespace; return the descriptor that packets are read from and written to.

    Raises:
        RunError: the kernel has no TUN devices, or refuses.
    """
    try:
        end = os.open(_DEVICE, os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(end, _SET_INTERFACE, struct.pack("16sH", name.encode(), _PACKETS))
    except OSError as error:
        raise RunError(f"a link with a delay needs a TUN device, and {_DEVICE} says: {error}") from error
    return end


def start_carrier(ends: tuple[int, int], delay_s: float) -> "subprocess.Popen[bytes]":
    """Start the process that carries packets between two ends; it ends when it is killed."""
    command = [sys.executable, "-m", "runtime.delayed", *map(str, ends), repr(delay_s)]
    return subprocess.Popen(command, pass_fds=ends)


def carry(ends: tuple[int, int], delay_s: float) -> None:
    """Carry packets between two ends for ever, each that many seconds after it was sent."""
    waiting: dict[int, deque[tuple[float, bytes]]] = {end: deque() for end in ends}  # by where they go
    other = dict(zip(ends, reversed(ends), strict=True))
    selector = selectors.DefaultSelector()
    for end in ends:
        selector.register(end, selectors.EVENT_READ)
    while True:
        due_s = min((queue[0][0] for queue in waiting.values() if queue), default=None)
        for key, _ in selector.select(None if due_s is None else max(due_s - time.monotonic(), 0.0)):
            _receive(key.fd, waiting[other[key.fd]], delay_s)
        now_s = time.monotonic()
        for end, queue in waiting.items():
            while queue and queue[0][0] <= now_s:
                _send(end, queue.popleft()[1])


def _receive(end: int, queue: "deque[tuple[float, bytes]]", delay_s: float) -> None:
    while True:
        try:
            packet = os.read(end, _LONGEST_PACKET)
        except BlockingIOError:
            return
        queue.append((time.monotonic() + delay_s, packet))


def _send(end: int, packet: bytes) -> None:
    try:
        os.write(end, packet)
    except (BlockingIOError, OSError):
        return  # as any link, it may lose packets; the device is down while hosts are made and removed


if __name__ == "__main__":
    carry((int(sys.argv[1]), int(sys.argv[2])), float(sys.argv[3]))
