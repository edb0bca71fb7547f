"""The newest checkpoint of several that can be read."""

import os
import warnings
from pathlib import Path

import torch
from torch import nn

from planner.errors import LayerwiseError, MismatchError, RunError, UsageError
from runtime.checkpoint import stored
from runtime.checkpoint.saving import Resumed, load, step_of
from runtime.checkpoint.storage import previous
from runtime.checkpoint.whole import Part


def load_newest(
    net: nn.Module, optimizer: torch.optim.Optimizer | None, parent: str | os.PathLike[str]
) -> Resumed | None:
    """Load the checkpoint of most steps among those in a folder; every rank must call it.

    One that is incomplete or damaged on any rank is left out with a warning, and the next older one is loaded.

    Args:
        net: as of ``load``.
        optimizer: likewise.
        parent: that holds the checkpoints, each a folder of any name.

    Returns:
        As ``load``; None where the folder has no checkpoint, or is not there.

    Raises:
        UsageError: there are checkpoints, and none of them is whole.
        MismatchError: the newest is of another model or optimizer, or ranks see different folders.
    """
    part, place = Part.of(net), Path(os.path.realpath(parent))
    folders = _by_step(place)
    part.refuse_differing(f"the names {[folder.name for folder in folders]}", place)
    failed: LayerwiseError | None = None
    for folder in folders:
        try:
            return load(net, optimizer, folder)
        except MismatchError:
            raise
        except (UsageError, RunError) as error:
            failed = failed or error
            warnings.warn(f"{error}; the next older checkpoint is loaded", stacklevel=2)
    if failed is not None:
        raise failed
    return None


def _by_step(parent: Path) -> list[Path]:
    """Return the complete checkpoints in a folder, that of most steps first; damaged ones are left out."""
    if not parent.is_dir():
        return []
    names = {path.name for path in parent.iterdir() if not path.name.startswith(".")}
    hidden = {
        path.name.removeprefix(".").removesuffix(".previous") for path in parent.glob(previous(parent / "*").name)
    }
    found: list[tuple[int, str]] = []
    for name in sorted(names | hidden):
        if stored.exists(parent / name):
            try:
                found.append((step_of(parent / name), name))
            except (UsageError, RunError) as error:
                warnings.warn(f"{error}; it is left out", stacklevel=3)
    return [parent / name for _, name in sorted(found, reverse=True)]
