"""What the wheel holds."""

import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_wheel_holds_both_packages_with_their_data_and_nothing_else(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir", str(tmp_path), str(ROOT)]
    if find_spec("hatchling") is not None:
        command.insert(4, "--no-build-isolation")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("layerwise-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        scripts = next(archive.read(name).decode() for name in names if name.endswith("entry_points.txt"))
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"planner", "runtime"}
    assert len(top) == 3
    assert "layerwise = planner.cli.start:main" in scripts
    assert "plan = planner.cli.start:plan" in scripts
    for package in ("planner", "runtime"):
        sources = {str(path.relative_to(ROOT)) for path in (ROOT / package).rglob("*.py")}
        assert sources <= names
        assert f"{package}/py.typed" in names
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "planner/report/page").iterdir()} <= names
    files = (path for suffix in ("json", "csv", "txt") for path in (ROOT / "profiles").rglob(f"*.{suffix}"))
    data = {path.relative_to(ROOT / "profiles") for path in files}
    assert data
    assert {f"planner/_profiles/{path}" for path in data} <= names
