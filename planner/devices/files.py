"""Where the shipped data files are."""

from pathlib import Path

_PLANNER = Path(__file__).parents[1]


def profiles_path() -> Path:
    """Return the folder ``profiles`` of the checkout, or its copy inside an installed wheel.

    A checkout wins, because an editable install copies the data only once.
    """
    checkout = _PLANNER.parent
    if (checkout / "pyproject.toml").is_file() and (checkout / "profiles").is_dir():
        return checkout / "profiles"
    return _PLANNER / "_profiles"
