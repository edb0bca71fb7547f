"""Random command lines: the commands and options that there are, with good, bad and odd values."""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import typer

from planner.cli.main import app
from support.command_line import layerwise
from support.fuzz.campaign import limited
from support.fuzz.mutations import NAMES, mutated, pick
from support.fuzz.targets import TARGETS

NEVER_RUN: Final = ("run", "demo", "doctor", "decompose", "reproduce", "profile links", "profile layers")
"""They start processes or take minutes: they get an option that is not there."""
ODD: Final = (
    *(name for name in NAMES if "\0" not in name), "-", "--", "-1", "0", "1", "2", "8", "1e9", "99999999999999999999",
    "0x10", "1.5", "nan", "inf", "1,2", "=", "a=b", "٣", "1" * 400,
)  # fmt: skip
VALUES: Final[dict[str, Sequence[str]]] = {
    "model": ("lenet5", "lenet5", "lenet5", "digits-cnn", "lenet", "timm:", "nowhere:net", "x.py:net", "os:getcwd"),
    "shapes": ("1,28,28", "3,32,32", "x=1,28,28", "1", "0,1", "1," * 9 + "1", "1000000000,1000000000", "x="),
    "model_args": ("a=1", "num_classes=3", "a", "a=[1", "=", "a=1,b=2"),
    "devices": ("1", "2", "4", "3", "65537"),
    "cluster": (
        "2xt4-pcie",
        "2x2-t4-eth10",
        "local-0",
        "local-x",
        "9x9-9-9",
        "0xt4-pcie",
        "70000xt4-pcie",
        "none.json",
    ),
    "batch": ("1", "8", "7", "1000000000000", "9999999999999999999999"),
    "mesh": ("gpu=2", "node=2,gpu=2", "gpu=2x2", "gpu=0", "gpu=99999999999", "node+gpu=4", ",", "gpu="),
    "memory_limit": ("1MiB", "16GiB", "1", "1e999", "-1", "1e400GiB"),
    "time_limit": ("1s", "0s", "1e999s", "1ms", "-1s"),
    "stages": ("1", "2", "auto", "0", "100000"),
    "microbatches": ("1", "2", "3", "1000000"),
    "dims": ("sample", "sample,height", "in_channel", ",", "nothing"),
    "pin": ("*=sample", "conv*=out_channel", "[=sample", "x=gpu:sample", "*=gpu:gpu:gpu"),
    "precision": ("fp32", "bf16", "fp8"),
    "optimizer": ("sgd", "adam", "lion"),
    "io": ("per-rank", "global", "local", "none"),
    "parameter_sharding": ("none", "optimizer", "full", "half"),
    "schedule": ("gpipe", "1f1b", "interleaved", "zero-bubble", "stale", "pipedream", "none"),
    "halo_recompute": ("auto", "always", "never"),
    "halo_overlap": ("auto", "always", "never"),
    "branches": ("auto", "none"),
    "shares": ("auto", "equal"),
    "form": ("table", "pipedream"),
    "solver": ("auto", "dp", "data", "spatial", "exhaustive", "nothing"),
}
CODES: Final = {0, 2, 3, 4}
"""Of ``planner.errors``; 1 is a bug, and nothing here runs a job."""
MOST_CPU_S: Final = 60.0
Rng = np.random.Generator


def line(rng: Rng, files: Sequence[Path]) -> list[str]:
    """Return the arguments of one command; those that are paths are often files of these."""
    name, command = pick(sorted(commands().items()), rng)
    found = name.split()
    for parameter in command.params:
        is_argument = parameter.param_type_name == "argument"
        if rng.random() > (0.97 if is_argument else 0.08):
            continue
        text = _value(parameter, rng, files)
        found += [text] if is_argument else [pick(parameter.opts, rng)]
        if not (is_argument or getattr(parameter, "is_flag", False) or getattr(parameter, "count", False)):
            found.append(text)
    if name in {"plan", "compare"}:  # else the machine is missing
        found += ["--devices", pick(("1", "2", "3"), rng), "--time-limit", "2s"]
    if name in NEVER_RUN:
        found.insert(1 + int(rng.integers(len(found))), "--no-such-option")
    elif rng.random() < 0.2:
        found.insert(int(rng.integers(len(found) + 1)), pick(ODD, rng))
    return found


@functools.cache
def commands() -> dict[str, Any]:
    """Return every command by its words."""
    group: Any = typer.main.get_command(app)
    found: dict[str, Any] = {}
    for name, command in group.commands.items():
        below = getattr(command, "commands", None)
        found |= {name: command} if below is None else {f"{name} {k}": c for k, c in below.items()}
    return found


def _value(parameter: Any, rng: Rng, files: Sequence[Path]) -> str:
    chance = rng.random()
    if chance < 0.15:
        return pick(ODD, rng)
    if parameter.name in VALUES:
        return pick(VALUES[parameter.name], rng)
    if parameter.name == "output":
        return pick(("out.json", "folder/out.json", "/dev/null", ".", "out.svg"), rng)
    return str(pick(files, rng)) if files and chance < 0.9 else pick(ODD, rng)


def written(folder: Path) -> list[Path]:
    """Write good and mutated files of every kind, for commands to read."""
    rng, found = np.random.default_rng(7), []
    for target in TARGETS.values():
        for kind, raw in (("good", target.good()[-1]), ("bad", mutated(target.good(), rng))):
            found.append(folder / f"{target.name.replace(', ', '-').replace(' ', '-')}-{kind}{target.suffix}")
            found[-1].write_bytes(raw)
    return found


def wrong(count: int, files: Sequence[Path], folder: Path) -> Iterator[str]:
    """Type so many lines in a folder; yield those that did not end as they should, and how they did."""
    rng = np.random.default_rng(11)
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        for number in range(count):
            arguments = line(rng, files)
            try:
                with limited(MOST_CPU_S):
                    ran = layerwise(*arguments)
            except Exception as error:  # a hang, or what is no exit
                yield f"{number}: {arguments}: {type(error).__name__}: {error}"
                continue
            if ran.code not in CODES or "Traceback" in ran.err or (ran.code and not ran.err.strip()):
                yield f"{number}: {arguments}: {ran.code}\n{ran.err[-2000:]}"
