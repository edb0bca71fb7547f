"""The import graph is part of the design; this test is its definition."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

LINES = (  # lowest first; packages on one line do not import each other
    "errors",
    "units deadline html",
    "ir",
    "devices profile",
    "space",
    "cost",
    "search plan",
    "inference",
    "report",
    "models",
    "frontend measure",
    "api",
    "reproduce",
    "cli",
    "__main__",
)
LINE_OF = {name: i for i, line in enumerate(LINES) for name in line.split()}
RUNTIME_SEES = {"errors", "units", "ir", "plan", "frontend"}
# what the processes of a job run to measure their machine
ADAPTERS = {"runtime.links": "measure", "runtime.measuring": "measure"}
ONLY_IN = {  # cli imports torch inside functions only: ruff's TID253 checks that
    "torch": "planner.frontend planner.measure planner.models planner.api planner.cli runtime",
    "pydantic": "planner.ir.canonical planner.devices planner.profile planner.plan planner.inference.schema",
    "pulp": "planner.search.ilp",
    "typer": "planner.cli",
    "rich": "planner.cli",
    "ray": "runtime.ray",
    "torchvision": "planner.frontend.zoo",
    "timm": "planner.frontend.zoo",
}
ROOT = Path(__file__).parents[1]
PATHS = [path for top in ("planner", "runtime") for path in sorted((ROOT / top).rglob("*.py"))]


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    plain = {alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names}
    froms = [n for n in nodes if isinstance(n, ast.ImportFrom) and n.module]
    return plain | {f"{n.module}.{alias.name}" for n in froms for alias in n.names}


def may_import(here: str, there: str) -> bool:
    (top, mine), (other, theirs) = ((*name.split("."), "")[:2] for name in (here, there))
    if other == "runtime":  # inside a function only: ruff's TID253 checks that
        return top == "runtime" or mine in {"api", "cli"}
    if other == "planner" and top == "runtime":
        return theirs in RUNTIME_SEES or ADAPTERS.get(here) == theirs
    if other == "planner" and mine:  # planner/__init__.py re-exports
        return mine == theirs or LINE_OF[theirs] < LINE_OF[mine]
    homes = ONLY_IN.get(other)
    return homes is None or any(f"{here}.".startswith(f"{home}.") for home in homes.split())


@pytest.mark.parametrize("path", PATHS, ids=module_of)
def test_every_module_has_a_line_and_imports_point_downwards(path: Path) -> None:
    here = module_of(path)
    assert here == "planner" or here.startswith("runtime") or here.split(".")[1] in LINE_OF
    assert [name for name in sorted(imports(path)) if not may_import(here, name)] == []


@pytest.mark.parametrize(
    ("here", "there", "allowed"),
    [
        ("planner.ir.graph", "torch", False),
        ("planner.ir.graph", "planner.cost.model", False),
        ("planner.search.auto", "planner.plan.schema", False),
        ("planner.search.auto", "planner.cost.table", True),
        ("planner.api", "runtime.parallelize", True),
        ("planner.plan.build", "runtime.parallelize", False),
        ("runtime.lowering.lower", "planner.search.auto", False),
        ("runtime.lowering.lower", "planner.ir.rules", True),
        ("runtime.lowering.lower", "planner.measure.layers", False),
        ("planner.search.problem", "pulp", False),
    ],
)
def test_the_rules_themselves(here: str, there: str, allowed: bool) -> None:
    assert may_import(here, there) is allowed


TORCH_FREE = {
    "errors", "units", "deadline", "html", "ir", "devices", "profile", "space", "cost", "search", "plan", "inference",
    "report",
}  # fmt: skip


def test_everything_below_the_models_leaves_torch_unloaded() -> None:
    modules = [m for m in map(module_of, PATHS) if m.startswith("planner.") and m.split(".")[1] in TORCH_FREE]
    code = f"import sys, planner, {', '.join(modules)}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
