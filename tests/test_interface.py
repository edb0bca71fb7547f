"""The names that users may rely on; what is not listed here may change."""

import ast
import importlib
import os
from collections.abc import Iterator
from typing import Any

import pytest

from support import reference

STABLE = {
    "planner.api": (
        "plan_model", "compare", "Comparison", "Options", "Origin", "Constraints", "Machine", "machine_of",
        "price_plan", "Priced", "plan_inference", "InferenceOptions", "cases", "what_if", "Case", "Outcome",
        "export_dot", "export_placements", "layer_graph", "report",
    ),
    "planner.plan": ("Plan",),
    "planner.plan.placements": ("Placements",),
    "planner.devices": (
        "Cluster", "cluster", "equal_devices", "read_cluster", "write_cluster", "Device", "Link", "Level",
    ),
    "planner.frontend.custom": ("register_module",),
    "planner.errors": (
        "LayerwiseError", "UsageError", "UnknownNameError", "FormatError", "MismatchError", "TraceError",
        "InfeasibleError", "NoPlanError", "RunError",
    ),
    "runtime": (
        "parallelize", "ParallelModule", "pipelined", "variable_batch", "loader", "ArrayDataset", "GradScaler",
        "require_agreement", "require_finite",
    ),
    "runtime.dtensors": ("distribute_parameters",),
    "runtime.launch": ("initialize", "leave", "Process"),
    "runtime.checkpoint": (
        "save", "start_saving", "Saving", "load", "load_newest", "Resumed", "exists", "export", "full_state_dict",
        "load_full", "full_optimizer_state_dict", "load_full_optimizer",
    ),
    "runtime.decomposition": ("fit", "Fitted", "Decomposition", "Recipe", "Settings", "Samples", "Trained"),
}  # fmt: skip
NAMES = [(module, name) for module, names in STABLE.items() for name in names]


def found(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_a_stable_name_is_exported_documented_and_typed(module: str, name: str) -> None:
    exported = getattr(importlib.import_module(module), "__all__", None)
    assert exported is None or name in exported
    thing = found(module, name)
    assert (thing.__doc__ or "").strip()
    assert not thing.__doc__.startswith(f"{name}(")  # what dataclass writes where nobody has
    assert list(untyped(reference.definition(thing))) == []


def untyped(node: ast.FunctionDef | ast.ClassDef) -> Iterator[str]:
    """Yield what has no type, or no docstring, of a function or of the public methods of a class."""
    for function in reference.methods(node) if isinstance(node, ast.ClassDef) else [node]:
        arguments = function.args
        for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
            if argument.annotation is None and argument.arg not in {"self", "cls"}:
                yield f"{function.name}: {argument.arg}"
        if function.returns is None:
            yield f"{function.name}: what it returns"


def test_the_reference_page_is_what_the_docstrings_say() -> None:
    text = reference.reference(STABLE)
    if os.environ.get("LAYERWISE_WRITE_PAGES"):
        reference.PAGE.write_text(text)
    assert reference.PAGE.read_text() == text, "write it anew: LAYERWISE_WRITE_PAGES=1 pytest tests/test_interface.py"
