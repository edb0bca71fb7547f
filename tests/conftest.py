"""What the markers need: a test without it is skipped with the reason.

``REQUIRE=dist,netns`` in the environment turns the skips of these markers into failures.
"""

import functools
import importlib.util
import os
from collections.abc import Callable

import pytest
from hypothesis import settings

from planner.errors import LayerwiseError

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


_LACKS: dict[str, Callable[[], str | None]] = {
    "dist": functools.cache(_dist_lacks),
    "gpu": functools.cache(lambda: _cuda_devices_lack(1)),
    "multigpu": functools.cache(lambda: _cuda_devices_lack(2)),
    "netns": functools.cache(_netns_lacks),
    "zoo": functools.cache(_zoo_lacks),
}


def pytest_runtest_setup(item: pytest.Item) -> None:
    required = os.environ.get("REQUIRE", "").split(",")
    for marker, lacks in _LACKS.items():
        if item.get_closest_marker(marker) is None or (reason := lacks()) is None:
            continue
        if marker in required:
            pytest.fail(f"REQUIRE={marker}: {reason}", pytrace=False)
        pytest.skip(f"{marker}: {reason}")
