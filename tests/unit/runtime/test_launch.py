import _thread
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from planner.errors import RunError, UnknownNameError, UsageError
from runtime.launch import initialize, run_local

PARENT = "import sys; from runtime.launch import run_local; "


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def comes_true(condition: Callable[[], bool], within_s: float) -> bool:
    deadline_s = time.monotonic() + within_s
    while not condition() and time.monotonic() < deadline_s:
        time.sleep(0.05)
    return condition()


def have_started(folder: Path, num_ranks: int) -> bool:
    return len(list(folder.glob("*.pids"))) == num_ranks


def pids_in(folder: Path) -> list[list[int]]:
    return [[int(pid) for pid in file.read_text().split()] for file in folder.glob("*.pids")]


def test_an_environment_without_a_group_is_a_usage_error_that_names_what_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RANK", "0")
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UsageError, match="WORLD_SIZE, MASTER_ADDR, MASTER_PORT not set"):
        initialize()
    with pytest.raises(UsageError, match="at least one"):
        run_local("support.ranks:describe", None, num_ranks=0, timeout_s=1)


@pytest.mark.parametrize(
    ("name", "text", "error", "said"),
    [
        ("RANK", "x", UsageError, "RANK in the environment must be a whole number of at least 0, not 'x'"),
        ("RANK", "2", UsageError, "RANK is 2, but WORLD_SIZE is 2"),
        ("WORLD_SIZE", "-1", UsageError, "WORLD_SIZE in the environment must be"),
        ("LOCAL_RANK", "", UsageError, "LOCAL_RANK in the environment must be"),
        ("LOCAL_WORLD_SIZE", "1.0", UsageError, "LOCAL_WORLD_SIZE in the environment must be"),
        ("MASTER_PORT", "http", RunError, "could not join the process group: .*'http'"),
    ],
)
def test_an_environment_that_makes_no_sense_is_an_error_of_ours(
    name: str, text: str, error: type[Exception], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    for each, value in (place | {"MASTER_PORT": "29400", name: text}).items():
        monkeypatch.setenv(each, value)
    with pytest.raises(error, match=said):
        initialize(timeout_s=1)


@pytest.mark.dist
def test_results_come_back_in_rank_order() -> None:
    argument = {"x": [1, 2.5, None]}
    results = run_local("support.ranks:describe", argument, num_ranks=3, timeout_s=60, threads_per_rank=2)
    assert results == [
        {"argument": argument, "place": [r, 3, r], "same": True, "num_threads": 2, "sum": 6.0} for r in range(3)
    ]


@pytest.mark.dist
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("exception", r"rank 1 exited with code 1;.*rank 1 was here.*ValueError: boom$"),
        ("sigkill", "rank 1 was killed by SIGKILL.*rank 1 was here$"),
        ("silence", "rank 1 exited with code 1;.*rank 1 was here.*SystemExit: 0$"),
    ],
)
def test_the_rank_that_failed_is_blamed_not_those_that_waited_for_it(kind: str, message: str) -> None:
    start_s = time.monotonic()
    with pytest.raises(RunError, match=rf"(?s){message}"):
        run_local("support.ranks:fail", kind, num_ranks=2, timeout_s=60)
    assert time.monotonic() - start_s < 20  # the start takes most of it


@pytest.mark.dist
def test_an_error_of_ours_keeps_its_class_and_exit_code() -> None:
    with pytest.raises(UnknownNameError, match=r"^rank 1: unknown layer 'conv9'") as raised:
        run_local("support.ranks:fail", "our own", num_ranks=2, timeout_s=60)
    assert raised.value.exit_code == UnknownNameError.exit_code


@pytest.mark.dist
def test_a_timeout_shows_where_each_rank_was() -> None:
    where = r"(?s)rank 0 was not done.*in all_reduce.*rank 1 was not done.*in fail"
    with pytest.raises(RunError, match=where):
        run_local("support.ranks:fail", "hang", num_ranks=2, timeout_s=15)


@pytest.mark.dist
@pytest.mark.parametrize(("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_ctrl_c_and_sigterm_leave_neither_ranks_nor_their_children_nor_files(
    number: signal.Signals, raised: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (files := tmp_path / "files").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(files))

    def interrupt() -> None:
        comes_true(lambda: have_started(tmp_path, 2), 60)
        _thread.interrupt_main(number)

    thread = threading.Thread(target=interrupt)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        thread.start()
        with pytest.raises(raised):
            run_local("support.ranks:stay", str(tmp_path), num_ranks=2, timeout_s=90)
    finally:
        signal.signal(signal.SIGINT, before)
    thread.join()
    pids = [pid for pids in pids_in(tmp_path) for pid in pids]
    assert len(pids) == 4
    assert comes_true(lambda: not any(map(is_alive, pids)), 1)
    assert list(files.iterdir()) == []


@pytest.mark.dist
def test_ranks_die_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    call = f"run_local('support.ranks:stay', {str(tmp_path)!r}, num_ranks=2, timeout_s=90)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", PARENT + call], env=environment) as parent:
        started = comes_true(lambda: have_started(tmp_path, 2), 60)
        parent.kill()
    assert started
    ranks, children = zip(*pids_in(tmp_path), strict=True)
    assert comes_true(lambda: not any(map(is_alive, ranks)), 2)
    subprocess.run(["kill", *map(str, children)], check=True)  # the kernel ends ranks only
