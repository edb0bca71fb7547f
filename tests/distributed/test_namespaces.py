import os
import subprocess

import pytest

from planner.errors import UsageError
from runtime.launch import JsonValue, run_local
from runtime.namespaces import two_hosts

pytestmark = [pytest.mark.dist, pytest.mark.netns]
PORT = 5000


def namespaces_of(pid: int) -> list[str]:
    listing = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    return [line for line in listing.stdout.splitlines() if line.startswith(f"layerwise-{pid}-")]


@pytest.mark.parametrize(("num_hosts", "rate_bytes_per_s", "num_bytes"), [(2, 12.5e6, 5_000_000), (3, 1e6, 300_000)])
def test_a_link_is_no_faster_than_asked_for(num_hosts: int, rate_bytes_per_s: float, num_bytes: int) -> None:
    with two_hosts(rate_bytes_per_s, num_hosts) as hosts:
        argument: JsonValue = {"address": hosts.address(1), "port": PORT, "num_bytes": num_bytes}
        seconds, *_ = run_local("support.ranks:transfer", argument, num_ranks=num_hosts, timeout_s=90, hosts=hosts)
    assert isinstance(seconds, float)
    # an upper bound alone: how much slower a busy machine is says nothing of the link
    assert num_bytes / seconds < 1.15 * rate_bytes_per_s


def test_hosts_are_removed_at_the_end_also_when_the_body_raises() -> None:
    with two_hosts(None), two_hosts(1e9, num_hosts=3):
        assert len(namespaces_of(os.getpid())) == 2 + 4
    assert not namespaces_of(os.getpid())
    for error in (ValueError, KeyboardInterrupt, SystemExit):
        with pytest.raises(error), two_hosts(None):
            raise error
        assert not namespaces_of(os.getpid())


def test_sigterm_removes_the_hosts() -> None:
    with pytest.raises(SystemExit, match="143"), two_hosts(None):
        os.kill(os.getpid(), 15)
    assert not namespaces_of(os.getpid())


def test_what_a_dead_process_left_is_removed_by_the_next() -> None:
    with subprocess.Popen(["true"]) as dead:
        pass
    subprocess.run(["ip", "netns", "add", f"layerwise-{dead.pid}-0-0"], check=True)
    with two_hosts(None):
        assert not namespaces_of(dead.pid)


def test_senseless_hosts_are_refused() -> None:
    with pytest.raises(UsageError, match="2 to 254"), two_hosts(None, num_hosts=1):
        pass
    with pytest.raises(UsageError, match="rate of 0"), two_hosts(0):
        pass
