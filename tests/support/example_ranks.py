"""What the ranks of ``tests/distributed/test_examples.py`` run: several examples in one job; torch is imported once."""

import importlib.util
import runpy
from typing import Any

from planner.frontend import zoo
from runtime import launch
from support.pages import ROOT


def run_examples(argument: dict[str, list[str]], _: launch.Process) -> dict[str, Any]:
    """Run the ``main`` of examples with their arguments, one after another; return what each returns, by its name."""
    if "lightning_loop.py" in argument and importlib.util.find_spec("torchvision") is not None:
        zoo.families("torchvision")  # Lightning imports it, which fails beside a CPU build of torch until it is helped
    setattr(launch, "leave", lambda: None)  # noqa: B010  # the job goes on with the next one
    return {name: runpy.run_path(str(ROOT / "examples" / name))["main"](words) for name, words in argument.items()}
