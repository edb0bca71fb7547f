"""Device profiles put to use: those of a folder that belong to a kind of device, and one asked for by name."""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from planner.profile.calibrated import CalibratedRoofline
from planner.profile.file import ProfileFile, read_profile
from planner.profile.table import ProfileTable


def profiles_for(folder: Path, device: str) -> tuple[ProfileFile, ...]:
    """Return the profiles of a folder that were measured on a kind of device, in the order of their names.

    Files that do not name the device are not decoded.

    Raises:
        FormatError: one of them is damaged.
    """
    names_it = re.compile(rb'"device"\s*:\s*' + re.escape(json.dumps(device).encode()))
    found = (read_profile(path) for path in sorted(folder.glob("*.json")) if names_it.search(path.read_bytes()))
    return tuple(profile for profile in found if profile.device == device)


def with_profiles(table: ProfileTable, profiles: Sequence[ProfileFile]) -> ProfileTable:
    """Return a table that looks layers up in profiles first; the first one that has a layer or a fit counts."""
    layers = {key: found for profile in reversed(profiles) for key, found in profile.measurements().items()}
    fits = [profile.fit for profile in profiles if profile.fit is not None]
    return replace(table, layers={**table.layers, **layers}, fit=_joined(fits) if fits else table.fit)


def _joined(fits: Sequence[CalibratedRoofline]) -> CalibratedRoofline:
    """Return the fit of every precision and memory format, from the first that has it."""
    found = {(c.precision, c.memory_format): c for fit in reversed(fits) for c in fit.conditions}
    return fits[0].model_copy(update={"conditions": [found[name] for name in sorted(found)]})
