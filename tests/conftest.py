"""What the markers need: a test without it is skipped with the reason.

``REQUIRE=dist,netns`` in the environment turns the skips of these markers into failures.
"""

import functools
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from planner.errors import LayerwiseError

if TYPE_CHECKING:
    from xdist.remote import Producer
    from xdist.scheduler import LoadScopeScheduling

if "PYTEST_XDIST_WORKER" in os.environ:  # one worker for each core leaves none for threads
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is loaded, here and in processes that tests start

settings.register_profile("shared machine", deadline=None)  # other processes decide how long an example takes
settings.load_profile("shared machine")


def _dist_lacks() -> str | None:
    import torch.distributed as dist

    built = dist.is_available() and dist.is_gloo_available()
    return None if built else "this torch is built without gloo"


def _cuda_devices_lack(num_devices: int) -> str | None:
    import torch

    found = torch.cuda.device_count()
    return None if found >= num_devices else f"needs {num_devices} CUDA devices, found {found}"


def _netns_lacks() -> str | None:
    from runtime.namespaces import two_hosts

    try:
        with two_hosts(1e9):
            return None
    except LayerwiseError as error:
        return str(error)


def _zoo_lacks() -> str | None:
    missing = [name for name in ("torchvision", "timm") if importlib.util.find_spec(name) is None]
    return f"needs {' and '.join(missing)}: pip install '.[zoo]'" if missing else None


def _browser_lacks() -> str | None:
    from support.browser import browser_lacks

    return browser_lacks()


_LACKS: dict[str, Callable[[], str | None]] = {
    "browser": functools.cache(_browser_lacks),
    "dist": functools.cache(_dist_lacks),
    "gpu": functools.cache(lambda: _cuda_devices_lack(1)),
    "multigpu": functools.cache(lambda: _cuda_devices_lack(2)),
    "netns": functools.cache(_netns_lacks),
    "zoo": functools.cache(_zoo_lacks),
}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: "Producer") -> "LoadScopeScheduling":
    """With ``-n``, tests of files that start processes run one after another on one worker, all else beside them."""
    from xdist.scheduler import LoadScopeScheduling

    class ProcessesApart(LoadScopeScheduling):  # type: ignore[misc]  # xdist has no types
        def _split_scope(self, nodeid: str) -> str:
            return "processes" if _starts_processes(config.rootpath / nodeid.partition("::")[0]) else nodeid

    return ProcessesApart(config, log)


@functools.cache
def _starts_processes(file: Path) -> bool:
    text = file.read_text(encoding="utf-8")
    return any(f"mark.{marker}" in text for marker in ("dist", "netns"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    required = os.environ.get("REQUIRE", "").split(",")
    for marker, lacks in _LACKS.items():
        if item.get_closest_marker(marker) is None or (reason := lacks()) is None:
            continue
        if marker in required:
            pytest.fail(f"REQUIRE={marker}: {reason}", pytrace=False)
        pytest.skip(f"{marker}: {reason}")


@pytest.fixture(scope="session")
def host_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``XDG_CACHE_HOME`` of processes: this host is measured once for all tests, apart from the user's files."""
    return tmp_path_factory.mktemp("cache")
